"""Two links hanging from a bar, with a motor between them, that must swing up (Sutton 1996; Sutton & Barto 2018)."""

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
SECONDS = 0.2  # a step, by the fourth-order Runge-Kutta method
MAX_SPEED_1, MAX_SPEED_2 = 4 * math.pi, 9 * math.pi


@dataclass(frozen=True, kw_only=True)
class Acrobot(ClassicTask):
    """Torque -1, 0 or 1 between the links; -1 a step until the tip is one length above the bar.

    State: angle of the first link from hanging down, angle between the links, and their speeds. Links have length,
    mass and moment of inertia 1 and their centre in the middle. Observation: cosine and sine of each angle, the speeds.
    """

    action_spec: ClassVar[DiscreteActionSpec] = DiscreteActionSpec(3)
    observation_size: ClassVar[int] = 6

    max_episode_steps: Count = 500

    def start(self, random: np.random.Generator) -> tuple[float, ...]:
        return tuple(random.uniform(-0.1, 0.1, 4).astype(np.float32).tolist())

    def advance(self, xp: ModuleType, state: State, action: Number) -> tuple[State, Number, Number]:
        torque = action - 1.0

        def derivative(along: State, time: float) -> State:
            moved = tuple(x + time * speed for x, speed in zip(state, along, strict=True))
            return _derivative(xp, moved, torque)

        k1 = _derivative(xp, state, torque)
        k2 = derivative(k1, SECONDS / 2.0)
        k3 = derivative(k2, SECONDS / 2.0)
        k4 = derivative(k3, SECONDS)
        angle_1, angle_2, speed_1, speed_2 = (
            x + SECONDS / 6.0 * (a + 2 * b + 2 * c + d) for x, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)
        )
        angle_1, angle_2 = xp.wrap(angle_1, math.pi), xp.wrap(angle_2, math.pi)
        speed_1 = xp.clip(speed_1, -MAX_SPEED_1, MAX_SPEED_1)
        speed_2 = xp.clip(speed_2, -MAX_SPEED_2, MAX_SPEED_2)
        swung_up = -xp.cos(angle_1) - xp.cos(angle_2 + angle_1) > 1.0
        return (angle_1, angle_2, speed_1, speed_2), swung_up - 1.0, swung_up

    def observe(self, xp: ModuleType, state: State) -> tuple[Number, ...]:
        angle_1, angle_2, speed_1, speed_2 = state
        return xp.cos(angle_1), xp.sin(angle_1), xp.cos(angle_2), xp.sin(angle_2), speed_1, speed_2

    def first_observation(self, state: tuple[float, ...]) -> tuple[float, ...]:
        """The reference's first state is float32, and so are its cosines and sines."""
        angle_1, angle_2, *speeds = np.array(state, np.float32)
        return tuple(map(float, (np.cos(angle_1), np.sin(angle_1), np.cos(angle_2), np.sin(angle_2), *speeds)))


def _derivative(xp: ModuleType, state: State, torque: Number) -> State:
    """Speeds and accelerations (Sutton & Barto 1998, section 11.3)."""
    angle_1, angle_2, speed_1, speed_2 = state
    cos_2, sin_2 = xp.cos(angle_2), xp.sin(angle_2)
    d1 = 0.25 + (1.25 + cos_2) + 1.0 + 1.0
    d2 = 0.25 + 0.5 * cos_2 + 1.0
    phi_2 = 0.5 * GRAVITY * xp.cos(angle_1 + angle_2 - math.pi / 2.0)
    phi_1 = (
        -0.5 * xp.library_square(speed_2) * sin_2
        - speed_2 * speed_1 * sin_2
        + 1.5 * GRAVITY * xp.cos(angle_1 - math.pi / 2)
        + phi_2
    )
    acceleration_2 = (torque + d2 / d1 * phi_1 - 0.5 * xp.library_square(speed_1) * sin_2 - phi_2) / (
        1.25 - xp.library_square(d2) / d1
    )
    acceleration_1 = -(d2 * acceleration_2 + phi_1) / d1
    return speed_1, speed_2, acceleration_1, acceleration_2
