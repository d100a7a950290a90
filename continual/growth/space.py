"""Where a dual encoder may grow to: a space that becomes larger as data arrive (specs/growclip-and-growth.md, A.3).

    P_cap(t) = P_0 (N_t / N_0)^ζ        P: parameters without embeddings; N: pairs that arrived

The principle is of the paper's abstract, the formula and the unit moves are of this house.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from continual.growth.axes import rounded
from continual.growth.genome import TOWERS, Genome, Towers
from continual.growth.protocol import Move

HOLD = "hold"
_SLACK = 1.05  # a candidate may be so much larger than the budget


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How large the model may be.

    exponent: ζ; 0: it never grows, 1: with the data in proportion. parameters: a limit whatever arrives, without
    embeddings; None: none.
    """

    exponent: float = 0.5
    parameters: int | None = None

    def __post_init__(self) -> None:
        if self.exponent < 0:
            raise ValueError(f"the exponent of the budget must not be negative, got {self.exponent}")

    def cap(self, first_parameters: int, first_pairs: int, pairs: int) -> float:
        """Of how many parameters the model should be; those of the first part stand for themselves."""
        return first_parameters * (pairs / first_pairs) ** self.exponent

    def allows(self, parameters: int, cap: float) -> bool:
        """Whether a model of so many fits into a cap, with some slack, and the hard limit."""
        return (self.parameters is None or parameters <= self.parameters) and parameters <= cap * _SLACK


@dataclass(frozen=True, kw_only=True)
class GrowthSpace:
    """Unit moves; None: that dimension never grows."""

    image_depth: int | None = 1
    """a move adds so many blocks"""
    text_depth: int | None = 1
    """a move adds so many blocks"""
    shared_depth: int | None = 1
    """a move adds so many blocks"""
    ffn: float | None = 1.5
    """a move makes so many times the hidden neurons, a multiple of 8"""
    heads: int | None = 1
    """a move adds so many heads to all stacks"""
    head_dim: float | None = 1.5
    """a move makes heads so many times as large, a multiple of 8"""
    width: float | None = 2.0
    """a move makes the stream so many times as wide; under LayerNorm that is a whole number"""
    pairs_of_moves: bool = False
    """two different moves at once are candidates too"""

    def __post_init__(self) -> None:
        for name in ("ffn", "head_dim", "width"):
            if (factor := getattr(self, name)) is not None and factor <= 1:
                raise ValueError(f"{name} must grow by a factor above 1, got {factor}")
        for name in ("image_depth", "text_depth", "shared_depth", "heads"):
            if (more := getattr(self, name)) is not None and more < 1:
                raise ValueError(f"{name} must grow by at least 1, got {more}")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the moves there are."""
        known = ("image_depth", "text_depth", "shared_depth", "ffn", "heads", "head_dim", "width")
        return tuple(name for name in known if getattr(self, name) is not None)

    def moves(self, genome: Genome) -> list[Move[Genome]]:
        """All growths of one dimension."""
        return [self.move(genome, name) for name in self.names]

    def move(self, genome: Genome, name: str) -> Move[Genome]:
        """One growth, or several in turn, "ffn+heads"; "hold" is none. Raises ValueError for an unknown name."""
        for part in name.split("+"):
            if part != HOLD:
                genome = self._grown(genome, part)
        return Move(name, genome)

    def _grown(self, genome: Genome, name: str) -> Genome:
        if name not in self.names:
            raise ValueError(f"unknown move '{name}', it is {HOLD} or one of {', '.join(self.names)}")
        amount = getattr(self, name)
        if name.endswith("_depth"):
            tower = name.removesuffix("_depth")
            return deeper(genome, tower, amount)
        if name == "heads":
            return genome.grown(heads=Towers(*(heads + amount for heads in genome.heads)))
        if name == "ffn":
            return genome.grown(ffn=Towers(*(rounded(size, amount) for size in genome.ffn)))
        if name == "head_dim":
            return genome.grown(head_dim=rounded(genome.head_dim, amount))
        return wider(genome, amount)

    def candidates(self, genome: Genome, cap: float, budget: Budget, force_growth: bool) -> list[Move[Genome]]:
        """Every move that the budget allows, sorted, each genome once.

        "hold" is one of them, first, unless growth is forced and another one fits.
        """
        names = [*self.names, *(self._pairs() if self.pairs_of_moves else ())]
        found: dict[Genome, Move[Genome]] = {}
        for move in (self.move(genome, name) for name in names):
            if move.genome != genome and budget.allows(move.genome.capacity, cap):
                found.setdefault(move.genome, move)
        fitting = sorted(found.values(), key=lambda move: move.genome)
        return fitting if fitting and force_growth else [Move(HOLD, genome), *fitting]

    def _pairs(self) -> Iterator[str]:
        return (f"{first}+{second}" for first, second in itertools.combinations(self.names, 2))


def deeper(genome: Genome, tower: str, blocks: int) -> Genome:
    """With more blocks in one stack."""
    return genome.grown(depth=genome.depth._replace(**{tower: getattr(genome.depth, tower) + blocks}))


def wider(genome: Genome, factor: float) -> Genome:
    """With a wider stream: repeated under LayerNorm, padded under RMSNorm, whose epsilon follows."""
    if genome.norm == "layernorm":
        return genome.grown(width=genome.width * max(2, round(factor)))
    width = rounded(genome.width, factor)
    return genome.grown(width=width, epsilon=genome.epsilon * genome.width / width)


def same_size(genome: Genome, blocks: int = 1, tolerance: float = 0.03) -> list[Move[Genome]]:
    """Growths of one dimension each, all to the same number of parameters: what does growing here or there bring?

    The budget is that of so many blocks more in the image tower. A dimension of which no size comes within `tolerance`
    of it is left out; width under LayerNorm mostly is.
    """
    budget = deeper(genome, "image", blocks).capacity
    found = [Move(name, _nearest(larger, budget)) for name, larger in _dimensions(genome).items()]
    fits = [abs(move.genome.capacity - budget) <= tolerance * budget for move in found]
    return [move for move, fitting in zip(found, fits, strict=True) if fitting and move.genome != genome]


def _nearest(larger: Callable[[int], Genome], budget: int) -> Genome:
    """Of the genomes that are larger by 0, 1, 2 ... in one dimension, that whose capacity is nearest to a budget."""
    most = 1
    while larger(most).capacity < budget:
        most *= 2
    above = bisect.bisect_left(range(most + 1), budget, key=lambda more: larger(more).capacity)
    return min((larger(max(above - 1, 0)), larger(above)), key=lambda genome: abs(genome.capacity - budget))


def _dimensions(genome: Genome) -> dict[str, Callable[[int], Genome]]:
    """Of each dimension, the genome that is larger by so many of its units."""

    def wide(more: int) -> Genome:
        if genome.norm == "layernorm":
            return genome.grown(width=genome.width * (1 + more))
        width = genome.width + more
        return genome.grown(width=width, epsilon=genome.epsilon * genome.width / width)

    return {
        **{f"{tower}_depth": partial(deeper, genome, tower) for tower in TOWERS},
        "ffn": lambda more: genome.grown(ffn=Towers(*(size + more for size in genome.ffn))),
        "heads": lambda more: genome.grown(heads=Towers(*(heads + more for heads in genome.heads))),
        "head_dim": lambda more: genome.grown(head_dim=genome.head_dim + more),
        "width": wide,
    }
