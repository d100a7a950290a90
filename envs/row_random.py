"""Random numbers for all rows of a device at once, each row from a stream of its own.

The generator is SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", figure 17) with
its state computed from a place instead of advanced: the number at place p of row i is a function of (key of i, p)
alone. A row's draws depend neither on the other rows nor on when they are made, and no draw waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15; 64-bit integers of torch are signed and wrap
_FIRST_FACTOR = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND_FACTOR = -7723592293110705685  # 0x94D049BB133111EB
_PLACES_BITS = 24  # a stream has 2 ** 24 places


def row_keys(seeds: Sequence[int], device: torch.device) -> Tensor:
    """One 64-bit key for each seed, int64 [N]."""
    drawn = [np.random.SeedSequence(seed).generate_state(1, np.uint64) for seed in seeds]
    return torch.from_numpy(np.concatenate(drawn).view(np.int64)).to(device)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """Every output bit depends on every input bit; a bijection of int64."""
    x = (x ^ _shifted(x, 30)) * _FIRST_FACTOR
    x = (x ^ _shifted(x, 27)) * _SECOND_FACTOR
    return x ^ _shifted(x, 31)


class RowRandom:
    """Fulfils `envs.tasks.task.Random` for N rows; what it gives has shape [N, size].

    keys: int64 [N], from `row_keys`. dtype: of uniform and normal numbers, which have 24 random bits in float32.
    """

    def __init__(self, keys: Tensor, dtype: torch.dtype = torch.float32):
        self.keys, self._dtype = keys, dtype
        self._place = torch.zeros_like(keys)
        self._bits = 24 if dtype == torch.float32 else 53
        # Bounds are brought to the device once: copying them at each draw would wait for it.
        self._bounds: dict[bytes, Tensor] = {}

    def begin(self, stream: Tensor) -> None:
        """Draw from the beginning of a stream for each row from now on. stream: int64 [N], below 2 ** 39."""
        self._place.copy_(stream << _PLACES_BITS)

    def uniform(self, low: Any, high: Any, size: int) -> Tensor:
        low, high = self._bound(low), self._bound(high)
        return low + (high - low) * (self._integers(size).to(self._dtype) * 2.0**-self._bits)

    def standard_normal(self, size: int) -> Tensor:
        # Half a step away from 0 and 1, where the quantile is infinite.
        middles = (self._integers(size).to(self._dtype) + 0.5) * 2.0**-self._bits
        return torch.special.ndtri(middles.clamp(max=1.0 - torch.finfo(self._dtype).eps / 2))

    def randint(self, high: int, size: int) -> Tensor:
        """For a `high` far below 2 ** 24, of which no number is noticeably more likely than another."""
        return self._integers(size) % high

    def _integers(self, size: int) -> Tensor:
        """int64 [N, size], uniform in 0 .. 2 ** bits - 1."""
        places = self._place[:, None] + torch.arange(1, size + 1, device=self.keys.device)
        self._place += size
        return _shifted(_mixed(self.keys[:, None] + places * _GOLDEN_GAMMA), 64 - self._bits)

    def _bound(self, bound: Any) -> Any:
        if isinstance(bound, int | float):
            return bound
        values = np.asarray(bound, np.float64)
        key = values.tobytes()
        if key not in self._bounds:
            self._bounds[key] = torch.tensor(values, dtype=self._dtype, device=self.keys.device)
        return self._bounds[key]
