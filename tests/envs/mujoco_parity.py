"""Step a runner beside reference environments with the same seeds and actions, and compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from envs.mujoco_batch import MujocoBatch, make


class Reference(Protocol):
    """One environment of another library, float64 in and out."""

    def reset(self) -> np.ndarray: ...

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]: ...


class GymnasiumReference:
    def __init__(self, env_id: str, seed: int, **settings: Any):
        import gymnasium

        self.env = gymnasium.make(env_id.removeprefix("mujoco/"), **settings)
        self.seed: int | None = seed

    def reset(self) -> np.ndarray:
        obs, _ = self.env.reset(seed=self.seed)
        self.seed = None  # later episodes go on with the same generator
        return obs

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return obs, float(reward), terminated, truncated


class ControlReference:
    def __init__(self, env_id: str, seed: int, **settings: Any):
        from dm_control import suite

        domain, task = env_id.removeprefix("dmc/").split("-", 1)
        self.env = suite.load(domain, task, task_kwargs={"random": np.random.RandomState(seed), **settings})

    @staticmethod
    def _flat(observation: dict[str, Any]) -> np.ndarray:
        return np.concatenate([np.ravel(value) for value in observation.values()])

    def reset(self) -> np.ndarray:
        return self._flat(self.env.reset().observation)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        step = self.env.step(action)
        terminated = step.last() and step.discount == 0.0
        return self._flat(step.observation), step.reward, terminated, step.last() and not terminated


@dataclass
class Totals:
    episodes: int = 0
    reward_error: float = 0.0
    rewards: float = 0.0


def random_actions(runner: MujocoBatch, steps: int, seed: int) -> np.ndarray:
    """[steps, N, A] uniform within the action bounds, float64."""
    spec = runner.action_spec
    return np.random.default_rng(seed).uniform(spec.low, spec.high, (steps, runner.num_envs, spec.size))


def assert_equal_to_reference(
    env_id: str, reference: Callable[..., Reference], seeds: Sequence[int], steps: int, **settings: Any
) -> Totals:
    """Observations, final observations, flags and lengths equal; rewards and returns up to 1e-10 a step."""
    rows = len(seeds)
    runner = make(env_id, rows, 0, torch.device("cpu"), 1, row_seeds=seeds, dtype=torch.float64, **settings)
    others = [reference(env_id, seed, **settings) for seed in seeds]
    totals, returns, lengths = Totals(), np.zeros(rows), np.zeros(rows, int)
    np.testing.assert_array_equal(runner.reset().numpy(), [other.reset() for other in others])
    for t, actions in enumerate(random_actions(runner, steps, seed=3)):
        step = runner.step(torch.from_numpy(actions))
        for row, other in enumerate(others):
            obs, reward, terminated, truncated = other.step(actions[row])
            at = f"{env_id} step {t} row {row}"
            np.testing.assert_array_equal(step.final_obs[row].numpy(), obs, err_msg=at)
            assert (bool(step.terminated[row]), bool(step.truncated[row])) == (terminated, truncated), at
            totals.reward_error = max(totals.reward_error, abs(float(step.reward[row]) - reward))
            totals.rewards += abs(reward)
            returns[row] += reward
            lengths[row] += 1
            ended = terminated or truncated
            assert bool(step.episode_ended[row]) == ended, at
            assert int(step.episode_length[row]) == (lengths[row] if ended else 0), at
            expected = returns[row] if ended else 0.0
            assert abs(float(step.episode_return[row]) - expected) <= 1e-10 * lengths[row], at
            if ended:
                returns[row], lengths[row], totals.episodes = 0.0, 0, totals.episodes + 1
                obs = other.reset()
            np.testing.assert_array_equal(step.obs[row].numpy(), obs, err_msg=at)
    runner.close()
    assert totals.reward_error <= 1e-10, f"{env_id}: rewards differ by up to {totals.reward_error}"
    return totals
