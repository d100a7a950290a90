"""Penalties on the weights that are added to the loss.

    l2        (λ/2) ||θ||²                                     L2 Init's baseline (Kumar et al. 2023, arXiv:2308.11958)
    l2-init   (λ/2) ||θ - θ⁰||², or L1, or Huber               the same paper, eq. 2; the released code squares the norm
    w2-init   (λ/2) ||sort θ - sort θ⁰||², tensor by tensor    squared 2-Wasserstein (Lewandowski et al. 2024,
                                                               arXiv:2312.00246)
    spectral  λ Σ_l (σ_max(W_l)^k - 1)² + ||b_l||^k            Lewandowski et al. 2024, arXiv:2406.06811
    parseval  λ Σ_l ||W_l W_lᵀ - s I||²_F, hidden layers       Chung et al. 2024, arXiv:2412.07224

Biases count, the gains and offsets of normalisers do not (spec 3.1). Convolutions are matrices [out, in h w].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.interventions.scope import all_weights, bias_of, hidden_weights, regularised
from plasticity.networks.redraw import fresh_parameters
from plasticity.optimisers.proposing import at_least


@dataclass
class L2(Intervention):
    """Weight decay in the loss. Published sweeps: 1e-2 to 1e-5 (L2 Init), 1e-3 and 1e-4 (slippery ant)."""

    strength: float = 1e-3
    """λ"""
    hidden: bool | None = None
    """whether hidden weights count; None: unless they are projected, where decay would only change the moments"""

    def __post_init__(self) -> None:
        at_least("strength of l2", self.strength, 0)

    def begin(self, learner: Learner) -> None:
        self.names = decayed(learner, self.hidden)

    def penalty(self, learner: Learner, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.strength * half_squares([parameters[name] for name in self.names])


@dataclass
class L2Init(Intervention):
    """Regenerative regularisation towards the initial values. Published sweep 1e-2 to 1e-5; 0.01 in RL (Juliani)."""

    strength: float = 1e-2
    """λ"""
    distance: Literal["l2", "l1", "huber"] = "l2"
    """l2: half the square, l1: the absolute value, huber: the one below 1 and the other above"""
    resample: bool = False
    """compare with a newly drawn network at each step, not with the first one"""

    def __post_init__(self) -> None:
        at_least("strength of l2-init", self.strength, 0)
        if self.distance not in _DISTANCES:
            raise ValueError(f"distance of l2-init must be l2, l1 or huber, got {self.distance}")

    def begin(self, learner: Learner) -> None:
        self.initial = {name: learner.parameter(name).clone() for name in regularised(learner)}
        learner.copies.append(self.initial)

    def penalty(self, learner: Learner, parameters: Mapping[str, Tensor]) -> Tensor:
        differences = [parameters[name] - start for name, start in self.initial.items()]
        return self.strength * _DISTANCES[self.distance](differences)

    def after_step(self, learner: Learner, batch: Batch) -> None:
        if self.resample:
            self.initial.update({n: t for n, t in fresh_parameters(learner).items() if n in self.initial})

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self.initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_values(self.initial, state["initial"])


_DISTANCES = {
    "l2": lambda differences: half_squares(differences),
    "l1": lambda differences: total(d.abs() for d in differences),
    "huber": lambda differences: total(F.huber_loss(d, torch.zeros_like(d), reduction="none") for d in differences),
}


@dataclass
class W2Init(Intervention):
    """As l2-init, between the sorted values of each tensor: only their distribution is held. 0.01 in RL (Juliani)."""

    strength: float = 1e-2
    """λ"""

    def __post_init__(self) -> None:
        at_least("strength of w2-init", self.strength, 0)

    def begin(self, learner: Learner) -> None:
        self.initial = {name: learner.parameter(name).clone() for name in regularised(learner)}
        learner.copies.append(self.initial)

    def penalty(self, learner: Learner, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.strength * half_squares(
            [
                parameters[name].flatten(1).sort(1).values - start.flatten(1).sort(1).values
                for name, start in self.initial.items()
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self.initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_values(self.initial, state["initial"])


@dataclass
class Spectral(Intervention):
    """Holds each layer's largest singular value at 1, found by one power iteration a step. Biases are pulled to 0."""

    strength: float = 1e-3
    """λ; published values reach from 1e-4 to 1e-2"""
    exponent: int = 2
    """k"""

    def __post_init__(self) -> None:
        at_least("strength of spectral", self.strength, 0)
        at_least("exponent of spectral", self.exponent, 2)

    def begin(self, learner: Learner) -> None:
        self.weights = all_weights(learner)
        self.biases = [b for w in self.weights if (b := bias_of(learner.network, w)) is not None]
        self.left, self.right = {}, {}
        for name in self.weights:
            matrix = learner.parameter(name).flatten(2)
            self.right[name] = F.normalize(_draw(learner, matrix[:, 0]), dim=1)
            self.left[name] = torch.zeros_like(matrix[:, :, 0])
        self._iterate(learner)

    def penalty(self, learner: Learner, parameters: Mapping[str, Tensor]) -> Tensor:
        sigmas = (
            torch.linalg.vecdot(self.left[name], torch.linalg.vecdot(parameters[name].flatten(2), right.unsqueeze(1)))
            for name, right in self.right.items()
        )
        norms = (parameters[name].square().sum(1, keepdim=True) for name in self.biases)
        k = self.exponent
        return self.strength * (
            total((sigma**k - 1).square().unsqueeze(1) for sigma in sigmas) + total(norm ** (k / 2) for norm in norms)
        )

    def after_step(self, learner: Learner, batch: Batch) -> None:
        self._iterate(learner)

    @torch.no_grad()
    def _iterate(self, learner: Learner) -> None:
        """One power iteration: u <- W v, v <- Wᵀ u, both of length 1."""
        for name in self.weights:
            matrix, left, right = learner.parameter(name).flatten(2), self.left[name], self.right[name]
            left.copy_(F.normalize(torch.linalg.vecdot(matrix, right.unsqueeze(1)), dim=1))
            right.copy_(F.normalize(torch.linalg.vecdot(matrix.mT, left.unsqueeze(1)), dim=1))

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left, "right": self.right}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_values(self.left, state["left"])
        copy_values(self.right, state["right"])


