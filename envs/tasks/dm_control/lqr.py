"""Linear-quadratic regulator: a chain of bodies on springs, some of them pushed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

from envs.mujoco_simulation import STAGE_NONE, engine
from envs.tasks.dm_control.base import ControlTask, length
from envs.tasks.settings import Duration
from envs.tasks.task import Array


@dataclass(frozen=True, kw_only=True)
class LinearQuadraticRegulator(ControlTask):
    """Bring all bodies to rest in the middle, which terminates. Observation 2 n_bodies, actions n_actuators.

    The stiffness of the springs is drawn once for each row, when its environment is made. The reference limits neither
    time (`time_limit=math.inf`) nor controls, so that a poor policy never finishes an episode; here an episode has the
    1 000 steps of the other tasks, and an agent the range `control_limit`. The optimal policy stays below 5.5 in 30
    problems drawn, and takes about 5 000 (2 bodies) or 12 000 (6 bodies) steps to come to rest.
    """

    file: ClassVar[str] = "lqr.xml"
    fields: ClassVar[tuple[str, ...]] = ()
    expanded: ClassVar[tuple[str, ...]] = ("jnt_stiffness",)
    stage: ClassVar[int] = STAGE_NONE
    time_limit: Duration = 30.0
    n_bodies: int = 2
    n_actuators: int = 1  # the first bodies
    control_cost_coef: float = 0.1
    control_limit: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_actuators <= self.n_bodies:
            raise ValueError(
                f"n_actuators must be from 1 to n_bodies, got {self.n_actuators} for {self.n_bodies} bodies"
            )
        if self.control_cost_coef <= 0 or self.control_limit <= 0:
            raise ValueError(
                f"control_cost_coef and control_limit must be positive, got {self.control_cost_coef} "
                f"and {self.control_limit}"
            )

    def edit(self, spec: Any) -> None:
        on_joint = engine().mjtTrn.mjTRN_JOINT
        body = spec.worldbody
        for i in range(self.n_bodies):
            body = body.add_body(name=f"body_{i}", pos=(0.25, 0, 0 if i else 0.1))
            body.add_joint(name=f"joint_{i}", stiffness=20.0)
            body.add_geom(name=f"geom_{i}")
            body.add_site(name=f"site_{i}")
        for i in range(self.n_actuators):
            motor = spec.add_actuator(name=f"motor_{i}", target=f"joint_{i}", trntype=on_joint)
            motor.set_to_motor()
            motor.ctrllimited, motor.ctrlrange = 0, (-self.control_limit, self.control_limit)
        for i in range(self.n_bodies - 1):
            tendon = spec.add_tendon(name=f"tendon_{i}")
            tendon.wrap_site(f"site_{i}")
            tendon.wrap_site(f"site_{i + 1}")

    def construction(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        # Every other draw is of a damping, which is always 0.
        n = self.n_bodies
        return {"jnt_stiffness": random.uniform((15.0, 0.0) * n, (25.0, 0.0) * n, 2 * n)[..., ::2]}

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        direction = random.standard_normal(self.n_bodies)
        return {"qpos": math.sqrt(2.0) * direction / length(xp, direction)[..., None]}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos, physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        qpos, qvel, ctrl = physics.qpos, physics.qvel, physics.ctrl
        displacement = xp.linalg.vecdot(qpos, qpos)
        cost = 0.5 * displacement + self.control_cost_coef * 0.5 * xp.linalg.vecdot(ctrl, ctrl)
        at_rest = xp.sqrt(displacement + xp.linalg.vecdot(qvel, qvel)) < 1e-6
        return 1.0 - cost, at_rest
