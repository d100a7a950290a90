"""What Avalanche's strategies are made of and fed with. Importing this imports Avalanche."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import avalanche.training as training
import torch
from avalanche.benchmarks.scenarios.deprecated.generic_benchmark_creation import (
    create_multi_dataset_generic_benchmark,
)
from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.models import MultiTaskModule
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torch.utils.data import TensorDataset

MASKED = -1000.0  # the score of an output that does not compete, as in Avalanche's own heads


class Told(MultiTaskModule):
    """One whose outputs of other tasks do not compete. outputs: bool [T, C], of each task, filled as they come."""

    outputs: Tensor

    def __init__(self, classifier: nn.Module, tasks: int, outputs: int):
        super().__init__()
        self.classifier = classifier
        self.register_buffer("outputs", torch.zeros(tasks, outputs, dtype=torch.bool))
        self.max_class_label = outputs
        self.newest = 0  # task in training

    def forward(self, x: Tensor, task_labels: Any = "newest") -> Any:
        """Scores [B, C]. task_labels: of each sample; None: a dict over tasks; left out (as DER does): the newest."""
        told: Any = self.newest if isinstance(task_labels, str) else task_labels
        return super().forward(x, told)

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        return self.classifier(x).masked_fill(~self.outputs[task_label], MASKED)


class Losses(SupervisedPlugin):
    """Keeps the losses of a task, and the labels of its last batch, which MIR's memory depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = torch.zeros(())
        self.steps = 0
        self.last_labels = torch.zeros(0, dtype=torch.int64)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Begin anew."""
        self.sum, self.steps = torch.zeros((), device=strategy.device), 0

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """After each step."""
        self.sum = self.sum + strategy.loss.detach().sum()
        self.steps += 1
        self.last_labels = strategy.mb_y.detach().clone()


def build(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keywords: dict[str, Any],
    plugins: Sequence[Any] = (),
) -> Any:
    """A strategy of `avalanche.training` by name. Raises ValueError for settings that it does not take."""
    with quiet():
        common = {"criterion": nn.CrossEntropyLoss(), "evaluator": EvaluationPlugin(), "plugins": [*plugins, Losses()]}
        try:
            return getattr(training, name)(
                model=model, optimizer=optimizer, device=next(model.parameters()).device, **common, **keywords
            )
        except (AssertionError, TypeError) as error:
            raise ValueError(f"Avalanche's {name} does not take these settings: {error}") from error


def dataset(x: Tensor, y: Tensor, task_label: int | Sequence[int]) -> Any:
    """Inputs [N, *shape] and labels [N] as a dataset of Avalanche. task_label: of all samples, or of each."""
    # Always a list: Avalanche cannot join a constant sequence with another one.
    labels = [task_label] * len(y) if isinstance(task_label, int) else list(task_label)
    return _make_taskaware_classification_dataset(
        TensorDataset(x, y),
        task_labels=labels,
        targets=y.tolist(),  # type: ignore[arg-type]
    )


def experience(x: Tensor, y: Tensor, index: int, task_label: int, earlier: Tensor) -> Any:
    """Samples as experience number `index` of a stream. earlier: labels that came before it."""
    kept = earlier if len(earlier) else y[:1]
    before = [dataset(x.new_zeros(len(kept), *x.shape[1:]), kept, 0)] * index
    now = dataset(x, y, task_label)
    made = create_multi_dataset_generic_benchmark([*before, now], [*before, now])
    return made.train_stream[index]


def train(strategy: Any, experience: Any, shuffle: bool) -> Tensor:
    """Train a strategy on an experience. Returns the mean loss, 0-d."""
    with quiet():
        strategy.train(experience, num_workers=0, shuffle=shuffle)
    losses = next(plugin for plugin in strategy.plugins if isinstance(plugin, Losses))
    return losses.sum / max(1, losses.steps)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the deprecations that Avalanche 0.6.0 tells of itself, past any filter."""
    with warnings.catch_warnings(record=True):
        yield


@contextlib.contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Avalanche draws from the generators of the process: here they begin at a seed, and go on behind as before."""
    before = RNGManager.__getstate__()
    RNGManager.set_random_seeds(seed)
    try:
        yield
    finally:
        RNGManager.__setstate__(before)
