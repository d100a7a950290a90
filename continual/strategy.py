"""The contract of a strategy, and the few things that every strategy does in the same way.

A strategy learns K members at once, one a seed: everything has an axis of K members in front, and members never mix. It
never logs, touches files, or asks which benchmark it is in. The learner (`continual.learner`) owns the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continual.inputs import Inputs
from continual.memory import Batch, Memory, Policy
from continual.networks.classifier import Classifier
from continual.streams import Source, Task
from plasticity.adam import Adam
from plasticity.plastic_optimizer import PlasticOptimizer
from plasticity.population import RandomStream
from plasticity.sgd import SGD

Metrics = dict[str, Tensor]
Optimizer = SGD | Adam | PlasticOptimizer


@dataclass(frozen=True)
class Setting:
    """What a strategy is told before the first task.

    shape: of an input. outputs: C, of all tasks together. tasks: how many will come. labelled: a sample's task is told.
    scopes: [K, C, C], see `TaskStream.scopes`. network: draws one for all members, head with a bias or not; fresh: one
    member's, from a generator. optimizer: makes that of such a network, with the interventions of the run (where there
    are none, of any module). inputs: how stored images become what is learned from. memory: how many samples may be
    kept, if a strategy is not told otherwise. random: the stream for what is kept and replayed, another one at each
    call. batch: samples of the stream in a step. steps: how many each task has.
    """

    members: int
    shape: tuple[int, ...]
    outputs: int
    tasks: int
    batch: int
    steps: tuple[int, ...]
    labelled: bool
    scopes: Tensor | None
    network: Callable[[bool], Classifier]
    fresh: Callable[[bool, torch.Generator], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    inputs: Inputs
    memory: int
    random: Callable[[], RandomStream]


@dataclass(frozen=True)
class Labelled:
    """Samples to be learned by cross-entropy, x [K, B, *shape], y [K, B].

    weight: of their mean. allowed: which outputs compete, bool, broadcast to [K, B, C]; None: all.
    """

    x: Tensor
    y: Tensor
    weight: float = 1.0
    allowed: Tensor | None = None


class Strategy:
    """Fine-tuning, and the parent of all others.

    memory: samples kept of each member; None: as many as the setting says; policy: which. head_bias: of the network.

    trains_on: the samples of a task's steps, see `TaskStream.batches`. needs_task_labels: it works only where a
    sample's task is told. reviews: it wants to see a task's samples once more at its end. answers_with_all: in tests
    all outputs compete, also where the task is told. takes_interventions: on its network and training.
    trains_network: the weights of the network are what it trains, nothing else makes them. learns_in_steps: in
    `observe`, else in `review` and there is nothing to look at before. Raises ValueError if it does not fit.
    """

    trains_on: Source = "task"
    needs_task_labels = False
    reviews = False
    answers_with_all = False
    takes_interventions = True
    trains_network = True
    learns_in_steps = True

    def __init__(self, setting: Setting, head_bias: bool = True, memory: int | None = 0, policy: Policy = "reservoir"):
        if self.needs_task_labels and not setting.labelled:
            name = type(self).__module__.rpartition(".")[2]
            raise ValueError(f"'{name}' needs to be told the task of each sample, which only --kind task does")
        self.setting = setting
        self.network = setting.network(head_bias)
        self.parameters: list[Tensor] = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = setting.optimizer(self.network)
        device = self.parameters[0].device
        kept = setting.memory if memory is None else memory
        self.memory = Memory(kept, policy, setting.members, setting.outputs, setting.inputs, setting.random())
        # Classes of which a label was seen, [K, C].
        self.seen = torch.zeros(setting.members, setting.outputs, dtype=torch.bool, device=device)
        self._weights_of_rows: dict[tuple[tuple[int, ...], tuple[float, ...]], Tensor] = {}

    def at_boundary(self) -> None:
        """Called between two tasks: interventions may act."""
        if isinstance(self.optimizer, PlasticOptimizer):
            self.optimizer.at_boundary()

    def begin_task(self, task: Task) -> None:
        """Called before the first batch of a task."""

    def observe(self, batch: Batch, task: Task) -> Metrics:
        """Learn from the next batch of the stream. Returns what there is to know, [K] by name."""
        (loss,) = self.learn(Labelled(batch.x, batch.y))
        return {"loss/current": loss}

    def review(self, batches: Iterable[Batch], task: Task) -> Metrics:
        """Called after the last batch of a task, if `reviews`: its first pass again, in that order, not augmented.

        Returns what there is to know, [K] by name.
        """
        return {}

    def end_task(self, task: Task) -> None:
        """Called after the last batch of a task, and after `review`."""

    def measurements(self) -> Iterator[tuple[int | None, Metrics]]:
        """What there is to tell after a task beside accuracies: of a task, from 1, or of none, and [K] by name."""
        return iter(())

    def predict(self, x: Tensor, task: Task | None) -> Tensor:
        """Scores [K, B, C] of inputs [K, B, *shape]; the largest is the answer. task: None where it is not told."""
        return self.network(x)

    @property
    def parameter_count(self) -> int:
        """How many numbers a member learns."""
        return sum(p.numel() for p in self.parameters) // self.setting.members

    def head_of(self, task: Task) -> Tensor:
        """Weights of the head, [K, C, d], that samples of a task meet."""
        return self.network.head.weight.detach()

    def learn(self, *parts: Labelled) -> list[Tensor]:
        """One step on the weighted sum of the parts' mean cross-entropies. Returns these before the step, [K] each.

        Samples of all parts pass the network together, unless it mixes samples. Where outputs compete only with those
        of their task, that holds here too. The derivative is taken by hand where that can be, see `Classifier.by_hand`.
        """
        sizes, weights = tuple(part.y.shape[1] for part in parts), tuple(part.weight for part in parts)
        labels = _joined([part.y for part in parts])
        allowed = self._competing(labels, self._allowed(parts))
        by_hand = self.network.by_hand() if isinstance(self.optimizer, SGD | Adam) else None
        if by_hand is None:
            outputs = self.network.outputs_together(*(part.x for part in parts))
            means = [losses.mean(1) for losses in _cross_entropies(outputs, labels, allowed).split(sizes, 1)]
            self.descend(sum((w * mean for w, mean in zip(weights, means, strict=True)), start=0 * means[0]))
            return [mean.detach() for mean in means]
        passed = by_hand.forward(_joined([part.x for part in parts]))
        losses, gradient = _with_gradient(passed.outputs, labels, allowed)
        if (sizes, weights) not in self._weights_of_rows:
            self._weights_of_rows[sizes, weights] = _weights_of_rows(sizes, weights, gradient)
        gradient.mul_(self._weights_of_rows[sizes, weights])
        plain = isinstance(self.optimizer, SGD) and not (self.optimizer.momentum or self.optimizer.weight_decay)
        if plain:
            by_hand.descend_along(passed, gradient, self.optimizer.learning_rate)
        else:
            self.optimizer.step(by_hand.pulled_back(passed, gradient))
        return [own.mean(1) for own in losses.split(sizes, 1)]

    def _allowed(self, parts: Sequence[Labelled]) -> Tensor | None:
        """Of all parts behind one another, [K or 1, B, C]."""
        if all(part.allowed is None for part in parts):
            return None
        shapes = [(*part.y.shape, self.setting.outputs) for part in parts]
        every = parts[0].y.new_ones((), dtype=torch.bool)
        masks = [every if part.allowed is None else part.allowed for part in parts]
        return torch.cat([mask.expand(shape) for mask, shape in zip(masks, shapes, strict=True)], 1)

    def cross_entropy(self, outputs: Tensor, labels: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Mean over the batch, [K], of outputs [K, B, C], labels [K, B]; softmax over all outputs that compete.

        allowed: bool, broadcast to [K, B, C]; None: all. Where a sample's task is told, only its outputs compete.
        """
        return _cross_entropies(outputs, labels, self._competing(labels, allowed)).mean(1)

    def _competing(self, labels: Tensor, allowed: Tensor | None) -> Tensor | None:
        """Those of `allowed` that are of the sample's task where that is told, broadcast to [K, B, C]; None: all."""
        scopes = self.setting.scopes
        if scopes is None:
            return allowed
        member = torch.arange(len(labels), device=labels.device).unsqueeze(1)
        own = scopes[member, labels]
        return own if allowed is None else own & allowed

    def descend(self, loss: Tensor) -> None:
        """One step of the optimiser on the losses of the members, [K], and what interventions add to them."""
        self.optimizer.step(self.gradients(loss))

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of the losses of the members, [K], and what interventions add to them: one for each of `parameters`."""
        penalty = self.optimizer.penalty(loss.shape) if isinstance(self.optimizer, PlasticOptimizer) else None
        if penalty is not None:
            loss = loss + penalty
        return list(torch.autograd.grad(loss.sum(), self.parameters))

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, as tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seen": self.seen,
            "memory": self.memory.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly. Raises ValueError if the state is of another strategy."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seen.copy_(state["seen"])
        self.memory.load_state_dict(state["memory"])


def _cross_entropies(outputs: Tensor, labels: Tensor, allowed: Tensor | None) -> Tensor:
    """[K, B]; outputs that are not allowed do not compete."""
    if allowed is not None:
        outputs = outputs.masked_fill(~allowed, -torch.inf)
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def _with_gradient(outputs: Tensor, labels: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same, and its gradient with respect to the outputs, softmax - 1[label]: [K, B, C]."""
    if allowed is not None:
        outputs = outputs.masked_fill(~allowed, -torch.inf)
    label = labels.unsqueeze(2)
    log_softmax = torch.log_softmax(outputs, 2)
    losses = -log_softmax.gather(2, label).squeeze(2)
    gradient = log_softmax.exp_()
    return losses, gradient.scatter_add_(2, label, gradient.new_full((1, 1, 1), -1.0).expand_as(label))


def _weights_of_rows(sizes: Sequence[int], weights: Sequence[float], like: Tensor) -> Tensor:
    """What each sample's loss counts in the sum, [B, 1]."""
    return torch.cat([like.new_full((size, 1), w / size) for size, w in zip(sizes, weights, strict=True)])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Behind one another along the samples, [K, sum of B_i, ...]."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), 1)
