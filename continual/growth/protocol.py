"""What a growable model offers, and what a growing learner asks of its stream."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch

from continual.growth.slots import SlotMap
from continual.pairs.batch import PairBatch

G = TypeVar("G", bound=Hashable)


@dataclass(frozen=True)
class Move(Generic[G]):
    """One way to grow. name: what grows, "ffn", or several, "ffn+heads". genome: the architecture after it."""

    name: str
    genome: G


class Growable(Protocol[G]):
    """A model whose architecture is its genome: hashable, and enough to build it.

    grow: a new model that shares no memory with this one, which stays as it is, and where each of its numbers comes
    from. The generator draws what is new. Raises ValueError if the genome cannot be reached from this one.
    cost: FLOPs of one training step on one sample.
    """

    @property
    def genome(self) -> G: ...

    def moves(self) -> Sequence[Move[G]]: ...

    def grow(self, move: Move[G], generator: torch.Generator) -> tuple[Self, SlotMap]: ...

    def cost(self) -> float: ...


@dataclass(frozen=True)
class Arrival:
    """A part of a stream of image-text pairs, as it arrives.

    index: of the part, from 0. pairs: that arrived so far, this part included (N_t). vocabulary: V, the largest token
    of all texts so far + 1, where 0 is padding and 1 stands for unknown words. steps: of the optimiser, on this part.
    proxy_batches: (seed, steps) -> so many training batches of all that arrived so far; the same seed gives the same
    batches to every candidate. validation: batches of one fixed size of held-out pairs that arrived so far, always the
    same, with their plain captions.
    """

    index: int
    pairs: int
    vocabulary: int
    steps: int
    proxy_batches: Callable[[int, int], Iterable[PairBatch]]
    validation: Callable[[], Sequence[PairBatch]]
