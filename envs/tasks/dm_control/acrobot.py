"""Acrobot: two links, driven at the elbow only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from envs.tasks.dm_control.base import XZ, ZZ, ControlTask, length
from envs.tasks.task import Array
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True, kw_only=True)
class Acrobot(ControlTask):
    """Swing the tip up to a target above the shoulder. Observation 6, action 1."""

    file: ClassVar[str] = "acrobot.xml"
    fields: ClassVar[tuple[str, ...]] = ("xmat", "site_xpos")
    sparse: bool = False  # reward 1 only inside the target

    @cached_property
    def _target_radius(self) -> float:
        """In metres."""
        return float(self.model.site("target").size[0])

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return {"qpos": random.uniform(-np.pi, np.pi, 2)}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        arms = physics.xmat[:, 1:3]
        return arms[:, :, XZ], arms[:, :, ZZ], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        tip = physics.site_xpos[:, self.sites["tip"]]
        distance = length(xp, physics.site_xpos[:, self.sites["target"]] - tip)
        return tolerance(xp, distance, 0.0, self._target_radius, 0.0 if self.sparse else 1.0), None
