"""Cart-pole: one pole or several in a chain, on a cart that can be pushed."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from envs.tasks.dm_control.base import XZ, ZZ, ControlTask
from envs.tasks.task import Array, per_row
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True, kw_only=True)
class Cartpole(ControlTask):
    """Swing the poles up, or keep them up. Observation 2 + 3 per pole, action 1.

    Quirk: only the first of several poles begins upside down; the others continue it.
    """

    file: ClassVar[str] = "cartpole.xml"
    swing_up: bool = True  # begin hanging down at rest, else near upright
    sparse: bool = False  # reward 1 only within 0.25 m and, every pole, a cosine of 0.995
    num_poles: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_poles < 1:
            raise ValueError(f"num_poles must be at least 1, got {self.num_poles}")

    def edit(self, spec: Any) -> None:
        if self.num_poles == 1:
            return
        pole = spec.body("pole_1")
        for i in range(2, self.num_poles + 1):
            pole = pole.add_body(name=f"pole_{i}", pos=(0, 0, 1), childclass="pole")
            pole.add_joint(name=f"hinge_{i}")
            pole.add_geom(name=f"pole_{i}")
        spec.geom("floor").pos = (0, 0, 1 - self.num_poles - 0.05)
        near, far = spec.cameras[:2]
        near.pos, far.pos = (0, -1 - 2 * self.num_poles, 1), (0, -2 * self.num_poles, 2)

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        n = self.num_poles
        if not self.swing_up:
            qpos = random.uniform((-0.1,) + n * (-0.034,), (0.1,) + n * (0.034,), 1 + n)
        else:
            qpos = 0.01 * random.standard_normal(2)
            qpos[..., 1] += np.pi
            if n > 1:
                qpos = xp.concatenate((qpos, 0.1 * random.standard_normal(n - 1)), -1)
        return {"qpos": qpos, "qvel": 0.01 * random.standard_normal(1 + n)}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        poles = range(2, 2 + self.num_poles)
        angles = [physics.xmat[:, pole, entry : entry + 1] for pole in poles for entry in (ZZ, XZ)]
        return physics.qpos[:, :1], *angles, physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        position = per_row(physics.qpos, 0)
        cosines = [per_row(physics.xmat, 2 + i, ZZ) for i in range(self.num_poles)]
        if self.sparse:
            inside = tolerance(xp, position, -0.25, 0.25)
            for cosine in cosines:
                inside = inside * tolerance(xp, cosine, 0.995, 1.0)
            return inside, None
        upright = (reduce(operator.add, cosines) + self.num_poles) / (2.0 * self.num_poles)  # their mean
        centred = (1.0 + tolerance(xp, position, margin=2.0)) / 2.0
        calm = (4.0 + tolerance(xp, per_row(physics.ctrl, 0), margin=1.0, shape="quadratic", value_at_margin=0.0)) / 5.0
        speeds = [tolerance(xp, per_row(physics.qvel, 1 + i), margin=5.0) for i in range(self.num_poles)]
        slow = (1.0 + reduce(xp.minimum, speeds)) / 2.0
        return upright * calm * slow * centred, None
