"""Utility-based perturbed gradient descent (Elsayed & Mahmood 2024, arXiv:2404.00781): useful weights are protected
from change, useless ones are perturbed.

The utility of a weight is a running mean of -gradient * weight, to first order what the loss would gain by its loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plasticity.intervention import Intervention, Learner
from plasticity.optimisers.proposing import Group, ProposingOptimizer, adam_proposal, at_least, decay, fraction


class UPGD(ProposingOptimizer):
    """p <- (1 - lr weight_decay) p - lr (g + noise) (1 - S), S the scaled utility of each weight in (0, 1).

    generators: one for each member, on any device; they draw the noise. sigma: its standard deviation. beta_utility: of
    the running mean. protecting: False takes the whole gradient and only scales the noise by 1 - S. local: S from each
    neuron's own weights, by their utilities' norm, instead of from the largest utility of the network. adaptive: Adam's
    direction in place of the gradient, noise added to it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        generators: Sequence[torch.Generator] = (),
        sigma: float = 1e-3,
        beta_utility: float = 0.999,
        weight_decay: float = 0.0,
        protecting: bool = True,
        local: bool = False,
        adaptive: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        stacked: bool = False,
    ):
        at_least("sigma", sigma, 0)
        at_least("eps", eps, 0)
        for name, value in (("beta_utility", beta_utility), ("betas", betas[0]), ("betas", betas[1])):
            fraction(name, value)
        defaults = {
            "lr": lr,
            "sigma": sigma,
            "beta_utility": beta_utility,
            "weight_decay": weight_decay,
            "protecting": protecting,
            "local": local,
            "adaptive": adaptive,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults, stacked)
        self.generators = list(generators)

    def _propose(self, groups: Sequence[Group]) -> list[Tensor]:
        if len(self.generators) != self.member_count() and any(group.options["sigma"] for group in groups):
            raise ValueError(f"UPGD needs a generator for each of {self.member_count()} members")
        directions = [self._directions(group) for group in groups]
        utilities = [self._utilities(group) for group in groups]
        largest = self._largest(utilities)
        steps = []
        for group, direction, utility in zip(groups, directions, utilities, strict=True):
            steps += self._steps(group, direction, utility, largest)
        return steps

    def _directions(self, group: Group) -> list[Tensor]:
        if not group.options["adaptive"]:
            return group.gradients
        unit_rate = Group({**group.options, "lr": -1.0}, group.parameters, group.gradients)
        return adam_proposal(self, unit_rate)

    def _utilities(self, group: Group) -> list[Tensor]:
        """The running means, not yet corrected for their start at zero."""
        beta = group.options["beta_utility"]
        for p in group.parameters:
            if "utility" not in self.state[p]:
                self.state[p]["utility"] = torch.zeros_like(p)
                self.state[p].setdefault("step", torch.zeros((), device=p.device))
        utilities = [self.state[p]["utility"] for p in group.parameters]
        if not group.options["adaptive"]:  # else Adam counted
            torch._foreach_add_([self.state[p]["step"] for p in group.parameters], 1)
        torch._foreach_mul_(utilities, beta)
        torch._foreach_addcmul_(utilities, group.gradients, group.parameters, value=beta - 1)
        return utilities

    def _largest(self, utilities: Sequence[Sequence[Tensor]]) -> Tensor:
        """Each member's largest utility, [K]; a negative one would turn the order round, so it is positive at least."""
        each = [self.flat(u).amax(1) for group in utilities for u in group]
        largest = torch.stack(each).amax(0)
        return largest.clamp_min(torch.finfo(largest.dtype).tiny)

    def _steps(
        self, group: Group, directions: Sequence[Tensor], utilities: Sequence[Tensor], largest: Tensor
    ) -> list[Tensor]:
        options = group.options
        noises = self._noise(group)
        steps = []
        for p, direction, utility, noise in zip(group.parameters, directions, utilities, noises, strict=True):
            corrected = utility / (1 - options["beta_utility"] ** self.state[p]["step"].double())
            freedom = 1 - self._scaled(self.members(corrected), largest, options["local"]).view_as(p)
            if options["protecting"]:
                steps.append((direction + noise) * freedom * -options["lr"])
            else:
                steps.append((direction + noise * freedom) * -options["lr"])
        decay(group, steps)
        return steps

    def _scaled(self, utility: Tensor, largest: Tensor, local: bool) -> Tensor:
        """utility [K, ...] -> (0, 1); local: over the norm of each row, or of a whole vector."""
        if local:
            rows = utility.flatten(2) if utility.dim() > 2 else utility
            return torch.sigmoid(nn.functional.normalize(rows, dim=-1).view_as(utility))
        return torch.sigmoid(utility / largest.view(-1, *[1] * (utility.dim() - 1)))

    def _noise(self, group: Group) -> Sequence[Tensor | float]:
        """Of each parameter's shape; a member's draws come from its own generator and do not depend on the others."""
        sigma = group.options["sigma"]
        if not sigma:
            return [0.0] * len(group.parameters)
        first = group.parameters[0]
        shapes = [self.members(p).shape[1:] for p in group.parameters]
        total = sum(shape.numel() for shape in shapes)
        draws = [torch.randn(total, generator=g, device=g.device, dtype=first.dtype) for g in self.generators]
        flat = torch.stack(draws).mul_(sigma).to(first.device)
        parts = flat.split([shape.numel() for shape in shapes], dim=1)
        return [part.view_as(self.members(p)).view_as(p) for part, p in zip(parts, group.parameters, strict=True)]


@dataclass(frozen=True)
class WithUPGD(Intervention):
    """UPGD in place of the problem's optimiser, at the problem's learning rate."""

    sigma: float = 1e-3
    beta_utility: float = 0.999
    weight_decay: float = 0.0
    protecting: bool = True
    local: bool = False
    adaptive: bool = False

    def optimizer(
        self, network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
    ) -> UPGD:
        return UPGD(
            parameters.values(),
            learning_rate,
            sigma=self.sigma,
            beta_utility=self.beta_utility,
            weight_decay=self.weight_decay,
            protecting=self.protecting,
            local=self.local,
            adaptive=self.adaptive,
            stacked=stacked,
        )

    def begin(self, learner: Learner) -> None:
        learner.optimizer.generators = list(learner.generators)
