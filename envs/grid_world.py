"""A grid whose transitions are known, so that what an agent learns can be compared with exact values.

Registered as `gym/GridWorld-v0`. The grid of BEER's illustration (He et al. 2024) is not published; size, actions, goal
and discount are those that specs/beer-and-online-rl.md, section 7, recommends.
"""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

MOVES = np.array([[0, -1], [1, 0], [0, 1], [-1, 0]])  # up, right, down, left, as (x, y)


class GridWorld(gymnasium.Env):
    """size x size cells; walk up, right, down or left; at the border a step goes nowhere. The goal is the last cell.

    goal_reward: for the step that reaches the goal, which ends the episode. step_reward: for any other. encoding: what
    is observed, one number for each cell or the two coordinates in [0, 1]. Episodes start in any other cell.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's own name)

    def __init__(
        self,
        size: int = 20,
        goal_reward: float = 1.0,
        step_reward: float = 0.0,
        encoding: Literal["one-hot", "coordinates"] = "one-hot",
        render_mode: str | None = None,
    ):
        if size < 2:
            raise ValueError(f"size must be at least 2, got {size}")
        if encoding not in ("one-hot", "coordinates"):
            raise ValueError(f"encoding must be one-hot or coordinates, got {encoding!r}")
        self.size, self.render_mode = size, render_mode
        self.cells, self.goal = size * size, size * size - 1
        x, y = np.arange(self.cells) % size, np.arange(self.cells) // size
        places = np.clip(np.stack([x, y], 1)[:, None] + MOVES, 0, size - 1)  # [cells, 4, 2]
        self.successor = places[..., 1] * size + places[..., 0]  # int64 [cells, 4]
        self.terminated = self.successor == self.goal  # bool [cells, 4]
        self.reward = np.where(self.terminated, goal_reward, step_reward)  # float64 [cells, 4]
        self.observations = np.eye(self.cells) if encoding == "one-hot" else np.stack([x, y], 1) / (size - 1)
        self.observations = self.observations.astype(np.float32)  # [cells, O]
        self.observation_space = Box(0.0, 1.0, self.observations.shape[1:], np.float32)
        self.action_space = Discrete(len(MOVES))
        self.cell = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.cell = int(self.np_random.integers(self.goal))
        return self.observations[self.cell], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        before, self.cell = self.cell, int(self.successor[self.cell, action])
        return (
            self.observations[self.cell],
            float(self.reward[before, action]),
            bool(self.terminated[before, action]),
            False,
            {},
        )

    def render(self) -> np.ndarray:
        """The grid in white, the walker in blue, the goal in green: uint8 [16 size, 16 size, 3]."""
        picture = np.full((self.cells, 3), 255, np.uint8)
        picture[self.goal] = 0, 158, 115
        picture[self.cell] = 0, 114, 178
        return picture.reshape(self.size, self.size, 3).repeat(16, 0).repeat(16, 1)
