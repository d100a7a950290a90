"""PackNet (Mallya & Lazebnik 2018, arXiv:1711.05769): each task gets weights of its own, and later ones may read them.

    learn    all weights that no task owns; those that one owns are used but do not move
    prune    within each layer the smaller part of them is set to 0 and is free for the next task
    retrain  the task's own weights alone
    answer   a sample of task t with the weights that tasks 1 .. t own, whatever came later

Biases and normalisation are learned in the first task only, statistics of batch normalisation too; each task has the
rows of the head that stand for its classes. What a task's answers depend on is bit-identical for ever after. Works
with: task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from continual.memory import Batch
from continual.strategy import Metrics, Setting, Strategy
from continual.streams import Task
from plasticity.networks.stacked import StackedBatchNorm, StackedLinear


@dataclass(frozen=True, kw_only=True)
class Config:
    """As in the paper's main results: half, and a third of all passes for retraining."""

    prune: float = 0.5
    """part of the free weights of a layer that a task leaves to later ones"""
    retrain: float = 1 / 3
    """part of a task's steps that come after pruning"""

    def __post_init__(self) -> None:
        if not 0 < self.prune < 1 or not 0 <= self.retrain < 1:
            raise ValueError(f"prune must be in (0, 1), retrain in [0, 1), got {self.prune} and {self.retrain}")


def kept_largest(weight: Tensor, free: Tensor, count: int) -> Tensor:
    """Where the `count` largest free weights of each member are, bool [K, ...] as weight and free."""
    size = weight.abs().masked_fill(~free, -1).flatten(1)
    places = size.topk(count, 1).indices
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, places, True).view_as(weight)


class PackNet(Strategy):
    """One network, packed with one task after another."""

    needs_task_labels = True

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting)
        if type(self.network.head) is not StackedLinear:
            raise ValueError("'packnet' owns rows of its head, and an intervention put something else in its place")
        self.config = config
        named = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.head = {name: p for name, p in named.items() if name.startswith("head.")}
        self.rest = {name: p for name, p in named.items() if name not in self.head}
        # Weights of layers [K, out, in, ...]: the number of the task, from 1, that owns each; 0: none.
        self.owner = {n: torch.zeros_like(p, dtype=torch.uint8) for n, p in self.rest.items() if p.dim() > 2}
        self.free = {name: p[0].numel() for name, p in self.rest.items() if name in self.owner}
        self.task, self.steps, self.pruned = 0, 0, False  # the present one, steps in it

    def begin_task(self, task: Task) -> None:
        self.task, self.steps, self.pruned = task.index, 0, False
        self._hold_statistics()

    def _hold_statistics(self) -> None:
        for module in self.network.modules():
            if isinstance(module, StackedBatchNorm | nn.modules.batchnorm._BatchNorm):
                module.train(self.task == 0)

    def observe(self, batch: Batch, task: Task) -> Metrics:
        if not self.pruned and self.steps >= round(task.steps * (1 - self.config.retrain)):
            self._prune()
        movable = self._movable(task)
        before = {name: p.detach().clone() for name, p in (self.rest | self.head).items()}
        metrics = super().observe(batch, task)
        self._restore(before, movable)
        self.steps += 1
        return metrics

    def _movable(self, task: Task) -> dict[str, Tensor]:
        """Which numbers of which parameters may change, bool, of a shape that their own begins with."""
        own = self.task + 1 if self.pruned else 0
        found = {name: owner == own for name, owner in self.owner.items()}
        first = torch.full_like(self.seen[:, 0], self.task == 0)
        return {n: found.get(n, first) for n in self.rest} | dict.fromkeys(self.head, task.outputs)

    @torch.no_grad()
    def _restore(self, before: Mapping[str, Tensor], movable: Mapping[str, Tensor]) -> None:
        for name, p in (self.rest | self.head).items():
            may = movable[name]
            p.copy_(torch.where(may.view(*may.shape, *[1] * (p.dim() - may.dim())), p, before[name]))

    def at_boundary(self) -> None:
        """Interventions may change what no task owns yet."""
        before = {name: p.detach().clone() for name, p in (self.rest | self.head).items()}
        super().at_boundary()
        nothing = torch.zeros_like(self.seen[:, 0])
        free = {name: owner == 0 for name, owner in self.owner.items()}
        self._restore(before, {name: free.get(name, nothing) for name in before})

    @torch.no_grad()
    def _prune(self) -> None:
        """Give the present task the larger part of the free weights, and set the others to 0."""
        for name, owner in self.owner.items():
            weight, free = self.rest[name], owner == 0
            count = self.free[name] - round(self.config.prune * self.free[name])
            kept = kept_largest(weight, free, count)
            owner.masked_fill_(kept, self.task + 1)
            weight.masked_fill_(free & ~kept, 0)
            self.free[name] -= count
        self.pruned = True

    def end_task(self, task: Task) -> None:
        if not self.pruned:
            self._prune()

    def predict(self, x: Tensor, task: Task | None) -> Tensor:
        assert task is not None  # `needs_task_labels`
        if task.index >= self.task:
            return self.network(x)
        weights = {n: self.rest[n] * ((o > 0) & (o <= task.index + 1)) for n, o in self.owner.items()}
        return functional_call(self.network, weights, (x,))

    def state_dict(self) -> dict[str, Any]:
        own = {"owner": self.owner, "free": dict(self.free), "position": [self.task, self.steps, self.pruned]}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for name, owner in self.owner.items():
            owner.copy_(state["owner"][name])
        self.free = dict(state["free"])
        self.task, self.steps, self.pruned = state["position"]
        self._hold_statistics()
