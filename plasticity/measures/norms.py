"""Sizes of weights and gradients, and how far a step moves: norms, effective learning rate, angles, ratios.

Tensors are [K, *shape], one row for each of K members, and results [K]: nothing sums over members. Several codebases
call ||g|| / ||θ|| the effective learning rate; here that is `grad_to_param`, and `elr` is that of a weight tensor whose
scale does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """[K, *shape] -> [K, n] in the order of memory, so that dense weights that lie transposed are not copied."""
    inner = sorted(range(1, x.dim()), key=x.stride, reverse=True)
    return x.permute(0, *inner).flatten(1)


def l2(x: Tensor) -> Tensor:
    """Euclidean norm."""
    return torch.linalg.vector_norm(rows(x), dim=1)


def l1(x: Tensor) -> Tensor:
    """Sum of magnitudes: unlike the Euclidean norm, not ruled by a few large entries."""
    return rows(x).abs().sum(1)  # vector_norm has no fast path for it


def rms(x: Tensor) -> Tensor:
    """Root mean square: `l2` over the root of the number of entries."""
    return l2(x) / x[0].numel() ** 0.5


def mean_magnitude(x: Tensor) -> Tensor:
    """Mean |x|."""
    return l1(x) / x[0].numel()


def total(norms: Tensor) -> Tensor:
    """The Euclidean norm of several tensors as one vector, from theirs: [T, K] -> [K]."""
    return torch.linalg.vector_norm(norms, dim=0)


def elr(
    norm: Tensor, initial_norm: Tensor, learning_rate: float, initial_learning_rate: float, exponent: int
) -> Tensor:
    """Effective learning rate of a scale-invariant tensor relative to initialisation: (η_t / η_0) (ρ / ||u_t||)^p.

    exponent p: 2 for SGD, whose step goes with the gradient and so with 1 / ||u||; 1 for Adam and others that do not
    see the gradient's scale (Lyle et al. 2024, arXiv:2407.01800). A norm of 0 gives inf.
    """
    return learning_rate / initial_learning_rate * (initial_norm / norm) ** exponent


def angle(after: Tensor, before: Tensor) -> Tensor:
    """Angle between a tensor before and after, in radians: its movement whatever the optimiser; 0 for a zero tensor."""
    after, before = after.flatten(1), before.flatten(1)
    direction = torch.nn.functional.normalize(before, dim=1)
    along = torch.linalg.vecdot(after, direction)
    return torch.atan2(l2(after - along.unsqueeze(1) * direction), along) * (l2(before) > 0)


def angle_from_norms(moved: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The same from ||Δ||, ||u|| and ||u + Δ||, all that is left of a large tensor once it has been read.

    ||Δ||² - (||u + Δ|| - ||u||)² = 4 ||u|| ||u + Δ|| sin²(angle / 2). Good to 1 % where a float32 tensor moves by more
    than 1e-5 of its norm, and mostly sideways.
    """
    across = (moved.square() - (after - before).square()).clamp(min=0)
    scale = before * after
    return torch.where(scale > 0, 2 * (across / (4 * _positive(scale))).sqrt().clamp(max=1).asin(), 0)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below; 0 where both are 0."""
    return torch.where(above > 0, above / below, 0)


def _positive(x: Tensor) -> Tensor:
    """What to divide by where x is 0 and the result is not used."""
    return torch.where(x > 0, x, 1)


def adam_snr(exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, betas: tuple[float, float], epsilon: float) -> Tensor:
    """Mean |m̂| / (√v̂ + ε) of Adam's moments: near 1 if gradients agree over time, near 0 if they are noise.

    step []: how many steps the moments have seen, at least one.
    """
    mean = exp_avg / (1 - betas[0] ** step)
    deviation = (exp_avg_sq / (1 - betas[1] ** step)).sqrt()
    return (mean.abs() / (deviation + epsilon)).flatten(1).mean(1)
