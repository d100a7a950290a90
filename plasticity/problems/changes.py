"""What makes the next task: other pixels, other labels, other classes, or another function.

The content of task k of a member depends on (seed, k) alone, not on what was drawn before, so a stream can be entered
at any task. Three changes of labels are three different problems (specs/nap-and-plasticity.md, section 2.2): `Redrawn`
labels change their counts, `Shuffled` ones keep them and lose their images, `Renamed` ones keep their images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Generators = Callable[[int], torch.Generator]  # task -> a generator for its content, always the same


@dataclass(frozen=True)
class Content:
    """One member's task. labels: [N], of every image of the pool.

    rows: [M], images of the pool that belong to it (None: all). permutation: [D], the pixel shown at each place (None:
    as they are). test_labels: [T], -1 for test images that do not belong to it (None: the task's own labels do not
    exist for them).
    """

    labels: Tensor
    rows: Tensor | None = None
    permutation: Tensor | None = None
    test_labels: Tensor | None = None


@dataclass(frozen=True)
class Pool:
    """What tasks are made of: the true labels [N] and [T] of a member's images, the number of pixels and classes."""

    labels: Tensor
    test_labels: Tensor
    pixels: int
    classes: int


class Change(Protocol):
    """How tasks follow one another."""

    def content(self, task: int, pool: Pool, generators: Generators) -> Content:
        """Task number `task` of one member."""
        ...

    def is_measured(self, task: int) -> bool:
        """Whether a task counts in a run's summary; all of them do, unless some are easier by design."""
        ...


class _AllMeasured:
    def is_measured(self, task: int) -> bool:
        return True


@dataclass(frozen=True)
class Constant(_AllMeasured):
    """No change: the first task of another change all along, or the data as they are."""

    of: Change | None = None

    def content(self, task: int, pool: Pool, generators: Generators) -> Content:
        if self.of is None:
            return Content(pool.labels, test_labels=pool.test_labels)
        return self.of.content(0, pool, generators)


@dataclass(frozen=True)
class Permuted(_AllMeasured):
    """A new order of the pixels. composed: on top of the task before; else of the original image."""

    composed: bool = False
    first_unpermuted: bool = False

    def content(self, task: int, pool: Pool, generators: Generators) -> Content:
        device = pool.labels.device
        order = torch.arange(pool.pixels, device=device)
        first = 1 if self.first_unpermuted else 0
        for index in range(first if self.composed else max(task, first), task + 1):
            generator = generators(index)
            order = order[torch.randperm(pool.pixels, generator=generator, device=device)]
        return Content(pool.labels, permutation=order, test_labels=pool.test_labels)


@dataclass(frozen=True)
class Redrawn(_AllMeasured):
    """Each image gets a label drawn uniformly from all classes."""

    def content(self, task: int, pool: Pool, generators: Generators) -> Content:
        generator = generators(task)
        labels = torch.randint(pool.classes, pool.labels.shape, generator=generator, device=pool.labels.device)
        return Content(labels)


@dataclass(frozen=True)
class Shuffled(_AllMeasured):
    """The labels are dealt out anew: as many of each class as before, on other images."""

    def content(self, task: int, pool: Pool, generators: Generators) -> Content:
        generator = generators(task)
        return Content(pool.labels[torch.randperm(len(pool.labels), generator=generator, device=pool.labels.device)])


@dataclass(frozen=True)
class Renamed(_AllMeasured):
    """The classes change their names; images of one class stay together. composed: the names of the task before."""

    composed: bool = True

    def content(self, task: int, pool: Pool, generators: Generators) -> Content:
        device = pool.labels.device
        names = torch.arange(pool.classes, device=device)
        for index in range(0 if self.composed else task, task + 1):
            generator = generators(index)
            names = torch.randperm(pool.classes, generator=generator, device=device)[names]
        return Content(names[pool.labels], test_labels=names[pool.test_labels])


@dataclass(frozen=True)
class ClassPairs(_AllMeasured):
    """Two classes to tell apart, 0 and 1; all classes once, in pairs, before a new order of them begins."""

    def content(self, task: int, pool: Pool, generators: Generators) -> Content:
        pairs = pool.classes // 2
        generator = generators(task // pairs)
        order = torch.randperm(pool.classes, generator=generator, device=pool.labels.device)
        return _of_classes(pool, order[2 * (task % pairs) : 2 * (task % pairs) + 2], renumbered=True)


@dataclass(frozen=True)
class Alternating(_AllMeasured):
    """Tasks of many classes and of few, in turn, none twice. Only the first kind is measured."""

    many: int
    few: int

    def content(self, task: int, pool: Pool, generators: Generators) -> Content:
        order = torch.randperm(pool.classes, generator=generators(0), device=pool.labels.device)
        start = (task + 1) // 2 * self.many + task // 2 * self.few
        count = self.many if self.is_measured(task) else self.few
        if start + count > pool.classes:
            raise ValueError(f"{pool.classes} classes are used up before task {task}; fewer tasks are possible")
        return _of_classes(pool, order[start : start + count])

    def is_measured(self, task: int) -> bool:
        return task % 2 == 0


@dataclass(frozen=True)
class Growing(_AllMeasured):
    """More classes with each task, beside all that came before."""

    classes_a_task: int

    def content(self, task: int, pool: Pool, generators: Generators) -> Content:
        order = torch.randperm(pool.classes, generator=generators(0), device=pool.labels.device)
        if task * self.classes_a_task >= pool.classes:
            raise ValueError(f"{pool.classes} classes are used up before task {task}; fewer tasks are possible")
        return _of_classes(pool, order[: (task + 1) * self.classes_a_task])


@dataclass(frozen=True)
class FlippingBits(_AllMeasured):
    """Regression on bits of which some change slowly (Dohare et al. 2024): see `streams.BitStream`.

    At each task one of the slow bits flips, or, with `all_bits`, all are drawn anew.
    """

    all_bits: bool = False

    def content(self, task: int, pool: Pool, generators: Generators) -> Content:
        raise ValueError("FlippingBits goes with data 'bits' only")


def _of_classes(pool: Pool, classes: Tensor, renumbered: bool = False) -> Content:
    names = torch.full((pool.classes,), -1, device=classes.device)
    names[classes] = torch.arange(len(classes), device=classes.device) if renumbered else classes
    labels = names[pool.labels]
    return Content(labels, rows=(labels >= 0).nonzero().squeeze(1), test_labels=names[pool.test_labels])
