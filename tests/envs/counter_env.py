"""A Gymnasium environment without surprises: it counts its steps, and its episodes end as a script says."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

# (length, terminated, truncated) of one episode after the other, then from the start again: every end, and length 1.
SCRIPT = (
    (3, True, False),
    (2, False, True),
    (1, True, True),
    (1, True, False),
    (1, False, True),
    (4, True, True),
)


class CounterEnv(gymnasium.Env):
    """Observation [episode, steps taken in it]; reward 10 * steps + action. The first episode's number is the seed."""

    observation_space = gymnasium.spaces.Box(-1.0, 1e6, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(3, start=5)

    def __init__(self, bad_step: int | None = None, bad_value: float = np.nan, bad_place: str = "observation") -> None:
        """At step `bad_step` of an episode `bad_value` stands in the observation or in the reward."""
        self._bad = (bad_step, bad_value, bad_place)
        self._episode = -1
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self._episode = self._episode + 1 if seed is None else seed
        self._steps = 0
        return self._observation(), {}

    def step(self, action: int):
        self._steps += 1
        length, terminated, truncated = SCRIPT[self._episode % len(SCRIPT)]
        over = self._steps == length
        reward = 10.0 * self._steps + (action - 5)
        bad_step, bad_value, bad_place = self._bad
        if self._steps == bad_step and bad_place == "reward":
            reward = bad_value
        return self._observation(), reward, over and terminated, over and truncated, {}

    def _observation(self) -> np.ndarray:
        bad_step, bad_value, bad_place = self._bad
        steps = bad_value if self._steps == bad_step and bad_place == "observation" else self._steps
        return np.array([self._episode, steps], np.float32)


gymnasium.register("neoteny/Counter-v0", CounterEnv)
