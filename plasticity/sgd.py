"""Stochastic gradient descent as a few calls over all parameters at once.

The arithmetic is `torch.optim.SGD`'s (with momentum, Nesterov's too, and coupled weight decay, no dampening); its
bookkeeping costs more than the arithmetic when networks are small. Gradients are handed in, as to
`plasticity.adam.Adam`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plasticity.denormals import denormals_as_zero


class SGD:
    """Owns the velocity of `parameters`, in their order; none without momentum.

    velocity: v <- momentum v + g', g' = g + weight_decay θ, then θ <- θ - learning_rate v; with nesterov the step is
    along g' + momentum v (Sutskever et al. 2013).
    """

    follows_gradient_scale = True  # for `plasticity.nap.elr_power`

    def __init__(
        self,
        parameters: Sequence[Tensor],
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        self.parameters = list(parameters)
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.nesterov = nesterov
        self.velocity = [torch.zeros_like(p, requires_grad=False) for p in self.parameters] if momentum else []

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move every parameter by one step, in place. gradients: one of each parameter's shape, in their order."""
        moves = list(gradients)
        if self.weight_decay:
            moves = list(torch._foreach_add(moves, self.parameters, alpha=self.weight_decay))
        with denormals_as_zero():
            if self.momentum:
                torch._foreach_mul_(self.velocity, self.momentum)
                torch._foreach_add_(self.velocity, moves)
                ahead = list(torch._foreach_add(moves, self.velocity, alpha=self.momentum)) if self.nesterov else None
                moves = ahead or self.velocity
            torch._foreach_add_(self.parameters, moves, alpha=-self.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """The velocities."""
        return {"velocity": self.velocity}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the saved velocities do not fit the parameters."""
        if [v.shape for v in state["velocity"]] != [v.shape for v in self.velocity]:
            raise ValueError("the saved optimiser's velocities do not fit these parameters")
        for own, saved in zip(self.velocity, state["velocity"], strict=True):
            own.copy_(saved)
