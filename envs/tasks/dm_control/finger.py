"""Finger: two links that turn a body on an unactuated hinge by touch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from envs.tasks.dm_control.base import ControlTask, length
from envs.tasks.settings import Duration
from envs.tasks.task import Array, copies


@dataclass(frozen=True, kw_only=True)
class FingerSpin(ControlTask):
    """Keep the body turning at 15 rad/s or more. Observation 9, actions 2."""

    file: ClassVar[str] = "finger.xml"
    fields: ClassVar[tuple[str, ...]] = ("sensordata", "ncon")
    contact_free: ClassVar[bool] = True
    time_limit: Duration = 20.0
    control_timestep: float | None = 0.02
    spin_velocity: float = 15.0  # radians per second
    hinge_damping: float = 0.03

    def edit(self, spec: Any) -> None:
        spec.joint("hinge").damping[0] = self.hinge_damping
        spec.site("target").rgba[3] = spec.site("tip").rgba[3] = 0.0  # the turning tasks' marks

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return _observe(self, xp, physics)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        turning = physics.sensordata[:, self.sensors["hinge_velocity"]][:, 0]
        return xp.where(turning <= -self.spin_velocity, 1.0, 0.0), None


@dataclass(frozen=True, kw_only=True)
class FingerTurn(ControlTask):
    """Turn the body's tip into a target, whose angle is drawn anew each episode. Observation 12, actions 2.

    Quirk: the hinge keeps the damping of the model file, 0.5 where `FingerSpin` has 0.03.
    """

    file: ClassVar[str] = "finger.xml"
    fields: ClassVar[tuple[str, ...]] = ("sensordata", "ncon")
    expanded: ClassVar[tuple[str, ...]] = ("site_pos",)
    contact_free: ClassVar[bool] = True
    time_limit: Duration = 20.0
    control_timestep: float | None = 0.02
    target_radius: float = 0.07  # metres

    def edit(self, spec: Any) -> None:
        spec.site("target").size[0] = self.target_radius

    @cached_property
    def _circle(self) -> tuple[int, float, float, float]:
        """Id of the target, and x, z and radius in metres of the circle on which it lies."""
        x, _, z = self.default_pose().xanchor[self.model.joint("hinge").id]
        return self.sites["target"], float(x), float(z), float(self.model.geom("cap1").size.sum())

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        target, x, z, radius = self._circle
        angle = random.uniform(-np.pi, np.pi, 1)
        site_pos = copies(default.site_pos, angle.shape[:-1])
        site_pos[..., target, 0:1] = x + radius * xp.sin(angle)
        site_pos[..., target, 2:3] = z + radius * xp.cos(angle)
        return {"qpos": self.randomized_joints(random, default), "site_pos": site_pos}

    def restart(
        self, xp: ModuleType, random: Any, default: SimpleNamespace, current: SimpleNamespace
    ) -> dict[str, Array]:
        return {"qpos": self.randomized_joints(random, default)}

    def _distance(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        """Distance [N] from the tip to the target's surface, negative inside."""
        to_target = _from_hinge(self, physics, "target") - _from_hinge(self, physics, "tip")
        return length(xp, to_target) - self.target_radius

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        target = _from_hinge(self, physics, "target")
        return *_observe(self, xp, physics), target, self._distance(xp, physics)[:, None]

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return xp.where(self._distance(xp, physics) <= 0.0, 1.0, 0.0), None


def _from_hinge(task: ControlTask, physics: SimpleNamespace, site: str) -> Array:
    """x and z of a site relative to the hinge, [N, 2]."""
    data, at = physics.sensordata, task.sensors
    return data[:, at[site]][:, ::2] - data[:, at["spinner"]][:, ::2]


def _observe(task: ControlTask, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
    data, at = physics.sensordata, task.sensors
    joints = data[:, at["proximal"].start : at["distal"].stop]
    velocities = data[:, at["proximal_velocity"].start : at["hinge_velocity"].stop]
    touch = data[:, at["touchtop"].start : at["touchbottom"].stop]
    return joints, _from_hinge(task, physics, "tip"), velocities, xp.log1p(touch)
