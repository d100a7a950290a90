"""Settings that change from task to task.

The abstract of the paper finds it promising to adapt the components of dynamic sparse training; what its authors
adapted could not be read. The three policies here are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Policy = Literal["none", "explore-then-exploit", "erk-then-uniform", "free-capacity-density"]
_ENOUGH = 0.2  # free share of the tightest layer, above which ERK goes on
_LEAST = 0.01  # of the density that was asked for, where next to nothing is free


@dataclass(frozen=True)
class History:
    """What a member knows before a task.

    task, tasks: its number from 0, and how many there will be. free: by layer, the share of weights that no task owns;
    all_free: of the whole network. exploration, reused, accuracy: of the task before, the share of weights that were
    active at some time, the share of its own that it took from others, and how well it fits its training samples.
    """

    task: int
    tasks: int
    free: Mapping[str, float]
    all_free: float
    exploration: float = 0.0
    reused: float = 0.0
    accuracy: float = 0.0


class Changeable(Protocol):
    """The settings that the policies read."""

    @property
    def growth(self) -> str: ...

    @property
    def density(self) -> float: ...


# From what is known and the settings, those that the next task has instead. Between members only init and density may
# differ.
Adapt = Callable[[History, Any], Mapping[str, Any]]


def explore_then_exploit(history: History, config: Changeable) -> dict[str, Any]:
    """Random growth (or unfired, if that is the setting) for the first half of the tasks, then along the gradient."""
    if 2 * history.task >= history.tasks:
        return {"growth": "gradient"}
    return {"growth": config.growth if config.growth in ("random", "unfired") else "random"}


def erk_then_uniform(history: History, config: Changeable) -> dict[str, Any]:
    """ERK while every layer has more than a fifth of its weights free."""
    return {"init": "erk" if min(history.free.values()) > _ENOUGH else "uniform"}


def free_capacity_density(history: History, config: Changeable) -> dict[str, Any]:
    """No task takes more than its part of what is free: d_t = min(d, free / (T - t))."""
    part = history.all_free / (history.tasks - history.task)
    return {"density": max(min(config.density, part), _LEAST * config.density)}


POLICIES: dict[str, Adapt] = {
    "none": lambda history, config: {},
    "explore-then-exploit": explore_then_exploit,
    "erk-then-uniform": erk_then_uniform,
    "free-capacity-density": free_capacity_density,
}
