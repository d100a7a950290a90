"""Where a dual encoder may grow to: a space that becomes larger as data arrive (specs/growclip-and-growth.md, A.3).

    P_cap(t) = P_0 (N_t / N_0)^ζ        P: parameters without embeddings; N: pairs that arrived

The principle is of the paper's abstract, the formula and the unit moves are of this house.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

    def allows(self, genome: Genome, cap: float) -> bool:
        """Whether a genome fits into a cap, with some slack, and the hard limit."""
        hard = self.parameters is None or genome.capacity <= self.parameters
        return hard and genome.capacity <= cap * _SLACK


@dataclass(frozen=True, kw_only=True)
class GrowthSpace:
    """Unit moves; None: that dimension never grows.

    image_depth, text_depth, shared_depth: blocks more. ffn, head_dim, width: factors; sizes become multiples of 8, a
    width under LayerNorm a multiple of what it was. heads: heads more, in all stacks. pairs_of_moves: two different
    moves at once are candidates too.
    """

    image_depth: int | None = 1
    text_depth: int | None = 1
    shared_depth: int | None = 1
    ffn: float | None = 1.5
    heads: int | None = 1
    head_dim: float | None = 1.5
    width: float | None = 2.0
    pairs_of_moves: bool = False

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
            if move.genome != genome and budget.allows(move.genome, cap):
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
    found: list[Move[Genome]] = []
    for name, sizes in _sizes(genome).items():
        nearest = min(sizes, key=lambda grown: abs(grown.capacity - budget))
        if nearest != genome and abs(nearest.capacity - budget) <= tolerance * budget:
            found.append(Move(name, nearest))
    return found


def _sizes(genome: Genome) -> dict[str, Sequence[Genome]]:
    """Of each dimension, genomes that only it tells apart."""
    few, many = range(1, 65), range(1, 4097)
    wide = [genome.grown(width=genome.width * times) for times in few]
    if genome.norm == "rmsnorm":
        widths = (genome.width + more for more in many)
        wide = [genome.grown(width=width, epsilon=genome.epsilon * genome.width / width) for width in widths]
    return {
        **{f"{tower}_depth": [deeper(genome, tower, more) for more in few] for tower in TOWERS},
        "ffn": [genome.grown(ffn=Towers(*(size + more for size in genome.ffn))) for more in many],
        "heads": [genome.grown(heads=Towers(*(heads + more for heads in genome.heads))) for more in few],
        "head_dim": [genome.grown(head_dim=genome.head_dim + more) for more in many],
        "width": wide,
    }
