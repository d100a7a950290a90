"""NorMuon (Li et al. 2025, arXiv:2510.05491): Muon whose step has rows of equal size, by a second moment per neuron."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plasticity.intervention import Intervention
from plasticity.optimisers.muon import (
    adam_or,
    adam_or_matrices,
    chosen,
    hidden_and_others,
    orthogonal_defaults,
    orthogonal_momentum,
)
from plasticity.optimisers.orthogonal import Orthogonaliser, step_scale
from plasticity.optimisers.proposing import Group, ProposingOptimizer, at_least, fraction

NeuronScale = Literal["frobenius", "rms"]


class NorMuon(ProposingOptimizer):
    """Muon's orthogonal matrix O, every row divided by the root of the running mean of its squares.

    scale: "frobenius" gives the whole the Frobenius norm of O and Muon's original size (authors' code); "rms" gives it
    the root mean square 0.2 * lr (paper). Groups with "adam": True are trained by AdamW, as in Muon.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        nesterov: bool = True,
        ns: Orthogonaliser = "newton_schulz",
        scale: NeuronScale = "frobenius",
        ns_dtype: torch.dtype | None = None,
        eps: float = 1e-10,
        stacked: bool = False,
    ):
        fraction("beta2", beta2)
        at_least("eps", eps, 0)
        defaults = orthogonal_defaults(lr, momentum, weight_decay, ns_steps, nesterov, ns, ns_dtype)
        own = {"beta2": beta2, "eps": eps, "scale": chosen("scale", scale, NeuronScale)}
        super().__init__(params, {**defaults, **own}, stacked)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError if a parameter to be made orthogonal is no matrix."""
        super().add_param_group(adam_or_matrices(param_group, self.stacked))

    def _propose(self, groups: Sequence[Group]) -> list[Tensor]:
        return adam_or(self, groups, self._neuron_steps)

    def _neuron_steps(self, group: Group) -> list[Tensor]:
        options = group.options
        steps = []
        for p, matrix in zip(group.parameters, orthogonal_momentum(self, group), strict=True):
            _, rows, columns = matrix.shape
            even = self._even_rows(p, matrix, options)
            norm = even.flatten(1).norm(dim=1).view(-1, 1, 1)
            if options["scale"] == "rms":
                size = 0.2 * (rows * columns) ** 0.5 / norm.clamp_min(options["eps"])
            else:
                size = matrix.flatten(1).norm(dim=1).view(-1, 1, 1) / (norm + options["eps"])
                size = size * step_scale(rows, columns, "original")
            steps.append((even * (-options["lr"] * size)).view_as(p))
        return steps

    def _even_rows(self, parameter: Tensor, matrix: Tensor, options: dict[str, Any]) -> Tensor:
        """O / (sqrt(v) + eps). The missing bias correction of v cancels in the rescaling that follows."""
        state = self.state[parameter]
        if "row_second_moment" not in state:
            state["row_second_moment"] = matrix.new_zeros(*matrix.shape[:2], 1)
        second = state["row_second_moment"]
        second.lerp_(matrix.square().mean(2, keepdim=True), 1 - options["beta2"])
        return matrix / (second.sqrt() + options["eps"])


@dataclass(frozen=True)
class WithNorMuon(Intervention):
    """NorMuon for the matrices of hidden layers, at a rate of its own; AdamW at the problem's rate for the rest."""

    learning_rate: float = 0.02
    momentum: float = 0.95
    beta2: float = 0.95
    weight_decay: float = 0.0
    scale: NeuronScale = "frobenius"

    def optimizer(
        self, network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
    ) -> NorMuon:
        groups = hidden_and_others(network, parameters, learning_rate, stacked)
        return NorMuon(
            groups,
            self.learning_rate,
            self.momentum,
            self.beta2,
            self.weight_decay,
            scale=self.scale,
            stacked=stacked,
        )
