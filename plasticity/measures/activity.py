"""What hidden units do on a batch: dormant, dead, rarely active, saturated, duplicated.

h: activations behind a nonlinearity, [K, B, H] or, of a convolution, [K, B, H, height, width]: K members, B samples, H
units (channels). Functions of units return a mask [K, H]; `fraction` turns the masks of several layers into one number
a member. Nothing here needs a gradient, draws a random number or reads a value back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Nonlinearities that give exactly 0 for every negative input: only their units can be dead.
RECTIFIERS = ("relu", "crelu")


def fraction(masks: Sequence[Tensor]) -> Tensor:
    """Share of units, [K], that `masks` [K, H] of several layers mark, each unit counted once.

    Not the mean of the layers' shares, which gives the units of a narrow layer more weight (Sokar et al. 2023,
    arXiv:2302.12902, definition 3.1).
    """
    return torch.cat(list(masks), 1).float().mean(1)


def activity(h: Tensor) -> Tensor:
    """E |h_i| over samples and positions, [K, H]."""
    return _by_unit(h).abs().mean(2)


def normalised_scores(magnitude: Tensor) -> Tensor:
    """Each unit's magnitude over the mean of its layer, [K, H] -> [K, H]; 0 in a layer where all are 0."""
    mean = magnitude.mean(1, keepdim=True)
    return torch.where(mean > 0, magnitude / mean.clamp(min=torch.finfo(mean.dtype).tiny), 0)


def dormant(h: Tensor, tau: float) -> Tensor:
    """Units whose score s_i = E |h_i| / mean_k E |h_k| is at most `tau`, [K, H]; tau = 0: E |h_i| is exactly 0.

    Sokar et al. 2023, arXiv:2302.12902, definition 3.1, with the mean over units below the line, as their code has it.
    """
    return normalised_scores(activity(h)) <= tau


def dead(h: Tensor, nonlinearity: str) -> Tensor:
    """Units that are exactly 0 on every sample and position, [K, H].

    Raises ValueError unless `nonlinearity` is a rectifier: elsewhere 0 is a value like others, and says nothing.
    """
    if nonlinearity not in RECTIFIERS:
        raise ValueError(
            f"dead units are those of {' and '.join(RECTIFIERS)}; '{nonlinearity}' has none: use `dormant`"
        )
    return (_by_unit(h) == 0).all(2)


def rarely(h: Tensor, share: float = 0.01) -> Tensor:
    """Units that are not 0 on less than `share` of samples and positions, [K, H].

    Dohare et al. 2024, Nature 632, code of the class-incremental experiments.
    """
    return (_by_unit(h) != 0).float().mean(2) < share


def zero_fraction(h: Tensor) -> Tensor:
    """Share of entries that are exactly 0, [K]; about one half in a healthy ReLU layer. Not a share of units."""
    return 1 - h.sign().abs().mean(tuple(range(1, h.dim())))  # in half the time of counting


def saturated(h: Tensor, nonlinearity: str) -> Tensor:
    """Units on a flat or straight piece of their nonlinearity for every sample and position, [K, H].

    tanh: |h| > 0.99; sigmoid: h < 0.01 or h > 0.99; relu: h > 0, so that the unit is linear (Lyle et al. 2024,
    arXiv:2402.18762). Raises ValueError for another nonlinearity.
    """
    rows = _by_unit(h)
    if nonlinearity == "tanh":
        flat = rows.abs() > 0.99
    elif nonlinearity == "sigmoid":
        flat = (rows < 0.01) | (rows > 0.99)
    elif nonlinearity == "relu":
        flat = rows > 0
    else:
        raise ValueError(f"saturation is defined for tanh, sigmoid and relu, not for '{nonlinearity}'")
    return flat.all(2)


def duplicate(h: Tensor, similarity: float = 0.95) -> Tensor:
    """Units whose activations have a cosine above `similarity` with those of a later unit, [K, H].

    Joudaki et al. 2025, arXiv:2510.00304. A unit that is always 0 is like no other.
    """
    rows = torch.nn.functional.normalize(_by_unit(h), dim=2)
    return (rows @ rows.mT).triu(1).amax(2) > similarity


def grad_dormant(gradient: Tensor, tau: float) -> Tensor:
    """Units whose incoming weights have a gradient norm of at most `tau` times the mean of their layer, [K, H].

    gradient [K, H, in, ...]: of the loss on a batch. The gradient's counterpart of `dormant` (Klein et al. 2024,
    arXiv:2411.04832, section 4.8).
    """
    return normalised_scores(gradient.flatten(2).norm(dim=2)) <= tau


def fold_copies(h: Tensor, units: int) -> Tensor:
    """Count what CReLU makes of one unit as one: [K, B, C H, ...] -> [K, B, H, C, ...], every copy a position."""
    copies = h.shape[2] // units
    return h if copies == 1 else h.unflatten(2, (copies, units)).transpose(2, 3)


def _by_unit(h: Tensor) -> Tensor:
    """[K, B, H, ...] -> [K, H, B * positions]."""
    return h.transpose(1, 2).flatten(2)
