"""The soft indicator that DeepMind Control's rewards are made of (Tassa et al. 2018, arXiv:1801.00690, section 2)."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

Array = Any  # numpy.ndarray, or torch.Tensor on a GPU backend: whatever belongs to `xp`


def _gaussian(xp: ModuleType, distance: Array, value: float) -> Array:
    return xp.exp(-0.5 * xp.square(distance * math.sqrt(-2.0 * math.log(value))))


def _linear(xp: ModuleType, distance: Array, value: float) -> Array:
    return xp.clip(1.0 - distance * (1.0 - value), 0.0, 1.0)


def _quadratic(xp: ModuleType, distance: Array, value: float) -> Array:
    return xp.clip(1.0 - xp.square(distance * math.sqrt(1.0 - value)), 0.0, 1.0)


def _long_tail(xp: ModuleType, distance: Array, value: float) -> Array:
    return 1.0 / (xp.square(distance * math.sqrt(1.0 / value - 1.0)) + 1.0)


def _reciprocal(xp: ModuleType, distance: Array, value: float) -> Array:
    return 1.0 / (distance * (1.0 / value - 1.0) + 1.0)


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
    """1 where lower <= x <= upper, falling with the distance to the interval; elementwise, same shape as x.

    margin: distance at which the value is `value_at_margin`; 0 gives a hard indicator.
    shape: "gaussian", "long_tail", "reciprocal", or "linear" and "quadratic", which reach 0 and stay there.
    """
    outside = xp.clip(xp.maximum(lower - x, x - upper), 0.0, None)
    if margin == 0.0:
        return xp.where(outside <= 0.0, 1.0, 0.0)
    return _SHAPES[shape](xp, outside / margin, value_at_margin)
