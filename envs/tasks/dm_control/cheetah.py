"""Cheetah: a planar robot with two legs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import ClassVar

from envs.tasks.dm_control.base import ControlTask
from envs.tasks.task import Array, per_row
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True, kw_only=True)
class Cheetah(ControlTask):
    """Run at 10 m/s. Observation 17, actions 6."""

    file: ClassVar[str] = "cheetah.xml"
    fields: ClassVar[tuple[str, ...]] = ("sensordata",)
    random_turns: ClassVar[bool] = False
    settling_steps: ClassVar[int] = 200
    run_speed: float = 10.0  # metres per second

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos[:, 1:], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        speed = per_row(physics.sensordata, 0)
        return tolerance(xp, speed, self.run_speed, math.inf, self.run_speed, "linear", 0.0), None
