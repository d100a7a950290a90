"""A MuJoCo task whose episodes end by a script, so that every field of every step is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from envs.runner import Runner
from envs.tasks.gymnasium_v5.task import GymnasiumTask
from envs.tasks.settings import Count
from envs.tasks.task import Array, per_row

MODEL = """
<mujoco>
  <option timestep="0.25" gravity="0 0 0"/>
  <worldbody>
    <body><joint name="script" type="slide"/><geom size="0.1"/></body>
  </worldbody>
  <actuator><motor joint="script" ctrlrange="0 1" gear="0"/></actuator>
</mujoco>
"""
LIMIT = 3  # steps


@dataclass(frozen=True, kw_only=True)
class Scripted(GymnasiumTask):
    """The episode draws a number and keeps it: the whole part of it, 1 to 4, is the step at which it terminates.

    So episodes of one step terminate, others terminate when they are truncated, and some are truncated only.
    Observation: that number, and the steps so far. Reward: ten times the steps so far, and the action.
    """

    xml_file: str
    frame_skip: Count = 1
    max_episode_steps: Count = LIMIT

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return {"qpos": random.uniform(1.0, 5.0, 1)}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos, physics.time.reshape(-1, 1) / self.timestep

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        taken = per_row(physics.time.reshape(-1, 1), 0) / self.timestep
        return 10.0 * taken + per_row(physics.ctrl, 0), taken >= per_row(physics.qpos // 1.0, 0)


def scripted(folder: Path) -> Scripted:
    path = folder / "scripted.xml"
    path.write_text(MODEL)
    return Scripted(xml_file=str(path))


def follow_the_script(runner: Runner, steps: int) -> dict[tuple[int, bool, bool], int]:
    """Check every field of every step; how many episodes ended after how many steps, terminated, truncated."""
    obs = runner.reset().clone()
    rows, seen = len(obs), {}
    taken, total = [0] * rows, [0.0] * rows
    for time in range(steps):
        action = torch.tensor([[(time + row) % 3 / 2] for row in range(rows)])
        before = obs.tolist()
        step = runner.step(action)
        for row in range(rows):
            number = before[row][0]
            assert before[row][1] == taken[row]
            taken[row] += 1
            reward = 10.0 * taken[row] + float(action[row, 0])
            total[row] += reward
            terminated, truncated = taken[row] >= int(number), taken[row] == LIMIT
            ended = terminated or truncated
            assert float(step.reward[row]) == reward
            assert step.final_obs[row].tolist() == [number, taken[row]]
            assert bool(step.terminated[row]) == terminated
            assert bool(step.truncated[row]) == truncated
            assert bool(step.episode_ended[row]) == ended
            assert int(step.episode_length[row]) == (taken[row] if ended else 0)
            assert float(step.episode_return[row]) == (total[row] if ended else 0.0)
            if ended:
                kind = taken[row], terminated, truncated
                seen[kind] = seen.get(kind, 0) + 1
                taken[row], total[row] = 0, 0.0
                assert step.obs[row, 1] == 0
                assert step.obs[row, 0] != number
            else:
                assert torch.equal(step.obs[row], step.final_obs[row])
        obs = step.obs.clone()
    return seen


KINDS = {(1, True, False), (2, True, False), (3, True, True), (3, False, True)}
