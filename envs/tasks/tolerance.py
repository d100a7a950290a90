"""The soft indicator that DeepMind Control's rewards are made of (Tassa et al. 2018, arXiv:1801.00690, section 2)."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray, or torch.Tensor on a GPU backend: whatever belongs to `xp`; or a number, for one row


def _positive_part(x: Array) -> Array:
    """max(x, 0), elementwise. NumPy's plain function takes a quarter of the time of its `clip`."""
    if isinstance(x, float):
        return max(x, 0.0)
    return np.maximum(x, 0.0) if isinstance(x, np.ndarray) else x.clip(min=0.0)


def _outside(xp: ModuleType, x: Array, lower: float, upper: float) -> Array:
    """Distance to the interval [lower, upper]."""
    if upper == math.inf:
        return _positive_part(lower - x)
    if lower == -math.inf:
        return _positive_part(x - upper)
    return abs(x - lower) if lower == upper else _positive_part(xp.maximum(lower - x, x - upper))


# Each takes the distance [...], and the one at which the shape has the given value.


def _gaussian(xp: ModuleType, distance: Array, margin: float, value: float) -> Array:
    scaled = distance * (math.sqrt(-2.0 * math.log(value)) / margin)
    return xp.exp(-0.5 * (scaled * scaled))


def _linear(xp: ModuleType, distance: Array, margin: float, value: float) -> Array:
    return _positive_part(1.0 - distance * ((1.0 - value) / margin))


def _quadratic(xp: ModuleType, distance: Array, margin: float, value: float) -> Array:
    scaled = distance * (math.sqrt(1.0 - value) / margin)
    return _positive_part(1.0 - scaled * scaled)


def _long_tail(xp: ModuleType, distance: Array, margin: float, value: float) -> Array:
    scaled = distance * (math.sqrt(1.0 / value - 1.0) / margin)
    return 1.0 / (scaled * scaled + 1.0)


def _reciprocal(xp: ModuleType, distance: Array, margin: float, value: float) -> Array:
    return 1.0 / (distance * ((1.0 / value - 1.0) / margin) + 1.0)


_SHAPES = {
    "gaussian": _gaussian,
    "linear": _linear,
    "quadratic": _quadratic,
    "long_tail": _long_tail,
    "reciprocal": _reciprocal,
}


def tolerance(
    xp: ModuleType,
    x: Array,
    lower: float = 0.0,
    upper: float = 0.0,
    margin: float = 0.0,
    shape: str = "gaussian",
    value_at_margin: float = 0.1,
) -> Array:
    """1 where lower <= x <= upper, falling with the distance to the interval; elementwise, a number for a number.

    margin: distance at which the value is `value_at_margin`; 0 gives a hard indicator.
    shape: "gaussian", "long_tail", "reciprocal", or "linear" and "quadratic", which reach 0 and stay there.
    """
    if margin == 0.0:
        return ((lower <= x) & (x <= upper)) * 1.0
    return _SHAPES[shape](xp, _outside(xp, x, lower, upper), margin, value_at_margin)
