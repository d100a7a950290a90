"""A car that must swing up out of a valley (Moore 1990)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import ClassVar

import numpy as np

from envs.runner import ContinuousActionSpec, DiscreteActionSpec
from envs.tasks.classic_control.one_row import single
from envs.tasks.classic_control.task import ClassicTask, Number, State
from envs.tasks.settings import Count

LEFT, RIGHT = -1.2, 0.6
MAX_SPEED = 0.07


@dataclass(frozen=True, kw_only=True)
class MountainCar(ClassicTask):
    """Push left (0), not at all (1) or right (2); -1 a step until the flag.

    State and observation: position, velocity.
    """

    action_spec: ClassVar[DiscreteActionSpec] = DiscreteActionSpec(3)
    observation_size: ClassVar[int] = 2

    goal_velocity: float = 0.0  # at the flag, at least
    max_episode_steps: Count = 200

    def start(self, random: np.random.Generator) -> tuple[float, ...]:
        return random.uniform(-0.6, -0.4), 0.0

    def advance(self, xp: ModuleType, state: State, action: Number) -> tuple[State, Number, Number]:
        position, velocity = state
        velocity = velocity + ((action - 1) * 0.001 + xp.library_cos(3 * position) * -0.0025)
        velocity = xp.clip(velocity, -MAX_SPEED, MAX_SPEED)
        position = xp.clip(position + velocity, LEFT, RIGHT)
        velocity = xp.choose((position == LEFT) & (velocity < 0), 0.0, velocity)
        return (position, velocity), -1.0, (position >= 0.5) & (velocity >= self.goal_velocity)

    def observe(self, xp: ModuleType, state: State) -> tuple[Number, ...]:
        return state


# The reference computes in float32 from the second step of an episode on. These are its constants in that precision.
LEFT_32, RIGHT_32, MAX_SPEED_32, FLAG_32, POWER_32 = map(single, (LEFT, RIGHT, MAX_SPEED, 0.45, 0.0015))


@dataclass(frozen=True, kw_only=True)
class MountainCarContinuous(ClassicTask):
    """Push with a force in [-1, 1]; 100 at the flag, less a tenth of the squared force at every step.

    State: position, velocity, and three times the position, rounded as the reference will. Observation: the first two.
    """

    action_spec: ClassVar[ContinuousActionSpec] = ContinuousActionSpec(
        np.full(1, -1.0, np.float32), np.full(1, 1.0, np.float32)
    )
    observation_size: ClassVar[int] = 2

    goal_velocity: float = 0.0  # at the flag, at least
    max_episode_steps: Count = 999

    @cached_property
    def _goal_velocity_32(self) -> float:
        return float(np.float32(self.goal_velocity))

    def start(self, random: np.random.Generator) -> tuple[float, ...]:
        position = random.uniform(-0.6, -0.4)
        return position, 0.0, 3 * position

    def advance(self, xp: ModuleType, state: State, action: Number) -> tuple[State, Number, Number]:
        position, velocity, tripled = state
        push, pull = xp.single_both(action * POWER_32, 0.0025 * xp.library_cos(tripled))
        velocity = xp.clip(xp.single(velocity + xp.single(push - pull)), -MAX_SPEED_32, MAX_SPEED_32)
        position = xp.clip(xp.single(position + velocity), LEFT_32, RIGHT_32)
        velocity = xp.choose((position == LEFT_32) & (velocity < 0), 0.0, velocity)
        reached = (position >= FLAG_32) & (velocity >= self._goal_velocity_32)
        return (position, velocity, xp.single(3 * position)), 100.0 * reached - action * action * 0.1, reached

    def observe(self, xp: ModuleType, state: State) -> tuple[Number, ...]:
        position, velocity, _ = state
        return position, velocity
