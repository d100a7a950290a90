"""Pendulum: one weakly driven pole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import ClassVar

from envs.tasks.dm_control.base import XZ, ZZ, ControlTask
from envs.tasks.settings import Duration
from envs.tasks.task import Array, per_row
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True, kw_only=True)
class Pendulum(ControlTask):
    """Swing the pole up; reward 1 within 8 degrees of upright. Observation 3, action 1."""

    file: ClassVar[str] = "pendulum.xml"
    time_limit: Duration = 20.0
    cosine: float = math.cos(math.radians(8.0))

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        pole = physics.xmat[:, 1]
        return pole[:, ZZ:], pole[:, XZ : XZ + 1], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return tolerance(xp, per_row(physics.xmat, 1, ZZ), self.cosine, 1.0), None
