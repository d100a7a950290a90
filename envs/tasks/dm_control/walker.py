"""Walker: a planar robot with two legs and a torso."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import ClassVar

from envs.tasks.dm_control.base import XX, XZ, ZZ, ControlTask
from envs.tasks.settings import Duration
from envs.tasks.task import Array, flat, per_row
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True, kw_only=True)
class Walker(ControlTask):
    """Stand, and move at `move_speed` unless that is 0. Observation 24, actions 6."""

    file: ClassVar[str] = "walker.xml"
    fields: ClassVar[tuple[str, ...]] = ("xmat", "xpos", "sensordata")
    time_limit: Duration = 25.0
    control_timestep: float | None = 0.025
    stand_height: float = 1.2  # metres
    move_speed: float = 0.0  # metres per second

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        orientations = physics.xmat[:, 1:, XX : XZ + 1 : 2]
        return flat(orientations), physics.xpos[:, 1, 2:], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        height = per_row(physics.xpos, 1, 2)
        standing = tolerance(xp, height, self.stand_height, math.inf, self.stand_height / 2)
        upright = (1.0 + per_row(physics.xmat, 1, ZZ)) / 2.0
        stand_reward = (3.0 * standing + upright) / 4.0
        if self.move_speed == 0.0:
            return stand_reward, None
        speed = per_row(physics.sensordata, 0)
        moving = tolerance(xp, speed, self.move_speed, math.inf, self.move_speed / 2, "linear", 0.5)
        return stand_reward * (5.0 * moving + 1.0) / 6.0, None
