"""What the backends that simulate on the host share: the memory of a `Step`, and the reading of task settings."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.cores import available_cores
from envs.runner import ObservationSpec, Step, row_seeds

# Widest first, so that every field starts at a multiple of its own size.
_SCALARS = (
    ("episode_length", torch.int64),
    ("reward", torch.float32),
    ("episode_return", torch.float32),
    ("terminated", torch.bool),
    ("truncated", torch.bool),
    ("episode_ended", torch.bool),
)
_BYTES_PER_ROW = sum(dtype.itemsize for _, dtype in _SCALARS)
_ONE_ROW = struct.Struct("=qff???")  # the same


def _scalar_views(block: Tensor, num_envs: int) -> dict[str, Tensor]:
    views, start = {}, 0
    for name, dtype in _SCALARS:
        stop = start + num_envs * dtype.itemsize
        views[name] = block[start:stop].view(dtype)
        start = stop
    return views


class StepMemory:
    """Host memory of one Step: numpy arrays to write into, which the tensors of `publish` share or are copied from.

    obs, final_obs [N, *obs_shape]; reward, episode_return [N] float32; episode_length [N] int64; terminated, truncated,
    episode_ended [N] bool. On a CUDA device the memory is pinned and `publish` uploads it without waiting.
    For one row, `write_row` takes the numbers of the fields in `_SCALARS`, `write_obs` those of a float32 observation.
    """

    def __init__(self, spec: ObservationSpec, num_envs: int, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        shape = (num_envs, *spec.shape)
        self._block = torch.zeros(num_envs * _BYTES_PER_ROW, dtype=torch.uint8, pin_memory=cuda)
        self._obs = torch.zeros(shape, dtype=spec.dtype, pin_memory=cuda)
        self._final_obs = torch.zeros(shape, dtype=spec.dtype, pin_memory=cuda)
        self._scalars = _scalar_views(self._block, num_envs)
        self.obs: np.ndarray = self._obs.numpy()
        self.flat_obs = self.obs.reshape(-1)  # the same memory
        self.final_obs: np.ndarray = self._final_obs.numpy()
        self.reward: np.ndarray = self._scalars["reward"].numpy()
        self.terminated: np.ndarray = self._scalars["terminated"].numpy()
        self.truncated: np.ndarray = self._scalars["truncated"].numpy()
        self.episode_return: np.ndarray = self._scalars["episode_return"].numpy()
        self.episode_length: np.ndarray = self._scalars["episode_length"].numpy()
        self.episode_ended: np.ndarray = self._scalars["episode_ended"].numpy()
        self._uploaded = torch.cuda.Event() if cuda else None
        self.holds_ends = False
        if num_envs == 1:  # one call for all numbers of the row takes a third of the time of assignments to arrays
            self.write_row: Callable[..., None] = partial(_ONE_ROW.pack_into, self._block.numpy().data, 0)
            self.reward_number = self.reward.data
            if spec.dtype == torch.float32:
                numbers = struct.Struct(f"{self.obs.size}f")
                self.write_obs: Callable[..., None] = partial(numbers.pack_into, self.obs.data.cast("B"), 0)
        # Built once: at one row, making the tensors anew would cost more than a cheap environment's whole step.
        self._alike = Step(obs=self._obs, final_obs=self._obs, **self._scalars)
        self._apart = Step(obs=self._obs, final_obs=self._final_obs, **self._scalars)

    def wait(self) -> None:
        """Return when the last upload has read this memory, so that it may be written again."""
        if self._uploaded is not None:
            self._uploaded.synchronize()

    def nothing_ended(self) -> None:
        """Set all fields but the observations to zero, unless they are because nothing had ended before either.

        Whoever calls this writes `reward` at every step, and the others where an episode ended.
        """
        if self.holds_ends:
            self._block.zero_()

    def publish(self, any_ended: bool) -> Step:
        """The Step on the device. Unless `any_ended`, its `final_obs` is `obs` and this memory's own is not read."""
        self.holds_ends = any_ended
        if self._uploaded is None:
            return self._apart if any_ended else self._alike
        obs = self._obs.to(self.device, non_blocking=True)
        final_obs = self._final_obs.to(self.device, non_blocking=True) if any_ended else obs
        scalars = _scalar_views(self._block.to(self.device, non_blocking=True), len(self.reward))
        self._uploaded.record(torch.cuda.current_stream(self.device))
        return Step(obs=obs, final_obs=final_obs, **scalars)

    def upload(self, obs: np.ndarray, final_obs: np.ndarray) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """For a simulator that makes new arrays at each step: both, which may be one, and the Step's other fields."""
        alike = final_obs is obs
        if self._uploaded is None:
            first = torch.from_numpy(obs)
            return first, first if alike else torch.from_numpy(final_obs), self._scalars
        self.obs[...] = obs
        if not alike:
            self.final_obs[...] = final_obs
        first = self._obs.to(self.device, non_blocking=True)
        last = first if alike else self._final_obs.to(self.device, non_blocking=True)
        scalars = _scalar_views(self._block.to(self.device, non_blocking=True), len(self.reward))
        self._uploaded.record(torch.cuda.current_stream(self.device))
        return first, last, scalars

    def upload_obs(self) -> Tensor:
        """The observation alone, as `Runner.reset` returns it."""
        if self._uploaded is None:
            return self._obs
        obs = self._obs.to(self.device, non_blocking=True)
        self._uploaded.record(torch.cuda.current_stream(self.device))
        return obs


