"""Small transformers that grow: a language model of characters, and the parts of a vision transformer.

Alone, inputs have an axis of samples in front, [B, ...]; stacked, one of members before it, [K, B, ...]. Blocks are
pre-norm, without dropout, and what they add to the stream is written by the parameters `RESIDUAL`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plasticity.networks.architectures import draw_
from plasticity.networks.stacked import stack

RESIDUAL = ("out.weight", "out.bias", "down.weight", "down.bias")
_DEVIATION = 0.02  # of embeddings


class TransformerBlock(nn.Module):
    """x + attention, + a hidden layer of F units, [..., T, D]. heads: H, of D / H units. causal: to earlier tokens."""

    def __init__(self, width: int, heads: int, ffn: int, causal: bool):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads, self.causal = heads, causal
        self.norm1: nn.Module = nn.LayerNorm(width)
        self.qkv: nn.Module = nn.Linear(width, 3 * width)  # rows: (q, k, v) x heads x D / H
        self.out: nn.Module = nn.Linear(width, width)
        self.norm2: nn.Module = nn.LayerNorm(width)
        self.up: nn.Module = nn.Linear(width, ffn)
        self.down: nn.Module = nn.Linear(ffn, width)

    @staticmethod
    def stacked(blocks: Sequence[nn.Module]) -> nn.Module:
        """K blocks as one."""
        first = cast(TransformerBlock, blocks[0])
        whole = copy.copy(first)
        names = [name for name, _ in first.named_children()]
        whole._modules = {name: stack([block.get_submodule(name) for block in blocks]) for name in names}
        return whole

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [..., T, H, D / H]
        mixed = F.scaled_dot_product_attention(*(t.transpose(-2, -3) for t in (q, k, v)), is_causal=self.causal)
        x = x + self.out(mixed.transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Patches(nn.Module):
    """Images [..., C, H, W] as a class token and patches, with positions: [..., 1 + N, D]."""

    def __init__(self, patch: int, project: nn.Module, token: Tensor, positions: Tensor):
        super().__init__()
        self.patch, self.project = patch, project
        self.token, self.positions = nn.Parameter(token), nn.Parameter(positions)

    @staticmethod
    def stacked(layers: Sequence[nn.Module]) -> nn.Module:
        """K of them as one."""
        same = cast(Sequence[Patches], layers)
        token, positions = (torch.stack([getattr(m, n).detach() for m in same]) for n in ("token", "positions"))
        return Patches(same[0].patch, stack([layer.project for layer in same]), token, positions)

    def draw_own_(self, generator: torch.Generator) -> None:
        """Draw token and positions."""
        for parameter in (self.token, self.positions):
            parameter.normal_(0, _DEVIATION, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        cut = x.unflatten(-1, (-1, self.patch)).unflatten(-3, (-1, self.patch))  # [..., C, h, p, w, p]
        rows = cut.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)  # [..., h w, C p p]
        y = self.project(rows)
        token = self.token[..., None, None, :].expand_as(y[..., :1, :])
        return torch.cat([token, y], -2) + self.positions.unsqueeze(-3)


class ClassToken(nn.Module):
    """The first token of each sample: [..., T, D] -> [..., D]."""

    @staticmethod
    def stacked(layers: Sequence[nn.Module]) -> nn.Module:
        """K of them as one."""
        return ClassToken()

    def forward(self, x: Tensor) -> Tensor:
        return x[..., 0, :]


def vit(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """A vision transformer of 4 x 4 patches with a class token.

    hidden: width, heads, units of a hidden layer, depth, if others than 32, 4, 64, 2. Raises ValueError for images that
    do not divide into patches.
    """
    width, heads, ffn, depth = _four(hidden)
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 4:
        raise ValueError(f"vit needs square images whose side is a multiple of 4, got {list(shape)}")
    patch = shape[1] // 4
    project = nn.Linear(shape[0] * patch * patch, width)
    first = Patches(patch, project, torch.zeros(width), torch.zeros(17, width))
    blocks = [TransformerBlock(width, heads, ffn, causal=False) for _ in range(depth)]
    return nn.Sequential(first, *blocks, nn.LayerNorm(width), ClassToken(), nn.Linear(width, outputs))


def _four(hidden: Sequence[int]) -> tuple[int, int, int, int]:
    sizes = tuple(hidden) or (32, 4, 64, 2)
    if len(sizes) != 4:
        raise ValueError(f"hidden of vit must be width, heads, units of a hidden layer and depth, got {list(sizes)}")
    return cast(tuple[int, int, int, int], sizes)


class Embedding(nn.Module):
    """Tokens, int64 [..., T], as vectors with positions, [..., T, D]."""

    def __init__(self, tokens: Tensor, positions: Tensor):
        super().__init__()
        self.tokens, self.positions = nn.Parameter(tokens), nn.Parameter(positions)

    @staticmethod
    def stacked(layers: Sequence[nn.Module]) -> nn.Module:
        """K of them as one."""
        same = cast(Sequence[Embedding], layers)
        return Embedding(*(torch.stack([getattr(m, n).detach() for m in same]) for n in ("tokens", "positions")))

    def draw_own_(self, generator: torch.Generator) -> None:
        """Draw both tables."""
        for parameter in (self.tokens, self.positions):
            parameter.normal_(0, _DEVIATION, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens.dim() == 2:
            found = F.embedding(x, self.tokens)
        else:
            member = torch.arange(len(x), device=x.device).view(-1, *[1] * (x.dim() - 1))
            found = self.tokens[member, x]
        return found + self.positions[..., : x.shape[-1], :].unsqueeze(-3)


class GPT(nn.Module):
    """Next-token logits [..., T, V] of tokens [..., T], T up to the number of positions; head and tokens are apart."""

    def __init__(self, embedding: nn.Module, blocks: nn.Module, norm: nn.Module, head: nn.Module):
        super().__init__()
        self.embedding, self.blocks, self.norm, self.head = embedding, cast(nn.ModuleList, blocks), norm, head

    @classmethod
    def drawn(
        cls, vocabulary: int, length: int, width: int, heads: int, ffn: int, depth: int, generator: torch.Generator
    ) -> GPT:
        """A single one, drawn from the generator: PyTorch's law for linear layers, whose part in the stream is divided
        by √(2 depth), and a deviation of 0.02 for embeddings."""
        embedding = Embedding(torch.zeros(vocabulary, width), torch.zeros(length, width))
        blocks = nn.ModuleList(TransformerBlock(width, heads, ffn, causal=True) for _ in range(depth))
        made = cls(embedding, blocks, nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False))
        draw_(made, "torch", generator)
        with torch.no_grad():
            for block in blocks:
                for name in RESIDUAL:
                    block.get_parameter(name).div_(math.sqrt(2 * depth))
        return made

    @staticmethod
    def stacked(models: Sequence[nn.Module]) -> nn.Module:
        """K models as one."""
        parts = ([model.get_submodule(name) for model in models] for name in ("embedding", "blocks", "norm", "head"))
        return GPT(*(stack(part) for part in parts))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))
