"""Stacker: the planar arm of the manipulator, and boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from envs.tasks.dm_control.base import ControlTask
from envs.tasks.dm_control.planar_arm import CLOSE, JOINTS, distance, observe_arm, pose, random_arm
from envs.tasks.task import Array, copies
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True, kw_only=True)
class Stacker(ControlTask):
    """Put a box where the target is, at the height of a stack, and take the hand away.

    Observation 35 + 7 n_boxes, or 21; actions 5. Boxes and target are drawn anew each episode.
    Quirk: one box at the target is enough, also if nothing is below it.
    """

    file: ClassVar[str] = "stacker.xml"
    fields: ClassVar[tuple[str, ...]] = ("xpos", "xquat", "site_xpos", "sensordata", "ncon")
    expanded: ClassVar[tuple[str, ...]] = ("body_pos",)
    contact_free: ClassVar[bool] = True
    control_timestep: float | None = 0.01
    n_boxes: int = 2  # up to 4
    fully_observable: bool = True  # observe hand, boxes and target, not only arm and touch

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_boxes <= 4:
            raise ValueError(f"n_boxes must be from 1 to 4, got {self.n_boxes}")

    def edit(self, spec: Any) -> None:
        for i in range(self.n_boxes, 4):
            spec.delete(spec.body(f"box{i}"))

    @cached_property
    def _box_size(self) -> float:
        """Half the edge, in metres."""
        return float(self.model.geom("target").size[0])

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        n, target = self.n_boxes, self.bodies["target"]
        arm = random_arm(self, xp, random)
        body_pos = copies(default.body_pos, arm.shape[:-1])
        body_pos[..., target, 2:3] = self._box_size * (2 * random.randint(n, size=1) + 1)
        body_pos[..., target, 0:1] = random.uniform(-0.37, 0.37, 1)
        boxes = random.uniform((0.1, 0.0, 0.0) * n, (0.3, 0.7, 2.0 * np.pi) * n, 3 * n)  # x, z, angle of each
        return {"qpos": xp.concatenate((arm, boxes), -1), "body_pos": body_pos}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        arm = observe_arm(self, xp, physics)
        if not self.fully_observable:
            return arm
        boxes = [piece for i in range(self.n_boxes) for piece in pose(self, physics, f"box{i}")]
        # x, angle, z; the model has z before the angle
        order = [x + i for x in range(JOINTS, JOINTS + 3 * self.n_boxes, 3) for i in (0, 2, 1)]
        velocities = [physics.qvel[:, i : i + 1] for i in order]
        target = physics.xpos[:, self.bodies["target"], ::2]
        return *arm, *pose(self, physics, "hand"), *boxes, *velocities, target

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        distances = [distance(self, xp, physics, f"box{i}", "target") for i in range(self.n_boxes)]
        box_is_close = tolerance(xp, xp.amin(xp.stack(distances, 1), 1), margin=2.0 * self._box_size)
        hand = distance(self, xp, physics, "grasp", "target")
        return box_is_close * tolerance(xp, hand, 0.1, math.inf, CLOSE), None
