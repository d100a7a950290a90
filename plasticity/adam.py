"""Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1) as one fused kernel call a step.

The arithmetic is `torch.optim.Adam(fused=True)`, bit for bit, but that moments too small for a normal number are 0
(`plasticity.denormals`). That class spends twice as long on bookkeeping around the kernel as in it when networks are
small; this one keeps lists of tensors and calls the kernel. Gradients are handed in, so nothing reads or writes
`parameter.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plasticity.denormals import denormals_as_zero


class Adam:
    """Owns the moments of `parameters`, in their order; all of one device.

    exp_avg, exp_avg_sq: running means of the gradient and its square, one tensor of the parameter's shape each.
    step_count: 0-d float tensors, one a parameter; without bias correction infinite from the start, as after very many
    steps, when nothing is left to correct. weight_decay: decoupled, AdamW's (Loshchilov & Hutter 2019).
    on_gradients: whoever computes gradients shows them here first.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
    ):
        self.parameters = list(parameters)
        self.learning_rate, self.betas, self.epsilon = learning_rate, betas, epsilon
        self.on_gradients: Callable[[Sequence[Tensor]], None] | None = None
        self.exp_avg = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.exp_avg_sq = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        first = 0.0 if bias_correction else math.inf
        self.step_count = [torch.full((), first, device=p.device) for p in self.parameters]
        self.weight_decay = weight_decay
        # The kernel of decoupled decay, which without decay is the other one.
        self._kernel = torch._fused_adamw_ if weight_decay else torch._fused_adam_

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move every parameter by one step, in place. gradients: one of each parameter's shape, in their order."""
        torch._foreach_add_(self.step_count, 1)
        with denormals_as_zero():
            self._kernel(
                self.parameters,
                [laid_out_like(p, g) for p, g in zip(self.parameters, gradients, strict=True)],
                self.exp_avg,
                self.exp_avg_sq,
                [],
                self.step_count,
                lr=self.learning_rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=self.weight_decay,
                eps=self.epsilon,
                amsgrad=False,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step_count": self.step_count}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the saved moments do not fit the parameters."""
        for name, own in self.state_dict().items():
            saved = state[name]
            if [s.shape for s in saved] != [o.shape for o in own]:
                raise ValueError(f"the saved optimiser's '{name}' does not fit these parameters")
            for target, source in zip(own, saved, strict=True):
                target.copy_(source)


def laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the memory layout of its parameter, which the kernel takes for granted and does not check."""
    same = gradient.stride() == parameter.stride()
    return gradient if same else torch.empty_like(parameter).copy_(gradient)
