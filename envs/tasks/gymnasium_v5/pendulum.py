"""Poles on a cart that are to be kept up."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

from envs.tasks.gymnasium_v5.task import GymnasiumTask, negated
from envs.tasks.settings import Count, Scale
from envs.tasks.task import Array, per_row


@dataclass(frozen=True, kw_only=True)
class InvertedPendulum(GymnasiumTask):
    """Keep a pole on a cart within 0.2 rad of upright. Observation 4, action 1."""

    xml_file: str = "inverted_pendulum.xml"
    frame_skip: Count = 2
    reset_noise_scale: Scale = 0.01

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return self._uniform_start(self.reset_noise_scale, random, default)

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos, physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        fallen = abs(per_row(physics.qpos, 1)) > 0.2
        return negated(fallen) * 1.0, fallen


@dataclass(frozen=True, kw_only=True)
class InvertedDoublePendulum(GymnasiumTask):
    """Keep the tip of two poles on a cart above 1 m. Observation 9, action 1."""

    fields: ClassVar[tuple[str, ...]] = ("site_xpos", "qfrc_constraint")

    xml_file: str = "inverted_double_pendulum.xml"
    frame_skip: Count = 5
    healthy_reward: float = 10.0
    reset_noise_scale: Scale = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.nsite == 0:
            raise ValueError(f"{self._path} has no site, of which the first is the tip of the poles")

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return self._normal_start(self.reset_noise_scale, random, default)

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        cart, angles = physics.qpos[:, :1], physics.qpos[:, 1:]
        rail = physics.qfrc_constraint[:, :1].clip(-10.0, 10.0)
        return cart, xp.sin(angles), xp.cos(angles), physics.qvel.clip(-10.0, 10.0), rail

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        x, z = per_row(physics.site_xpos, 0, 0), per_row(physics.site_xpos, 0, 2)
        lower, upper = per_row(physics.qvel, 1), per_row(physics.qvel, 2)
        fallen = z <= 1.0
        distance_penalty = 0.01 * x * x + (z - 2.0) * (z - 2.0)
        velocity_penalty = 1e-3 * lower * lower + 5e-3 * upper * upper
        return negated(fallen) * self.healthy_reward - distance_penalty - velocity_penalty, fallen
