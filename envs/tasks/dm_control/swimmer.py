"""Swimmer: a chain of links in a viscous plane."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

from envs.mujoco_simulation import engine
from envs.tasks.dm_control.base import ControlTask, length, local_vector
from envs.tasks.settings import Duration
from envs.tasks.task import Array, copies, flat
from envs.tasks.tolerance import tolerance


@dataclass(frozen=True, kw_only=True)
class Swimmer(ControlTask):
    """Bring the nose to a target, drawn anew each episode. Observation 4 n_links + 1, actions n_links - 1.

    Quirk: a target is near, within 0.3 m, in one episode of five, and within 2 m in the others.
    """

    file: ClassVar[str] = "swimmer.xml"
    fields: ClassVar[tuple[str, ...]] = ("geom_xpos", "xmat", "sensordata")
    expanded: ClassVar[tuple[str, ...]] = ("geom_pos", "light_pos")
    time_limit: Duration = 30.0
    control_timestep: float | None = 0.03
    n_links: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_links < 3:
            raise ValueError(f"n_links must be at least 3, got {self.n_links}")

    def edit(self, spec: Any) -> None:
        mujoco = engine()
        link = spec.body("head")
        for i in range(self.n_links - 1):
            link = link.add_body(name=f"segment_{i}", pos=(0, 0.1, 0))
            for kind in ("visual", "inertial"):
                link.add_geom(spec.find_default(kind), name=f"{kind}_{i}")
            link.add_site(name=f"site_{i}")
            link.add_joint(name=f"joint_{i}", range=(-360 / self.n_links, 360 / self.n_links))
            motor = spec.add_actuator(name=f"motor_{i}", target=f"joint_{i}", trntype=mujoco.mjtTrn.mjTRN_JOINT)
            motor.set_to_motor()
            on_site: dict[str, Any] = {"objtype": mujoco.mjtObj.mjOBJ_SITE, "objname": f"site_{i}"}
            spec.add_sensor(name=f"velocimeter_{i}", type=mujoco.mjtSensor.mjSENS_VELOCIMETER, **on_site)
            spec.add_sensor(name=f"gyro_{i}", type=mujoco.mjtSensor.mjSENS_GYRO, **on_site)
        for camera in spec.cameras:
            if camera.mode == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM:
                camera.pos = camera.pos * (self.n_links / 6)

    @cached_property
    def _geoms(self) -> tuple[int, int, float]:
        """Ids of the target and the nose, and the target's radius."""
        target = self.model.geom("target")
        return target.id, self.geoms["nose"], float(target.size[0])

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        qpos = self.randomized_joints(random, default)
        bound = xp.where(random.uniform(0.0, 1.0, 1) < 0.2, 0.3, 2.0)
        target = 2.0 * bound * random.uniform(0.0, 1.0, 2) - bound
        geom_pos, light_pos = (copies(x, qpos.shape[:-1]) for x in (default.geom_pos, default.light_pos))
        geom_pos[..., self._geoms[0], :2] = target
        light_pos[..., self.model.light("target_light").id, :2] = target
        return {"qpos": qpos, "geom_pos": geom_pos, "light_pos": light_pos}

    def _to_target(self, physics: SimpleNamespace) -> Array:
        """x and y in the frame of the head, [N, 2]."""
        target, nose, _ = self._geoms
        return local_vector(physics.geom_xpos[:, target] - physics.geom_xpos[:, nose], physics.xmat[:, 1])[:, :2]

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        # linear and angular velocity of each link in its own frame, of which x, y and the turning are observed
        velocities = physics.sensordata[:, 12:].reshape(-1, self.n_links, 6)
        planar = xp.concatenate((velocities[:, :, :2], velocities[:, :, 5:]), 2)
        return physics.qpos[:, 3:], self._to_target(physics), flat(planar)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        radius = self._geoms[2]
        distance = length(xp, self._to_target(physics))
        return tolerance(xp, distance, 0.0, radius, 5.0 * radius, "long_tail"), None
