"""Muon (Jordan et al. 2024, github KellerJordan/Muon): momentum, made orthogonal, for the matrices of hidden layers.

Everything else (heads, embeddings, first convolutions, biases, gains) is trained by AdamW in the same optimiser.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from plasticity.intervention import Intervention
from plasticity.networks.structure import find_structure
from plasticity.optimisers.orthogonal import Orthogonaliser, Scale, as_matrices, orthogonalise, step_scale
from plasticity.optimisers.proposing import (
    Group,
    ProposingOptimizer,
    adam_proposal,
    at_least,
    decay,
    fraction,
    momentum_buffers,
)

# Of the authors, for the parameters that are not matrices of hidden layers.
ADAM = {"adam": True, "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}


class Muon(ProposingOptimizer):
    """u <- orthogonal(momentum), times `step_scale`, for every group without "adam": True; AdamW for the others.

    ns: "newton_schulz" (`ns_steps`, in `ns_dtype`) or "exact". scale: see `step_scale`. Groups with "adam": True take
    "lr", "betas", "eps" and "weight_decay"; what they leave out is as in `ADAM`. Raises ValueError if a parameter to be
    made orthogonal is no matrix. Convolutions count as matrices [out, in * height * width].
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        nesterov: bool = True,
        ns: Orthogonaliser = "newton_schulz",
        scale: Scale = "original",
        ns_dtype: torch.dtype | None = None,
        stacked: bool = False,
    ):
        fraction("momentum", momentum)
        at_least("ns_steps", ns_steps, 1)
        if ns not in get_args(Orthogonaliser) or scale not in get_args(Scale):
            raise ValueError(f"unknown ns '{ns}' or scale '{scale}'")
        defaults = {
            "adam": False,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "nesterov": nesterov,
            "ns": ns,
            "scale": scale,
            "ns_dtype": ns_dtype,
        }
        super().__init__(params, defaults, stacked)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError if a parameter to be made orthogonal is no matrix."""
        super().add_param_group(adam_or_matrices(param_group, self.stacked))

    def _propose(self, groups: Sequence[Group]) -> list[Tensor]:
        steps = []
        for group in groups:
            proposals = adam_proposal(self, group) if group.options["adam"] else self._orthogonal_steps(group)
            decay(group, proposals)
            steps += proposals
        return steps

    def _orthogonal_steps(self, group: Group) -> list[Tensor]:
        options = group.options
        steps = []
        for p, matrix in zip(group.parameters, orthogonal_momentum(self, group), strict=True):
            _, rows, columns = matrix.shape
            size = options["lr"] * step_scale(rows, columns, options["scale"])
            steps.append((matrix * -size).view_as(p))
        return steps


def adam_or_matrices(group: dict[str, Any], stacked: bool) -> dict[str, Any]:
    """A parameter group, completed with `ADAM` if it asks for "adam"; others must hold matrices only (ValueError)."""
    parameters = group["params"]
    group = {**group, "params": [parameters] if isinstance(parameters, Tensor) else list(parameters)}
    if group.get("adam"):
        return {**ADAM, **group}
    bad = next((p for p in group["params"] if p.dim() - stacked < 2), None)
    if bad is not None:
        raise ValueError(f"only matrices can be made orthogonal, got {list(bad.shape)}; put it in a group with 'adam'")
    return group


def orthogonal_momentum(optimizer: ProposingOptimizer, group: Group) -> list[Tensor]:
    """The momentum of each parameter, advanced and made orthogonal: [K, rows, columns] each."""
    options = group.options
    momentum = options["momentum"]
    buffers = momentum_buffers(optimizer, group)
    torch._foreach_lerp_(buffers, group.gradients, 1 - momentum)
    directions = buffers
    if options["nesterov"]:
        directions = torch._foreach_lerp(group.gradients, buffers, momentum)
    matrices = [as_matrices(optimizer.members(d)) for d in directions]
    return orthogonalise(matrices, options["ns"], options["ns_steps"], options["ns_dtype"])


def hidden_matrices(
    network: nn.Module, parameters: Iterable[nn.Parameter], stacked: bool
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters in two lists: matrices of hidden layers and attentions, and all others: heads, embeddings, a
    first convolution, biases, gains."""
    structure = find_structure(network)
    names = {name for layer in structure.hidden for name in layer.weights}.union(structure.inner)
    names -= {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Embedding)}
    first = structure.hidden[0].weights[0]
    if network.get_parameter(first).dim() - stacked > 2:
        names.discard(first)
    wanted = {id(p) for name, p in network.named_parameters() if name in names and p.dim() - stacked > 1}
    parameters = list(parameters)
    return [p for p in parameters if id(p) in wanted], [p for p in parameters if id(p) not in wanted]


@dataclass(frozen=True)
class WithMuon(Intervention):
    """Muon for the matrices of hidden layers, at a rate of its own; AdamW at the problem's rate for the rest."""

    learning_rate: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.0
    scale: Scale = "original"

    def optimizer(
        self, network: nn.Module, parameters: Iterable[nn.Parameter], learning_rate: float, stacked: bool
    ) -> Muon:
        matrices, others = hidden_matrices(network, parameters, stacked)
        groups = [{"params": matrices}, {"params": others, "adam": True, "lr": learning_rate}]
        return Muon(groups, self.learning_rate, self.momentum, self.weight_decay, scale=self.scale, stacked=stacked)
