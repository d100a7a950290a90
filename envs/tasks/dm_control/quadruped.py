"""Quadruped: a robot with four legs, on a plane, or in a pen with a ball."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from envs.mujoco_simulation import engine
from envs.tasks.dm_control.base import ZZ, ControlTask, length, local, local_vector, unit
from envs.tasks.settings import Duration
from envs.tasks.task import Array, copies, flat
from envs.tasks.tolerance import tolerance

QPOS, QVEL = slice(7, 23), slice(6, 22)  # of the legs' 16 joints
BALL_QPOS, BALL_QVEL = 23, 22  # where the ball's begin


@dataclass(frozen=True, kw_only=True)
class QuadrupedMove(ControlTask):
    """Move forwards at `desired_speed`. Observation 78, actions 12.

    An episode begins in any orientation, with the legs in the default pose, just above the floor.
    """

    file: ClassVar[str] = "quadruped.xml"
    fields: ClassVar[tuple[str, ...]] = ("act", "sensordata", "xmat", "xpos", "ncon")
    lifted: ClassVar[bool] = True
    time_limit: Duration = 20.0
    control_timestep: float | None = 0.02
    desired_speed: float = 0.5  # metres per second; also the floor's size depends on it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.desired_speed <= 0:
            raise ValueError(f"desired_speed must be positive, got {self.desired_speed}")

    def edit(self, spec: Any) -> None:
        spec.geom("floor").size = (20.0 * self.desired_speed, 20.0 * self.desired_speed, 0.5)
        walls = [spec.geom(f"wall_{side}") for side in ("px", "py", "nx", "ny")]
        for element in (*walls, spec.body("ball"), spec.site("target")):
            spec.delete(element)
        _remove_terrain(spec)

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        orientation = unit(xp, random.standard_normal(4))
        qpos = copies(default.qpos, orientation.shape[:-1])
        qpos[..., :2] = 0.0
        qpos[..., 3:7] = orientation
        return {"qpos": qpos}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return _observe(self, xp, physics)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        speed, desired = physics.sensordata[:, self.sensors["velocimeter"]][:, 0], self.desired_speed
        return _upright(xp, physics) * tolerance(xp, speed, desired, math.inf, desired, "linear", 0.5), None


@dataclass(frozen=True, kw_only=True)
class QuadrupedFetch(ControlTask):
    """Push a ball, which falls anywhere in a pen, to the middle. Observation 90, actions 12.

    An episode begins upright, at any azimuth and place, just above the floor.
    """

    file: ClassVar[str] = "quadruped.xml"
    fields: ClassVar[tuple[str, ...]] = ("act", "sensordata", "xmat", "xpos", "site_xpos", "ncon")
    lifted: ClassVar[bool] = True
    time_limit: Duration = 20.0
    control_timestep: float | None = 0.02

    def edit(self, spec: Any) -> None:
        _remove_terrain(spec)

    @cached_property
    def _radii(self) -> tuple[float, float, float]:
        """Of the pen to its corner, of workspace and ball together, and of the target, in metres."""
        pen, model = self.model.geom("floor").size[0] * math.sqrt(2.0), self.model
        reach = model.site("workspace").size[0] + model.geom("ball").size[0]
        return float(pen), float(reach), float(model.site("target").size[0])

    @cached_property
    def _spawn_radius(self) -> float:
        """Half the edge of the square in which robot and ball begin, in metres."""
        return 0.9 * float(self.model.geom("floor").size[0])

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        half = random.uniform(0.0, 2.0 * np.pi, 1) / 2.0
        qpos = copies(default.qpos, half.shape[:-1])
        qpos[..., 3:4], qpos[..., 4:6], qpos[..., 6:7] = xp.cos(half), 0.0, xp.sin(half)
        qpos[..., :2] = random.uniform(-self._spawn_radius, self._spawn_radius, 2)
        return {"qpos": qpos}

    def after_lift(self, xp: ModuleType, random: Any, current: SimpleNamespace) -> dict[str, Array]:
        qpos, qvel = copies(current.qpos, ()), copies(current.qvel, ())
        qpos[..., BALL_QPOS : BALL_QPOS + 2] = random.uniform(-self._spawn_radius, self._spawn_radius, 2)
        qpos[..., BALL_QPOS + 2] = 2.0
        qvel[..., BALL_QVEL : BALL_QVEL + 2] = 5.0 * random.standard_normal(2)
        return {"qpos": qpos, "qvel": qvel}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        xpos, qvel, frame = physics.xpos, physics.qvel, physics.xmat[:, 1]
        position = xpos[:, self.bodies["ball"]] - xpos[:, 1]
        velocity = qvel[:, BALL_QVEL : BALL_QVEL + 3] - qvel[:, :3]
        ball = xp.stack((position, velocity, qvel[:, BALL_QVEL + 3 :]), 1)
        target = physics.site_xpos[:, self.sites["target"]] - xpos[:, 1]
        return *_observe(self, xp, physics), flat(local(ball, frame)), local_vector(target, frame)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        def near(site: str, radius: float) -> Array:
            offset = physics.site_xpos[:, self.sites[site], :2] - physics.xpos[:, self.bodies["ball"], :2]
            return tolerance(xp, length(xp, offset), 0.0, radius, pen, "linear", 0.0)

        pen, reach, target = self._radii
        return _upright(xp, physics) * near("workspace", reach) * (0.5 + 0.5 * near("target", target)), None


def _remove_terrain(spec: Any) -> None:
    rangefinder = engine().mjtSensor.mjSENS_RANGEFINDER
    for element in (spec.geom("terrain"), *(sensor for sensor in spec.sensors if sensor.type == rangefinder)):
        spec.delete(element)


def _observe(task: ControlTask, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
    data, at = physics.sensordata, task.sensors
    toes = data[:, at["force_toe_front_left"].start : at["torque_toe_back_left"].stop]
    return (
        physics.qpos[:, QPOS],
        physics.qvel[:, QVEL],
        physics.act,
        data[:, at["velocimeter"]],
        physics.xmat[:, 1, ZZ:],
        data[:, at["imu_accel"].start : at["imu_gyro"].stop],
        xp.arcsinh(toes),
    )


def _upright(xp: ModuleType, physics: SimpleNamespace) -> Array:
    """[N] from 0 upside down to 1."""
    return tolerance(xp, physics.xmat[:, 1, ZZ], 1.0, math.inf, 2.0, "linear", 0.0)
