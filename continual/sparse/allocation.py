"""Which share of each layer's weights a sparse network has, so that it has the share wanted in all.

Sources: Evci et al. 2020 (arXiv:1911.11134) for ERK; specs/dynamic-sparse-training.md, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Init = Literal["uniform", "erk"]
INITS: tuple[Init, ...] = ("uniform", "erk")
Shapes = Sequence[Sequence[int]]


def densities(init: Init, shapes: Shapes, density: float) -> list[float]:
    """The density of each layer. shapes: of the weights, (out, in) or (out, in, height, width).

    Raises ValueError for an unknown way or a density out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density:g}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got '{init}'")
    return erk(shapes, density) if init == "erk" else [density] * len(shapes)


def erk(shapes: Shapes, density: float, power: float = 1.0) -> list[float]:
    """Erdős-Rényi kernel: densities proportional to (Σ dimensions / Π dimensions)^power, at most 1.

    Layers that would get more than they have are dense, one size after the other, and the rest is scaled anew. A layer
    that becomes dense frees what it would have got beyond that, so there is always something left for the others.
    """
    sizes = [math.prod(shape) for shape in shapes]
    scores = [(sum(shape) / size) ** power for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        others = [index for index in range(len(shapes)) if index not in dense]
        wanted = sum(density * sizes[i] for i in others) - sum((1 - density) * sizes[i] for i in dense)
        scale = wanted / sum(scores[i] * sizes[i] for i in others)
        largest = max(scores[i] for i in others)
        if density == 1 or scale * largest > 1:
            dense |= {i for i in others if scores[i] == largest}
            continue
        return [1.0 if i in dense else scale * scores[i] for i in range(len(shapes))]
    return [1.0] * len(shapes)
