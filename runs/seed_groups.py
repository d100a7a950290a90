"""Which seeds of a run train together: as one population, in one process, or each in a process of its own."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch

from envs.cores import available_cores

Groups = tuple[tuple[int, ...], ...]
SEEDS_AS = ("auto", "population", "processes")
# Of two seeds in turns on one core, a population of two needs this part of the time (docs/results/speed.md).
_TIME_OF_TWO = 0.8


def group_seeds(seeds_as: str, seeds: Sequence[int], liftable: bool, device: torch.device, images: bool) -> Groups:
    """The groups of seeds that train as one population, each in a process of its own; one seed alone is a group too.

    liftable: whether the agent can train a population in this environment. "auto" on a CPU: as many groups as there are
    cores, as equal as can be, because seeds as a population take less of a core than as processes. Not for images,
    whose convolutions gain nothing (docs/results/speed.md), and not where the cores of smaller groups would idle so
    long that processes, which share all cores, are faster. On a GPU: one population.
    Raises ValueError for an unknown way, or for a population of an agent that cannot be one.
    """
    if seeds_as not in SEEDS_AS:
        raise ValueError(f"unknown --seeds-as '{seeds_as}', it is one of {', '.join(SEEDS_AS)}")
    if seeds_as == "population" and not liftable:
        raise ValueError("this run cannot train its seeds as a population; use --seeds-as processes")
    count = len(seeds)
    if seeds_as == "population" or (seeds_as == "auto" and liftable and device.type != "cpu"):
        count = 1
    elif seeds_as == "auto" and liftable and not images:
        cores = available_cores()
        largest = math.ceil(count / cores)
        if count / cores >= _TIME_OF_TWO * largest:
            count = min(cores, count)
    size, larger = divmod(len(seeds), count)
    starts = [number * size + min(number, larger) for number in range(count + 1)]
    return tuple(tuple(seeds[start:end]) for start, end in zip(starts[:-1], starts[1:], strict=True))


def in_step(groups: Groups, steps: Mapping[int, int], others: Collection[int]) -> Groups:
    """The groups, but seeds apart that are not at the same step, because one was lost and is tried again.

    others: seeds that are done, or begin again, and so do not go on with those at their step.
    """
    parts: dict[tuple[int, int, bool], list[int]] = {}
    for number, group in enumerate(groups):
        for seed in group:
            parts.setdefault((number, steps[seed], seed in others), []).append(seed)
    return tuple(tuple(part) for part in parts.values())


def described(groups: Groups) -> str:
    """The groups in words, for a message: "0, 1, 2 together; 3 alone"."""
    alone = [str(group[0]) for group in groups if len(group) == 1]
    together = [f"{', '.join(map(str, group))} together" for group in groups if len(group) > 1]
    return "; ".join([*together, *([f"{', '.join(alone)} alone"] if alone else [])])
