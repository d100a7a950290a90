"""Numbers too small for a processor: running means of gradients that have stopped coming shrink until they are such.

A step of an optimiser on them takes several times as long (docs/results/speed.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Inside, what this thread computes is 0 where it would be smaller than the smallest normal number."""
    before = bool(np.float32(1e-38) * np.float32(0.1) == 0)  # there is no other way to ask
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
