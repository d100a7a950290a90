"""The backend of Gymnasium's classic control tasks, computed in this process, all rows at once.

Rows are the library's environments: row i draws what `gymnasium.make(...)` with row i's seed would draw. One row is
computed in Python's own numbers and written with two calls, because a step of the library's own environment takes a
few microseconds, and so do three operations on arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.actions import check_action
from envs.host_step import MemoryRing, StepMemory, check_task_args, resized, take_row_seeds
from envs.runner import ActionSpec, ContinuousActionSpec, DiscreteActionSpec, ObservationSpec, RunnerSpec, Step
from envs.tasks.classic_control import TASKS, many_rows, one_row
from envs.tasks.classic_control.task import ClassicTask, State

_SLACK = 1e-3  # of the range of actions, for the rounding of policies that squash and scale


def known_ids() -> list[str]:
    """The environments of this backend."""
    return list(TASKS)


def make(
    env_id: str, num_envs: int, seed: int, device: torch.device | str, threads: int = 0, **task_args: Any
) -> ClassicControl:
    """Build N environments. `threads` has no meaning here.

    task_args: `row_seeds`, and the fields of the task's class. Raises ValueError for a setting the task does not have,
    or a value it cannot take.
    """
    seeds, settings = take_row_seeds(task_args, seed, num_envs)
    kind = TASKS[env_id]
    check_task_args(env_id, settings, {"row_seeds", *(field.name for field in dataclasses.fields(kind))})
    return ClassicControl(env_id, kind(**settings), seeds, torch.device(device))


class ClassicControl:
    """N rows of one task; fulfils `envs.runner.Runner`."""

    def __init__(self, env_id: str, task: ClassicTask, seeds: list[int], device: torch.device):
        self.num_envs, self.device = len(seeds), device
        self.diverged_episodes = 0
        self.action_spec = task.action_spec
        self.observation_spec = ObservationSpec((task.observation_size,))
        versions = {"gymnasium": version("gymnasium")}
        settings = dataclasses.asdict(task)
        self.spec = RunnerSpec(env_id, "classic_control", task.max_episode_steps, 1, settings, versions)
        self._generators = [np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))) for seed in seeds]
        self._rows = (_OneRow if self.num_envs == 1 else _ManyRows)(task, self._generators)
        self._decode = _decoder(task.action_spec, self.num_envs, device)
        self._advance = self._rows.advance
        self._next_memory = MemoryRing(self.observation_spec, self.num_envs, device).next
        self._written: StepMemory | None = None  # None before the first reset
        self._action: Any = None  # the last one, which some pictures show
        self._sent: Any = None

    def reset(self) -> Tensor:
        """Start a new episode in every row. Returns obs [N, O]."""
        self._sent = self._action = None
        memory = self._written = self._next_memory()
        self._rows.begin_all(memory)
        return memory.upload_obs()

    def step(self, action: Tensor) -> Step:
        """Take one action in every row. action: [N] int64, or [N, 1] floating-point, rounded to float32.

        Raises ValueError for actions of another shape, type or device, or out of bounds, FloatingPointError for NaN.
        """
        if self._written is None or self._sent is not None:
            raise RuntimeError("step needs a reset before it, and a recv after a send")
        # As `_simulate`, one call less.
        self._action = decoded = self._decode(action)
        memory = self._written = self._next_memory()
        return memory.publish(self._advance(memory, decoded))

    def send(self, action: Tensor) -> None:
        """Keep a copy of the actions; `recv` simulates. Raises ValueError as `step`."""
        if self._written is None or self._sent is not None:
            raise RuntimeError("send needs a reset before it, and a recv between two of them")
        self._sent = np.copy(self._decode(action)) if self.num_envs > 1 else self._decode(action)

    def recv(self) -> Step:
        """The outcome of the actions sent last."""
        if self._sent is None:
            raise RuntimeError("recv needs a send before it")
        sent, self._sent = self._sent, None
        return self._simulate(sent)

    def _simulate(self, action: Any) -> Step:
        self._action = action
        memory = self._written = self._next_memory()
        return memory.publish(self._advance(memory, action))

    def render(self, row: int = 0, height: int = 480, width: int = 480) -> np.ndarray:
        """The library's own picture of a row, uint8 [height, width, 3], resized."""
        if self._written is None:
            raise RuntimeError("render needs a reset before it")
        action = None if self._action is None or self._rows.fresh[row] else float(np.ravel(self._action)[row])
        self._rows.task.show(self._library_env, self._rows.states()[row], action)
        return resized(self._library_env.render(), height, width)

    @property
    def observation_space(self) -> Any:
        """The library's space of one observation, with its bounds."""
        return self._library_env.observation_space

    @cached_property
    def _library_env(self) -> Any:
        import gymnasium

        name = self.spec.env_id.removeprefix("gym/")
        env = gymnasium.make(name, render_mode="rgb_array", **self.spec.settings).unwrapped
        env.reset()
        return env

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, as tensors and plain values; not between `send` and `recv`."""
        if self._sent is not None:
            raise RuntimeError("state_dict needs a recv after the last send")
        returns, lengths = self._rows.episodes()
        return {
            "env_id": self.spec.env_id,
            "settings": dict(self.spec.settings),
            "states": torch.from_numpy(self._rows.states()),
            "episode_return": torch.from_numpy(returns),
            "episode_length": torch.from_numpy(lengths),
            "generators": [dict(generator.bit_generator.state) for generator in self._generators],
            "obs": None if self._written is None else torch.from_numpy(self._written.obs.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was called. Raises ValueError if the environments are not the same."""
        if "states" not in state:
            raise ValueError(
                f"the saved {state['env_id']} is of the backend of other Gymnasium environments, not of this"
            )
        for name, value in (("env_id", self.spec.env_id), ("settings", self.spec.settings)):
            if state[name] != value:
                raise ValueError(f"the saved environments have {name} {state[name]}, these have {value}")
        if len(state["generators"]) != self.num_envs:
            raise ValueError(f"the saved state has {len(state['generators'])} rows, not {self.num_envs}")
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.bit_generator.state = saved
        self._rows.load(*(state[name].numpy() for name in ("states", "episode_return", "episode_length")))
        self._sent = self._action = self._written = None
        if state["obs"] is not None:
            self._written = self._next_memory()
            self._written.obs[...] = state["obs"].numpy()

    def close(self) -> None:
        if "_library_env" in self.__dict__:
            self._library_env.close()


