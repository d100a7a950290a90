"""Training with enforced Lipschitz constants (Newhouse et al. 2025, arXiv:2507.13338).

After every step each weight matrix is brought back to a norm of at most `max_norm`, as a map between root mean squares:
sqrt(in / out) times its largest singular value. Orthogonal steps have a known norm, which is why Muon goes with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from plasticity.intervention import Intervention, Learner
from plasticity.measures.lipschitz import Attention, operator_norm
from plasticity.optimisers.muon import ADAM
from plasticity.optimisers.orthogonal import LARGEST_OUTPUT, as_matrices, exact, newton_schulz
from plasticity.optimisers.proposing import (
    Group,
    ProposingOptimizer,
    adam_proposal,
    at_least,
    decay,
    fraction,
    momentum_buffers,
)
from plasticity.optimisers.spectral import (
    STIEFEL,
    soft_cap_strength,
    spectral_hammer,
    spectral_hard_cap,
    spectral_normalize,
    spectral_soft_cap,
    spectral_weight_decay,
    stiefel,
    svd_clip,
)

Constraint = Literal[
    "none",
    "spectral_weight_decay",
    "spectral_normalize",
    "stiefel",
    "spectral_hammer",
    "spectral_hard_cap",
    "spectral_soft_cap",
    "svd_clip",
]
Direction = Literal["muon", "muon_stiefel", "muon_exact", "adam"]
# Largest singular value of the directions that have a bound.
LARGEST_STEP = {"muon": LARGEST_OUTPUT, "muon_stiefel": 1.0, "muon_exact": 1.0}


class ConstrainedMuon(ProposingOptimizer):
    """W <- constraint((1 - lr weight_decay) W - lr U) with U orthogonal momentum times sqrt(out / in).

    direction: "muon" (five quintic steps), "muon_stiefel" (six, none overshoots), "muon_exact" (SVD) or "adam": m /
    (sqrt(v) + 1e-12) without bias correction, whose size has no bound. kind of a group: "matrix", "embedding" (AdamW,
    then every row to a root mean square of at most 1) or "adam" (AdamW, no constraint). blocks of a group: its matrices
    are so many independent ones below each other, as the heads of an attention are.

    Only "spectral_soft_cap", with a "muon" direction, and "svd_clip" hold the bound to rounding; "spectral_normalize"
    and "spectral_hard_cap" to the accuracy of power iteration and polynomial (1.1 %). The norm must be within the bound
    at the start. Raises ValueError if the soft cap cannot hold it at this learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        max_norm: float = 1.0,
        constraint: Constraint = "spectral_soft_cap",
        direction: Direction = "muon",
        momentum: float = 0.95,
        beta2: float = 0.99,
        weight_decay: float = 0.0,
        spectral_decay: float = 0.0,
        only_down: bool = True,
        stacked: bool = False,
    ):
        fraction("momentum", momentum)
        fraction("beta2", beta2)
        at_least("spectral_decay", spectral_decay, 0)
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        if constraint not in get_args(Constraint) or direction not in get_args(Direction):
            raise ValueError(f"unknown constraint '{constraint}' or direction '{direction}'")
        if constraint == "spectral_soft_cap" and direction == "adam":
            raise ValueError("a soft cap needs steps of bounded norm; adam's have none. Use svd_clip")
        defaults = {
            "kind": "matrix",
            "blocks": 1,
            "lr": lr,
            "max_norm": max_norm,
            "constraint": constraint,
            "direction": direction,
            "momentum": momentum,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "spectral_decay": spectral_decay,
            "only_down": only_down,
        }
        super().__init__(params, defaults, stacked)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError if a constrained parameter is no matrix or the soft cap cannot hold the bound."""
        if param_group.get("kind", "matrix") != "matrix":
            param_group = {**ADAM, **param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        bad = next((p for p in group["params"] if p.dim() - self.stacked < 2), None)
        if group["kind"] != "adam" and bad is not None:
            raise ValueError(f"only matrices have a norm to bound, got {list(bad.shape)}; put it in a group of 'adam'")
        if group["kind"] == "matrix" and group["constraint"] == "spectral_soft_cap":
            soft_cap_strength(group["max_norm"], norm_after_step(group))

    def _propose(self, groups: Sequence[Group]) -> list[Tensor]:
        steps = []
        for group in groups:
            if group.options["kind"] == "matrix":
                steps += self._constrained_steps(group)
                continue
            proposals = adam_proposal(self, group)
            decay(group, proposals)
            if group.options["kind"] == "embedding":
                proposals = [limit_rows(p + s) - p for p, s in zip(group.parameters, proposals, strict=True)]
            steps += proposals
        return steps

    def _constrained_steps(self, group: Group) -> list[Tensor]:
        options = group.options
        shrink = 1 - options["lr"] * options["weight_decay"]
        steps = []
        for p, direction in zip(group.parameters, self._directions(group), strict=True):
            weight = self._blocks(p, options)
            natural = (weight.shape[1] / weight.shape[2]) ** 0.5
            moved = weight * (shrink / natural) - options["lr"] * direction
            steps.append((constrain(moved, options) * natural - weight).view_as(p))
        return steps

    def _directions(self, group: Group) -> list[Tensor]:
        """Of each parameter, as [K * blocks, out, in], for W / sqrt(out / in)."""
        options = group.options
        buffers = momentum_buffers(self, group)
        torch._foreach_lerp_(buffers, group.gradients, 1 - options["momentum"])
        matrices = [self._blocks(b, options) for b in buffers]
        if options["direction"] == "muon":
            return [newton_schulz(m) for m in matrices]
        if options["direction"] == "muon_stiefel":
            return [newton_schulz(m, STIEFEL) for m in matrices]
        if options["direction"] == "muon_exact":
            return [exact(m) for m in matrices]
        directions = []
        for p, g, m in zip(group.parameters, group.gradients, matrices, strict=True):
            state = self.state[p]
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["exp_avg_sq"].lerp_(g.square(), 1 - options["beta2"])
            natural = (m.shape[1] / m.shape[2]) ** 0.5
            directions.append(m / (self._blocks(state["exp_avg_sq"], options).sqrt() + 1e-12) / natural)
        return directions

    def _blocks(self, parameter: Tensor, options: dict[str, Any]) -> Tensor:
        matrices = as_matrices(self.members(parameter))
        return matrices.unflatten(1, (options["blocks"], -1)).flatten(0, 1)

    @torch.no_grad()
    def constrain_now(self) -> None:
        """Bring every parameter within its bound, by `svd_clip` or by its rows, as it must be before the first step."""
        for options in self.param_groups:
            for p in options["params"]:
                if options["kind"] == "matrix" and options["constraint"] not in ("none", "spectral_weight_decay"):
                    weight = self._blocks(p, options)
                    natural = (weight.shape[1] / weight.shape[2]) ** 0.5
                    p.copy_((svd_clip(weight / natural, options["max_norm"]) * natural).view_as(p))
                if options["kind"] == "embedding":
                    p.copy_(limit_rows(p))


def norm_after_step(options: dict[str, Any]) -> float:
    """The largest norm that a matrix within the bound can have right after decay and step."""
    shrunk = options["max_norm"] * (1 - options["lr"] * options["weight_decay"])
    return shrunk + options["lr"] * LARGEST_STEP[options["direction"]]


def constrain(matrices: Tensor, options: dict[str, Any]) -> Tensor:
    """matrices [N, rows, columns], whose singular values are to be at most "max_norm", brought there."""
    maximum = options["max_norm"]
    match options["constraint"]:
        case "none":
            return matrices
        case "spectral_weight_decay":
            return spectral_weight_decay(matrices, options["spectral_decay"])
        case "spectral_normalize":
            return spectral_normalize(matrices, maximum)
        case "stiefel":
            return stiefel(matrices, maximum)
        case "spectral_hammer":
            return spectral_hammer(matrices, maximum, options["only_down"])
        case "spectral_hard_cap":
            return spectral_hard_cap(matrices, maximum)
        case "spectral_soft_cap":
            return spectral_soft_cap(matrices, soft_cap_strength(maximum, norm_after_step(options)))
        case _:
            return svd_clip(matrices, maximum)


def limit_rows(embeddings: Tensor) -> Tensor:
    """Every vector along the last axis, divided by its root mean square where that is above 1."""
    return embeddings / embeddings.square().mean(-1, keepdim=True).sqrt().clamp_min(1)


@dataclass(frozen=True)
class WithLipschitz(Intervention):
    """Every weight matrix within `max_norm`; AdamW at the problem's rate for what is no matrix."""

    learning_rate: float = 0.1
    max_norm: float = 2.0
    constraint: Constraint = "spectral_soft_cap"
    direction: Direction = "muon"
    momentum: float = 0.95
    weight_decay: float = 0.0

    def optimizer(
        self, network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
    ) -> ConstrainedMuon:
        return ConstrainedMuon(
            parameter_groups(network, parameters, learning_rate, stacked),
            self.learning_rate,
            self.max_norm,
            self.constraint,
            self.direction,
            self.momentum,
            weight_decay=self.weight_decay,
            stacked=stacked,
        )

    def begin(self, learner: Learner) -> None:
        learner.optimizer.constrain_now()

    def metrics(self, learner: Learner) -> dict[str, Tensor]:
        """The norm of each matrix as a map between root mean squares, [K]."""
        weights = {name: learner.parameter(name) for name, _ in learner.network.named_parameters()}
        return {f"lipschitz/{name}": operator_norm(weight) for name, weight in weights.items() if weight.dim() > 2}


def parameter_groups(
    network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
) -> list[dict[str, Any]]:
    """Groups of `ConstrainedMuon`: matrices, matrices per head of attentions, embeddings, and all others."""
    blocks, embeddings = {}, set()
    for prefix, module in network.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, Attention):
            blocks |= {f"{dot}{layer}.weight": module.heads for layer in ("query", "key", "value")}
        elif isinstance(module, nn.Embedding):
            embeddings.add(f"{dot}weight")
    groups: dict[tuple[str, int], list[Tensor]] = {}
    for name, p in parameters.items():
        kind = "embedding" if name in embeddings else "matrix" if p.dim() - stacked > 1 else "adam"
        groups.setdefault((kind, blocks.get(name, 1)), []).append(p)
    own = {"matrix": {}, "embedding": {"lr": learning_rate}, "adam": {"lr": learning_rate}}
    return [{"params": ps, "kind": kind, "blocks": n, **own[kind]} for (kind, n), ps in groups.items()]
