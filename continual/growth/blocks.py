"""The blocks of a dual encoder, and what each of its parameters begins with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continual.growth.contrastive import FIRST_LOGIT_SCALE
from continual.growth.genome import TOWERS, Genome

RESIDUAL = ("out.weight", "out.bias", "down.weight", "down.bias")  # of a block, what writes to the stream
_STANDARD_DEVIATION = 0.02  # of embeddings, positions, class tokens


class Block(nn.Module):
    """Attention and a hidden layer, each added to the stream [B, n, D]. Its parameters have no values yet."""

    def __init__(self, genome: Genome, tower: int):
        super().__init__()
        width, self.heads, self.head_dim = genome.width, genome.heads[tower], genome.head_dim
        attended = self.heads * self.head_dim
        self.norm1, self.norm2 = norm(genome), norm(genome)
        self.qkv = nn.Linear(width, 3 * attended, device="meta")  # rows: (q, k, v) x heads x head_dim
        self.out = nn.Linear(attended, width, device="meta")
        self.up = nn.Linear(width, genome.ffn[tower], device="meta")
        self.down = nn.Linear(genome.ffn[tower], width, device="meta")

    def forward(self, x: Tensor, mask: Tensor | None, class_only: bool) -> Tensor:
        """x: [B, n, D]. mask: bool [B, 1, 1, n], the tokens that may be attended to; None: all.

        class_only: only the class token's output is asked for, [B, 1, D]; the others would be computed for nothing.
        """
        normed, batch, attended = self.norm1(x), len(x), self.heads * self.head_dim
        if class_only:
            x = x[:, :1]
            (wq, wkv), (bq, bkv) = (p.split([attended, 2 * attended]) for p in (self.qkv.weight, self.qkv.bias))
            q = F.linear(normed[:, :1], wq, bq).view(batch, 1, self.heads, self.head_dim).transpose(1, 2)
            k, v = self._split(F.linear(normed, wkv, bkv), 2)
        else:
            q, k, v = self._split(self.qkv(normed), 3)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, -1, attended))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def _split(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, n, parts x H x d_h] -> parts of [B, H, n, d_h]."""
        batch, tokens, _ = projected.shape
        return projected.view(batch, tokens, parts, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def fresh(genome: Genome, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """What a new model begins with for a parameter of that name, in a shape that may be a part of it."""
    layer, _, kind = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    made = torch.empty(tuple(shape), device=generator.device)
    if "norm" in layer:
        return made.fill_(1.0 if kind == "weight" else 0.0)
    if name == "logit_scale":
        return made.fill_(FIRST_LOGIT_SCALE)
    if (inputs := _inputs(genome, name, layer)) is None:
        return made.normal_(0, _STANDARD_DEVIATION, generator=generator)
    bound = 1 / math.sqrt(inputs)
    if genome.init == "clip" and layer in ("out", "down"):
        bound /= math.sqrt(2 * (max(genome.depth.image, genome.depth.text) + genome.depth.shared))
    return made.uniform_(-bound, bound, generator=generator)


def _inputs(genome: Genome, name: str, layer: str) -> int | None:
    """Of the linear layer that a parameter belongs to; None for embeddings."""
    if layer == "patch":
        return 3 * genome.patch**2
    if layer in ("qkv", "up") or name.endswith("projection"):
        return genome.width
    if layer in ("out", "down"):
        tower = TOWERS.index(name.partition("_")[0])
        return genome.heads[tower] * genome.head_dim if layer == "out" else genome.ffn[tower]
    return None


def norm(genome: Genome) -> nn.Module:
    """Of the kind that the genome names, without values yet."""
    kind = nn.LayerNorm if genome.norm == "layernorm" else nn.RMSNorm
    return kind(genome.width, eps=genome.epsilon, device="meta")
