"""Manipulator: a planar arm that carries a ball or a peg."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from envs.tasks.dm_control.base import XX, ZX, ControlTask, ruled_out
from envs.tasks.dm_control.planar_arm import CLOSE, JOINTS, distance, observe_arm, pose, random_arm
from envs.tasks.task import Array, copies
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True, kw_only=True)
class Manipulator(ControlTask):
    """Bring a ball or a peg to a target, or into a cup or a slot there. Observation 44 or 21, actions 5.

    Target and object are drawn anew each episode; one object in ten begins in the hand, one in ten in the target.
    Quirk: an object that was thrown in a pose with contacts keeps its speed if the next draw does not throw it.
    """

    file: ClassVar[str] = "manipulator.xml"
    fields: ClassVar[tuple[str, ...]] = ("xpos", "xquat", "site_xpos", "site_xmat", "sensordata", "ncon")
    expanded: ClassVar[tuple[str, ...]] = ("body_pos", "body_quat")
    contact_free: ClassVar[bool] = True
    finishes: ClassVar[bool] = True
    control_timestep: float | None = 0.01
    use_peg: bool = False  # instead of the ball
    insert: bool = False  # the target is inside a receptacle
    fully_observable: bool = True  # observe hand, object and target, not only arm and touch

    @property
    def _object(self) -> str:
        return "peg" if self.use_peg else "ball"

    @property
    def _at_target(self) -> tuple[str, ...]:
        """The bodies that stand where the target is, itself first."""
        return (f"target_{self._object}", *(("slot" if self.use_peg else "cup",) if self.insert else ()))

    def edit(self, spec: Any) -> None:
        for unused in {"ball", "target_ball", "cup", "peg", "target_peg", "slot"} - {self._object, *self._at_target}:
            spec.delete(spec.body(unused))

    @cached_property
    def _bodies_at_target(self) -> tuple[int, ...]:
        return tuple(self.bodies[name] for name in self._at_target)

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return self._draw_all(xp, random, default, default.qpos[JOINTS:], 0.0)

    def restart(
        self, xp: ModuleType, random: Any, default: SimpleNamespace, current: SimpleNamespace
    ) -> dict[str, Array]:
        return self._draw_all(xp, random, default, current.qpos[..., JOINTS:], current.qvel[..., JOINTS : JOINTS + 1])

    def _draw_all(
        self, xp: ModuleType, random: Any, default: SimpleNamespace, pose: Array, speed: Array | float
    ) -> dict[str, Array]:
        """pose [..., 3], speed [..., 1]: those the object has, kept until it is in the hand, or if it is not thrown."""
        arm = random_arm(self, xp, random)
        turn = np.pi / 3.0 if self.insert else np.pi
        target = random.uniform((-0.4, 0.1, -turn), (0.4, 0.4, turn), 3)  # x, z, angle
        kind = random.uniform(0.0, 1.0, 1)
        in_hand, thrown = kind < 0.1, kind >= 0.2
        placed = xp.where(in_hand, pose, target)
        if not ruled_out(thrown[..., 0]):
            drawn = random.uniform((-0.5, 0.0, 0.0, -5.0), (0.5, 0.7, 2.0 * np.pi, 5.0), 4)
            placed = xp.where(thrown, drawn[..., :3], placed)
            speed = xp.where(thrown, drawn[..., 3:], speed)
        qpos = xp.concatenate((arm, placed), -1)
        qvel = 0.0 * qpos
        qvel[..., JOINTS : JOINTS + 1] = speed
        body_pos, body_quat = (copies(x, arm.shape[:-1]) for x in (default.body_pos, default.body_quat))
        for body in self._bodies_at_target:
            body_pos[..., body, ::2] = target[..., :2]
            body_quat[..., body, 0:1] = xp.cos(target[..., 2:] / 2.0)
            body_quat[..., body, 2:3] = xp.sin(target[..., 2:] / 2.0)
        moved = {"body_pos": body_pos, "body_quat": body_quat}
        return {"qpos": qpos, "qvel": qvel, **moved, "unfinished": in_hand[..., 0]}

    def finish(self, xp: ModuleType, physics: SimpleNamespace) -> dict[str, Array]:
        """Puts the object into the hand."""
        grasp = self.sites["grasp"]
        position, frame = physics.site_xpos[:, grasp], physics.site_xmat[:, grasp]
        angle = np.pi - xp.arctan2(frame[:, ZX : ZX + 1], frame[:, XX : XX + 1])
        return {"qpos": xp.concatenate((physics.qpos[:, :JOINTS], position[:, ::2], angle), 1)}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        arm = observe_arm(self, xp, physics)
        if not self.fully_observable:
            return arm
        hand, held, target = (pose(self, physics, body) for body in ("hand", self._object, self._at_target[0]))
        return *arm, *hand, *held, physics.qvel[:, JOINTS:], *target

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        def close(site: str, other: str) -> Array:
            return tolerance(xp, distance(self, xp, physics, site, other), 0.0, CLOSE, 2.0 * CLOSE)

        if not self.use_peg:
            return close("ball", "target_ball"), None
        grasping = (close("peg_grasp", "grasp") + close("peg_pinch", "pinch")) / 2.0
        bringing = (close("peg", "target_peg") + close("target_peg_tip", "peg_tip")) / 2.0
        return xp.maximum(bringing, grasping / 3.0), None
