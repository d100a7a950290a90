"""Hare and Tortoise networks (Lee et al. 2024, arXiv:2406.02596, algorithm 1).

    tortoise  slow <- μ slow + (1 - μ) fast, after each step
    hare      fast <- a copy of slow, every R steps

The optimiser's state is kept. Buffers (running statistics) are averaged and copied with the weights. The released code
makes fast and slow share storage after a reset, until the next average; here they stay apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.interventions.regularisers import copy_values
from plasticity.interventions.scope import between
from plasticity.optimisers.proposing import at_least


@dataclass
class HareTortoise(Intervention):
    """The network in training is the hare; `slow` holds the tortoise's tensors by name, [K, *shape]."""

    momentum: float = 0.999
    """μ"""
    every: int = 1000
    """R, in steps; published: 10 epochs"""

    def __post_init__(self) -> None:
        between("momentum of hare-tortoise", self.momentum, 0, 1)
        at_least("every of hare-tortoise", self.every, 1)

    def begin(self, learner: Learner) -> None:
        self.slow = {name: tensor.clone() for name, tensor in self._fast(learner).items()}
        learner.copies.append(self.slow)

    @torch.no_grad()
    def after_step(self, learner: Learner, batch: Batch) -> None:
        for name, fast in self._fast(learner).items():
            slow = self.slow[name]
            slow.lerp_(fast, 1 - self.momentum) if slow.is_floating_point() else slow.copy_(fast)
            if learner.steps % self.every == 0:
                fast.copy_(slow)

    @staticmethod
    def _fast(learner: Learner) -> dict[str, Tensor]:
        weights = {name: learner.parameter(name) for name, _ in learner.network.named_parameters()}
        return weights | {name: _by_member(t, learner.members) for name, t in learner.network.named_buffers()}

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_values(self.slow, state["slow"])


def _by_member(buffer: Tensor, members: int | None) -> Tensor:
    """[K, *shape], also where members stand in two axes, as those of twin critics in a population do."""
    if members is None:
        return buffer.unsqueeze(0)
    return buffer if len(buffer) == members else buffer.flatten(0, 1)
