"""How many directions a matrix uses: the ranks of features and weights.

Most are functions of singular values, sigma [K, r] in falling order, one row for each member; a matrix of zeros has
rank 0 by all of them, one that is not finite has rank nan. Features are not centred. Names are those of their sources;
where others call them differently, the docstring says so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plasticity.measures.decomposition import singular_values


def feature_matrix(h: Tensor, rows: int = 1024) -> Tensor:
    """Activations as samples times features: [K, B, H] as it is, [K, B, C, height, width] -> [K, n, C].

    Of a convolution's B * height * width positions at most `rows` are kept, evenly spaced, so that nothing is drawn.
    """
    if h.dim() == 3:
        return h
    positions = h.movedim(2, -1).flatten(1, -2)
    return positions[:, :: math.ceil(positions.shape[1] / rows)]


def erank(sigma: Tensor) -> Tensor:
    """Effective rank exp(-Σ p ln p) with p = σ / Σ σ, [K] (Roy & Vetterli 2007, equation 4).

    Ranks of features are comparable for at least twice as many samples as features.
    """
    total = sigma.sum(1, keepdim=True)
    entropy = torch.special.entr(sigma / _positive(total)).sum(1)
    return torch.where(total.squeeze(1) > 0, entropy.exp(), 0 * total.squeeze(1))


def srank(sigma: Tensor, delta: float = 0.01) -> Tensor:
    """The fewest singular values that sum to (1 - delta) of all, [K] (Kumar et al. 2021, arXiv:2010.14498, section 3).

    Several codebases call this one the stable rank.
    """
    return _fewest(sigma, 1 - delta)


def energy_rank(sigma: Tensor, share: float = 0.99) -> Tensor:
    """The fewest singular values whose squares sum to `share` of all, [K] (Yang et al. 2020, arXiv:1909.12255).

    Also called the approximate rank.
    """
    return _fewest(sigma.square(), share)


def stable_rank(sigma: Tensor) -> Tensor:
    """||Φ||_F² / σ_1², [K]."""
    squares = sigma.square()
    return squares.sum(1) / _positive(squares.amax(1))


def participation(sigma: Tensor) -> Tensor:
    """Participation ratio (Σ σ²)² / Σ σ⁴, [K]."""
    squares = sigma.square()
    return squares.sum(1).square() / _positive(squares.square().sum(1))


def feature_rank(sigma: Tensor, samples: int, epsilon: float = 0.01) -> Tensor:
    """Number of singular values of Φ / sqrt(samples) above epsilon, [K] (Lyle et al. 2022, arXiv:2204.09560, eq. 2)."""
    return (sigma / math.sqrt(samples) > epsilon).sum(1) + 0 * sigma[:, 0]


def weight_rank(weight: Tensor) -> Tensor:
    """Numerical rank of weights [K, out, in, ...] as out x (in ...), over the largest possible one, [K] in [0, 1].

    What rounding to the weights' own type may have made of a 0 counts as 0, as in `torch.linalg.matrix_rank`.
    """
    matrix = weight.flatten(2)
    sigma = singular_values(matrix)
    rounding = max(matrix.shape[1:]) * torch.finfo(weight.dtype).eps * sigma[:, :1]
    return ((sigma > rounding).sum(1) + 0 * sigma[:, 0]) / min(matrix.shape[1:])


def _fewest(values: Tensor, share: float) -> Tensor:
    """How many of the values [K, r], largest first, it takes to reach `share` of their sum, [K]; 0 if all are 0."""
    total = values.sum(1, keepdim=True)
    short = (values.cumsum(1) < share * total).sum(1)
    return torch.where(total.squeeze(1) > 0, (short + 1).clamp(max=values.shape[1]), 0 * total.squeeze(1))


def _positive(x: Tensor) -> Tensor:
    """What to divide by where x is 0 and so is the number above it."""
    return torch.where(x > 0, x, 1)