@dataclass
class Parseval(Intervention):
    """Holds the rows of hidden weights orthogonal and of squared length s."""

    strength: float = 1e-3
    """λ"""
    scale: float = 1.0
    """s"""

    def __post_init__(self) -> None:
        at_least("strength of parseval", self.strength, 0)
        at_least("scale of parseval", self.scale, 0)

    def begin(self, learner: Learner) -> None:
        self.names = hidden_weights(learner)

    def penalty(self, learner: Learner, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.strength * total(self._deviation(parameters[name].flatten(2)).square() for name in self.names)

    def _deviation(self, matrix: Tensor) -> Tensor:
        """W Wᵀ - s I of [K, out, in]: [K, out, out]."""
        identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        return torch.baddbmm(identity.expand(matrix.shape[0], -1, -1), matrix, matrix.mT, beta=-self.scale)


def decayed(learner: Learner, hidden: bool | None) -> list[str]:
    """What decays, with or without the hidden weights (None: with)."""
    spared = hidden_weights(learner) if hidden is False else []
    return [name for name in regularised(learner) if name not in spared]


class _HalfSquares(torch.autograd.Function):
    """With its gradient as one product; autograd's own way takes twice as long."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.stack([torch.linalg.vecdot(t.flatten(1), t.flatten(1)) for t in tensors]).sum(0) / 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = gradients
        return tuple(t * gradient.view(-1, *[1] * (t.dim() - 1)) for t in ctx.saved_tensors)


def half_squares(tensors: list[Tensor]) -> Tensor:
    """½ Σ ||t||² of each member of tensors [K, ...]: [K]."""
    return cast(Tensor, _HalfSquares.apply(*tensors)) if tensors else torch.zeros(())


def total(terms: Any) -> Tensor:
    """The sum of all numbers of each member in tensors [K, ...]: [K]."""
    sums = [term.flatten(1).sum(1) for term in terms]
    return torch.stack(sums).sum(0) if sums else torch.zeros(())


def copy_values(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Saved tensors into those in use. Raises ValueError if they do not fit."""
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise ValueError("the saved state of the intervention does not fit this network")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _draw(learner: Learner, like: Tensor) -> Tensor:
    """Gaussian noise [K, ...], each member from its own generator."""
    return torch.stack(
        [torch.randn(like.shape[1:], generator=g, device=like.device, dtype=like.dtype) for g in learner.generators]
    )
