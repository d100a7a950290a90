"""Point mass: a ball in a plane, pulled by two tendons."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

from envs.tasks.dm_control.base import ControlTask, length, ruled_out, unit
from envs.tasks.settings import Duration
from envs.tasks.task import Array
from envs.tasks.tolerance import tolerance

TARGET_RADIUS = 0.015  # metres


@dataclass(frozen=True, kw_only=True)
class PointMass(ControlTask):
    """Bring the ball to the middle; each control moves it along one axis. Observation 4, actions 2."""

    file: ClassVar[str] = "point_mass.xml"
    fields: ClassVar[tuple[str, ...]] = ("geom_xpos",)
    time_limit: Duration = 20.0

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos, physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return _reward(self, xp, physics), None


@dataclass(frozen=True, kw_only=True)
class PointMassRandomGains(ControlTask):
    """The same, but each control pulls in a direction of its own, drawn anew each episode and not observed.

    Observation 4, actions 2.
    """

    file: ClassVar[str] = "point_mass.xml"
    fields: ClassVar[tuple[str, ...]] = ("geom_xpos",)
    expanded: ClassVar[tuple[str, ...]] = ("wrap_prm",)
    time_limit: Duration = 20.0

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        qpos = self.randomized_joints(random, default)
        first, second = (unit(xp, random.standard_normal(2)) for _ in range(2))
        for _ in range(50):  # 29 of 100 pairs are too parallel
            parallel = xp.abs(xp.linalg.vecdot(first, second)) > 0.9
            if ruled_out(parallel):
                break
            second = xp.where(parallel[..., None], unit(xp, random.standard_normal(2)), second)
        return {"qpos": qpos, "wrap_prm": xp.concatenate((first, second), -1)}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos, physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return _reward(self, xp, physics), None


def _reward(task: ControlTask, xp: ModuleType, physics: SimpleNamespace) -> Array:
    target, mass = task.geoms["target"], task.geoms["pointmass"]
    distance = length(xp, physics.geom_xpos[:, target] - physics.geom_xpos[:, mass])
    near = tolerance(xp, distance, 0.0, TARGET_RADIUS, TARGET_RADIUS)
    calm = tolerance(xp, physics.ctrl, margin=1.0, shape="quadratic", value_at_margin=0.0).mean(1)
    return near * (calm + 4.0) / 5.0
