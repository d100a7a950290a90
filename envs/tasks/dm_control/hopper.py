"""Hopper: a planar robot with one leg."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import ClassVar

from envs.tasks.dm_control.base import ControlTask
from envs.tasks.settings import Duration
from envs.tasks.task import Array
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True, kw_only=True)
class Hopper(ControlTask):
    """Stand, or hop at 2 m/s. Observation 15, actions 4.

    Quirk: an episode begins at any angle and in any pose, also with a part in the floor.
    """

    file: ClassVar[str] = "hopper.xml"
    fields: ClassVar[tuple[str, ...]] = ("xipos", "sensordata")
    time_limit: Duration = 20.0
    control_timestep: float | None = 0.02
    hopping: bool = True
    stand_height: float = 0.6  # metres of the torso above the foot
    hop_speed: float = 2.0  # metres per second

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        touch = physics.sensordata[:, self.sensors["touch_toe"].start : self.sensors["touch_heel"].stop]
        return physics.qpos[:, 1:], physics.qvel, xp.log1p(touch)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        height = physics.xipos[:, self.bodies["torso"], 2] - physics.xipos[:, self.bodies["foot"], 2]
        standing = tolerance(xp, height, self.stand_height, 2.0)
        if self.hopping:
            speed = physics.sensordata[:, self.sensors["torso_subtreelinvel"]][:, 0]
            return standing * tolerance(xp, speed, self.hop_speed, math.inf, self.hop_speed / 2, "linear", 0.5), None
        calm = tolerance(xp, physics.ctrl, margin=1.0, shape="quadratic", value_at_margin=0.0).mean(1)
        return standing * (calm + 4.0) / 5.0, None
