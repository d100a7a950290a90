"""Deeper transformers from trained ones: G_stack and its relatives (Du et al. 2024, arXiv:2405.15319).

    stack         layer i is a copy of layer i mod l, the whole stack again and again: G_stack. The loss jumps.
    interpolate   of layer ⌊i / g⌋: each layer g times
    evenly        of layer ⌊i l / l'⌋: copies spread over the old layers, also where g is no whole number
    gradual       the last l' - l layers again behind the others: at most twice as deep, to be called now and then
    zero          new layers that add nothing (G_zero); the function stays
    random        fresh layers behind a gate that opens from 0 (G_random)

and wider ones: `widened` copies rows, and columns divided by how often (direct, as bert2BERT), or fills the new
places at random, but new rows of old columns with zeros (zero). Sources: specs/growclip-and-growth.md, part C.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from continual.growth.depth import zeroed_copy
from continual.growth.transformers import GPT, RESIDUAL, Embedding, TransformerBlock
from plasticity.networks.stacked import stack

Order = Literal["stack", "interpolate", "evenly", "gradual"]
ORDERS: tuple[Order, ...] = ("stack", "interpolate", "evenly", "gradual")


def depth_map(layers: int, depth: int, order: Order) -> list[int]:
    """Of which old layer each of `depth` new ones is a copy. Raises ValueError for an order that cannot do it."""
    if order not in ORDERS:
        raise ValueError(f"unknown order '{order}', it is one of {', '.join(ORDERS)}")
    if layers < 1 or depth < layers:
        raise ValueError(f"a stack of {layers} layers cannot become one of {depth}")
    if order == "stack":
        return [i % layers for i in range(depth)]
    if order == "interpolate":
        if depth % layers:
            raise ValueError(f"interpolate needs a whole factor, and {depth} is no multiple of {layers}; take evenly")
        return [i // (depth // layers) for i in range(depth)]
    if order == "evenly":
        return [i * layers // depth for i in range(depth)]
    if depth > 2 * layers:
        raise ValueError(f"gradual growth doubles a stack at most, {layers} layers cannot become {depth} at once")
    return [*range(layers), *range(2 * layers - depth, layers)]


def stack_depth(blocks: nn.ModuleList, g: float, order: Order = "stack") -> nn.ModuleList:
    """g times as many blocks, copies of these in an order of the module's docstring; g = 1: equal copies.

    They share no memory with these or each other. Raises ValueError if g is below 1 or does not give a whole number of
    blocks, or blocks differ in shape.
    """
    if not g >= 1:
        raise ValueError(f"a stack grows by a factor of at least 1, got {g}")
    depth = round(g * len(blocks))
    if abs(depth - g * len(blocks)) > 1e-6:
        raise ValueError(f"{g} times {len(blocks)} blocks is no whole number of them")
    shapes = [{name: t.shape for name, t in block.state_dict().items()} for block in blocks]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("only blocks of the same shapes can take each other's place")
    return nn.ModuleList(copy.deepcopy(blocks[i]) for i in depth_map(len(blocks), depth, order))


def zero_depth(blocks: nn.ModuleList, depth: int, residual: Sequence[str] = RESIDUAL) -> nn.ModuleList:
    """A stack of `depth` blocks that computes what this one does: each is followed by copies of it that add nothing.

    residual: the parameters of a block that write to the stream.
    """
    new, before = [], None
    for origin in depth_map(len(blocks), depth, "evenly"):
        block = blocks[origin]
        new.append(copy.deepcopy(block) if origin != before else zeroed_copy(block, residual))
        before = origin
    return nn.ModuleList(new)


class Gated(nn.Module):
    """x + gate (block(x) - x). gate: 0: it is not there, 1: it is the block."""

    def __init__(self, block: nn.Module, gate: Tensor | None = None):
        super().__init__()
        self.block = block
        self.register_buffer("gate", torch.zeros(()) if gate is None else gate)

    @staticmethod
    def stacked(layers: Sequence[nn.Module]) -> nn.Module:
        """K of them as one, with the first one's gate."""
        same = cast(Sequence[Gated], layers)
        return Gated(stack([layer.block for layer in same]), cast(Tensor, same[0].gate).expand(len(same)).clone())

    def forward(self, x: Tensor) -> Tensor:
        gate = cast(Tensor, self.gate).to(x.dtype)
        return torch.lerp(x, self.block(x), gate.view(*gate.shape, *[1] * (x.dim() - gate.dim())))


def random_depth(blocks: nn.ModuleList, depth: int, fresh: Callable[[], nn.Module]) -> nn.ModuleList:
    """The stack with new, closed blocks behind it. fresh: draws one."""
    old = [copy.deepcopy(block) for block in blocks]
    return nn.ModuleList([*old, *(Gated(fresh()) for _ in range(depth - len(blocks)))])


def set_gates(network: nn.Module, value: float) -> None:
    """Open all gates so far, from 0 to 1."""
    for module in network.modules():
        if isinstance(module, Gated):
            cast(Tensor, module.gate).fill_(value)


@torch.no_grad()
def widened(model: GPT, times: int, how: Literal["direct", "zero"], generator: torch.Generator) -> GPT:
    """A single model with stream, heads and hidden layers `times` as wide. direct: it computes the same."""
    if times < 1 or how not in ("direct", "zero"):
        raise ValueError(f"a model gets wider by a whole factor, direct or zero, got {times} and '{how}'")
    old = cast(Embedding, model.embedding)
    block = cast(TransformerBlock, model.blocks[0])
    (vocabulary, width), length, ffn = old.tokens.shape, len(old.positions), cast(nn.Linear, block.up).out_features
    sizes = vocabulary, length, times * width, times * block.heads, times * ffn, len(model.blocks)
    new = GPT.drawn(*sizes, generator).to(old.tokens.dtype)
    values = dict(model.named_parameters())
    for name, target in new.named_parameters():
        wide = _tiled if how == "direct" else _bordered
        target.copy_(wide(name, values[name], target, times))
    return new


def _tiled(name: str, value: Tensor, target: Tensor, times: int) -> Tensor:
    """Rows repeated, columns repeated and shared out; rows of q, k and v each for itself."""
    if name.startswith("embedding"):
        return value.repeat(1, times)
    if "qkv" in name:
        parts = value.unflatten(0, (3, -1))
        value = torch.cat([parts] * times, 1).flatten(0, 1)
    elif name != "head.weight":
        value = value.repeat(times, *[1] * (value.dim() - 1))
    return value if value.dim() == 1 else value.repeat(1, times) / times


def _bordered(name: str, value: Tensor, target: Tensor, times: int) -> Tensor:
    """In a corner of what was drawn; where new rows meet old columns, 0."""
    if "qkv" in name:
        drawn = target.unflatten(0, (3, -1))
        rows = [_bordered("", v, d, times) for v, d in zip(value.unflatten(0, (3, -1)), drawn, strict=True)]
        return torch.cat(rows)
    new = target.clone()
    if value.dim() == 2 and not name.startswith("embedding"):
        new[:, : value.shape[1]] = 0
    new[tuple(slice(n) for n in value.shape)] = value
    return new


def stacking_tokens(parameters: float, tokens: float) -> float:
    """d, how many tokens the small model is best trained on before it is stacked into one of N parameters.

        log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74,    C = 6 N D

    for D tokens in all (guideline of the paper, fitted to large models; it means nothing for small ones).
    """
    if not (parameters > 0 and tokens > 0):
        raise ValueError(f"parameters and tokens must be positive, got {parameters} and {tokens}")
    compute = math.log10(6 * parameters * tokens)
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / compute - 5.74)
