"""Ball in cup: a ball on a string, in a plane."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

from envs.tasks.dm_control.base import ControlTask
from envs.tasks.settings import Duration
from envs.tasks.task import Array, copies


@dataclass(frozen=True, kw_only=True)
class BallInCup(ControlTask):
    """Swing the ball up and catch it; reward 1 while it is inside the cup. Observation 8, actions 2."""

    file: ClassVar[str] = "ball_in_cup.xml"
    fields: ClassVar[tuple[str, ...]] = ("site_xpos", "xpos", "ncon")
    contact_free: ClassVar[bool] = True
    time_limit: Duration = 20.0
    control_timestep: float | None = 0.02

    @cached_property
    def _catch(self) -> tuple[int, int, float, float]:
        """Ids of target site and ball, and how far apart they may be in x and z."""
        target, radius = self.model.site("target"), self.model.geom("ball").size[0]
        return target.id, self.bodies["ball"], float(target.size[0] - radius), float(target.size[2] - radius)

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        ball = random.uniform((-0.2, 0.2), (0.2, 0.5), 2)
        qpos = copies(default.qpos, ball.shape[:-1])
        qpos[..., 2:] = ball
        return {"qpos": qpos}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos, physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        target, ball, x, z = self._catch
        offset = xp.abs(physics.site_xpos[:, target] - physics.xpos[:, ball])
        return xp.where((offset[:, 0] < x) & (offset[:, 2] < z), 1.0, 0.0), None
