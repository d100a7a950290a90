"""AdamP (Heo et al. 2021, arXiv:2006.08217): Adam without the radial part of its step where scale does not matter.

Behind a normaliser the norm of a weight changes nothing but the effective learning rate, which momentum then lets decay
needlessly fast. Where the gradient is (nearly) orthogonal to the weight, the step is projected to be so exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plasticity.intervention import Intervention, Learner
from plasticity.optimisers.proposing import (
    Group,
    ProposingOptimizer,
    adam_proposal,
    adam_state,
    at_least,
    decay,
    fraction,
)


class AdamP(ProposingOptimizer):
    """Adam with decoupled weight decay and the projection of `project`; defaults of the paper.

    delta: how small the cosine of gradient and weight must be, before division by the root of the row's length; 0
    turns projection off and leaves AdamW. wd_ratio: weight decay of projected parameters, relative to the others.
    views: how each of `proposed` was projected at the last step, [K].
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        stacked: bool = False,
    ):
        for beta in betas:
            fraction("betas", beta)
        for name, value in (("eps", eps), ("delta", delta), ("wd_ratio", wd_ratio)):
            at_least(name, value, 0)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, stacked)
        self.views: list[Tensor] = []

    def _propose(self, groups: Sequence[Group]) -> list[Tensor]:
        self.views = []
        steps = []
        for group in groups:
            proposals = adam_proposal(self, group)
            if group.options["nesterov"]:
                proposals = [
                    self._nesterov(group, p, g) for p, g in zip(group.parameters, group.gradients, strict=True)
                ]
            steps += project_all(self, group, proposals, self.views)
        return steps

    def _nesterov(self, group: Group, parameter: Tensor, gradient: Tensor) -> Tensor:
        state, (beta1, beta2) = adam_state(self, parameter), group.options["betas"]
        steps = state["step"].double()
        ahead = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
        denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2**steps).sqrt()).add_(group.options["eps"])
        return ahead.div_(denominator) * (-group.options["lr"] / (1 - beta1**steps))


NOT_PROJECTED, BY_CHANNEL, BY_LAYER = 0, 1, 2


def project_all(
    optimizer: ProposingOptimizer, group: Group, steps: list[Tensor], views: list[Tensor], decay_factor: float = 1.0
) -> list[Tensor]:
    """`project` for the proposals of a group, and weight decay: weaker by "wd_ratio" where they were projected.

    views: [K] for each parameter is appended. decay_factor: multiplies the weight decay of all.
    """
    projected, factors = [], []
    for p, g, step in zip(group.parameters, group.gradients, steps, strict=True):
        weight, gradient, update = (optimizer.members(t) for t in (p, g, step))
        if weight.dim() > 2 and group.options["delta"] > 0:
            new, view = project(weight, gradient, update, group.options["delta"], group.options["eps"])
        else:
            new, view = update, weight.new_zeros(weight.shape[0])
        projected.append(new.view_as(p))
        ones = torch.ones_like(view)
        factor = decay_factor * torch.where(view == NOT_PROJECTED, ones, ones * group.options["wd_ratio"])
        factors.append(factor.view(-1, *[1] * (p.dim() - 1)) if optimizer.stacked else factor.squeeze(0))
        views.append(view)
    decay(group, projected, factors)
    return projected


def project(
    weight: Tensor, gradient: Tensor, update: Tensor, delta: float = 0.1, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """The update without its part along the weight, where the gradient says that the weight's scale does not matter.

    All [K, out, ...]. A member is projected row by row if in every row |cos(gradient, weight)| is below delta over the
    root of the row's length; else as one vector, if that holds for the whole tensor; else not at all. Returns the
    update and, [K], which it was: `BY_CHANNEL`, `BY_LAYER` or `NOT_PROJECTED` (paper, section 3.2, algorithm 2).
    """
    p, g, u = (t.flatten(2) for t in (weight, gradient, update))  # [K, out, row]
    row_length, length = p.shape[2], p.shape[1] * p.shape[2]
    along = torch.linalg.vecdot(p, u)  # [K, out]
    p_norm, g_norm = p.norm(dim=2), g.norm(dim=2)
    dot = torch.linalg.vecdot(p, g)
    cosine = dot.abs() / (p_norm.clamp_min(eps) * g_norm.clamp_min(eps))
    by_channel = cosine.amax(1) < delta / row_length**0.5
    whole_norm = p_norm.norm(dim=1)
    cosine = dot.sum(1).abs() / (whole_norm.clamp_min(eps) * g_norm.norm(dim=1).clamp_min(eps))
    by_layer = cosine < delta / length**0.5

    rows = along / (p_norm + eps).square()
    whole = along.sum(1) / (whole_norm + eps).square()
    radial = torch.where(by_layer, whole, 0.0).unsqueeze(1).expand_as(rows)
    radial = torch.where(by_channel.unsqueeze(1), rows, radial)
    view = torch.where(by_channel, BY_CHANNEL, torch.where(by_layer, BY_LAYER, NOT_PROJECTED))
    return torch.addcmul(u, radial.unsqueeze(2), p, value=-1).view_as(update), view.to(p.dtype)


@dataclass(frozen=True)
class WithAdamP(Intervention):
    """AdamP in place of the problem's optimiser, at the problem's learning rate."""

    weight_decay: float = 0.0
    delta: float = 0.1
    wd_ratio: float = 0.1

    def optimizer(
        self, network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
    ) -> AdamP:
        return AdamP(
            parameters.values(),
            learning_rate,
            weight_decay=self.weight_decay,
            delta=self.delta,
            wd_ratio=self.wd_ratio,
            stacked=stacked,
        )

    def metrics(self, learner: Learner) -> dict[str, Tensor]:
        return projection_metrics(learner)


def projection_metrics(learner: Learner) -> dict[str, Tensor]:
    """What AdamP and SGDP record of the last step: how each matrix was projected, its norm and its movement."""
    optimizer = learner.optimizer
    names = {id(parameter): name for name, parameter in learner.network.named_parameters()}
    measures = {"projected": optimizer.views, **optimizer.movement()}
    return {
        f"optimizer/{measure}/{names[id(p)]}": value
        for measure, values in measures.items()
        for p, value in zip(optimizer.proposed, values, strict=True)
        if optimizer.members(p).dim() > 2
    }
