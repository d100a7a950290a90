"""The nearest orthogonal matrix, U V^T of a matrix U S V^T, by polynomials or exactly; and the size of such a step.

Matrices are batched: [N, rows, columns].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Orthogonaliser = Literal["newton_schulz", "exact"]
Scale = Literal["original", "match_rms_adamw", "spectral"]

# Keller Jordan's quintic (github KellerJordan/Muon): steep at 0, so that small singular values rise in few steps, and
# therefore not convergent to 1. Singular values in [0.005, 1] of the Frobenius norm land in [0.68, 1.155] after five.
QUINTIC = (3.4445, -4.7750, 2.0315)
# No singular value comes out above this: the maximum of the quintic on [0, 1], with room for rounding.
LARGEST_OUTPUT = 1.2025


def as_matrices(parameters: Tensor) -> Tensor:
    """[N, out, in, ...] -> [N, out, in * ...]; a row holds the weights of one neuron."""
    return parameters.flatten(2)


def newton_schulz(
    matrices: Tensor,
    coefficients: Sequence[tuple[float, float, float]] = (QUINTIC,) * 5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x <- a x + b x^3 + c x^5 of the singular values, once for each (a, b, c), after division by the Frobenius norm.

    dtype: of the computation; None: that of the matrices.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices.to(dtype or matrices.dtype)
    x = x if wide else x.mT
    x = x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def exact(matrices: Tensor) -> Tensor:
    """U V^T by singular value decomposition; singular values that are zero stay zero. Waits for the device."""
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    tolerance = torch.finfo(s.dtype).eps * max(matrices.shape[1:])
    nonzero = s > s.amax(1, keepdim=True) * tolerance
    return (u * nonzero.unsqueeze(1)) @ vh


def orthogonalise(
    matrices: Sequence[Tensor],
    method: Orthogonaliser = "newton_schulz",
    steps: int = 5,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Each of `matrices`, all [N, rows, columns] of any shape, made orthogonal; those of one shape in one batch."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape[1:], []).append(index)
    result = list(matrices)
    for indices in by_shape.values():
        group = [matrices[i] for i in indices]
        batch = group[0] if len(group) == 1 else torch.cat(group)
        done = exact(batch) if method == "exact" else newton_schulz(batch, (QUINTIC,) * steps, dtype)
        for i, part in zip(indices, done.split([g.shape[0] for g in group]), strict=True):
            result[i] = part
    return result


def step_scale(rows: int, columns: int, scale: Scale) -> float:
    """By how much an orthogonal step is multiplied.

    original: Jordan's. match_rms_adamw: root mean square 0.2, as steps of AdamW have (Liu et al. 2025,
    arXiv:2502.16982). spectral: norm 1 as a map between root mean squares.
    """
    if scale == "original":
        return max(1.0, rows / columns) ** 0.5
    if scale == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return (rows / columns) ** 0.5
