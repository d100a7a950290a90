"""Decompositions of one matrix for each member of a population: one that is not finite gets nan, the others theirs.

The routines behind them refuse the whole batch, or may never end, if one number in it is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(matrix: Tensor) -> Tensor:
    """Of each matrix of [K, n, d], float64 [K, min(n, d)] in falling order."""
    finite, broken = _finite(matrix)
    return torch.linalg.svdvals(finite).masked_fill(broken[:, None], torch.nan)


def eigenvalues(matrix: Tensor) -> Tensor:
    """Of each symmetric matrix of [K, n, n], float64 [K, n] in rising order."""
    finite, broken = _finite(matrix)
    return torch.linalg.eigvalsh(finite).masked_fill(broken[:, None], torch.nan)


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, and eigenvectors [K, n, n] as columns, of each symmetric matrix of [K, n, n], float64."""
    finite, broken = _finite(matrix)
    values, vectors = torch.linalg.eigh(finite)
    return values.masked_fill(broken[:, None], torch.nan), vectors.masked_fill(broken[:, None, None], torch.nan)


def _finite(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices in float64, zeros in place of those that are not finite, and which those are, [K]."""
    broken = ~matrix.isfinite().flatten(1).all(1)
    return matrix.double().masked_fill(broken[:, None, None], 0), broken
