"""Any benchmark of Avalanche as our stream of tasks.

    data = experiences_of(SplitMNIST(5))
    learner = open_learner(settings, "uer", uer.Config(), seeds=range(5), data=data)

Its samples are read once, through the transformations that they have, and kept; what draws anew each time (random
crops) is frozen by that, so leave such to `Benchmark.augmentation`. Importing this needs nothing of Avalanche.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from continual.avalanche import require_avalanche
from continual.experiences import Experiences, Samples
from continual.streams import Kind
from plasticity.problems.datasets import DATA_VARIABLE, DataMissing

# Its classic benchmarks, each with the data set of torchvision that it reads.
CLASSIC = {
    "SplitMNIST": "MNIST",
    "PermutedMNIST": "MNIST",
    "RotatedMNIST": "MNIST",
    "SplitFMNIST": "FashionMNIST",
    "SplitCIFAR10": "CIFAR10",
    "SplitCIFAR100": "CIFAR100",
}
_SEED = 0  # of the order of classes, the permutations or the angles, the same for all seeds of a run


@dataclass(frozen=True)
class Layout:
    """Which outputs stand for which labels of a benchmark of Avalanche.

    tasks_labels: the task label of each experience. pairs: task label (0 but for kind "task") and label of each output.
    """

    kind: Kind
    task_labels: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]

    def outputs_of(self, labels: Tensor, task_label: int) -> Tensor:
        """Outputs [N] of labels [N] of a task."""
        number = {label: c for c, (task, label) in enumerate(self.pairs) if task == self._told(task_label)}
        places = torch.full((max(number) + 1,), -1)
        places[list(number)] = torch.tensor(list(number.values()))
        return places.to(labels.device)[labels]

    def _told(self, task_label: int) -> int:
        return task_label if self.kind == "task" else 0

    @property
    def groups(self) -> Tensor:
        """The task label of each output, [C]."""
        return torch.tensor([task for task, _ in self.pairs])


def layout(benchmark: Any) -> Layout:
    """What a benchmark with a stream to train on tells of its tasks. Raises ValueError for several tasks at once."""
    told: list[int] = []
    labels: list[set[int]] = []
    for experience in benchmark.train_stream:
        own = {int(task) for task in getattr(experience.dataset, "targets_task_labels", [0])}
        if len(own) != 1:
            raise ValueError(
                f"experience {len(told)} of this benchmark has samples of {len(own)} task labels, not of one"
            )
        told += own
        labels.append({int(y) for y in experience.dataset.targets})
    kind: Kind = "task" if len(set(told)) > 1 else "domain" if all(own == labels[0] for own in labels) else "class"
    pairs = {(t if kind == "task" else 0, y) for t, own in zip(told, labels, strict=True) for y in own}
    return Layout(kind, tuple(told), tuple(sorted(pairs)))


def experiences_of(benchmark: Any, name: str = "avalanche") -> Experiences:
    """The tasks of a benchmark of Avalanche: task-incremental if its experiences have different task labels.

    A single experience to test on, as some benchmarks have, is divided by the classes of the tasks. Raises ValueError,
    one sentence, for what is no stream of labelled inputs of one shape.
    """
    found = layout(benchmark)
    train = [_read(experience, found) for experience in benchmark.train_stream]
    test = [_read(experience, found) for experience in benchmark.test_stream]
    if len(test) == 1 < len(train):
        x, y = test[0]
        own = [torch.isin(y, trained.unique()) for _, trained in train]
        test = [(x[rows], y[rows]) for rows in own]
    return Experiences(name, found.kind, train, test, found.groups)


def _read(experience: Any, found: Layout) -> Samples:
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        for x, y, *_ in DataLoader(experience.dataset, batch_size=256, collate_fn=experience.dataset.collate_fn):
            inputs.append(x)
            labels.append(torch.as_tensor(y))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"samples of this benchmark do not become tensors of one shape: {error}") from error
    told = {int(task) for task in getattr(experience.dataset, "targets_task_labels", [0])}
    outputs = found.outputs_of(torch.cat(labels), min(told))
    if bool((outputs < 0).any()):
        raise ValueError("this benchmark tests on classes that it never trains on")
    return torch.cat(inputs), outputs


def open_classic(name: str, tasks: int, kind: Kind, class_order: Sequence[int], folder: Path | None) -> Experiences:
    """One of `CLASSIC`, from files as torchvision keeps them in a folder; nothing is ever downloaded.

    Raises ValueError for an unknown name, for a kind that it has not, or if the files are not there (DataMissing).
    """
    require_avalanche()
    if name not in CLASSIC:
        raise ValueError(f"unknown benchmark of Avalanche '{name}', it is one of {', '.join(CLASSIC)}")
    split = name.startswith("Split")
    if kind == ("domain" if split else "class"):
        raise ValueError(
            f"Avalanche's {name} is no {kind}-incremental benchmark; --kind {'class' if split else 'domain'}"
        )
    _check_files(CLASSIC[name], folder)
    from avalanche.benchmarks import classic

    keywords: dict[str, Any] = {"return_task_id": kind == "task", "seed": _SEED, "dataset_root": folder}
    if split and class_order:
        keywords["fixed_class_order"] = list(class_order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = getattr(classic, name)(n_experiences=tasks, **keywords)
        except (AssertionError, ValueError) as error:
            raise ValueError(f"Avalanche's {name} cannot be made with {tasks} tasks: {error}") from error
    return experiences_of(made, f"avalanche:{name}")


def _check_files(data: str, folder: Path | None) -> None:
    """Avalanche downloads what it does not find; we do not."""
    from torchvision import datasets

    try:
        if folder is None:
            raise RuntimeError
        for train in (True, False):
            getattr(datasets, data)(folder, train=train, download=False)
    except RuntimeError:
        raise DataMissing(
            f"torchvision's '{data}' is not on this machine: put its folder, as torchvision keeps it, into "
            f"${DATA_VARIABLE} or --data"
        ) from None
