"""Averaged gradient episodic memory (Chaudhry et al. 2019, arXiv:1812.00420): no step against what is remembered.

    g the gradient on the new batch, r that on a batch from the memory of earlier tasks
    g <- g - (g·r / r·r) r   where g·r < 0, else g stays                                         eq. 11

The samples of a task are offered to the memory at its end, so r is of earlier tasks only, as in the paper's algorithm.
The paper gives each task an equal part of the memory; a reservoir does so in the mean. Works with: task, class, domain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from continual.memory import Batch, Policy
from continual.strategies.replay import check_replay
from continual.strategy import Metrics, Setting, Strategy
from continual.streams import Task


@dataclass(frozen=True, kw_only=True)
class Config:
    """The size of the reference batch is that of permuted MNIST in the paper."""

    memory: int | None = None
    """samples kept; default: the benchmark's"""
    policy: Policy = "reservoir"
    """which samples: reservoir, class-balanced or ring"""
    replay_batch: int = 256
    """samples of the reference gradient, or all that are kept"""

    def __post_init__(self) -> None:
        check_replay(self)


def projected(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Gradients [K, ...] without what works against the reference, and where something did, bool [K]."""
    against = _product(gradients, reference)
    conflict = against < 0
    part = torch.where(conflict, against / _product(reference, reference), 0)
    pairs = zip(gradients, reference, strict=True)
    return [g - part.view(-1, *[1] * (g.dim() - 1)) * r for g, r in pairs], conflict


def _product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    parts = [(a * b).flatten(1).sum(1) for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).sum(0)


class AGEM(Strategy):
    """Gradients projected by a memory."""

    reviews = True

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting, memory=config.memory, policy=config.policy)
        self.config = config

    def observe(self, batch: Batch, task: Task) -> Metrics:
        if self.memory.empty:
            return super().observe(batch, task)
        replay = self.memory.sample(self.config.replay_batch)
        new, old = self.network.outputs_of(batch.x, replay.x)
        current, replayed = self.cross_entropy(new, batch.y), self.cross_entropy(old, replay.y)
        reference = torch.autograd.grad(replayed.sum(), self.parameters, retain_graph=True)
        gradients, conflict = projected(self.gradients(current), reference)
        self.optimizer.step(gradients)
        metrics = {"loss/current": current.detach(), "loss/replay": replayed.detach()}
        return metrics | {"agem/projected": conflict.to(current.dtype)}

    def review(self, batches: Iterable[Batch], task: Task) -> Metrics:
        for batch in batches:
            self.memory.insert(batch)
        return {}
