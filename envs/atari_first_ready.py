"""Atari, first ready: whichever rows finish first are handed out, so that no row waits for a slower one.

N games run on ALE's threads; `recv` returns as soon as B < N of them have results, and the others go on while the
policy looks at these. That hides the policy's time, and rows of uneven cost don't hold each other up. The price:
**which rows come together depends on timing, so no two runs are alike.** A row's own game is still a function of its
seed and its actions. `envs.overlap.TwoHalves` hides the policy's time too and is exact: take that one unless rows
really wait for each other.

Rows keep their first seed, there is no saved state and no picture: nothing here can be resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.atari import (
    build_emulators,
    channels_first,
    frame_spec,
    read_actions,
    read_task_args,
    runner_spec,
    stack_spec,
)
from envs.atari_settings import Settings
from envs.host_step import MemoryRing
from envs.registry import check_id
from envs.runner import DiscreteActionSpec, Step


@dataclass(frozen=True, slots=True)
class Ready:
    """B rows that have results, in the order in which they came.

    rows [B] int64: which rows of the N; step: fields [B, ...] as in `envs.runner.Step`; is_transition [B] bool: False
    where this is the first observation after `reset`, to which no action led: there only `step.obs` means something.
    """

    rows: Tensor
    step: Step
    is_transition: Tensor


def make_first_ready(
    env_id: str,
    num_envs: int,
    batch_size: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    threads: int = 0,
    **task_args: Any,
) -> FirstReadyRunner:
    """Build N copies of one Atari game of which `batch_size` are handed out at a time.

    Settings as for `envs.make`. Raises ValueError if batch_size is not in 1 .. num_envs - 1 or the id is no Atari game.
    """
    check_id(env_id)
    if not env_id.startswith("atari/"):
        raise ValueError(f"only Atari games can be handed out first ready, '{env_id}' is none")
    if not 1 <= batch_size < num_envs:
        raise ValueError(f"batch_size must be in 1 .. num_envs - 1 = {num_envs - 1}, got {batch_size}")
    seeds, settings = read_task_args(env_id, num_envs, seed, task_args)
    return FirstReadyRunner(env_id, seeds, batch_size, torch.device(device), threads, settings)


class FirstReadyRunner:
    """N copies of one Atari game, B at a time: `reset`, then `send` and `recv` in turn."""

    def __init__(
        self,
        env_id: str,
        row_seeds: list[int],
        batch_size: int,
        device: torch.device,
        threads: int,
        settings: Settings,
    ) -> None:
        self.num_envs = len(row_seeds)
        self.batch_size = batch_size
        self.device = device
        self._settings = settings
        # The last frame of an episode and the first of the next come together: no action is lost.
        mode = {"batch_size": batch_size, "autoreset_mode": "SameStep"}
        self._env = build_emulators(env_id, self.num_envs, threads, settings, **mode)
        self.observation_spec = stack_spec(settings)
        self.action_spec = DiscreteActionSpec(len(self._env.ale.get_action_set()))
        self.spec = runner_spec(env_id, "ale, first ready", settings)
        self._memory = MemoryRing(frame_spec(settings), batch_size, device)
        shape = (self.num_envs, *self.observation_spec.shape)
        self._stacks = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._row_seeds = np.array(row_seeds, np.int64)
        self._began = np.zeros(self.num_envs, bool)
        self._length = np.zeros(self.num_envs, np.int64)
        self._return = np.zeros(self.num_envs, np.float64)
        self._lives = np.zeros(self.num_envs, np.int64)
        self._started = False
        self._in_flight = False

    def reset(self) -> Ready:
        """Seed and start all rows; the first B of them. Once only: a second call raises RuntimeError."""
        self._check_open()
        if self._started:
            raise RuntimeError("a first-ready runner starts once; make another one")
        self._started = True
        frame, info = self._env.reset(seed=self._row_seeds)
        nothing = np.zeros(self.batch_size, np.int32)
        return self._ready(frame, nothing, nothing.astype(bool), nothing.astype(bool), info)

    def send(self, action: Tensor) -> None:
        """Hand over actions [B] int64 for the rows of the last `Ready`, in its order, and return at once."""
        self._check_open()
        if not self._started or self._in_flight:
            raise RuntimeError("send needs a reset before it, and a recv between two of them")
        self._env.send(read_actions(self.spec.env_id, action, self.batch_size, self.action_spec.count, self.device))
        self._in_flight = True

    def recv(self) -> Ready:
        """Wait for the next B rows. What it returns stays valid for two calls."""
        if not self._in_flight:
            raise RuntimeError("recv needs a send before it")
        self._in_flight = False
        return self._ready(*self._env.recv())

    def _ready(
        self, frame: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
    ) -> Ready:
        rows = info["env_id"].astype(np.int64)
        moved = self._began[rows]
        self._began[rows] = True
        ended = terminated | truncated
        length, total = self._length[rows] + moved, self._return[rows] + reward
        self._length[rows], self._return[rows] = length * ~ended, total * ~ended
        memory = self._memory.next()
        memory.reward[:] = np.sign(reward) if self._settings.clip_rewards else reward
        memory.terminated[:] = terminated
        if self._settings.life_loss_terminates:
            memory.terminated |= (info["lives"] < self._lives[rows]) & ~ended
        self._lives[rows] = info["lives"]
        memory.truncated[:] = truncated
        memory.episode_ended[:] = ended
        memory.episode_return[:] = total * ended
        memory.episode_length[:] = length * ended
        first = last = channels_first(frame)
        if ended.any():  # only then is there a `final_obs`, filled only in the rows that ended
            last = first.copy()
            last[ended] = channels_first(info["final_obs"])[ended]
        on_device = torch.from_numpy(rows).to(self.device), torch.from_numpy(moved).to(self.device)
        return Ready(on_device[0], self._stacked(on_device[0], *memory.upload(first, last)), on_device[1])

    def _stacked(self, rows: Tensor, first: Tensor, last: Tensor, fields: dict[str, Tensor]) -> Step:
        """As `FrameStack.follow`, for some rows."""
        channels = self._settings.channels
        older = self._stacks.index_select(0, rows)
        final_obs = torch.cat([older[:, channels:], last], 1)
        obs = final_obs * ~(fields["terminated"] | fields["truncated"])[:, None, None, None]
        obs[:, -channels:] = first
        self._stacks.index_copy_(0, rows, obs)
        return Step(obs=obs, final_obs=final_obs, **fields)

    def _check_open(self) -> None:
        if self._env.closed:
            raise RuntimeError(f"the runner of {self.spec.env_id} is closed")

    def close(self) -> None:
        """Stop ALE's threads; a second call does nothing."""
        if not self._env.closed:
            self._env.close()
            del self._env.ale  # close() leaves them running, the destructor joins them
