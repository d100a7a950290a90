"""The one vectorised environment runner: its contract.

Every backend (MuJoCo batch, ALE, Gymnasium) hands out the same `Step` of tensors on the training device.

Semantics, the same everywhere (specs/environment-runner.md, section 4):

* `obs` is what the policy acts on next. Where an episode just ended it is the first observation of the next episode.
* `final_obs` is the successor of the action just taken, for every row. Where nothing ended it equals `obs`. Where a
  lost life is reported as a termination and the game goes on, `obs` is the same frame in a stack that begins anew.
* No action is ever ignored: every row of every step is a real transition.
* `terminated` means the task is over (bootstrap value 0), `truncated` means the clock ran out (bootstrap from
  `final_obs`). Both can be true in the same step.
* Returned tensors stay valid for two calls of `step`, then their memory is used again. Clone what you keep longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What one action in each of N environments led to; all tensors are on the runner's device.

    obs, final_obs [N, *obs_shape]; reward [N] float32; terminated, truncated [N] bool.
    episode_return [N] float32, episode_length [N] int64: undiscounted return and number of actions of the episode that
    ended at this row, both 0 where none ended. Returns are of raw rewards, also where `reward` is clipped.
    episode_ended [N] bool marks those rows; it differs from `terminated | truncated` only where a life loss is reported
    as a termination while the game goes on, and where a sequence of tasks cuts an episode off.
    """

    obs: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final_obs: Tensor
    episode_return: Tensor
    episode_length: Tensor
    episode_ended: Tensor


@dataclass(frozen=True)
class ObservationSpec:
    """Shape of one environment's observation. uint8 images are [channels, height, width], unscaled 0..255.

    `stacked_frames` > 1 says that the first axis is a stack of consecutive frames, oldest first, of
    shape[0] // stacked_frames channels each, zeros before the first frame since the last termination or truncation, so
    that a replay may store each frame once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    stacked_frames: int = 1


@dataclass(frozen=True)
class ContinuousActionSpec:
    """A box: `low` and `high` are float32 arrays [A]. The runner takes float32 actions [N, A] in these units."""

    low: np.ndarray
    high: np.ndarray

    @property
    def size(self) -> int:
        return int(self.low.shape[0])


@dataclass(frozen=True)
class DiscreteActionSpec:
    """`count` actions. The runner takes int64 actions [N] in 0 .. count - 1."""

    count: int


ActionSpec = ContinuousActionSpec | DiscreteActionSpec


@dataclass(frozen=True)
class RunnerSpec:
    """What a record of a run must say about its environments."""

    env_id: str
    backend: str  # "mujoco.batch", "classic_control", "ale", "gymnasium"
    horizon: int | None  # steps until truncation, None if there is no limit
    action_repeat: int  # emulator frames or control steps per action
    settings: dict[str, Any]  # every setting that changes the task: sticky actions, reward clipping, ...
    versions: dict[str, str]  # simulator packages; trajectories change with them


class Runner(Protocol):
    """N environments stepped together. Made by `envs.make`."""

    num_envs: int
    device: torch.device
    observation_spec: ObservationSpec
    action_spec: ActionSpec
    spec: RunnerSpec

    @property
    def diverged_episodes(self) -> int:
        """Episodes truncated because their simulation met NaN, infinite or huge numbers."""
        ...

    def reset(self) -> Tensor:
        """Start a new episode in every row. Returns obs [N, *obs_shape]."""
        ...

    def step(self, action: Tensor) -> Step:
        """Take one action in every row: `send`, then `recv`.

        action: [N, A] float32 in the units of `action_spec`, or [N] int64. Raises FloatingPointError naming the row and
        the quantity if an observation or reward is NaN or infinite.
        """
        ...

    def send(self, action: Tensor) -> None:
        """Hand over actions; simulation may run while the caller does something else. Call `recv` next."""
        ...

    def recv(self) -> Step: ...

    def render(self, row: int = 0, height: int = 480, width: int = 480) -> np.ndarray:
        """A picture of one row, uint8 [height, width, 3]; Atari ignores the size and gives the console's 210 x 160."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future of these environments, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def row_seeds(seed: int, num_envs: int) -> list[int]:
    """One independent non-negative 31-bit seed for each row, derived from (seed, row) alone.

    A row's episodes do not depend on how many rows there are. Seeds are spawned, not added: seed + 1 shares no row.
    """
    return [int(np.random.SeedSequence((seed, row)).generate_state(1, np.uint32)[0] >> 1) for row in range(num_envs)]
