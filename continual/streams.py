"""Streams of tasks for K members at once, on the training device: split, permuted and rotated data.

What a member sees follows from its seed and the number of the task: another number of members, another strategy, or a
run that was cut off sees the same. Batches are gathered from images that stay on the device; no loader, no worker.

    split      every task has classes of its own; their order is drawn for each member
    permuted   every task has all classes and an order of pixels of its own
    rotated    every task has all classes and an angle of its own, uniform in [0, 180) degrees

and each of them as
    class      which task a sample is from is not told, an output for each class of each task
    task       it is told, in training and test: only the outputs of that task compete
    domain     it is not told, and all tasks share their outputs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from continual.inputs import rotated
from plasticity.problems.datasets import Images
from plasticity.problems.streams import generator

Kind = Literal["task", "class", "domain"]
Change = Literal["split", "permuted", "rotated"]
Source = Literal["task", "seen", "all"]
KINDS: tuple[Kind, ...] = ("task", "class", "domain")
CHANGES: tuple[Change, ...] = ("split", "permuted", "rotated")


@dataclass(frozen=True)
class Task:
    """One task of all members, as strategies are told of it.

    outputs: bool [K, C], the outputs that stand for its classes. labelled: a sample's task is told (kind "task").
    steps: how many batches it has, in all of its epochs.
    """

    index: int
    outputs: Tensor
    labelled: bool
    steps: int
    epochs: int


class TaskStream:
    """The tasks of one data set. seeds: one for each member.

    tasks: how many. batch: samples of a member in a step; what is left of a pass is dropped (`dropped` counts it).
    epochs: passes over each task. blurry: part of each task's training samples that is exchanged at random with the
    other tasks'. class_groups: of a split, how many classes each task has; None: the groups of the data, else all as
    many. class_order: of a split, the same for all members; None: drawn for each, or one for all where classes or tasks
    differ in size, so that members stay in step, or that of the data where these have groups.
    Raises ValueError, one sentence, for what does not fit together.
    """

    def __init__(
        self,
        data: Images,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        change: Change = "split",
        kind: Kind = "class",
        tasks: int = 5,
        batch: int = 10,
        epochs: int = 1,
        blurry: float = 0.0,
        class_groups: Sequence[int] | None = None,
        class_order: Sequence[int] | None = None,
    ):
        self.seeds, self.device = tuple(seeds), torch.device(device)
        self.change, self.kind, self.tasks = change, kind, tasks
        self.batch, self.epochs, self.blurry = batch, epochs, blurry
        self.classes, self.levels, self.fingerprint = data.classes, data.levels, data.fingerprint()
        self.shape = tuple(data.train_images.shape[1:])
        self._check(data)
        self.class_groups = self._shared_out(class_groups, data)
        self._grouped_by_data = class_groups is None and len(data.groups) > 0
        self._train = data.train_images.to(self.device), data.train_labels.to(self.device)
        self._test = data.test_images.to(self.device), data.test_labels.to(self.device)
        self.class_order = self._orders(class_order, data.train_labels)  # [K, classes]
        most = max(self.class_groups) if change == "split" else self.classes
        self.outputs = most if kind == "domain" else self.classes * (1 if change == "split" else tasks)
        sizes = torch.tensor(self.class_groups, device=self.device)
        # Of each place in the order of classes: its task, and which class of it is there.
        self._task_of_place = torch.arange(len(sizes), device=self.device).repeat_interleave(sizes)
        first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        self._class_of_place = torch.arange(len(first), device=self.device) - first
        self._place = self.class_order.argsort(1)  # [K, classes], where a class comes in the order
        self._rows = self._divided(self._train[1], blur=True)
        self._test_rows = self._divided(self._test[1], blur=False)
        self._content = [self._for_each(lambda g: self._drawn(g), "content", index) for index in range(tasks)]
        smallest = min(rows.shape[1] for rows in self._rows)
        if smallest < batch:
            raise ValueError(f"a task has {smallest} training samples, too few for a batch of {batch}")

    def _check(self, data: Images) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind '{self.kind}', it is one of {', '.join(KINDS)}")
        if self.change not in CHANGES:
            raise ValueError(f"unknown change '{self.change}', it is one of {', '.join(CHANGES)}")
        for name in ("tasks", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.blurry < 1:
            raise ValueError(f"blurry must be in [0, 1), got {self.blurry}")
        labels, tested = data.train_labels.unique(), data.test_labels.unique()
        if not torch.equal(labels, torch.arange(len(labels))) or not torch.equal(labels, tested):
            raise ValueError(f"labels of '{data.name}' must be 0 .. C - 1, all of them in training and test data")
        if self.change == "rotated" and len(self.shape) != 3:
            raise ValueError(f"only images can be rotated, inputs of '{data.name}' are {list(self.shape)}")
        if not self.seeds:
            raise ValueError("a stream needs at least one seed")

    def _shared_out(self, given: Sequence[int] | None, data: Images) -> tuple[int, ...]:
        """Classes of each task of a split."""
        if self.change != "split":
            if given:
                raise ValueError(f"class_groups are of split data, tasks of '{data.name}' are {self.change}")
            return (self.classes,)
        found = tuple(given or data.groups)
        if not found and self.classes % self.tasks:
            fitting = [str(n) for n in range(1, self.classes + 1) if self.classes % n == 0]
            raise ValueError(
                f"{self.classes} classes do not divide into {self.tasks} tasks; choose {', '.join(fitting[:-1])} or "
                f"{fitting[-1]}, or say how many each has (--class-groups)"
            )
        found = found or (self.classes // self.tasks,) * self.tasks
        if min(found) < 1 or sum(found) != self.classes:
            raise ValueError(f"class_groups must share out {self.classes} classes, got {list(found)}")
        if len(found) != self.tasks:
            raise ValueError(
                f"the classes of '{data.name}' are in {len(found)} groups, so there are no {self.tasks} tasks"
            )
        return found

    def _orders(self, given: Sequence[int] | None, labels: Tensor) -> Tensor:
        members = len(self.seeds)
        if given is not None:
            if sorted(given) != list(range(self.classes)):
                raise ValueError(f"class_order must hold each of 0 .. {self.classes - 1} once, got {list(given)}")
            return torch.tensor(given, device=self.device).expand(members, -1)
        if self.change != "split" or self._grouped_by_data:
            return torch.arange(self.classes, device=self.device).expand(members, -1)
        if len(labels.bincount().unique()) > 1 or len(set(self.class_groups)) > 1:
            order = torch.randperm(self.classes, generator=generator(self.device, 0, "class_order"), device=self.device)
            return order.expand(members, -1)
        return self._for_each(lambda g: torch.randperm(self.classes, generator=g, device=self.device), "class_order")

    def _for_each(self, draw: Callable[[torch.Generator], Tensor], purpose: str, *index: int) -> Tensor:
        return torch.stack([draw(generator(self.device, seed, purpose, *index)) for seed in self.seeds])

    def _drawn(self, source: torch.Generator) -> Tensor:
        """What makes a task: an order of pixels [D], an angle [1], or nothing [0]."""
        if self.change == "permuted":
            return torch.randperm(torch.Size(self.shape).numel(), generator=source, device=self.device)
        drawn = torch.rand(1, generator=source, device=self.device)
        return 180 * drawn if self.change == "rotated" else drawn[:0]

    def _divided(self, labels: Tensor, blur: bool) -> list[Tensor]:
        """Rows of the data in each task, [K, n] each."""
        if self.change != "split":
            whole = torch.arange(len(labels), device=self.device).expand(len(self.seeds), -1)
            return [whole] * self.tasks
        of_task = self._task_of_place[self._place[:, labels]]  # [K, N]
        order = of_task.argsort(stable=True)
        sizes = (of_task.unsqueeze(1) == torch.arange(self.tasks, device=self.device).view(-1, 1)).sum(2)[0]
        if blur and self.blurry:
            order = self._blurred(order, sizes)
        return list(order.split(sizes.tolist(), 1))

    def _blurred(self, order: Tensor, sizes: Tensor) -> Tensor:
        """The same rows by task, a part of each exchanged with the others'. order [K, N], sizes [tasks]."""
        starts = (sizes.cumsum(0) - sizes).tolist()
        rows = []
        for seed, own in zip(self.seeds, order, strict=True):
            source = generator(self.device, seed, "examples")
            leaving = [
                start + torch.randperm(size, generator=source, device=self.device)[: round(self.blurry * size)]
                for start, size in zip(starts, sizes.tolist(), strict=True)
            ]
            places = torch.cat(leaving)
            mixed = own.clone()
            mixed[places] = own[places[torch.randperm(len(places), generator=source, device=self.device)]]
            rows.append(mixed)
        return torch.stack(rows)

    @property
    def scopes(self) -> Tensor | None:
        """Of kind "task": which outputs compete for a sample with each label, bool [K, C, C]; else None."""
        if self.kind != "task":
            return None
        task = self._task_of_output
        return task.unsqueeze(2) == task.unsqueeze(1)

    @property
    def _task_of_output(self) -> Tensor:
        """[K, C]; of kind "domain", where all tasks share them, 0."""
        if self.kind == "domain":
            return torch.zeros(len(self.seeds), self.outputs, dtype=torch.int64, device=self.device)
        if self.change == "split":
            return self._task_of_place[self._place]
        return (torch.arange(self.outputs, device=self.device) // self.classes).expand(len(self.seeds), -1)

    def task(self, index: int, source: Source = "task") -> Task:
        """Task number `index`. source: the samples that it is trained on, see `batches`."""
        own = self._task_of_output == (0 if self.kind == "domain" else index)
        return Task(index, own, self.kind == "task", self.steps(index, source), self.epochs)

    def steps(self, index: int, source: Source = "task") -> int:
        """How many batches task `index` has."""
        return self.epochs * (self._sample_count(index, source) // self.batch)

    @property
    def dropped(self) -> int:
        """Training samples that no full batch was left for, in a pass over all tasks."""
        return sum(rows.shape[1] % self.batch for rows in self._rows)

    def _sample_count(self, index: int, source: Source) -> int:
        if source == "seen":
            return sum(rows.shape[1] for rows in self._rows[: index + 1])
        return self._rows[index].shape[1]

    def batches(self, index: int, start: int, stop: int, source: Source = "task") -> tuple[Tensor, Tensor]:
        """Images [K, stop - start, B, *shape] as stored and labels [K, stop - start, B] of steps start .. stop - 1.

        source: "task", the samples of this task; "seen", of all tasks so far; "all", a part of all tasks' samples in
        one random order, as large as this task: what i.i.d. learning sees.
        """
        count = self._sample_count(index, source)
        per_epoch = count // self.batch
        parts = []
        while start < stop:
            epoch, first = divmod(start, per_epoch)
            last = min(first + stop - start, per_epoch)
            parts.append(self._order(index, epoch, source)[:, first * self.batch : last * self.batch])
            start += last - first
        samples = torch.cat(parts, 1)
        x, y = self._shown(*self._located(samples, index, source), self._train)
        steps = samples.shape[1] // self.batch
        return x.view(len(x), steps, self.batch, *self.shape), y.view(len(y), steps, self.batch)

    def _order(self, index: int, epoch: int, source: Source) -> Tensor:
        """Numbers of the samples of one pass in the order in which they come, [K, n]."""
        if self._known_order[0] != (index, epoch, source):
            self._known_order = (index, epoch, source), self._new_order(index, epoch, source)
        return self._known_order[1]

    _known_order: tuple[tuple[int, int, str] | None, Tensor] = None, torch.zeros(0)

    def _new_order(self, index: int, epoch: int, source: Source) -> Tensor:
        if source != "all":
            count, own = self._sample_count(index, source), (index, epoch)
            return self._for_each(lambda g: torch.randperm(count, generator=g, device=self.device), "order", *own)
        sizes = [rows.shape[1] for rows in self._rows]
        whole = self._for_each(
            lambda g: torch.randperm(sum(sizes), generator=g, device=self.device), "order", self.tasks, epoch
        )
        return whole[:, sum(sizes[:index]) : sum(sizes[: index + 1])]

    def _located(self, samples: Tensor, index: int, source: Source) -> tuple[Tensor, Tensor | int]:
        """Rows of the training data [K, n], and the task of all of them, or of each [K, n]."""
        if source == "task":
            return self._rows[index].gather(1, samples), index
        sizes = torch.tensor([rows.shape[1] for rows in self._rows], device=self.device)
        task = torch.bucketize(samples, sizes.cumsum(0), right=True)
        rows = torch.cat(self._rows, 1).gather(1, samples) if self.change == "split" else samples % sizes[0]
        return rows, task

    def _shown(self, rows: Tensor, task: Tensor | int, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Images as stored, and labels as the outputs that stand for them, of rows [K, n] of the data."""
        images, labels = data
        return self._changed(images[rows], task), self._output(labels[rows], task)

    def _output(self, labels: Tensor, task: Tensor | int) -> Tensor:
        if self.change != "split":
            return labels if self.kind == "domain" else labels + self.classes * task
        return self._class_of_place[self._place.gather(1, labels)] if self.kind == "domain" else labels

    def _changed(self, images: Tensor, task: Tensor | int) -> Tensor:
        """images [K, n, *shape] as they are in their tasks."""
        if self.change == "split":
            return images
        if isinstance(task, int):
            content = self._content[task].unsqueeze(1)  # [K, 1, D]
        else:
            member = torch.arange(len(self.seeds), device=self.device).unsqueeze(1)
            content = torch.stack(self._content, 1)[member, task]
        content = content.expand(*images.shape[:2], -1)
        if self.change == "permuted":
            return images.flatten(2).gather(2, content).view(images.shape)
        turned = rotated(images.flatten(0, 1).float(), content.flatten()).view(images.shape)
        return turned if images.is_floating_point() else turned.round().to(images.dtype)

    def test(self, index: int, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Held-out images [K, M, *shape] and labels [K, M] of a task. most: no more than so many, the first ones."""
        rows = self._test_rows[index]
        if most is not None and most < rows.shape[1]:
            # Rows of a task come class by class: take some of each.
            rows = rows[:, torch.linspace(0, rows.shape[1] - 1, most, device=self.device).long()]
        return self._shown(rows, index, self._test)
