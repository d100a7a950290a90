"""A dual encoder of images and texts that can grow (specs/growclip-and-growth.md, A.2).

Images: patches, class token, positions, blocks of the image tower, shared blocks, norm, projection, length 1.
Texts:  tokens, class token, positions, blocks of the text tower, the same shared blocks, norm, projection, length 1.
Each modality passes the shared blocks alone; there is no attention across. Blocks are pre-norm, without dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continual.growth import operators
from continual.growth.blocks import Block, fresh, norm
from continual.growth.genome import TOWERS, Genome
from continual.growth.operators import Operators
from continual.growth.protocol import Move
from continual.growth.slots import SlotMap
from continual.growth.space import GrowthSpace


class DualEncoder(nn.Module):
    """The model of a genome. generator: draws its parameters, on its device; None: they have no values yet.

    logit_scale: [], the logarithm of the factor on cosines.
    """

    def __init__(self, genome: Genome, generator: torch.Generator | None):
        super().__init__()
        self.genome, width = genome, genome.width
        self.patch = nn.Linear(3 * genome.patch**2, width, device="meta")
        self.image_class = _parameter(width)
        self.image_positions = _parameter(genome.patches + 1, width)
        self.tokens = _parameter(genome.vocabulary, width)
        self.text_class = _parameter(width)
        self.text_positions = _parameter(genome.length + 1, width)
        self.image_blocks, self.text_blocks, self.shared_blocks = (
            nn.ModuleList(Block(genome, tower) for _ in range(genome.depth[tower])) for tower in range(len(TOWERS))
        )
        self.image_norm, self.text_norm = norm(genome), norm(genome)
        self.image_projection, self.text_projection = (_parameter(genome.embedding, width) for _ in range(2))
        self.logit_scale = _parameter()
        if generator is not None:
            shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}
            self.take({name: fresh(genome, name, shape, generator) for name, shape in shapes.items()})

    @classmethod
    def of(cls, genome: Genome, values: Mapping[str, Tensor]) -> DualEncoder:
        """The model of a genome with these tensors as its parameters, not copies of them."""
        return cls(genome, None).take(values)

    def take(self, values: Mapping[str, Tensor]) -> DualEncoder:
        """Make these tensors its parameters. Raises ValueError if they are those of another genome."""
        try:
            self.load_state_dict(values, assign=True)
        except RuntimeError as error:
            raise ValueError(f"these weights are not of the genome {self.genome.to_json()}") from error
        return self

    def stack(self, tower: str) -> nn.ModuleList:
        """The blocks of "image", "text" or "shared"."""
        return cast(nn.ModuleList, self.get_submodule(f"{tower}_blocks"))

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings [B, E] of length 1. images: [B, 3, S, S], uint8, or floating point from 0 to 1."""
        return F.normalize(F.linear(self.image_features(images), self.image_projection), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """What is projected of images [B, 3, S, S]: [B, D]."""
        dtype = self.patch.weight.dtype
        scaled = images.to(dtype) / 127.5 - 1 if images.dtype == torch.uint8 else images.to(dtype) * 2 - 1
        side = self.genome.patch
        batch, _, height, width = scaled.shape
        cut = scaled.view(batch, 3, height // side, side, width // side, side).permute(0, 2, 4, 1, 3, 5)
        x = _with_class(self.image_class, self.patch(cut.reshape(batch, -1, 3 * side * side))) + self.image_positions
        return self._features(x, None, self.image_blocks, self.image_norm)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, E] of length 1. tokens: int64 [B, up to T], 0 is padding, 1 an unknown word."""
        tokens, mask = _unpadded(tokens)
        x = _with_class(self.text_class, F.embedding(tokens, self.tokens)) + self.text_positions[: tokens.shape[1] + 1]
        features = self._features(x, mask, self.text_blocks, self.text_norm)
        return F.normalize(F.linear(features, self.text_projection), dim=-1)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of images and of texts, see `encode_image` and `encode_text`."""
        return self.encode_image(images), self.encode_text(tokens)

    def moves(self, space: GrowthSpace | None = None) -> Sequence[Move[Genome]]:
        """The growths of one dimension, see `GrowthSpace.moves`."""
        return (space or GrowthSpace()).moves(self.genome)

    def grow(
        self, move: Move[Genome], generator: torch.Generator, how: Operators = operators.DEFAULT
    ) -> tuple[DualEncoder, SlotMap]:
        """See `operators.grow`."""
        return operators.grow(self, move.genome, generator, how)

    def cost(self) -> float:
        """FLOPs of one training step on one pair."""
        return self.genome.flops

    def _features(self, x: Tensor, mask: Tensor | None, tower: nn.ModuleList, norm: nn.Module) -> Tensor:
        blocks: Sequence[nn.Module] = [*tower, *self.shared_blocks]
        for index, block in enumerate(blocks, start=1):
            x = block(x, mask, index == len(blocks))
        return norm(x[:, 0])


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"))


def _with_class(token: Tensor, x: Tensor) -> Tensor:
    """[B, n, D] -> [B, 1 + n, D]."""
    return torch.cat([token.expand(len(x), 1, -1), x], 1)


def _unpadded(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens without columns in which all texts are padded, and the mask of the rest, bool [B, 1, 1, 1 + n].

    Only where looking is free: another device would have to be waited for, so there the mask is always made.
    """
    words = tokens != 0
    if tokens.device.type == "cpu":
        last = int(words.any(0).nonzero().max() + 1) if bool(words.any()) else 1
        tokens, words = tokens[:, :last], words[:, :last]
        if bool(words.all()):
            return tokens, None
    return tokens, F.pad(words, (1, 0), value=True)[:, None, None]
