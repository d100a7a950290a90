"""A cart that balances a pole (Barto, Sutton & Anderson 1983)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import numpy as np

from envs.runner import DiscreteActionSpec
from envs.tasks.classic_control.task import ClassicTask, Number, State
from envs.tasks.settings import Count

GRAVITY = 9.8
POLE_MASS, TOTAL_MASS = 0.1, 0.1 + 1.0
HALF_LENGTH = 0.5  # of the pole
POLE_MOMENT = POLE_MASS * HALF_LENGTH
FORCE = 10.0
SECONDS = 0.02  # a step, by Euler's method
MAX_POSITION, MAX_ANGLE = 2.4, 12 * 2 * math.pi / 360


@dataclass(frozen=True, kw_only=True)
class CartPole(ClassicTask):
    """Push to the left (0) or right (1) and keep the pole up: 1 a step.

    With sutton_barto_reward 0 a step, and -1 where the pole falls. State and observation: position of the cart and its
    speed, angle of the pole and its speed.
    """

    action_spec: ClassVar[DiscreteActionSpec] = DiscreteActionSpec(2)
    observation_size: ClassVar[int] = 4

    sutton_barto_reward: bool = False
    max_episode_steps: Count = 500

    def start(self, random: np.random.Generator) -> tuple[float, ...]:
        return tuple(random.uniform(-0.05, 0.05, 4).tolist())

    def advance(self, xp: ModuleType, state: State, action: Number) -> tuple[State, Number, Number]:
        x, x_speed, angle, angle_speed = state
        cos, sin = xp.cos(angle), xp.sin(angle)
        push = ((2 * action - 1) * FORCE + POLE_MOMENT * (angle_speed * angle_speed) * sin) / TOTAL_MASS
        angle_acceleration = (GRAVITY * sin - cos * push) / (
            HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * (cos * cos) / TOTAL_MASS)
        )
        x_acceleration = push - POLE_MOMENT * angle_acceleration * cos / TOTAL_MASS
        x, angle = x + SECONDS * x_speed, angle + SECONDS * angle_speed
        x_speed, angle_speed = x_speed + SECONDS * x_acceleration, angle_speed + SECONDS * angle_acceleration
        fallen = (abs(x) > MAX_POSITION) | (abs(angle) > MAX_ANGLE)
        return (x, x_speed, angle, angle_speed), 0.0 - fallen if self.sutton_barto_reward else 1.0, fallen

    def observe(self, xp: ModuleType, state: State) -> tuple[Number, ...]:
        return state
