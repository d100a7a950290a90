"""A pendulum to be swung up and kept upright by a weak motor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from envs.runner import ContinuousActionSpec
from envs.tasks.classic_control.one_row import single
from envs.tasks.classic_control.task import ClassicTask, Number, State
from envs.tasks.settings import Count

MAX_SPEED, MAX_TORQUE = 8.0, 2.0
SECONDS = 0.05  # a step
EFFORT_32 = single(0.001)  # price of a squared torque; the reference computes that part in float32


@dataclass(frozen=True, kw_only=True)
class Pendulum(ClassicTask):
    """State: angle from the top, its speed. Observation: cosine and sine of the angle, its speed. Never terminates."""

    action_spec: ClassVar[ContinuousActionSpec] = ContinuousActionSpec(
        np.full(1, -MAX_TORQUE, np.float32), np.full(1, MAX_TORQUE, np.float32)
    )
    observation_size: ClassVar[int] = 3

    g: float = 10.0
    max_episode_steps: Count = 200

    def start(self, random: np.random.Generator) -> tuple[float, ...]:
        return tuple(random.uniform((-np.pi, -1.0), (np.pi, 1.0)).tolist())

    def advance(self, xp: ModuleType, state: State, action: Number) -> tuple[State, Number, None]:
        angle, speed = state
        from_top = (angle + math.pi) % (2 * math.pi) - math.pi
        cost = from_top * from_top + 0.1 * (speed * speed) + xp.single(EFFORT_32 * xp.single(action * action))
        speed = speed + (3 * self.g / 2.0 * xp.sin(angle) + xp.single(3.0 * action)) * SECONDS
        speed = xp.clip(speed, -MAX_SPEED, MAX_SPEED)
        return (angle + speed * SECONDS, speed), -cost, None

    def observe(self, xp: ModuleType, state: State) -> tuple[Number, ...]:
        angle, speed = state
        return xp.cos(angle), xp.sin(angle), speed

    def show(self, env: Any, state: np.ndarray, action: float | None) -> None:
        env.state, env.last_u = state, None if action is None else np.float32(action)
