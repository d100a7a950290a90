"""A runner as a stable-baselines3 `VecEnv`, so that its agents train on our environments.

stable-baselines3 is no dependency; the extra `bench` has it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.gymnasium_adapter import action_space, action_tensor, copy_to_host, observation_space, reseed
from envs.runner import Runner

try:
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import VecEnv
except ModuleNotFoundError as error:
    advice = "pip install 'neoteny[bench]'"
    raise ModuleNotFoundError(f"as_stable_baselines3 needs stable-baselines3: {advice}", name=error.name) from error


def as_stable_baselines3(runner: Runner) -> RunnerVecEnv:
    """The runner as a stable-baselines3 vector environment, which then owns it: closing one closes the other."""
    return RunnerVecEnv(runner)


class RunnerVecEnv(VecEnv):
    """N rows of a runner. Made by `as_stable_baselines3`.

    A row's info is empty unless its episode ended. Then it has `terminal_observation`, `TimeLimit.truncated` (truncated
    and not terminated: bootstrap) and `episode` with `r`, `l` and `t` as Monitor writes it, of raw rewards; so the rows
    count as wrapped in a Monitor. A lost life that is reported as an end has no `episode`.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        super().__init__(runner.num_envs, observation_space(runner), action_space(runner))
        self._began = np.zeros(self.num_envs)  # seconds

    def reset(self) -> np.ndarray:
        """Start a new episode in every row, with the seeds that `seed` set before, if it did. Returns [N, ...].

        Seeding builds the environments once more; see `gymnasium_adapter.reseed`.
        """
        seeds = [seed for seed in self._seeds if seed is not None]
        if seeds:
            reseed(self.runner, seeds)
        self._reset_seeds()
        self._began[:] = time.perf_counter()
        return copy_to_host(self.runner.reset())

    def step_async(self, actions: np.ndarray) -> None:
        self.runner.send(action_tensor(actions, self.runner.device))

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Observations [N, ...], rewards [N] float32, ends [N] bool, one info a row."""
        step = self.runner.recv()
        terminated, truncated = copy_to_host(step.terminated), copy_to_host(step.truncated)
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if done.any():
            last, now = copy_to_host(step.final_obs), time.perf_counter()
            ended, returns, lengths = map(copy_to_host, (step.episode_ended, step.episode_return, step.episode_length))
            for row in np.flatnonzero(done):
                infos[row]["terminal_observation"] = last[row].copy()
                infos[row]["TimeLimit.truncated"] = bool(truncated[row] and not terminated[row])
                if ended[row]:
                    seconds = round(now - self._began[row], 6)
                    infos[row]["episode"] = {"r": float(returns[row]), "l": int(lengths[row]), "t": seconds}
                    self._began[row] = now
        return copy_to_host(step.obs), copy_to_host(step.reward).astype(np.float32), done, infos

    def close(self) -> None:
        self.runner.close()

    def get_images(self) -> Sequence[np.ndarray]:
        """A picture of each row, uint8 [height, width, 3]."""
        return [self.runner.render(row) for row in range(self.num_envs)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Only in a Monitor, whose episode statistics the infos have."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The render mode. Rows are not objects: they have no attributes, which AttributeError says."""
        if attr_name != "render_mode":
            raise AttributeError(f"the rows of a runner have no attribute '{attr_name}'")
        return ["rgb_array" for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"the rows of a runner have no attribute '{attr_name}'")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Raises AttributeError: rows are not objects and have no methods."""
        raise AttributeError(f"the rows of a runner have no method '{method_name}'")
