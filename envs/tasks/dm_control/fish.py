"""Fish: a body with a tail and two fins, in water without gravity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

from envs.tasks.dm_control.base import ZZ, ControlTask, length, local_vector, unit
from envs.tasks.settings import Duration
from envs.tasks.task import Array, copies
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True, kw_only=True)
class FishUpright(ControlTask):
    """Turn the body upright. Observation 21, actions 5."""

    file: ClassVar[str] = "fish.xml"
    time_limit: Duration = 40.0
    control_timestep: float | None = 0.04

    def edit(self, spec: Any) -> None:
        spec.geom("target").rgba[3] = 0.0

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return {"qpos": _pose(xp, random, default)}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos[:, 7:], physics.xmat[:, 1, ZZ:], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return tolerance(xp, physics.xmat[:, 1, ZZ], 1.0, 1.0, 1.0), None


@dataclass(frozen=True, kw_only=True)
class FishSwim(ControlTask):
    """Swim to a target, whose place is drawn anew each episode. Observation 24, actions 5."""

    file: ClassVar[str] = "fish.xml"
    fields: ClassVar[tuple[str, ...]] = ("xmat", "geom_xpos", "geom_xmat")
    expanded: ClassVar[tuple[str, ...]] = ("geom_pos",)
    time_limit: Duration = 40.0
    control_timestep: float | None = 0.04

    @cached_property
    def _geoms(self) -> tuple[int, int, float]:
        """Ids of the mouth and the target, and the sum of their radii."""
        mouth, target = self.model.geom("mouth"), self.model.geom("target")
        return mouth.id, target.id, float(mouth.size[0] + target.size[0])

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        qpos = _pose(xp, random, default)
        geom_pos = copies(default.geom_pos, qpos.shape[:-1])
        geom_pos[..., self._geoms[1], :] = random.uniform((-0.4, -0.4, 0.1), (0.4, 0.4, 0.3), 3)
        return {"qpos": qpos, "geom_pos": geom_pos}

    def _to_target(self, physics: SimpleNamespace) -> Array:
        """From the mouth in its own frame, [N, 3]."""
        mouth, target, _ = self._geoms
        return local_vector(physics.geom_xpos[:, target] - physics.geom_xpos[:, mouth], physics.geom_xmat[:, mouth])

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos[:, 7:], physics.xmat[:, 1, ZZ:], self._to_target(physics), physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        radii = self._geoms[2]
        in_target = tolerance(xp, length(xp, self._to_target(physics)), 0.0, radii, 2.0 * radii)
        upright = 0.5 * (physics.xmat[:, 1, ZZ] + 1.0)
        return (7.0 * in_target + upright) / 8.0, None


def _pose(xp: ModuleType, random: Any, default: SimpleNamespace) -> Array:
    """qpos [..., 14] with a random orientation, tail and fins nearly straight."""
    orientation = unit(xp, random.standard_normal(4))
    qpos = copies(default.qpos, orientation.shape[:-1])
    qpos[..., 3:7] = orientation
    qpos[..., 7:] = random.uniform(-0.2, 0.2, 7)
    return qpos