def _decoder(spec: ActionSpec, num_envs: int, device: torch.device) -> Callable[[Tensor], Any]:
    """The function from a tensor of actions to what a task takes: a number for one row, else an array [N]."""
    if isinstance(spec, DiscreteActionSpec):
        return _discrete_decoder(spec, num_envs, device)
    return _continuous_decoder(spec, num_envs, device)


def _discrete_decoder(spec: DiscreteActionSpec, num_envs: int, device: torch.device) -> Callable[[Tensor], Any]:
    count, shape, on_host = spec.count, torch.Size((num_envs,)), device.type == "cpu"

    def fits(action: Tensor) -> bool:
        return action.dtype is torch.int64 and action.shape == shape and action.is_cpu is on_host

    def decode_one(action: Tensor) -> float:
        if fits(action) and 0 <= (number := action.item()) < count:
            return number
        raise refusal(action)

    def decode_many(action: Tensor) -> np.ndarray:
        if fits(action):
            numbers = action.numpy() if on_host else action.numpy(force=True)
            unsigned = numbers.view(np.uint64)  # negative numbers are huge; argmax takes a third of the time of max
            if unsigned[unsigned.argmax()] < count:
                return numbers
        raise refusal(action)

    def refusal(action: Tensor) -> ValueError:
        check_action(action, spec, num_envs, device)
        row, number = next((row, number) for row, number in enumerate(action.tolist()) if not 0 <= number < count)
        return ValueError(f"row {row}: action {number} is not one of 0 to {count - 1}")

    return decode_one if num_envs == 1 else decode_many


def _continuous_decoder(spec: ContinuousActionSpec, num_envs: int, device: torch.device) -> Callable[[Tensor], Any]:
    shape, on_host = torch.Size((num_envs, 1)), device.type == "cpu"
    low, high = spec.low.item(), spec.high.item()
    slack = _SLACK * (high - low)
    lowest, highest = low - slack, high + slack

    def decode_one(action: Tensor) -> float:
        if action.dtype is torch.float32 and action.shape == shape and action.is_cpu is on_host:
            number = action.item()
        else:
            check_action(action, spec, num_envs, device)
            number = action.float().item()
        if low <= number <= high:
            return number
        if lowest <= number <= highest:
            return one_row.clip(number, low, high)
        raise refusal(action)

    def decode_many(action: Tensor) -> np.ndarray:
        check_action(action, spec, num_envs, device)
        numbers = action.numpy(force=True)[:, 0].astype(np.float32).astype(np.float64)
        if np.count_nonzero((lowest <= numbers) & (numbers <= highest)) == num_envs:
            return many_rows.clip(numbers, low, high)
        raise refusal(action)

    def refusal(action: Tensor) -> Exception:
        check_action(action, spec, num_envs, device)
        numbers = enumerate(action.flatten().tolist())
        row, number = next((row, number) for row, number in numbers if not lowest <= number <= highest)
        if math.isnan(number):
            return FloatingPointError(f"row {row}: the action is not a number")
        return ValueError(f"row {row}: action {number:g} is outside of [{low:g}, {high:g}]")

    return decode_one if num_envs == 1 else decode_many


