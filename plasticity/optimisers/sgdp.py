"""SGDP (Heo et al. 2021, arXiv:2006.08217): SGD with momentum and the projection of AdamP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plasticity.intervention import Intervention, Learner
from plasticity.optimisers.adamp import project_all, projection_metrics
from plasticity.optimisers.proposing import Group, ProposingOptimizer, at_least, fraction, momentum_buffers


class SGDP(ProposingOptimizer):
    """SGD with momentum, decoupled weight decay / (1 - momentum), and `plasticity.optimisers.adamp.project`.

    The buffer starts at zero, so dampening holds for the first step too. project_buffer: keep the projected step as the
    momentum, as the authors' code does without nesterov; else the raw momentum is kept, as in the paper. views: how
    each of `proposed` was projected at the last step, [K].
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        project_buffer: bool = False,
        stacked: bool = False,
    ):
        fraction("momentum", momentum)
        for name, value in (("dampening", dampening), ("eps", eps), ("delta", delta), ("wd_ratio", wd_ratio)):
            at_least(name, value, 0)
        if nesterov and project_buffer:
            raise ValueError("project_buffer is without nesterov, whose step is not the buffer")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "project_buffer": project_buffer,
        }
        super().__init__(params, defaults, stacked)
        self.views: list[Tensor] = []

    def _propose(self, groups: Sequence[Group]) -> list[Tensor]:
        self.views = []
        steps = []
        for group in groups:
            options = group.options
            momentum, rate = options["momentum"], options["lr"]
            buffers = momentum_buffers(self, group)
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, group.gradients, alpha=1 - options["dampening"])
            if options["nesterov"]:
                directions = torch._foreach_add(group.gradients, buffers, alpha=momentum)
            else:
                directions = buffers
            proposals = list(torch._foreach_mul(directions, -rate))
            if options["project_buffer"]:
                self._project_buffers(group, buffers)
            steps += project_all(self, group, proposals, self.views, 1 / (1 - momentum))
        return steps

    def _project_buffers(self, group: Group, buffers: list[Tensor]) -> None:
        undecayed = Group({**group.options, "weight_decay": 0.0}, group.parameters, group.gradients)
        torch._foreach_copy_(buffers, project_all(self, undecayed, buffers, []))


@dataclass(frozen=True)
class WithSGDP(Intervention):
    """SGDP in place of the problem's optimiser, at the problem's learning rate."""

    momentum: float = 0.9
    weight_decay: float = 0.0
    delta: float = 0.1
    wd_ratio: float = 0.1

    def optimizer(
        self, network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
    ) -> SGDP:
        return SGDP(
            parameters.values(),
            learning_rate,
            self.momentum,
            weight_decay=self.weight_decay,
            delta=self.delta,
            wd_ratio=self.wd_ratio,
            stacked=stacked,
        )

    def metrics(self, learner: Learner) -> dict[str, Tensor]:
        return projection_metrics(learner)
