"""Dog: a pharaoh dog with 73 joints and 38 actuators, alone or with a ball."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from envs.tasks.dm_control.base import ZX, ZZ, ControlTask, length, local_vector
from envs.tasks.settings import Duration
from envs.tasks.task import Array, copies
from envs.tasks.tolerance import tolerance

QPOS, QVEL = slice(7, 80), slice(6, 79)  # of the 73 hinges
BALL_QPOS, BALL_QVEL = 80, 79  # where the ball's begin
UPRIGHT = math.cos(math.radians(30.0))


@dataclass(frozen=True, kw_only=True)
class Dog(ControlTask):
    """Stand upright, with the weight on the feet, and move forwards at `move_speed`. Observation 223, actions 38.

    An episode begins in the default pose at any azimuth, with a random push and random activations.
    """

    file: ClassVar[str] = "dog.xml"
    fields: ClassVar[tuple[str, ...]] = ("act", "sensordata", "xmat", "xpos")
    time_limit: Duration = 15.0
    control_timestep: float | None = 0.015
    move_speed: float | None = None  # metres per second; None: not rewarded. Also the floor's size depends on it
    observe_reward_factors: bool = False  # the 6 or 7 factors of the reward, behind all else

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.move_speed is not None and self.move_speed <= 0:
            raise ValueError(f"move_speed must be positive or None, got {self.move_speed}")

    def edit(self, spec: Any) -> None:
        size = 15.0 if self.move_speed is None else 15.0 * self.move_speed
        spec.geom("floor").size = (size, size, 0.1)
        walls = [spec.geom(f"wall_{side}") for side in ("px", "nx", "py", "ny")]
        cameras = [spec.camera("ball"), spec.camera("head")]
        for element in (spec.body("ball"), spec.geom("target"), *cameras, *walls):
            spec.delete(element)

    @cached_property
    def _standing(self) -> tuple[float, float, float]:
        return _standing(self)

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return _start(self, xp, random, default)

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        features = _observe(self, physics)
        return (*features, xp.stack(self._factors(xp, physics), 1)) if self.observe_reward_factors else features

    def _factors(self, xp: ModuleType, physics: SimpleNamespace) -> list[Array]:
        factors, desired = _stand_factors(self, self._standing, xp, physics), self.move_speed
        if desired is not None:
            speed = _com_velocity(self, physics)[:, 0]
            forward = tolerance(xp, speed, desired, 2.0 * desired, max(1.0, desired), "linear", 0.0)
            factors.append((4.0 * forward + 1.0) / 5.0)
        return factors

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return xp.stack(self._factors(xp, physics), 1).prod(1), None


@dataclass(frozen=True, kw_only=True)
class DogFetch(ControlTask):
    """Stand, and bring a thrown ball to the middle. Observation 232, actions 38."""

    file: ClassVar[str] = "dog.xml"
    fields: ClassVar[tuple[str, ...]] = (
        *("act", "sensordata", "xmat", "xpos"),
        *("geom_xpos", "site_xpos", "site_xmat", "cvel", "subtree_com"),
    )
    time_limit: Duration = 15.0
    control_timestep: float | None = 0.015
    observe_reward_factors: bool = False  # the 8 factors of the reward, behind all else

    def edit(self, spec: Any) -> None:
        spec.geom("floor").size = (10.0, 10.0, 0.1)

    @cached_property
    def _standing(self) -> tuple[float, float, float]:
        return _standing(self)

    @cached_property
    def _radii(self) -> tuple[float, float]:
        """Of the bite and of the target, in metres."""
        return float(self.model.site("upper_bite").size[0]), float(self.model.geom("target").size[0])

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        fields = _start(self, xp, random, default)
        azimuth = random.uniform(0.0, 2.0 * np.pi, 1)
        height = random.uniform(0.0, 3.0, 1)  # metres that the ball will rise
        speed = random.uniform(0.0, 5.0, 1)  # metres per second, towards the middle
        outwards = xp.concatenate((xp.sin(azimuth), xp.cos(azimuth)), -1)
        qpos, qvel = fields["qpos"], fields["qvel"]
        qpos[..., BALL_QPOS : BALL_QPOS + 2] = 7.5 * outwards
        qpos[..., BALL_QPOS + 2] = 0.05
        qvel[..., BALL_QVEL : BALL_QVEL + 2] = speed * (0.05 * random.standard_normal(2) - outwards)
        qvel[..., BALL_QVEL + 2 : BALL_QVEL + 3] = xp.sqrt(-2.0 * float(self.model.opt.gravity[2]) * height)
        return fields

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        frame = physics.site_xmat[:, self.sites["head"]]
        head, ball = physics.site_xpos[:, self.sites["head"]], physics.geom_xpos[:, self.geoms["ball"]]
        velocity = self._velocity(xp, physics, "ball", ball) - self._velocity(xp, physics, "skull", head)
        features = (
            *_observe(self, physics),
            local_vector(ball - head, frame),
            local_vector(velocity, frame),
            local_vector(physics.geom_xpos[:, self.geoms["target"]] - head, frame),
        )
        return (*features, xp.stack(self._factors(xp, physics), 1)) if self.observe_reward_factors else features

    def _velocity(self, xp: ModuleType, physics: SimpleNamespace, body: str, point: Array) -> Array:
        """Velocity of a point [N, 3] on a body, as mj_objectVelocity computes it."""
        index = self.bodies[body]
        angular, linear = physics.cvel[:, index, :3], physics.cvel[:, index, 3:]
        centre = physics.subtree_com[:, int(self.model.body_rootid[index])]
        return linear - xp.linalg.cross(point - centre, angular)

    def _factors(self, xp: ModuleType, physics: SimpleNamespace) -> list[Array]:
        ball, (bite_radius, target_radius) = physics.geom_xpos[:, self.geoms["ball"]], self._radii
        upper, lower = (
            length(xp, ball - physics.site_xpos[:, self.sites[f"{jaw}_bite"]]) for jaw in ("upper", "lower")
        )
        to_target = length(xp, ball - physics.geom_xpos[:, self.geoms["target"]])
        reach = tolerance(xp, 0.5 * (upper + lower), 0.0, bite_radius, 2.0, "reciprocal")
        # The ball may be let go where it belongs.
        reach = xp.where(to_target < 2.0 * target_radius, 1.0, (6.0 * reach + 1.0) / 7.0)
        fetched = tolerance(xp, to_target, 0.0, target_radius, 10.0, "reciprocal")
        return [*_stand_factors(self, self._standing, xp, physics), reach, (fetched + 1.0) / 2.0]

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return xp.stack(self._factors(xp, physics), 1).prod(1), None


def _standing(task: ControlTask) -> tuple[float, float, float]:
    """Heights in metres above which torso and pelvis stand, and the weight in newtons, of the unchanged model."""
    model, bodies = task.model, task.bodies
    torso, pelvis = 0.9 * task.default_pose().xpos[[bodies["torso"], bodies["pelvis"]], 2]
    return float(torso), float(pelvis), float(-model.opt.gravity[2] * model.body_subtreemass[bodies["torso"]])


def _start(task: ControlTask, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
    half = random.uniform(0.0, 2.0 * np.pi, 1) / 2.0
    push = 2.0 * random.standard_normal(3)
    low, high = task.model.actuator_ctrlrange.T
    qpos = copies(default.qpos, half.shape[:-1])
    qpos[..., 3:4], qpos[..., 4:6], qpos[..., 6:7] = xp.cos(half), 0.0, xp.sin(half)
    qvel = 0.0 * qpos[..., : task.model.nv]
    qvel[..., :2], qvel[..., 5] = push[..., :2], push[..., 2]
    return {"qpos": qpos, "qvel": qvel, "act": random.uniform(low, high, task.model.na)}


def _com_velocity(task: ControlTask, physics: SimpleNamespace) -> Array:
    """Of the centre of mass in the frame of the torso, [N, 3]."""
    velocity = physics.sensordata[:, task.sensors["torso_linvel"]]
    return local_vector(velocity, physics.xmat[:, task.bodies["torso"]])


def _observe(task: ControlTask, physics: SimpleNamespace) -> tuple[Array, ...]:
    data, at, bodies = physics.sensordata, task.sensors, task.bodies
    return (
        physics.qpos[:, QPOS],
        physics.qvel[:, QVEL],
        physics.xpos[:, bodies["torso"], 2:],
        physics.xpos[:, bodies["pelvis"], 2:],
        *(physics.xmat[:, bodies[name], ZX : ZZ + 1] for name in ("skull", "torso", "pelvis")),
        _com_velocity(task, physics),
        data[:, at["accelerometer"].start : at["gyro"].stop],
        data[:, at["foot_L"].start : at["hand_R"].stop],
        data[:, at["palm_L"].start : at["sole_R"].stop],
        physics.act,
    )


def _stand_factors(
    task: ControlTask, standing: tuple[float, float, float], xp: ModuleType, physics: SimpleNamespace
) -> list[Array]:
    """The factors of the reward for standing, [N] each: heights, three upright bodies, weight on the feet."""
    torso, pelvis, weight = standing
    bodies, at = task.bodies, task.sensors
    uprights = [
        tolerance(xp, physics.xmat[:, bodies[name], ZZ], UPRIGHT, math.inf, UPRIGHT + 1.0, "linear", 0.0)
        for name in ("skull", "torso", "pelvis")
    ]
    force = physics.sensordata[:, at["palm_L"].start : at["sole_R"].stop].sum(1)
    return [
        tolerance(xp, physics.xpos[:, bodies["torso"], 2], torso, math.inf, torso),
        tolerance(xp, physics.xpos[:, bodies["pelvis"], 2], pelvis, math.inf, pelvis),
        *uprights,
        tolerance(xp, force, weight, math.inf, weight, "linear", 0.9),
    ]
