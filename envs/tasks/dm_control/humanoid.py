"""Humanoid: the simplified one, and that of the CMU motion capture data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

from envs.tasks.dm_control.base import ZX, ZY, ZZ, ControlTask, length, local_vector, unit
from envs.tasks.settings import Duration
from envs.tasks.task import Array
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True)
class Anatomy:
    """What the two models call their parts."""

    trunk: str
    up_axis: int  # of the trunk, as an entry of its rotation matrix
    limbs: tuple[str, ...]


SIMPLE = Anatomy("torso", ZZ, ("left_hand", "left_foot", "right_hand", "right_foot"))
CMU = Anatomy("thorax", ZY, ("lhand", "lfoot", "rhand", "rfoot"))


@dataclass(frozen=True, kw_only=True)
class Humanoid(ControlTask):
    """Stand, and move at `move_speed` in any direction unless that is 0. Observation 67, pure state 55; actions 21.

    Quirk: the first orientation comes from uniform numbers in [0, 1), so that it lies in one eighth of all rotations.
    """

    file: ClassVar[str] = "humanoid.xml"
    fields: ClassVar[tuple[str, ...]] = ("xmat", "xpos", "sensordata", "ncon")
    contact_free: ClassVar[bool] = True
    time_limit: Duration = 25.0
    control_timestep: float | None = 0.025
    stand_height: float = 1.4  # metres of the head
    move_speed: float = 0.0  # metres per second
    pure_state: bool = False  # observe positions and velocities, also the place in the world

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return {"qpos": _pose(self, xp, random, default)}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return (physics.qpos, physics.qvel) if self.pure_state else _observe(self, SIMPLE, physics)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return _reward(self, SIMPLE, xp, physics), None


@dataclass(frozen=True, kw_only=True)
class HumanoidCMU(ControlTask):
    """The same tasks with 56 joints. Observation 137, actions 56. Quirk: as that of `Humanoid`."""

    file: ClassVar[str] = "humanoid_CMU.xml"
    fields: ClassVar[tuple[str, ...]] = ("xmat", "xpos", "sensordata", "ncon")
    contact_free: ClassVar[bool] = True
    time_limit: Duration = 20.0
    control_timestep: float | None = 0.02
    stand_height: float = 1.4  # metres of the head
    move_speed: float = 0.0  # metres per second

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return {"qpos": _pose(self, xp, random, default)}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return _observe(self, CMU, physics)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return _reward(self, CMU, xp, physics), None


def _pose(task: ControlTask, xp: ModuleType, random: Any, default: SimpleNamespace) -> Array:
    """qpos [..., nq] with a random orientation and random joints."""
    orientation = unit(xp, random.uniform(0.0, 1.0, 4))
    qpos = task.randomized_joints(random, default)
    qpos[..., 3:7] = orientation
    return qpos


def _observe(task: ControlTask, anatomy: Anatomy, physics: SimpleNamespace) -> tuple[Array, ...]:
    at = task.bodies
    frame, centre = physics.xmat[:, at[anatomy.trunk]], physics.xpos[:, at[anatomy.trunk]]
    return (
        physics.qpos[:, 7:],
        physics.xpos[:, at["head"], 2:],
        *(local_vector(physics.xpos[:, at[limb]] - centre, frame) for limb in anatomy.limbs),
        frame[:, ZX : ZZ + 1],
        physics.sensordata[:, task.sensors[f"{anatomy.trunk}_subtreelinvel"]],
        physics.qvel,
    )


def _reward(task: Humanoid | HumanoidCMU, anatomy: Anatomy, xp: ModuleType, physics: SimpleNamespace) -> Array:
    height = physics.xpos[:, task.bodies["head"], 2]
    standing = tolerance(xp, height, task.stand_height, math.inf, task.stand_height / 4)
    cosine = physics.xmat[:, task.bodies[anatomy.trunk], anatomy.up_axis]
    upright = tolerance(xp, cosine, 0.9, math.inf, 1.9, "linear", 0.0)
    calm = tolerance(xp, physics.ctrl, margin=1.0, shape="quadratic", value_at_margin=0.0).mean(1)
    stand_reward = standing * upright * (4.0 + calm) / 5.0
    velocity = physics.sensordata[:, task.sensors[f"{anatomy.trunk}_subtreelinvel"]][:, :2]
    if task.move_speed == 0.0:
        return stand_reward * tolerance(xp, velocity, margin=2.0).mean(1)
    moving = tolerance(xp, length(xp, velocity), task.move_speed, math.inf, task.move_speed, "linear", 0.0)
    return stand_reward * (5.0 * moving + 1.0) / 6.0
