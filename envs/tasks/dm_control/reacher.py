"""Reacher: an arm of two links in a plane."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from envs.tasks.dm_control.base import ControlTask, length
from envs.tasks.settings import Duration
from envs.tasks.task import Array, copies
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True, kw_only=True)
class Reacher(ControlTask):
    """Touch a target, whose place is drawn anew each episode. Observation 6, actions 2."""

    file: ClassVar[str] = "reacher.xml"
    fields: ClassVar[tuple[str, ...]] = ("geom_xpos",)
    expanded: ClassVar[tuple[str, ...]] = ("geom_pos",)
    time_limit: Duration = 20.0
    target_size: float = 0.05  # radius in metres

    def edit(self, spec: Any) -> None:
        spec.geom("target").size[0] = self.target_size

    @cached_property
    def _geoms(self) -> tuple[int, int, float]:
        """Ids of the target and the finger, and the sum of their radii."""
        target, finger = self.model.geom("target"), self.model.geom("finger")
        return target.id, finger.id, float(target.size[0] + finger.size[0])

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        qpos = self.randomized_joints(random, default)
        angle, radius = random.uniform(0.0, 2.0 * np.pi, 1), random.uniform(0.05, 0.20, 1)
        geom_pos = copies(default.geom_pos, qpos.shape[:-1])
        geom_pos[..., self._geoms[0], 0:1] = radius * xp.sin(angle)
        geom_pos[..., self._geoms[0], 1:2] = radius * xp.cos(angle)
        return {"qpos": qpos, "geom_pos": geom_pos}

    def _to_target(self, physics: SimpleNamespace) -> Array:
        target, finger, _ = self._geoms
        return physics.geom_xpos[:, target, :2] - physics.geom_xpos[:, finger, :2]

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos, self._to_target(physics), physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return tolerance(xp, length(xp, self._to_target(physics)), 0.0, self._geoms[2]), None
