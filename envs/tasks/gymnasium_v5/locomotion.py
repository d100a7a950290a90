"""Robots that are paid for running, hopping, walking or swimming along x, and one for getting up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

from envs.tasks.gymnasium_v5.task import GymnasiumTask, clipped, negated, squared, within
from envs.tasks.settings import Count, Range, Scale
from envs.tasks.task import Array, flat, per_row


@dataclass(frozen=True, kw_only=True)
class HalfCheetah(GymnasiumTask):
    """Run forwards; never terminates. Observation 17, actions 6."""

    xml_file: str = "half_cheetah.xml"
    frame_skip: Count = 5
    forward_reward_weight: float = 1.0  # per metre per second
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: Scale = 0.1
    exclude_current_positions_from_observation: bool = True

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return self._normal_start(self.reset_noise_scale, random, default)

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        return physics.qpos[:, 0]

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos[:, 1 * self.exclude_current_positions_from_observation :], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return _forward(self, moved) - self.ctrl_cost_weight * squared(xp, physics.ctrl), None


@dataclass(frozen=True, kw_only=True)
class Swimmer(GymnasiumTask):
    """Swim along x in a plane; never terminates. Observation 8, actions 2."""

    xml_file: str = "swimmer.xml"
    frame_skip: Count = 4
    forward_reward_weight: float = 1.0  # per metre per second
    ctrl_cost_weight: float = 1e-4
    reset_noise_scale: Scale = 0.1
    exclude_current_positions_from_observation: bool = True

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return self._uniform_start(self.reset_noise_scale, random, default)

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        return physics.qpos[:, 0]

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos[:, 2 * self.exclude_current_positions_from_observation :], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return _forward(self, moved) - self.ctrl_cost_weight * squared(xp, physics.ctrl), None


@dataclass(frozen=True, kw_only=True)
class Hopper(GymnasiumTask):
    """Hop forwards on one leg. Observation 11, actions 3."""

    xml_file: str = "hopper.xml"
    frame_skip: Count = 4
    forward_reward_weight: float = 1.0  # per metre per second
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_state_range: Range = (-100.0, 100.0)  # of every coordinate and velocity but x and z
    healthy_z_range: Range = (0.7, float("inf"))
    healthy_angle_range: Range = (-0.2, 0.2)
    reset_noise_scale: Scale = 5e-3
    exclude_current_positions_from_observation: bool = True

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return self._uniform_start(self.reset_noise_scale, random, default)

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        return physics.qpos[:, 0]

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos[:, 1 * self.exclude_current_positions_from_observation :], physics.qvel.clip(-10.0, 10.0)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        state = xp.concatenate((physics.qpos[:, 2:], physics.qvel), 1)
        healthy = (
            per_row(within(state, self.healthy_state_range).all(1))
            & within(per_row(physics.qpos, 1), self.healthy_z_range)
            & within(per_row(physics.qpos, 2), self.healthy_angle_range)
        )
        return _walking(self, moved, healthy, self.ctrl_cost_weight * squared(xp, physics.ctrl))


@dataclass(frozen=True, kw_only=True)
class Walker2d(GymnasiumTask):
    """Walk forwards on two legs in a plane. Observation 17, actions 6."""

    xml_file: str = "walker2d_v5.xml"
    frame_skip: Count = 4
    forward_reward_weight: float = 1.0  # per metre per second
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range = (0.8, 2.0)
    healthy_angle_range: Range = (-1.0, 1.0)
    reset_noise_scale: Scale = 5e-3
    exclude_current_positions_from_observation: bool = True

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return self._uniform_start(self.reset_noise_scale, random, default)

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        return physics.qpos[:, 0]

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos[:, 1 * self.exclude_current_positions_from_observation :], physics.qvel.clip(-10.0, 10.0)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        z, angle = per_row(physics.qpos, 1), per_row(physics.qpos, 2)
        healthy = within(z, self.healthy_z_range) & within(angle, self.healthy_angle_range)
        return _walking(self, moved, healthy, self.ctrl_cost_weight * squared(xp, physics.ctrl))


@dataclass(frozen=True, kw_only=True)
class Ant(GymnasiumTask):
    """Walk forwards on four legs. Observation 105, of which 78 contact forces; actions 8."""

    fields: ClassVar[tuple[str, ...]] = ("xpos", "cfrc_ext")
    contact_forces: ClassVar[bool] = True

    xml_file: str = "ant.xml"
    frame_skip: Count = 5
    forward_reward_weight: float = 1.0  # per metre per second
    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    healthy_reward: float = 1.0
    main_body: int | str = 1  # whose speed is rewarded
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range = (0.2, 1.0)  # bounds included
    contact_force_range: Range = (-1.0, 1.0)
    reset_noise_scale: Scale = 0.1
    exclude_current_positions_from_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._body(self.main_body)

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return self._normal_start(self.reset_noise_scale, random, default)

    @cached_property
    def _main_body(self) -> int:
        return self._body(self.main_body)

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        return physics.xpos[:, self._main_body, 0]

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        pieces = physics.qpos[:, 2 * self.exclude_current_positions_from_observation :], physics.qvel
        if not self.include_cfrc_ext_in_observation:
            return pieces
        # 6 forces and torques a body, of which the world's are left out
        return *pieces, flat(physics.cfrc_ext)[:, 6:].clip(*self.contact_force_range)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        low, high = self.healthy_z_range
        z = per_row(physics.qpos, 2)
        contact = squared(xp, flat(physics.cfrc_ext).clip(*self.contact_force_range))
        cost = self.ctrl_cost_weight * squared(xp, physics.ctrl) + self.contact_cost_weight * contact
        return _walking(self, moved, (low <= z) & (z <= high), cost)


@dataclass(frozen=True, kw_only=True)
class Humanoid(GymnasiumTask):
    """Walk forwards upright. Observation 348, actions 17."""

    fields: ClassVar[tuple[str, ...]] = ("xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    constants: ClassVar[tuple[str, ...]] = ("body_mass",)
    contact_forces: ClassVar[bool] = True

    xml_file: str = "humanoid.xml"
    frame_skip: Count = 5
    forward_reward_weight: float = 1.25  # per metre per second of the centre of mass
    ctrl_cost_weight: float = 0.1
    contact_cost_weight: float = 5e-7
    contact_cost_range: Range = (-float("inf"), 10.0)
    healthy_reward: float = 5.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range = (1.0, 2.0)
    reset_noise_scale: Scale = 1e-2
    exclude_current_positions_from_observation: bool = True
    include_cinert_in_observation: bool = True
    include_cvel_in_observation: bool = True
    include_qfrc_actuator_in_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    @cached_property
    def _total_mass(self) -> float:
        return float(self.model.body_mass.sum())

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return self._uniform_start(self.reset_noise_scale, random, default)

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> Array:
        return xp.linalg.vecdot(physics.xipos[:, :, 0], physics.body_mass) / self._total_mass

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return _humanoid_observation(self, physics)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        contact = self.contact_cost_weight * squared(xp, flat(physics.cfrc_ext))
        cost = self.ctrl_cost_weight * squared(xp, physics.ctrl) + clipped(contact, self.contact_cost_range)
        return _walking(self, moved, within(per_row(physics.qpos, 2), self.healthy_z_range), cost)


@dataclass(frozen=True, kw_only=True)
class HumanoidStandup(GymnasiumTask):
    """Get up from lying on the back; never terminates. Observation 348, actions 17."""

    fields: ClassVar[tuple[str, ...]] = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    contact_forces: ClassVar[bool] = True

    xml_file: str = "humanoidstandup.xml"
    frame_skip: Count = 5
    ctrl_cost_weight: float = 0.1
    impact_cost_weight: float = 5e-7
    impact_cost_range: Range = (-float("inf"), 10.0)
    reset_noise_scale: Scale = 1e-2
    exclude_current_positions_from_observation: bool = True
    include_cinert_in_observation: bool = True
    include_cvel_in_observation: bool = True
    include_qfrc_actuator_in_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return self._uniform_start(self.reset_noise_scale, random, default)

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return _humanoid_observation(self, physics)

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        impact = self.impact_cost_weight * squared(xp, flat(physics.cfrc_ext))
        cost = self.ctrl_cost_weight * squared(xp, physics.ctrl) + clipped(impact, self.impact_cost_range)
        return per_row(physics.qpos, 2) * (1.0 / self.timestep) - cost + 1.0, None


def _humanoid_observation(task: Humanoid | HumanoidStandup, physics: SimpleNamespace) -> tuple[Array, ...]:
    pieces = [physics.qpos[:, 2 * task.exclude_current_positions_from_observation :], physics.qvel]
    # 10, 6 and 6 numbers a body, of which the world's are left out; the root has 6 degrees of freedom and no actuator
    if task.include_cinert_in_observation:
        pieces.append(flat(physics.cinert)[:, 10:])
    if task.include_cvel_in_observation:
        pieces.append(flat(physics.cvel)[:, 6:])
    if task.include_qfrc_actuator_in_observation:
        pieces.append(physics.qfrc_actuator[:, 6:])
    if task.include_cfrc_ext_in_observation:
        pieces.append(flat(physics.cfrc_ext)[:, 6:])
    return tuple(pieces)


def _forward(task: HalfCheetah | Swimmer | Hopper | Walker2d | Ant | Humanoid, moved: Array) -> Array:
    return per_row(moved) * (task.forward_reward_weight / task.dt)


def _walking(task: Hopper | Walker2d | Ant | Humanoid, moved: Array, healthy: Array, cost: Array) -> tuple[Array, Any]:
    """Speed and health are paid, effort costs, and an unhealthy robot ends the episode. All [N]."""
    reward = _forward(task, moved) + healthy * task.healthy_reward - cost
    return reward, negated(healthy) if task.terminate_when_unhealthy else None