class _OneRow:
    """The only row: its state and what its episode has been, in Python's numbers."""

    def __init__(self, task: ClassicTask, generators: list[np.random.Generator]):
        self.task, self._random = task, generators[0]
        self._state: State = ()
        self._return, self._length = 0.0, 0

    @property
    def fresh(self) -> list[bool]:
        """[1]: whether the episode is before its first step."""
        return [self._length == 0]

    def begin_all(self, memory: StepMemory) -> None:
        self._return, self._length = 0.0, 0
        self._state = self.task.start(self._random)
        memory.write_obs(*self.task.first_observation(self._state))

    def advance(self, memory: StepMemory, action: float) -> bool:
        """Take a step and write its outcome. Returns whether the episode ended."""
        task = self.task
        self._state, reward, terminated = task.advance(one_row, self._state, action)
        memory.write_obs(*task.observe(one_row, self._state))
        self._return += reward
        self._length += 1
        truncated = self._length >= task.max_episode_steps
        if not terminated and not truncated:
            memory.nothing_ended()
            memory.reward_number[0] = reward
            return False
        memory.write_row(self._length, reward, self._return, bool(terminated), truncated, True)
        memory.final_obs[...] = memory.obs
        self.begin_all(memory)
        return True

    def states(self) -> np.ndarray:
        """[1, k] float64."""
        return np.array([self._state], np.float64)

    def episodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns and lengths so far, [1]."""
        return np.array([self._return]), np.array([self._length])

    def load(self, states: np.ndarray, returns: np.ndarray, lengths: np.ndarray) -> None:
        self._state = tuple(states[0].tolist())
        self._return, self._length = returns.item(), lengths.item()


class _ManyRows:
    """N rows: each number of the state is an array [N]."""

    def __init__(self, task: ClassicTask, generators: list[np.random.Generator]):
        self.task, self._generators = task, generators
        self._state: State = ()
        self._returns = np.zeros(len(generators))
        self._time = 0  # steps since this object was made or loaded
        self._started = np.zeros(len(generators), np.int64)  # `_time` at the start of each row's episode
        self._next_truncation = task.max_episode_steps

    @property
    def fresh(self) -> np.ndarray:
        """[N]: whether the episode is before its first step."""
        return self._started == self._time

    def begin_all(self, memory: StepMemory) -> None:
        starts = [self.task.start(generator) for generator in self._generators]
        memory.obs[...] = [self.task.first_observation(start) for start in starts]
        self._state = tuple(np.array(starts).T.copy())
        self._returns[...] = 0.0
        self._time, self._started[...] = 0, 0
        self._next_truncation = self.task.max_episode_steps

    def advance(self, memory: StepMemory, action: np.ndarray) -> bool:
        """Take a step in every row and write its outcome. Returns whether an episode ended."""
        task = self.task
        self._state, reward, terminated = task.advance(many_rows, self._state, action)
        for column, values in enumerate(task.observe(many_rows, self._state)):
            memory.obs[:, column] = values
        self._returns += reward
        self._time += 1
        memory.nothing_ended()
        memory.reward[...] = reward
        any_terminated = terminated is not None and np.count_nonzero(terminated) > 0
        if not any_terminated and self._time < self._next_truncation:
            return False
        if any_terminated:
            memory.terminated[...] = terminated
        if self._time >= self._next_truncation:
            np.greater_equal(self._time - self._started, task.max_episode_steps, out=memory.truncated)
        np.logical_or(memory.terminated, memory.truncated, out=memory.episode_ended)
        memory.final_obs[...] = memory.obs
        self._end_episodes(memory)
        return True

    def _end_episodes(self, memory: StepMemory) -> None:
        # Row by row, because nearly always few end at once.
        for row in memory.episode_ended.nonzero()[0].tolist():
            memory.episode_return[row], memory.episode_length[row] = self._returns[row], self._time - self._started[row]
            self._returns[row], self._started[row] = 0.0, self._time
            start = self.task.start(self._generators[row])
            memory.obs[row] = self.task.first_observation(start)
            for column, value in zip(self._state, start, strict=True):
                column[row] = value
        self._next_truncation = int(self._started[self._started.argmin()]) + self.task.max_episode_steps

    def states(self) -> np.ndarray:
        """[N, k] float64."""
        return np.array(self._state, np.float64).T.copy()

    def episodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns and lengths so far, [N]."""
        return self._returns.copy(), self._time - self._started

    def load(self, states: np.ndarray, returns: np.ndarray, lengths: np.ndarray) -> None:
        self._state = tuple(states.T.copy())
        self._returns[...] = returns
        self._time, self._started = 0, -lengths
        self._next_truncation = int(self._started.min()) + self.task.max_episode_steps
