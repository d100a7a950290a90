"""How the topology of a sparse layer moves: some of its connections go, as many others come.

All layers are flat: weights [K, N], masks bool [K, N], counts int64 [K], ties uniform [K, N], which decide between
equals. Sources: specs/dynamic-sparse-training.md, sections 5 and 6.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from continual.sparse.masks import lowest

Prune = Literal["magnitude", "set", "taylor"]
Growth = Literal["random", "unfired", "gradient", "momentum", "none"]
PRUNES: tuple[Prune, ...] = ("magnitude", "set", "taylor")
GROWTHS: tuple[Growth, ...] = ("random", "unfired", "gradient", "momentum", "none")


def prune_rate(step: int, steps: int, initial: float, least: float) -> float:
    """p(s) = p_min + ½ (p0 - p_min)(1 + cos(π s / S)) after `step` of a task's `steps`."""
    return least + 0.5 * (initial - least) * (1 + math.cos(math.pi * step / steps))


def pruned(
    rule: Prune, weight: Tensor, gradient: Tensor, mask: Tensor, rate: float, ties: Tensor, strict: bool = False
) -> Tensor:
    """Which ⌈rate · |mask|⌉ connections go. gradient: of the loss, that of frozen weights included.

    strict, of "magnitude": all that are no larger than the last to go, as in the authors' code, so more where some are
    equal.
    """
    count = (mask.sum(1).double() * rate).ceil().long()
    if rule == "set":
        return _smallest_of_each_sign(weight, mask, count, ties)
    if rule == "magnitude" and strict:
        return _below_threshold(weight, mask, count)
    score = weight.abs() if rule == "magnitude" else (weight * gradient).square()
    return lowest(score.masked_fill(~mask, torch.inf), count, ties)


def _below_threshold(weight: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """|w| ≤ the value at rank #inactive + count of the whole layer, in which inactive ones are 0."""
    size = weight.abs() * mask
    rank = ((~mask).sum(1) + count - 1).clamp(min=0)
    threshold = size.sort(1).values.gather(1, rank.unsqueeze(1))
    return mask & (size <= threshold)


def _smallest_of_each_sign(weight: Tensor, mask: Tensor, count: Tensor, ties: Tensor) -> Tensor:
    """SET (Mocanu et al. 2018): half of them, rounded up, the smallest positive ones, the others the negative ones
    nearest to 0; where one sign has too few the other gives more. A weight of 0 counts as positive."""
    positive, negative = mask & (weight >= 0), mask & (weight < 0)
    half = torch.minimum((count + 1) // 2, positive.sum(1))
    below = torch.minimum(count - half, negative.sum(1))
    from_above = lowest(weight.masked_fill(~positive, torch.inf), count - below, ties)
    return from_above | lowest((-weight).masked_fill(~negative, torch.inf), below, ties)


def grown(
    rule: Growth, mask: Tensor, count: Tensor, score: Tensor, fired: Tensor, owned: Tensor, ties: Tensor
) -> Tensor:
    """Which `count` inactive connections come. mask: after pruning; what has just gone may come back.

    score: how much each is wanted, by "gradient" and "momentum", which take weights that no earlier task owns while
    there are any. fired: those that were active before in this task, which "unfired" takes last.
    """
    if rule == "random":
        order = ties
    elif rule == "unfired":
        order = ties + fired
    else:
        order = torch.where(owned, 1.0, -score)  # scores are not negative
        return lowest(order.masked_fill(mask, torch.inf), count, ties)
    return lowest(order.masked_fill(mask, torch.inf), count)
