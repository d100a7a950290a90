"""Growing a dual encoder, one dimension at a time (specs/growclip-and-growth.md, A.4).

    depth      a block that is a copy (or drawn) and writes nothing yet
    ffn        neurons that are not read yet, or copies that share what is read (Net2Wider)
    heads      heads that are not read yet
    head_dim   the same within heads, scores kept: queries times sqrt(d_h' / d_h), new ones 0
    width      LayerNorm: the stream repeated, read in shares that sum to 1; RMSNorm: padded, norms corrected
    vocabulary tokens that are copies of the unknown one; length: positions that only longer texts reach

Embeddings of every input stay as they were, up to rounding, but for the depth sources "stack" and "random", which are
there to compare with. LayerNorm cannot be padded: the mean would change. E never grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from continual.growth.axes import Axis, Shares, duplicated, grown, padded, tiled, tiled_read, unread
from continual.growth.blocks import RESIDUAL, Block, fresh
from continual.growth.depth import insert_block, zeroed_copy
from continual.growth.genome import TOWERS, Genome, Towers
from continual.growth.slots import SlotMap, Slots

if TYPE_CHECKING:
    from continual.growth.dual_encoder import DualEncoder

DepthSource = Literal["copy", "fresh", "stack", "random"]
Neurons = Literal["zero", "duplicate", "duplicate-random"]
Width = Literal["auto", "tile", "pad"]
UNKNOWN = 1  # the token that new ones are copies of

# What each axis of a parameter is: `stream` is written, `read` from the stream, `normed` of a norm; None never grows.
_AXES: dict[str, tuple[str | None, ...]] = {
    "patch.weight": ("stream", None), "patch.bias": ("stream",), "image_class": ("stream",),
    "image_positions": (None, "stream"), "tokens": ("vocabulary", "stream"), "text_class": ("stream",),
    "text_positions": ("length", "stream"), "image_projection": (None, "read"), "text_projection": (None, "read"),
    "qkv.weight": ("qkv", "read"), "qkv.bias": ("qkv",), "out.weight": ("stream", "attended"), "out.bias": ("stream",),
    "up.weight": ("ffn", "read"), "up.bias": ("ffn",), "down.weight": ("stream", "neurons"), "down.bias": ("stream",),
    "logit_scale": (),
}  # fmt: skip

Grown: TypeAlias = "tuple[DualEncoder, SlotMap]"


@dataclass(frozen=True, kw_only=True)
class Operators:
    """Which construction is used where there are several.

    depth: what a new block is, "copy" of the one before or "fresh", writing nothing; "stack" and "random" are the same
    two, writing. position: of the new block in its stack; None: at the end. neurons: of a hidden layer. width: "auto"
    is "tile" for LayerNorm, "pad" for RMSNorm. shares: of copies that are read, when tiled.
    """

    depth: DepthSource = "copy"
    position: int | None = None
    neurons: Neurons = "zero"
    width: Width = "auto"
    shares: Shares = "random"

    def __post_init__(self) -> None:
        allowed = {"depth": DepthSource, "neurons": Neurons, "width": Width, "shares": Shares}
        for name, kinds in allowed.items():
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} is one of {', '.join(get_args(kinds))}, got '{getattr(self, name)}'")

    @property
    def preserve(self) -> bool:
        """Whether embeddings stay as they were."""
        return self.depth in ("copy", "fresh")


DEFAULT = Operators()


@torch.no_grad()
def grow(model: DualEncoder, genome: Genome, generator: torch.Generator, operators: Operators = DEFAULT) -> Grown:
    """A model of another genome that shares no memory with this one, and where its numbers come from.

    Raises ValueError if that genome is not larger in what can grow and equal in the rest.
    """
    reachable = genome.grown(epsilon=model.genome.epsilon, **_growing(model.genome))
    if reachable != model.genome:
        raise ValueError("a genome can differ in depth, width, heads, head_dim, ffn, vocabulary and length only")
    pairs = zip(genome.dimensions(), model.genome.dimensions(), strict=True)
    smaller = [name for (name, new), (_, old) in pairs if new < old]
    if smaller:
        raise ValueError(f"a model only grows, but {', '.join(smaller)} would shrink")
    grown_model, slots = model, None
    for step in _steps(model.genome, genome, generator, operators):
        grown_model, more = step(grown_model)
        slots = more if slots is None else slots.then(more)
    if slots is None:
        grown_model, slots = _rebuilt(model, model.genome, lambda name, axis: None, None)
    if grown_model.genome != genome:
        raise ValueError(f"the epsilon of norms would be {grown_model.genome.epsilon}, the genome has {genome.epsilon}")
    return grown_model, slots


def _growing(genome: Genome) -> dict[str, object]:
    names = ("depth", "width", "heads", "head_dim", "ffn", "vocabulary", "length")
    return {name: getattr(genome, name) for name in names}


def _steps(
    old: Genome, new: Genome, generator: torch.Generator, operators: Operators
) -> list[Callable[[DualEncoder], Grown]]:
    """The operators from one genome to the other, in a fixed order."""
    found: list[Callable[[DualEncoder], Grown]] = []
    if new.vocabulary > old.vocabulary:
        found.append(lambda model: grow_vocabulary(model, new.vocabulary))
    if new.length > old.length:
        found.append(lambda model: grow_length(model, new.length, generator))
    if new.width > old.width:
        found.append(lambda model: grow_width(model, new.width, generator, operators))
    for index, tower in enumerate(TOWERS):
        for _ in range(new.depth[index] - old.depth[index]):
            found.append(lambda model, tower=tower: grow_depth(model, tower, generator, operators))
    if new.ffn != old.ffn:
        found.append(lambda model: grow_ffn(model, new.ffn, generator, operators.neurons))
    if new.heads != old.heads:
        found.append(lambda model: grow_heads(model, new.heads, generator))
    if new.head_dim > old.head_dim:
        found.append(lambda model: grow_head_dim(model, new.head_dim, generator))
    return found


@torch.no_grad()
def grow_depth(model: DualEncoder, tower: str, generator: torch.Generator, operators: Operators = DEFAULT) -> Grown:
    """One more block in the stack of "image", "text" or "shared"."""
    blocks, index = model.stack(tower), TOWERS.index(tower)
    position = len(blocks) if operators.position is None else operators.position
    copied = operators.depth in ("copy", "stack") and len(blocks) > 0
    origin = max(position - 1, 0) if copied else None
    depth = model.genome.depth._replace(**{tower: len(blocks) + 1})
    genome = model.genome.grown(depth=depth)
    if origin is not None and origin < len(blocks):
        source = blocks[origin]
    else:
        source = Block(model.genome, index)
        shapes = {name: p.shape for name, p in source.named_parameters()}
        drawn = {n: fresh(genome, f"{tower}_blocks.0.{n}", shape, generator) for n, shape in shapes.items()}
        like = model.logit_scale
        source.load_state_dict({n: value.to(like.device, like.dtype) for n, value in drawn.items()}, assign=True)
    silent = RESIDUAL if operators.preserve else ()
    stack, inner = insert_block(blocks, position, zeroed_copy(source, silent), origin, silent)
    prefix = f"{tower}_blocks."
    values: dict[str, Tensor] = {prefix + name: p.detach() for name, p in stack.named_parameters()}
    slots = {prefix + n: _prefixed(prefix, found) for n, found in inner.items()}
    for name, p in model.named_parameters():
        if not name.startswith(prefix):
            values[name], slots[name] = p.detach().clone(), Slots.same(name, p)
    return type(model).of(genome, values), SlotMap(slots)


@torch.no_grad()
def grow_ffn(model: DualEncoder, ffn: Towers, generator: torch.Generator, neurons: Neurons = "zero") -> Grown:
    """Hidden layers of F neurons, a number for each stack."""
    pairs: dict[str, tuple[Axis, Axis]] = {}

    def axis(name: str, kind: str) -> Axis | None:
        if kind not in ("ffn", "neurons"):
            return None
        block, tower = name.rpartition(".")[0].rpartition(".")[0], tower_of(name)
        if block not in pairs:  # rows and columns of a block are made together
            old, new = model.genome.ffn[tower], ffn[tower]
            shares: Shares = "random" if neurons == "duplicate-random" else "equal"
            made = unread(old, new) if neurons == "zero" else duplicated(old, new, generator, shares)
            pairs[block] = (made.written, made.read)
        return pairs[block][kind == "neurons"]

    return _rebuilt(model, model.genome.grown(ffn=ffn), axis, generator)


@torch.no_grad()
def grow_heads(model: DualEncoder, heads: Towers, generator: torch.Generator) -> Grown:
    """More heads, a number for each stack."""
    size = model.genome.head_dim

    def axis(name: str, kind: str) -> Axis | None:
        if kind not in ("qkv", "attended"):
            return None
        tower = tower_of(name)
        old, new = model.genome.heads[tower], heads[tower]
        if kind == "qkv":
            return Axis.of(_places((3, old, size), (3, new, size)))
        return Axis.of(_places((old, size), (new, size)), drawn=0.0)

    return _rebuilt(model, model.genome.grown(heads=heads), axis, generator)


@torch.no_grad()
def grow_head_dim(model: DualEncoder, head_dim: int, generator: torch.Generator) -> Grown:
    """Larger heads, in all stacks."""
    old = model.genome.head_dim

    def axis(name: str, kind: str) -> Axis | None:
        if kind not in ("qkv", "attended"):
            return None
        heads = model.genome.heads[tower_of(name)]
        if kind == "attended":
            return Axis.of(_places((heads, old), (heads, head_dim)), drawn=0.0)
        # New queries are 0 and new keys are not: with both 0 neither would ever learn.
        is_query = torch.zeros(3, heads, head_dim, dtype=torch.float64)
        is_query[0] = 1
        scale = 1 + is_query.flatten() * (math.sqrt(head_dim / old) - 1)
        return Axis.of(_places((3, heads, old), (3, heads, head_dim)), scale, 1 - is_query.flatten())

    return _rebuilt(model, model.genome.grown(head_dim=head_dim), axis, generator)


@torch.no_grad()
def grow_width(model: DualEncoder, width: int, generator: torch.Generator, operators: Operators = DEFAULT) -> Grown:
    """A wider stream. Raises ValueError where LayerNorm does not allow it: it can only be repeated."""
    old, norm = model.genome.width, model.genome.norm
    tile = operators.width == "tile" or (operators.width == "auto" and norm == "layernorm")
    if not tile:
        if norm == "layernorm":
            raise ValueError("a stream under LayerNorm cannot be padded, only repeated")
        return _pad(model, width, generator)
    if width % old:
        raise ValueError(f"a stream of {old} can be repeated to a multiple of that, not to {width}")
    times = width // old

    def axis(name: str, kind: str) -> Axis | None:
        if kind == "read":
            return tiled_read(old, times, generator, operators.shares)
        return tiled(old, times) if kind in ("stream", "normed") else None

    return _rebuilt(model, model.genome.grown(width=width), axis, generator)


def _pad(model: DualEncoder, width: int, generator: torch.Generator) -> Grown:
    """The root mean square of a padded stream is smaller by sqrt(D / D'), which gains and epsilon make up for."""
    old, both = model.genome.width, padded(model.genome.width, width)

    def axis(name: str, kind: str) -> Axis | None:
        if kind == "normed":
            return replace(both.read, scale=both.read.scale * math.sqrt(old / width))
        return {"stream": both.written, "read": both.read}.get(kind)

    genome = model.genome.grown(width=width, epsilon=model.genome.epsilon * old / width)
    return _rebuilt(model, genome, axis, generator)


@torch.no_grad()
def grow_vocabulary(model: DualEncoder, vocabulary: int) -> Grown:
    """More tokens; texts in which they stood for unknown words keep their embeddings."""
    old = model.genome.vocabulary
    places = torch.cat([torch.arange(old), torch.full((vocabulary - old,), UNKNOWN)])

    def axis(name: str, kind: str) -> Axis | None:
        return Axis.of(places) if kind == "vocabulary" else None

    return _rebuilt(model, model.genome.grown(vocabulary=vocabulary), axis, None)


@torch.no_grad()
def grow_length(model: DualEncoder, length: int, generator: torch.Generator) -> Grown:
    """Positions for longer texts."""

    def axis(name: str, kind: str) -> Axis | None:
        return unread(model.genome.length + 1, length + 1).written if kind == "length" else None

    return _rebuilt(model, model.genome.grown(length=length), axis, generator)


def _rebuilt(
    model: DualEncoder,
    genome: Genome,
    axis_of: Callable[[str, str], Axis | None],
    generator: torch.Generator | None,
) -> Grown:
    """The model of a genome, each parameter grown along its axes. generator: for what is drawn, if anything is."""
    values: dict[str, Tensor] = {}
    slots = SlotMap()
    for name, p in model.named_parameters():
        axes = [None if kind is None else axis_of(name, kind) for kind in axes_of(name)]

        def draw(shape: tuple[int, ...], name: str = name) -> Tensor:
            assert generator is not None  # nothing is drawn for a vocabulary
            return fresh(genome, name, shape, generator)

        values[name], slots[name] = grown(name, p.detach(), axes, draw)
    return type(model).of(genome, values), slots


def axes_of(name: str) -> tuple[str | None, ...]:
    """What each axis of a parameter of the dual encoder is, by its name."""
    if "norm" in name:
        return ("normed",)
    return _AXES.get(name) or _AXES.get(".".join(name.split(".")[-2:]), ())


def tower_of(name: str) -> int:
    """The stack, 0 to 2, of a parameter that is of one."""
    return TOWERS.index(name.partition("_")[0])


def _places(old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Of a flattened axis of several dimensions, all of which may grow."""
    places = torch.full(new, -1)
    places[tuple(slice(size) for size in old)] = torch.arange(math.prod(old)).view(old)
    return places.flatten()


def _prefixed(prefix: str, slots: Slots) -> Slots:
    return slots if slots.source is None else replace(slots, source=prefix + slots.source)
