"""Published sequences of tasks for continual reinforcement learning, by name: what comes when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from envs.runner import Runner
from envs.sequence import Segment, make_sequence


@dataclass(frozen=True)
class Schedule:
    """Segments in order, and how many steps (over all rows) each lasts. After the last comes the first again."""

    segments: tuple[Segment, ...]
    switch_every: int


def slippery_ant(seed: int) -> Schedule:
    """Ant-v5 on ten grounds of other friction, log-uniform in [0.02, 2], 2 M steps each.

    Dohare et al. 2024, "Loss of plasticity in deep continual learning" (Nature 632), on an older Ant. A row changes at
    the end of its episode.
    """
    frictions = np.exp(np.random.default_rng(seed).uniform(np.log(0.02), np.log(2.0), 10))
    segments = [Segment("mujoco/Ant-v5", model={"friction": float(friction)}) for friction in frictions]
    return Schedule(tuple(segments), 2_000_000)


# Aitchison, Sweetser & Hutter 2023, "Atari-5" (arXiv:2210.02019): the ten games that predict the median of all best.
ATARI_10 = (
    "Amidar",
    "BattleZone",
    "Bowling",
    "DoubleDunk",
    "Frostbite",
    "KungFuMaster",
    "NameThisGame",
    "Phoenix",
    "Qbert",
    "Riverraid",
)


def sequential_atari(seed: int) -> Schedule:
    """Ten games of 20 M frames (5 M steps) each, with the full action set: the experiment of Lyle et al. 2024 (NaP).

    The paper (arXiv:2407.01800, figure 6) goes through its games twice and does not name them; these are Atari-10.
    """
    return Schedule(tuple(Segment(f"atari/{game}", {"full_action_set": True}) for game in ATARI_10), 5_000_000)


def _dmc(domain: str, *tasks: str) -> Callable[[int], Schedule]:
    def schedule(seed: int) -> Schedule:
        """Tasks of one dm_control robot in turn, as in Plasticine's continual DMC; 1 M steps each (ours)."""
        return Schedule(tuple(Segment(f"dmc/{domain}-{task}") for task in tasks), 1_000_000)

    return schedule


def one_arm(seed: int) -> Schedule:
    """Four manipulation tasks of one arm, 1 M steps each, in place of Continual World's (ours).

    Those of Wołczyk et al. 2021 (arXiv:2105.10919) are Meta-World's, whose newest package, metaworld 3.1.1, is made for
    mujoco 3.3.0: it cannot be installed beside dm-control 1.0.50, and its environments fail with mujoco 3.17.0.
    """
    tasks = ("bring_ball", "bring_peg", "insert_ball", "insert_peg")
    return Schedule(tuple(Segment(f"dmc/manipulator-{task}") for task in tasks), 1_000_000)


def shuffled_cartpole(seed: int) -> Schedule:
    """CartPole whose observation entries change places and signs every 10 000 steps: minutes on a CPU (ours)."""
    return Schedule(tuple(Segment("gym/CartPole-v1", shuffle=seed * 1000 + task) for task in range(10)), 10_000)


SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "slippery-ant": slippery_ant,
    "seq-ale": sequential_atari,
    "cont-dmc-dog": _dmc("dog", "stand", "walk", "run", "trot"),
    "cont-dmc-walker": _dmc("walker", "stand", "walk", "run"),
    "cont-dmc-quadruped": _dmc("quadruped", "walk", "run"),
    "cont-dmc-manipulator": one_arm,
    "shuffled-cartpole": shuffled_cartpole,
}

_PREFIX = "sequence/"
SWITCHING = ("switch_every", "switch_episodes")


def known_ids() -> list[str]:
    """`sequence/NAME` for every schedule."""
    return [f"{_PREFIX}{name}" for name in SCHEDULES]


def make(env_id: str, num_envs: int, seed: int, device: torch.device, threads: int, **settings: Any) -> Runner:
    """The runner of a schedule. See `envs.make`, whose `seed` draws episodes, never tasks.

    settings: `switch_every`, steps over all rows instead of the published number, or `switch_episodes`; and
    `schedule_seed` (0) for what a schedule itself draws, such as frictions. Raises ValueError for any other.
    """
    unknown = sorted(settings.keys() - {*SWITCHING, "schedule_seed"})
    if unknown:
        raise ValueError(f"{env_id} has no setting '{unknown[0]}'; it has {', '.join(SWITCHING)}, schedule_seed")
    schedule = SCHEDULES[env_id.removeprefix(_PREFIX)](settings.get("schedule_seed", 0))
    how = {name: settings[name] for name in SWITCHING if settings.get(name) is not None}
    how = how or {"switch_every": schedule.switch_every}
    return make_sequence(schedule.segments, num_envs, seed, device, threads, **how)


def make_listed(
    env_ids: Sequence[str], num_envs: int, seed: int, device: torch.device, threads: int, **settings: Any
) -> Runner:
    """The runner of a sequence whose tasks are named one by one. See `envs.make`.

    settings: `switch_every` or `switch_episodes`; all others are of every task. Raises ValueError for a sequence in a
    sequence, or tasks that are all the same.
    """
    nested = [env_id for env_id in env_ids if env_id.startswith(_PREFIX)]
    if nested:
        raise ValueError(f"{nested[0]} is a sequence of tasks itself and cannot be one of several")
    if len(set(env_ids)) < 2:
        raise ValueError(f"a sequence needs at least two tasks that differ, got {' '.join(env_ids) or 'none'}")
    own = {name: value for name, value in settings.items() if name not in SWITCHING}
    how = {name: settings[name] for name in SWITCHING if name in settings}
    return make_sequence([Segment(env_id, own) for env_id in env_ids], num_envs, seed, device, threads, **how)
