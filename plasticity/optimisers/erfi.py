"""The imaginary error function, which torch lacks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ERFI_OF_ROOT_HALF = 0.9534382692512611  # erfi(sqrt(1/2))
SPLIT, LARGEST = 5.0, 26.0  # beyond 26 double precision overflows


def erfi(x: Tensor) -> Tensor:
    """2 / sqrt(pi) times the integral of exp(t^2) from 0 to x, in double precision; constant beyond |x| = 26.

    The power series up to 5, whose terms are of one sign; the asymptotic series beyond. Relative error below 1e-9.
    """
    x = x.double().clamp(-LARGEST, LARGEST).unsqueeze(-1)
    n = torch.arange(90, device=x.device, dtype=x.dtype)
    small = x.clamp(-SPLIT, SPLIT)
    below = (small.square() ** n * torch.exp(-torch.lgamma(n + 1)) / (2 * n + 1)).sum(-1, keepdim=True)
    below = below * small * (2 / math.sqrt(math.pi))
    large = x.abs().clamp_min(SPLIT)
    n = n[:22]
    above = (large.square() ** -n * torch.exp(torch.lgamma(n + 0.5))).sum(-1, keepdim=True)
    above = above * large.square().exp() / (large * math.pi) * x.sign()
    return torch.where(x.abs() <= SPLIT, below, above).squeeze(-1)
