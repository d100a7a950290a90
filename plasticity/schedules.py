"""Learning-rate schedules as objects: the part of an optimiser's own learning rate to use at each step.

With projected weights the schedule is all that anneals the effective learning rate (spec of NaP, 1.7).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """`factor` is multiplied with the learning rates that the optimiser was made with.

    uses_boundaries: it begins again when the task changes.
    """

    @property
    def uses_boundaries(self) -> bool: ...

    def factor(self, step: int, steps_of_task: int) -> float:
        """For the step after `step` steps in all and `steps_of_task` of this task."""
        ...


def _progress(step: int, start: int, steps: int) -> float:
    return min(max((step - start) / max(steps - start, 1), 0.0), 1.0)


@dataclass(frozen=True)
class Constant:
    """Always the same."""

    uses_boundaries = False

    def factor(self, step: int, steps_of_task: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear:
    """From 1 to `end` over `steps`, then `end`."""

    steps: int
    end: float = 0.0

    uses_boundaries = False

    def __post_init__(self) -> None:
        _check(self)

    def factor(self, step: int, steps_of_task: int) -> float:
        return 1 + (self.end - 1) * _progress(step, 0, self.steps)


@dataclass(frozen=True)
class Cosine:
    """From `start` linearly to 1 over `warmup` steps, then half a cosine wave down to `end` at `steps`.

    restart: anew at each task, which then takes `steps`. The setting reported for the sequence of Atari games is
    warmup 1000, start 1e-8 / peak, end 1e-6 / peak, with the peak, 6.25e-4 there, as the optimiser's learning rate.
    """

    steps: int
    warmup: int = 0
    start: float = 0.0
    end: float = 0.0
    restart: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def uses_boundaries(self) -> bool:
        return self.restart

    def factor(self, step: int, steps_of_task: int) -> float:
        now = steps_of_task if self.restart else step
        if now < self.warmup:
            return self.start + (1 - self.start) * now / self.warmup
        return self.end + (1 - self.end) * 0.5 * (1 + math.cos(math.pi * _progress(now, self.warmup, self.steps)))


def _check(schedule: Any) -> None:
    name = type(schedule).__name__
    if schedule.steps < 1 or not 0 <= getattr(schedule, "warmup", 0) < schedule.steps:
        raise ValueError(f"{name}: steps must be at least 1 and more than warmup, got {schedule}")
    if not (0 <= schedule.end <= 1 and 0 <= getattr(schedule, "start", 0.0) <= 1):
        raise ValueError(f"{name}: start and end are parts of the learning rate, between 0 and 1; got {schedule}")


@dataclass(frozen=True)
class Replay:
    """The effective learning rate that a network lost to the growth of its norms, replayed on a projected one.

    growth: ||u|| / radius of each group of the recorded run (`NaP.growth`): [T, G], or [T, G, K] for K members;
    growth[i] held before step i * every, linear between. A smooth fit of it is a growth as well. one_rate: replay the
    root mean square over groups in every group, instead of each group's own.

    It acts on the projected weights only, so its `factor` for the optimiser is 1.
    """

    growth: Tensor
    every: int = 1
    one_rate: bool = False

    uses_boundaries = False

    def __post_init__(self) -> None:
        if self.growth.dim() not in (2, 3) or not len(self.growth) or self.every < 1:
            raise ValueError(f"growth must be [T, G] or [T, G, K] with T >= 1, got {list(self.growth.shape)}")

    def factor(self, step: int, steps_of_task: int) -> float:
        return 1.0

    def growth_before(self, step: int) -> Tensor:
        """||u|| / radius that the recorded run had before `step`, [G] or [G, K]; the last one after its end."""
        last = len(self.growth) - 1
        index, part = min(step // self.every, last), (step % self.every) / self.every
        growth = torch.lerp(self.growth[index], self.growth[min(index + 1, last)], part)
        return growth.square().mean(0, keepdim=True).sqrt().expand_as(growth) if self.one_rate else growth


class Scheduled:
    """Sets the learning rates of one optimiser before each of its steps.

    optimizer: a `torch.optim.Optimizer`, or one with an attribute `learning_rate` (`plasticity.adam.Adam`).
    """

    def __init__(self, optimizer: Any, schedule: Schedule):
        self.optimizer, self.schedule = optimizer, schedule
        self.base = learning_rates(optimizer)
        self.last_boundary = 0
        self.set_for(0)

    def set_for(self, step: int) -> None:
        """The rates for the step after `step` steps."""
        factor = self.schedule.factor(step, step - self.last_boundary)
        set_learning_rates(self.optimizer, [rate * factor for rate in self.base])

    def at_boundary(self, step: int) -> None:
        """The task changes after `step` steps."""
        self.last_boundary = step
        self.set_for(step)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"base": self.base, "last_boundary": self.last_boundary}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Undo `state_dict` at `step`."""
        self.base, self.last_boundary = list(state["base"]), state["last_boundary"]
        self.set_for(step)


def learning_rates(optimizer: Any) -> list[float]:
    """Of each parameter group."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return [float(group["lr"]) for group in optimizer.param_groups]
    return [optimizer.learning_rate]


def set_learning_rates(optimizer: Any, rates: list[float]) -> None:
    """Of each parameter group; a rate that is a tensor is changed in place."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        (optimizer.learning_rate,) = rates
        return
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
