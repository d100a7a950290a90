"""TRAC (Muppidi et al. 2024, arXiv:2405.16642): how far to follow another optimiser away from the first weights.

Parameter-free: several one-dimensional learners, one for each discount, bet on the sum of gradient times distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plasticity.intervention import Intervention
from plasticity.optimisers.adamp import AdamP
from plasticity.optimisers.erfi import ERFI_OF_ROOT_HALF, erfi
from plasticity.optimisers.proposing import Group, ProposingOptimizer, at_least, fraction


class TRAC(ProposingOptimizer):
    """p <- reference + (distance + step of `base`) * max(sum of s, 0), where p = reference + distance * (sum of s).

    base: an optimiser that this one drives and saves; it holds the learning rate. reference: the parameters before the
    first step. betas: discounts of the learners. first_scale: s_0, by which each s begins. shared: "sum", [K], and
    "variance" and "sigma", [K, learners]; float64.
    """

    def __init__(
        self,
        base: ProposingOptimizer,
        betas: Sequence[float] = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999),
        first_scale: float = 1e-8,
        eps: float = 1e-8,
    ):
        for beta in betas:
            fraction("betas", beta)
        at_least("first_scale", first_scale, 0)
        at_least("eps", eps, 0)
        super().__init__([{"params": group["params"]} for group in base.param_groups], {"lr": 1.0}, base.stacked)
        self.base, self.first_scale, self.eps = base, first_scale, eps
        self.param_groups = base.param_groups  # whose learning rate a schedule may change
        device = self.param_groups[0]["params"][0].device
        self.betas = torch.tensor(betas, dtype=torch.float64, device=device)
        learners = torch.ones(self.member_count(), len(betas), dtype=torch.float64, device=device)
        self.shared = {
            "sum": torch.zeros_like(learners[:, 0]),
            "variance": torch.zeros_like(learners),
            "sigma": learners * 1e-8,
        }
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["reference"] = p.detach().clone()

    def _propose(self, groups: Sequence[Group]) -> list[Tensor]:
        parameters = [p for group in groups for p in group.parameters]
        gradients = [g for group in groups for g in group.gradients]
        references = [self.state[p]["reference"] for p in parameters]
        steps = self.base.propose()

        moved = torch._foreach_sub(parameters, references)
        whole = 1 / (self.shared["sum"] + self.eps)
        products = [
            torch.linalg.vecdot(self.flat(g), self.flat(m)).double() for g, m in zip(gradients, moved, strict=True)
        ]
        scale = self._bet(torch.stack(products).sum(0) * whole)
        return [self.part(self.part(m, whole) + step, scale).sub_(m) for m, step in zip(moved, steps, strict=True)]

    def _bet(self, product: Tensor) -> Tensor:
        """product: <gradient, distance>, [K]. Returns the new max(sum of s, 0)."""
        variance, sigma = self.shared["variance"], self.shared["sigma"]
        variance.mul_(self.betas.square()).add_(product.square().unsqueeze(1))
        sigma.mul_(self.betas).sub_(product.unsqueeze(1))
        bets = erfi(sigma / (2**0.5 * variance.sqrt() + self.eps)) * (self.first_scale / ERFI_OF_ROOT_HALF)
        self.shared["sum"].copy_(bets.sum(1).clamp_min(0))
        return self.shared["sum"]

    def state_dict(self) -> dict[str, Any]:
        """Its own and, under "base", that of the optimiser it drives."""
        return {**super().state_dict(), "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if it does not fit."""
        super().load_state_dict(state_dict)
        self.base.load_state_dict(state_dict["base"])
        self.param_groups = self.base.param_groups


@dataclass(frozen=True)
class WithTRAC(Intervention):
    """TRAC around Adam, at the problem's learning rate."""

    first_scale: float = 1e-8

    def optimizer(
        self, network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
    ) -> TRAC:
        return TRAC(AdamP(parameters.values(), learning_rate, delta=0.0, stacked=stacked), first_scale=self.first_scale)
