"""Masks of K members: bool [K, N] for the N weights of a layer in a row, and how to draw, choose and store them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_BELOW = 2.0**-24  # half the distance of neighbouring float32 numbers
_SMALL = 1e-300  # next to a score of 0


def counted(densities: Tensor, size: int) -> Tensor:
    """How many of `size` weights a mask of exactly these densities [K] has, at least one: int64 [K]."""
    return (densities * size).round().long().clamp_(1, size)


def lowest(scores: Tensor, count: Tensor, ties: Tensor | None = None) -> Tensor:
    """The `count` [K] smallest of each row of float32 scores [K, N], as a mask.

    ties [K, N] in [0, 1): decide between equal scores. They act below the last digit of a score.
    """
    if ties is not None:
        ties = ties.double()
        scores = scores.double() * (1 + ties * _BELOW) + ties * _SMALL
    order = scores.argsort(1)
    first = torch.arange(scores.shape[1], device=scores.device) < count.unsqueeze(1)
    return torch.zeros_like(first).scatter_(1, order, first)


def packed(mask: Tensor) -> Tensor:
    """Eight weights in a byte: bool [K, N] -> uint8 [K, ⌈N / 8⌉]."""
    rest = -mask.shape[1] % 8
    eights = torch.nn.functional.pad(mask, (0, rest)).view(len(mask), -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (eights.to(torch.uint8) << places).sum(2, dtype=torch.uint8)


def unpacked(bits: Tensor, size: int) -> Tensor:
    """Undo `packed`: bool [K, size]."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(2) >> places) & 1).bool().flatten(1)[:, :size]


def density(masks: Iterable[Tensor]) -> Tensor:
    """The active share of all layers' weights together, float64 [K]."""
    flat = torch.cat([mask.flatten(1) for mask in masks], 1)
    return flat.double().mean(1)


def over_members(flags: Tensor, like: Tensor) -> Tensor:
    """[K] as [K, 1, …], to be used beside `like` [K, *shape]."""
    return flags.view(-1, *[1] * (like.dim() - 1))
