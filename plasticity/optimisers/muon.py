"""Muon (Jordan et al. 2024, github KellerJordan/Muon): momentum, made orthogonal, for the matrices of hidden layers.

Everything else (heads, embeddings, first convolutions, biases, gains) is trained by AdamW in the same optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
        defaults = orthogonal_defaults(lr, momentum, weight_decay, ns_steps, nesterov, ns, ns_dtype)
        super().__init__(params, {**defaults, "scale": chosen("scale", scale, Scale)}, stacked)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError if a parameter to be made orthogonal is no matrix."""
        super().add_param_group(adam_or_matrices(param_group, self.stacked))

    def _propose(self, groups: Sequence[Group]) -> list[Tensor]:
        return adam_or(self, groups, self._orthogonal_steps)

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


def orthogonal_defaults(
    lr: float,
    momentum: float,
    weight_decay: float,
    ns_steps: int,
    nesterov: bool,
    ns: Orthogonaliser,
    ns_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """The options of groups that `adam_or_matrices` and `orthogonal_momentum` read. Raises ValueError if impossible."""
    fraction("momentum", momentum)
    at_least("ns_steps", ns_steps, 1)
    return {
        "adam": False,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "ns_steps": ns_steps,
        "nesterov": nesterov,
        "ns": chosen("ns", ns, Orthogonaliser),
        "ns_dtype": ns_dtype,
    }


def chosen(name: str, value: str, options: Any) -> str:
    """The value, if it is one of a Literal's. Raises ValueError for another."""
    if value not in get_args(options):
        raise ValueError(f"unknown {name} '{value}'; there are {', '.join(get_args(options))}")
    return value


def adam_or(
    optimizer: ProposingOptimizer, groups: Sequence[Group], orthogonal_steps: Callable[[Group], list[Tensor]]
) -> list[Tensor]:
    """The steps of all groups, decay included: Adam's of those with "adam", `orthogonal_steps` of the others."""
    steps = []
    for group in groups:
        proposals = adam_proposal(optimizer, group) if group.options["adam"] else orthogonal_steps(group)
        decay(group, proposals)
        steps += proposals
    return steps


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
    network: nn.Module, parameters: Mapping[str, Tensor], stacked: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters in two lists: matrices of hidden layers and attentions, and all others: heads, embeddings, a
    first convolution, biases, gains."""
    structure = find_structure(network)
    names = {name for layer in structure.hidden for name in layer.weights}.union(structure.inner)
    names -= {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Embedding)}
    first = structure.hidden[0].weights[0]
    if parameters[first].dim() - stacked > 2:
        names.discard(first)
    wanted = {name for name, p in parameters.items() if name in names and p.dim() - stacked > 1}
    others = [p for name, p in parameters.items() if name not in wanted]
    return [p for name, p in parameters.items() if name in wanted], others


def hidden_and_others(
    network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
) -> list[dict[str, Any]]:
    """Groups for `hidden_matrices`: those, and the others, which Adam trains at `learning_rate`."""
    matrices, others = hidden_matrices(network, parameters, stacked)
    return [{"params": matrices}, {"params": others, "adam": True, "lr": learning_rate}]


@dataclass(frozen=True)
class WithMuon(Intervention):
    """Muon for the matrices of hidden layers, at a rate of its own; AdamW at the problem's rate for the rest."""

    learning_rate: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.0
    scale: Scale = "original"

    def optimizer(
        self, network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
    ) -> Muon:
        groups = hidden_and_others(network, parameters, learning_rate, stacked)
        return Muon(groups, self.learning_rate, self.momentum, self.weight_decay, scale=self.scale, stacked=stacked)