class MemoryRing:
    """Three StepMemory in turn, so that what a step returned survives the next two calls."""

    def __init__(self, spec: ObservationSpec, num_envs: int, device: torch.device) -> None:
        self._memories = itertools.cycle([StepMemory(spec, num_envs, device) for _ in range(3)])
        if device.type != "cuda":  # nothing is uploaded that could be waited for
            self.next = self._memories.__next__

    def next(self) -> StepMemory:
        """The memory to write now, after its last upload has read it."""
        memory = next(self._memories)
        memory.wait()
        return memory


def raise_not_finite(env_id: str, obs: np.ndarray, reward: np.ndarray) -> None:
    """Raise FloatingPointError for the first row whose observation or reward is NaN or infinite, if there is one."""
    for quantity, values in (("observation", obs), ("reward", reward)):
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            raise FloatingPointError(f"{env_id}: the {quantity} of row {int(bad.argmax())} is not finite")


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] in another size."""
    if picture.shape[:2] == (height, width):
        return picture
    import cv2

    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def check_task_args(env_id: str, given: Collection[str], accepted: Collection[str]) -> None:
    """Raise ValueError, naming what is accepted, if a setting is given that the task does not have."""
    unknown = sorted(set(given) - set(accepted))
    if unknown:
        raise ValueError(f"{env_id} has no setting '{unknown[0]}'; it accepts {', '.join(sorted(accepted))}")


def take_row_seeds(task_args: Mapping[str, Any], seed: int, num_envs: int) -> tuple[list[int], dict[str, Any]]:
    """The seed of each row (`row_seeds` if given, else derived from `seed`), and the other settings."""
    others = dict(task_args)
    explicit = others.pop("row_seeds", None)
    if explicit is None:
        return row_seeds(seed, num_envs), others
    seeds = [int(value) for value in explicit]
    if len(seeds) != num_envs or min(seeds) < 0:
        raise ValueError(f"row_seeds must be {num_envs} non-negative integers, one a row, got {seeds}")
    return seeds, others


def usable_threads(threads: int) -> int:
    """`threads`, or for 0 the number of cores this process may use."""
    if threads < 0:
        raise ValueError(f"threads must be 0 (all cores) or more, got {threads}")
    return threads or available_cores()
