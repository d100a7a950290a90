"""The arithmetic of one row: functions of Python numbers. `many_rows` has the same for arrays, with equal results."""

from __future__ import annotations

import math
import struct

import numpy as np

_pack, _unpack = struct.Struct("f").pack, struct.Struct("f").unpack
_pack_two, _unpack_two = struct.Struct("2f").pack, struct.Struct("2f").unpack

library_cos = math.cos


def cos(x: float) -> float:
    """NumPy's cosine, of which the last bit may differ from the C library's."""
    return float(np.cos(x))


def sin(x: float) -> float:
    """NumPy's sine."""
    return float(np.sin(x))


def library_square(x: float) -> float:
    """x² by the C library's `pow`, of which the last bit may differ from x * x; so squares a NumPy scalar."""
    return x**2


def single(x: float) -> float:
    """x rounded to float32."""
    return _unpack(_pack(x))[0]


def single_both(x: float, y: float) -> tuple[float, float]:
    """x and y rounded to float32."""
    return _unpack_two(_pack_two(x, y))


def clip(x: float, low: float, high: float) -> float:
    """x brought within bounds."""
    return low if x < low else high if x > high else x


def choose(condition: bool, yes: float, no: float) -> float:
    """One of two."""
    return yes if condition else no


def wrap(x: float, bound: float) -> float:
    """x brought within ± bound by steps of twice that."""
    while x > bound:
        x = x - 2.0 * bound
    while x < -bound:
        x = x + 2.0 * bound
    return x
