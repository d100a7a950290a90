"""Arms that reach for a target, or push something to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from envs.tasks.gymnasium_v5.task import GymnasiumTask, norm, squared
from envs.tasks.settings import Count
from envs.tasks.task import Array, copies

CANDIDATES = 64  # the chance that Pusher accepts none of them is below 1e-26


@dataclass(frozen=True, kw_only=True)
class Reacher(GymnasiumTask):
    """Reach a target in a plane with a two-link arm; never terminates. Observation 10, actions 2."""

    fields: ClassVar[tuple[str, ...]] = ("xpos",)

    xml_file: str = "reacher.xml"
    frame_skip: Count = 2
    max_episode_steps: Count = 50
    reward_dist_weight: float = 1.0  # per metre
    reward_control_weight: float = 1.0

    @cached_property
    def _bodies(self) -> tuple[int, int]:
        return self._body("fingertip"), self._body("target")

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        qpos = default.qpos + random.uniform(-0.1, 0.1, self.model.nq)
        qpos[..., -2:] = _first_accepted(
            random, lambda count: random.uniform(-0.2, 0.2, 2 * count), lambda goal: norm(xp, goal) < 0.2
        )
        qvel = random.uniform(-0.005, 0.005, self.model.nv)
        qvel[..., -2:] = 0.0
        return {"qpos": qpos, "qvel": qvel}

    def _to_target(self, physics: SimpleNamespace) -> Array:
        fingertip, target = self._bodies
        return physics.xpos[:, fingertip] - physics.xpos[:, target]

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        angles, target = physics.qpos[:, :2], physics.qpos[:, 2:]
        return xp.cos(angles), xp.sin(angles), target, physics.qvel[:, :2], self._to_target(physics)[:, :2]

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        distance = norm(xp, self._to_target(physics))
        return -self.reward_dist_weight * distance - self.reward_control_weight * squared(xp, physics.ctrl), None


@dataclass(frozen=True, kw_only=True)
class Pusher(GymnasiumTask):
    """Push a cylinder to a goal with a seven-joint arm; never terminates. Observation 23, actions 7."""

    fields: ClassVar[tuple[str, ...]] = ("xpos",)

    xml_file: str = "pusher_v5.xml"
    frame_skip: Count = 5
    max_episode_steps: Count = 100
    reward_near_weight: float = 0.5  # per metre from the arm's tip to the cylinder
    reward_dist_weight: float = 1.0  # per metre from the cylinder to the goal
    reward_control_weight: float = 0.1

    @cached_property
    def _bodies(self) -> tuple[int, int, int]:
        return self._body("tips_arm"), self._body("object"), self._body("goal")

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        cylinder = _first_accepted(
            random,
            lambda count: random.uniform((-0.3, -0.2) * count, (0.0, 0.2) * count, 2 * count),
            lambda place: norm(xp, place) > 0.17,
        )
        qpos = copies(default.qpos, cylinder.shape[:-1])
        qpos[..., -4:-2] = cylinder
        qpos[..., -2:] = 0.0  # the goal
        qvel = random.uniform(-0.005, 0.005, self.model.nv)
        qvel[..., -4:] = 0.0
        return {"qpos": qpos, "qvel": qvel}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        tip, cylinder, goal = self._bodies
        xpos = physics.xpos
        return physics.qpos[:, :7], physics.qvel[:, :7], xpos[:, tip], xpos[:, cylinder], xpos[:, goal]

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        xpos, (tip, cylinder, goal) = physics.xpos, self._bodies
        near, distance = norm(xp, xpos[:, cylinder] - xpos[:, tip]), norm(xp, xpos[:, cylinder] - xpos[:, goal])
        control = self.reward_control_weight * squared(xp, physics.ctrl)
        return -self.reward_dist_weight * distance - control - self.reward_near_weight * near, None


def _first_accepted(random: Any, draw: Callable[[int], Array], accepts: Callable[[Array], Array]) -> Array:
    """[..., 2], the first point that is accepted.

    draw: gives that many points, [..., 2 * count]. accepts: [..., 2] -> [...] bool.
    A generator of one row draws one by one, as the reference. A source of all rows draws `CANDIDATES` a row at once,
    because a GPU would have to report to the host whether a row still waits; a row that accepts none gets zeros.
    """
    if isinstance(random, np.random.Generator):
        while not accepts(point := draw(1)):
            pass
        return point
    points = draw(CANDIDATES).reshape(-1, CANDIDATES, 2)
    accepted = accepts(points)
    first = accepted & (accepted.cumsum(1) == 1)
    return (points * first[..., None]).sum(1)
