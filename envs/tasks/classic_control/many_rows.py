"""The arithmetic of N rows: functions of float64 arrays [N]. `one_row` has the same for numbers, with equal results."""

from __future__ import annotations

import math

import numpy as np
from numpy import cos, sin

__all__ = ["choose", "clip", "cos", "library_cos", "library_square", "sin", "single", "single_both", "wrap"]

choose = np.where


def library_cos(x: np.ndarray) -> np.ndarray:
    """The C library's cosine, of which the last bit may differ from NumPy's."""
    return np.array(list(map(math.cos, x.tolist())))


def library_square(x: np.ndarray) -> np.ndarray:
    """x² by the C library's `pow`, of which the last bit may differ from x * x; so squares a NumPy scalar."""
    return np.array([number**2 for number in x.tolist()])


def single(x: np.ndarray) -> np.ndarray:
    """x rounded to float32, as float64."""
    return x.astype(np.float32).astype(np.float64)


def single_both(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y rounded to float32, as float64."""
    return single(x), single(y)


def clip(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """x brought within bounds. Two plain functions take a third of the time of `np.clip`."""
    return np.minimum(np.maximum(x, low), high)


def wrap(x: np.ndarray, bound: float) -> np.ndarray:
    """x brought within ± bound by steps of twice that."""
    while np.count_nonzero(beyond := x > bound):
        x = np.where(beyond, x - 2.0 * bound, x)
    while np.count_nonzero(beyond := x < -bound):
        x = np.where(beyond, x + 2.0 * bound, x)
    return x
