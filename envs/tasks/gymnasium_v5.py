"""Gymnasium's MuJoCo locomotion tasks, version 5 (Towers et al. 2024, arXiv:2407.17032; gymnasium.farama.org).

Equal to the reference given the same seeds and actions, observations bit for bit (tests/envs/test_mujoco_gymnasium.py).
Quirks kept: the rewards of Ant and Humanoid compare body positions that lag the state by one simulator step; contact
forces are those after the last Runge-Kutta stage, and 0 in the first observation of an episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from envs.mujoco_simulation import STAGE_NONE, Model, Simulations, load_model
from envs.tasks.task import Array, flat, package_file


@dataclass(frozen=True, kw_only=True)
class GymnasiumTask:
    """What the five tasks share, with the settings of the reference's constructors under the same names."""

    file: ClassVar[str]
    normal_velocity: ClassVar[bool] = False  # distribution of the initial velocities: normal, else uniform
    package: ClassVar[str] = "gymnasium"
    fields: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[str, ...]] = ()
    expanded: ClassVar[tuple[str, ...]] = ()
    stage: ClassVar[int] = STAGE_NONE
    contact_forces: ClassVar[bool] = False
    # Gymnasium's own default camera stands still, and a running robot leaves its picture; the models bring this one.
    camera: ClassVar[int | str] = "track"

    horizon: int = 1000
    frame_skip: int = 5
    forward_reward_weight: float = 1.0  # per metre per second
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 0.1

    def __post_init__(self) -> None:
        if self.frame_skip < 1 or self.horizon < 1:
            raise ValueError(f"frame_skip and horizon must be at least 1, got {self.frame_skip} and {self.horizon}")
        if self.reset_noise_scale < 0:
            raise ValueError(f"reset_noise_scale must not be negative, got {self.reset_noise_scale}")

    @cached_property
    def model(self) -> Model:
        return load_model(package_file("gymnasium", "envs", "mujoco", "assets", self.file))

    @property
    def substeps(self) -> int:
        return self.frame_skip

    @cached_property
    def dt(self) -> float:
        """Seconds per action."""
        return self.model.opt.timestep * self.frame_skip

    def generator(self, seed: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))

    def generator_state(self, generator: np.random.Generator) -> dict[str, Any]:
        return dict(generator.bit_generator.state)

    def set_generator_state(self, generator: np.random.Generator, state: dict[str, Any]) -> None:
        generator.bit_generator.state = state

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        scale, model = self.reset_noise_scale, self.model
        qpos = default.qpos + random.uniform(-scale, scale, model.nq)
        if self.normal_velocity:
            return {"qpos": qpos, "qvel": scale * random.standard_normal(model.nv)}
        return {"qpos": qpos, "qvel": random.uniform(-scale, scale, model.nv)}

    def build(self, physics: SimpleNamespace, generators: list[Any]) -> None:
        pass

    def begin(
        self, simulations: Simulations, physics: SimpleNamespace, rows: np.ndarray, generators: list[Any]
    ) -> None:
        simulations.reset(rows)
        default = SimpleNamespace(qpos=self.model.qpos0)
        for row in rows:
            for name, values in self.start(np, generators[row], default).items():
                getattr(physics, name)[row] = values
        simulations.forward(rows)

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        """x of the root, in metres."""
        return physics.qpos[:, 0]

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        raise NotImplementedError

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        raise NotImplementedError

    def _control_cost(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        return self.ctrl_cost_weight * _squared(xp, physics.ctrl)


@dataclass(frozen=True, kw_only=True)
class HalfCheetah(GymnasiumTask):
    """Run forwards; never terminates. Observation 17, actions 6."""

    file: ClassVar[str] = "half_cheetah.xml"
    normal_velocity: ClassVar[bool] = True

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos[:, 1:], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return moved * (self.forward_reward_weight / self.dt) - self._control_cost(xp, physics), None


@dataclass(frozen=True, kw_only=True)
class Hopper(GymnasiumTask):
    """Hop forwards on one leg. Observation 11, actions 3."""

    file: ClassVar[str] = "hopper.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_state_range: tuple[float, float] = (-100.0, 100.0)
    healthy_z_range: tuple[float, float] = (0.7, float("inf"))
    healthy_angle_range: tuple[float, float] = (-0.2, 0.2)
    reset_noise_scale: float = 5e-3

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos[:, 1:], physics.qvel.clip(-10.0, 10.0)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        qpos = physics.qpos
        state = xp.concatenate((qpos[:, 2:], physics.qvel), 1)
        healthy = _within(state, self.healthy_state_range).all(1)
        healthy = healthy & _within(qpos[:, 1], self.healthy_z_range) & _within(qpos[:, 2], self.healthy_angle_range)
        return _walking(self, moved, healthy, self._control_cost(xp, physics))


@dataclass(frozen=True, kw_only=True)
class Walker2d(GymnasiumTask):
    """Walk forwards on two legs in a plane. Observation 17, actions 6."""

    file: ClassVar[str] = "walker2d_v5.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple[float, float] = (0.8, 2.0)
    healthy_angle_range: tuple[float, float] = (-1.0, 1.0)
    reset_noise_scale: float = 5e-3

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos[:, 1:], physics.qvel.clip(-10.0, 10.0)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        qpos = physics.qpos
        healthy = _within(qpos[:, 1], self.healthy_z_range) & _within(qpos[:, 2], self.healthy_angle_range)
        return _walking(self, moved, healthy, self._control_cost(xp, physics))


@dataclass(frozen=True, kw_only=True)
class Ant(GymnasiumTask):
    """Walk forwards on four legs. Observation 105, of which 78 contact forces; actions 8."""

    file: ClassVar[str] = "ant.xml"
    normal_velocity: ClassVar[bool] = True
    fields: ClassVar[tuple[str, ...]] = ("xpos", "cfrc_ext")
    contact_forces: ClassVar[bool] = True
    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    healthy_reward: float = 1.0
    main_body: int = 1
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple[float, float] = (0.2, 1.0)
    contact_force_range: tuple[float, float] = (-1.0, 1.0)

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        """x of the torso, in metres."""
        return physics.xpos[:, self.main_body, 0]

    def _contact_forces(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        return xp.clip(flat(physics.cfrc_ext), *self.contact_force_range)

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        # 6 forces and torques a body, of which the world's are left out
        return physics.qpos[:, 2:], physics.qvel, self._contact_forces(xp, physics)[:, 6:]

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        low, high = self.healthy_z_range
        z = physics.qpos[:, 2]
        contact = self.contact_cost_weight * _squared(xp, self._contact_forces(xp, physics))
        cost = self._control_cost(xp, physics) + contact
        return _walking(self, moved, (low <= z) & (z <= high), cost)


@dataclass(frozen=True, kw_only=True)
class Humanoid(GymnasiumTask):
    """Walk forwards upright. Observation 348, actions 17."""

    file: ClassVar[str] = "humanoid.xml"
    fields: ClassVar[tuple[str, ...]] = ("xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    constants: ClassVar[tuple[str, ...]] = ("body_mass",)
    contact_forces: ClassVar[bool] = True
    forward_reward_weight: float = 1.25
    contact_cost_weight: float = 5e-7
    contact_cost_range: tuple[float, float] = (-float("inf"), 10.0)
    healthy_reward: float = 5.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple[float, float] = (1.0, 2.0)
    reset_noise_scale: float = 1e-2

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        """x of the centre of mass, in metres."""
        mass = physics.body_mass
        return (physics.xipos[:, :, 0] @ mass) / mass.sum()

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return (
            physics.qpos[:, 2:],
            physics.qvel,
            flat(physics.cinert)[
                :, 10:
            ],  # 10, 6 and 6 numbers a body in these three, of which the world's are left out
            flat(physics.cvel)[:, 6:],
            physics.qfrc_actuator[:, 6:],  # the root has 6 degrees of freedom and no actuator
            flat(physics.cfrc_ext)[:, 6:],
        )

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        contact = self.contact_cost_weight * _squared(xp, flat(physics.cfrc_ext))
        cost = self._control_cost(xp, physics) + xp.clip(contact, *self.contact_cost_range)
        healthy = _within(physics.qpos[:, 2], self.healthy_z_range)
        return _walking(self, moved, healthy, cost)


def _squared(xp: ModuleType, x: Array) -> Array:
    """Sum of squares of each row, [N, k] -> [N]."""
    # NumPy's ufunc lacks the Python wrapper of `linalg`, which costs 2 % of a HalfCheetah step at one row.
    return np.vecdot(x, x) if isinstance(x, np.ndarray) else xp.linalg.vecdot(x, x)


def _within(x: Array, bounds: tuple[float, float]) -> Array:
    return (bounds[0] < x) & (x < bounds[1])


def _walking(task: Hopper | Walker2d | Ant | Humanoid, moved: Array, healthy: Array, cost: Array) -> tuple[Array, Any]:
    """Speed and health are paid, effort costs, and an unhealthy robot ends the episode. All [N]."""
    reward = moved * (task.forward_reward_weight / task.dt) + healthy * task.healthy_reward - cost
    return reward, ~healthy if task.terminate_when_unhealthy else None


TASKS: dict[str, type[GymnasiumTask]] = {
    "mujoco/HalfCheetah-v5": HalfCheetah,
    "mujoco/Hopper-v5": Hopper,
    "mujoco/Walker2d-v5": Walker2d,
    "mujoco/Ant-v5": Ant,
    "mujoco/Humanoid-v5": Humanoid,
}
