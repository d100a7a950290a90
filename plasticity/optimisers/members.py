"""A PyTorch optimiser with the interface of `plasticity.adam.Adam`, on members however a network has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plasticity.adam import laid_out_like
from plasticity.denormals import denormals_as_zero
from plasticity.intervention import Learner


class MemberOptimizer:
    """Drives `optimizer`, whose parameters are those of the learner in the axes of `Learner.parameter`.

    parameters: of the network, in their order; the optimiser's share their memory. learning_rate: of the network's
    loss; setting it changes the rates of all groups of the optimiser by the same factor.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, learner: Learner, learning_rate: float):
        self.optimizer, self._learner = optimizer, learner
        named = dict(learner.network.named_parameters())
        self.names, self.parameters = list(named), list[Tensor](named.values())
        self._first_rate, self._learning_rate = learning_rate, learning_rate
        self._group_rates = [group["lr"] for group in optimizer.param_groups]

    @property
    def learning_rate(self) -> float:
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self._learning_rate = rate
        for group, first in zip(self.optimizer.param_groups, self._group_rates, strict=True):
            group["lr"] = first * (rate / self._first_rate)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move every parameter by one step, in place. gradients: one of each parameter's shape, in their order."""
        for name, gradient in zip(self.names, gradients, strict=True):
            owned = self._learner.optimized[name]
            owned.grad = laid_out_like(owned, self._learner.by_member(name, gradient))
        with denormals_as_zero():
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Of the optimiser; tensors have the members in front."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if it does not fit."""
        self.optimizer.load_state_dict(state)
        _own_state(self.optimizer)


def _own_state(optimizer: torch.optim.Optimizer) -> None:
    """Copies of what was loaded, which PyTorch shares with its source, in the memory layout of the parameters."""
    for parameter, states in optimizer.state.items():
        for key, state in states.items():
            if isinstance(state, Tensor):
                fits = state.shape == parameter.shape
                states[key] = torch.empty_like(parameter).copy_(state) if fits else state.clone()
    if isinstance(base := getattr(optimizer, "base", None), torch.optim.Optimizer):
        _own_state(base)
