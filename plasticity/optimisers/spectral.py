"""Ways to keep the singular values of a matrix below a bound (Newhouse et al. 2025, arXiv:2507.13338, section 3).

Matrices are batched, [N, rows, columns], and are those whose singular values the bound is for: W / sqrt(out / in) if
the norm of W is meant as a map between root mean squares. Nothing here waits for the device but `svd_clip`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from plasticity.optimisers.orthogonal import newton_schulz

# Newton-Schulz in six quintics that never overshoot: relative singular values >= 0.003 land in [0.9956, 0.9993].
STIEFEL = tuple(
    (a / 1024, b / 1024, c / 1024)
    for a, b, c in (
        (3955, -8306, 5008),
        (3735, -6681, 3463),
        (3799, -6499, 3211),
        (4019, -6385, 2906),
        (2677, -3029, 1162),
        (2172, -1833, 682),
    )
)
# Four odd quintics whose composition is min(1, x) to 0.034 on [0, 3.5]; beyond 4 it diverges.
HARD_CAP = (
    (0.805032, 0.206361, -0.019763),
    (0.649867, 0.162935, -0.011150),
    (1.810259, -0.200265, 0.008251),
    (1.004384, -0.183490, 0.014413),
)
HARD_CAP_RANGE = 3.0


def stiefel(matrices: Tensor, maximum: float) -> Tensor:
    """All singular values to `maximum`, nearly."""
    return newton_schulz(matrices, STIEFEL) * maximum


def leading(matrices: Tensor, iterations: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value [N, 1, 1] and its vectors [N, rows, 1], [N, columns, 1], by power iteration.

    The value is approached from below. It starts from a fixed vector, so the result depends on the matrix alone.
    """
    columns = matrices.shape[2]
    v = torch.cos(torch.arange(1, columns + 1, device=matrices.device, dtype=matrices.dtype)).view(1, -1, 1)
    v = _unit(v.expand(matrices.shape[0], -1, -1))
    for _ in range(iterations):
        v = _unit(matrices.mT @ (matrices @ v))
    u = matrices @ v
    largest = u.norm(dim=1, keepdim=True)
    return largest, u / largest.clamp_min(torch.finfo(u.dtype).tiny), v


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


def spectral_normalize(matrices: Tensor, maximum: float) -> Tensor:
    """All singular values divided by the same number, so that the largest is at most `maximum`."""
    return matrices / (leading(matrices)[0] / maximum).clamp_min(1)


def spectral_weight_decay(matrices: Tensor, strength: float) -> Tensor:
    """The largest singular value times 1 - strength."""
    largest, u, v = leading(matrices)
    return matrices - strength * largest * (u @ v.mT)


def spectral_hammer(matrices: Tensor, maximum: float, only_down: bool = True) -> Tensor:
    """The largest singular value to `maximum`. only_down: leave it where it is smaller."""
    largest, u, v = leading(matrices)
    change = maximum - largest
    return matrices + (change.clamp_max(0) if only_down else change) * (u @ v.mT)


def spectral_hard_cap(matrices: Tensor, maximum: float) -> Tensor:
    """Each singular value to min(it, maximum), to 3.4 % of `maximum`.

    A matrix whose largest is beyond the range of the polynomials is scaled into it first, which shrinks the others.
    """
    excess = leading(matrices)[0] / (maximum * HARD_CAP_RANGE)
    x = matrices / maximum / excess.clamp_min(1)
    for a, b, c in HARD_CAP:
        gram = _gram(x)
        x = _times(x, a * _eye(gram) + b * gram + c * (gram @ gram))
    return x * maximum


def spectral_soft_cap(matrices: Tensor, strength: float) -> Tensor:
    """Each singular value s to z = y + strength y^3 of y = s - strength s^3; see `soft_cap_strength`."""
    x = matrices
    for signed in (-strength, strength):
        gram = _gram(x)
        x = _times(x, _eye(gram) + signed * gram)
    return x


def svd_clip(matrices: Tensor, maximum: float) -> Tensor:
    """Each singular value to min(it, maximum), exactly. Waits for the device."""
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    return (u * s.clamp_max(maximum).unsqueeze(1)) @ vh


@lru_cache(maxsize=1024)
def soft_cap_strength(maximum: float, before: float) -> float:
    """The weakest soft cap that takes `before` to `maximum`: then every singular value up to `before` lands below.

    The smallest root a >= 0 of z(y(before)) = maximum, where z(y(k)) = k - 3 a^2 k^5 + 3 a^3 k^7 - a^4 k^9. Raises
    ValueError if before > 1.306 maximum: the cap is then not increasing up to `before`, and bounds nothing.
    """
    if before <= maximum:
        return 0.0
    # In x = a k^2: 1 - 3 x^2 + 3 x^3 - x^4 = maximum / before; y is increasing on [0, before] for x <= 1/3.
    roots = np.roots([-1.0, 3.0, -3.0, 0.0, 1.0 - maximum / before])
    smallest = min(r.real for r in roots if abs(r.imag) < 1e-9 and r.real >= 0)
    if smallest > 1 / 3:
        raise ValueError(
            f"a soft cap cannot take singular values from {before:.4g} to {maximum:.4g}; lower the learning rate"
        )
    return float(smallest / before**2)


def _gram(x: Tensor) -> Tensor:
    """The smaller of X^T X and X X^T."""
    return x.mT @ x if x.shape[1] >= x.shape[2] else x @ x.mT


def _times(x: Tensor, polynomial: Tensor) -> Tensor:
    """X times a polynomial of `_gram(x)`, from the side where it fits."""
    return x @ polynomial if x.shape[1] >= x.shape[2] else polynomial @ x


def _eye(gram: Tensor) -> Tensor:
    return torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
