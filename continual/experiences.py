"""Streams whose tasks are given as they are, inputs and labels of each; members differ in the order of samples only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from continual.streams import Kind, Source, Task, TaskStream
from plasticity.problems.datasets import Images

Samples = tuple[Tensor, Tensor]  # inputs [N, *shape], outputs [N]


@dataclass(frozen=True)
class Experiences:
    """Tasks in their order.

    train, test: inputs uint8 or float [N, *shape] and the outputs int64 [N] that stand for them, of each task. groups:
    int64 [C], outputs with the same number compete where a sample's task is told, as it is of kind "task".
    """

    name: str
    kind: Kind
    train: Sequence[Samples]
    test: Sequence[Samples]
    groups: Tensor

    def __post_init__(self) -> None:
        if len(self.train) != len(self.test) or not self.train:
            raise ValueError(f"'{self.name}' has {len(self.train)} tasks to train on and {len(self.test)} to test")
        shapes = {(tuple(x.shape[1:]), x.dtype) for x, _ in [*self.train, *self.test]}
        if len(shapes) > 1:
            raise ValueError(f"inputs of '{self.name}' must have one shape and type, got {sorted(map(str, shapes))}")


class ExperienceStream(TaskStream):
    """Given tasks for a population; each member sees their samples in an order of its own.

    Raises ValueError, one sentence, for what does not fit together.
    """

    def __init__(
        self,
        data: Experiences,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        batch: int = 10,
        epochs: int = 1,
    ):
        self.seeds, self.device = tuple(seeds), torch.device(device)
        self.change, self.kind, self.tasks = "split", data.kind, len(data.train)
        self.batch, self.epochs, self.blurry = batch, epochs, 0.0
        parts = [torch.cat(part) for samples in (data.train, data.test) for part in zip(*samples, strict=True)]
        levels = 255 if parts[0].dtype == torch.uint8 else 1
        images = Images(data.name, parts[0], parts[1], parts[2], parts[3], levels, data.name)
        self.classes = self.outputs = len(data.groups)
        self.levels, self.fingerprint, self.shape = levels, images.fingerprint(), tuple(parts[0].shape[1:])
        self._check_given()
        self._train = parts[0].to(self.device), parts[1].to(self.device)
        self._test = parts[2].to(self.device), parts[3].to(self.device)
        self._groups = data.groups.to(self.device)
        self._rows, self._test_rows = self._ranges(data.train), self._ranges(data.test)
        self._known_outputs = self._outputs_of(data)
        self.class_order = torch.arange(self.outputs, device=self.device).expand(len(self.seeds), -1)
        smallest = min(len(y) for _, y in data.train)
        if smallest < batch:
            raise ValueError(f"a task of '{data.name}' has {smallest} training samples, too few for a batch of {batch}")

    def _check_given(self) -> None:
        for name in ("batch", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.seeds:
            raise ValueError("a stream needs at least one seed")

    def _ranges(self, tasks: Sequence[Samples]) -> list[Tensor]:
        """Rows of each task in the data of all, [K, n]."""
        sizes = [len(y) for _, y in tasks]
        rows = torch.arange(sum(sizes), device=self.device).expand(len(self.seeds), -1)
        return list(rows.split(sizes, 1))

    def _outputs_of(self, data: Experiences) -> Tensor:
        """Outputs of each task, bool [T, C]."""
        found = torch.zeros(self.tasks, self.outputs, dtype=torch.bool, device=self.device)
        for own, (_, trained), (_, tested) in zip(found, data.train, data.test, strict=True):
            own[torch.cat([trained, tested]).to(self.device)] = True
        return found

    @property
    def scopes(self) -> Tensor | None:
        if self.kind != "task":
            return None
        return (self._groups.unsqueeze(1) == self._groups).expand(len(self.seeds), -1, -1)

    def task(self, index: int, source: Source = "task") -> Task:
        own = self._known_outputs[index].expand(len(self.seeds), -1)
        return Task(index, own, self.kind == "task", self.steps(index, source), self.epochs)

    def _output(self, labels: Tensor, task: Tensor | int) -> Tensor:
        return labels
