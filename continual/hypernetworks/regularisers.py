"""What keeps a hypernetwork from forgetting: penalties on the weights it makes for earlier tasks, and on its head.

    output (von Oswald et al. 2020, eq. 2)   R = 1/t Σ_{j<t} ‖ Q_j (h(e_j, θ*) - h(e_j, θ)) ‖²
    fisher (Chandra et al. 2023)             R = 1/t Σ_{j<t} Σ_n Q_jn F_jn (h_n(e_j, θ*) - h_n(e_j, θ))²
    head anchor                              Σ over the head of (p - p*)²

θ* are the parameters at the end of the task before, Q_j leaves out rows of the head that belong to other tasks. That
the second is the regulariser of the paper is inferred from its authors' code (specs/rnn-hypernetworks.md, 5.2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from plasticity.adam import Adam
from plasticity.sgd import SGD


def output_distance(then: Tensor, now: Tensor, own: Tensor, importance: Tensor | None = None) -> Tensor:
    """R [K] of the weights of t tasks, [K, t, N] each. own: Q, bool; importance: F, None: 1 for all."""
    squares = torch.where(own, then - now, 0).square()
    if importance is not None:
        squares = squares * importance
    return squares.sum((1, 2)) / then.shape[1]


def anchor_distance(then: Sequence[Tensor], now: Sequence[Tensor]) -> Tensor:
    """Sum of squares, [K], of the differences between parameters [K, *shape]."""
    distances = [(a - b).square().flatten(1).sum(1) for a, b in zip(then, now, strict=True)]
    return torch.stack(distances).sum(0)


def diagonal_fisher(log_likelihood: Callable[[Tensor, int], Tensor], weights: Tensor, samples: int) -> Tensor:
    """F [K, N]: the mean over samples of (∂ log p(y|x; W) / ∂W)², with true labels, one sample at a time.

    log_likelihood: (weights [K, N], number of the sample) -> [K]. weights: W.
    """
    weights = weights.detach().requires_grad_(True)
    total = torch.zeros_like(weights, requires_grad=False)
    for index in range(samples):
        with torch.enable_grad():
            likelihood = log_likelihood(weights, index).sum()
        (gradient,) = torch.autograd.grad(likelihood, weights)
        total.addcmul_(gradient, gradient)
    return total / samples


def step_ahead(optimizer: Adam | SGD, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Where the optimiser's parameters would be after a step on these gradients. It is left as it is."""
    twin = copy.copy(optimizer)
    for name, value in vars(optimizer).items():
        if isinstance(value, list):  # of tensors: parameters and moments
            setattr(twin, name, [tensor.detach().clone() for tensor in value])
    twin.step(gradients)
    return list(twin.parameters)
