"""What a learner of image-text pairs is given in a step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PairBatch(NamedTuple):
    """images: uint8 [B, 3, S, S]. tokens: int64 [B, T], 0 padding, 1 unknown, words from 2. concepts: int64 [B]."""

    images: Tensor
    tokens: Tensor
    concepts: Tensor
