"""Captions as tensors, and how one is drawn for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from continual.pairs.collection import Concept
from continual.pairs.vocabulary import PADDING, UNKNOWN, Vocabulary, split

_MOST_TAGS = 4  # added to a caption, or alone
_PIECE = 8  # words of a tag that are kept


@dataclass(frozen=True)
class Mixture:
    """How often a caption is whole, has tags behind it, is tags alone, or is "category: subcategory" (D.1 of the spec).

    Raises ValueError for parts that are no distribution.
    """

    caption: float = 0.45
    caption_and_tags: float = 0.27
    tags: float = 0.18
    prompt: float = 0.10

    def __post_init__(self) -> None:
        parts = (self.caption, self.caption_and_tags, self.tags, self.prompt)
        if min(parts) < 0 or abs(sum(parts) - 1) > 1e-6:
            raise ValueError(f"the parts of a caption mixture must be 0 or more and sum to 1, got {parts}")


class Captions:
    """What can be said of every concept, as tokens of the whole stream's vocabulary, on the device.

    Words of parts to come have numbers too; `known` says which the vocabulary holds by now, others are UNKNOWN.
    length: tokens of a caption. Raises ValueError for a caption without words.
    """

    def __init__(self, concepts: Sequence[Concept], words: Vocabulary, length: int, device: torch.device):
        self.length = length
        self.whole, self._counts = _table([c.captions for c in concepts], words, length, device)
        self.tags, self._tags = _table([_spoken(c.tags) for c in concepts], words, min(_PIECE, length), device)
        self.prompts, self._prompts = _table([[c.prompt] if c.prompt else [] for c in concepts], words, length, device)

    def labels(self, concepts: Tensor, known: int) -> Tensor:
        """The first caption of each, int64 [N, length]. known: size of the vocabulary."""
        return _within(self.whole[concepts, 0], known)

    def draw(self, concepts: Tensor, mixture: Mixture, known: int, generator: torch.Generator) -> Tensor:
        """A caption of each, int64 [N, length]. A concept without tags or classes has its whole caption instead."""
        count, device = len(concepts), concepts.device
        draws = torch.rand(count, 3, generator=generator, device=device)
        order = torch.rand(count, self.tags.shape[1], generator=generator, device=device)
        kind = torch.bucketize(draws[:, 0].contiguous(), torch.tensor(_edges(mixture), device=device), right=True)
        kind = torch.where((self._tags[concepts] == 0) & ((kind == 1) | (kind == 2)), 0, kind)
        kind = torch.where((self._prompts[concepts] == 0) & (kind == 3), 0, kind)
        which = (draws[:, 1] * self._counts[concepts]).long()
        whole = self.whole[concepts, which] * ((kind == 0) | (kind == 1)).unsqueeze(1)
        prompt = self.prompts[concepts, 0] * (kind == 3).unsqueeze(1)
        wanted = 1 + (draws[:, 2] * _MOST_TAGS).long()
        tags = self._some_tags(concepts, order, wanted * ((kind == 1) | (kind == 2)))
        pieces = torch.cat([whole, prompt, tags], 1)
        # Words to the front, in their order; what is behind the length is cut.
        packed = pieces.gather(1, (pieces == PADDING).to(torch.int8).argsort(dim=1, stable=True))
        return _within(packed[:, : self.length].contiguous(), known)

    def _some_tags(self, concepts: Tensor, order: Tensor, wanted: Tensor) -> Tensor:
        """`wanted` [N] tags of each, in a random order, one behind the other: [N, 4 x words]."""
        missing = torch.arange(order.shape[1], device=order.device) >= self._tags[concepts].unsqueeze(1)
        chosen = order.masked_fill(missing, 2.0).argsort(1)[:, :_MOST_TAGS]  # tags that are not there come last
        found = self.tags[concepts.unsqueeze(1), chosen]
        places = torch.arange(found.shape[1], device=order.device)
        return (found * (places < wanted.unsqueeze(1)).unsqueeze(2)).flatten(1)


def _edges(mixture: Mixture) -> list[float]:
    first = mixture.caption
    second = first + mixture.caption_and_tags
    return [first, second, second + mixture.tags]


def _spoken(tags: Sequence[str]) -> list[str]:
    """Those with a word that we can write."""
    return [tag for tag in tags if split(tag)]


def _within(tokens: Tensor, known: int) -> Tensor:
    return torch.where(tokens < known, tokens, UNKNOWN)


def _table(
    texts: Sequence[Sequence[str]], words: Vocabulary, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tokens [C, most, length] of several texts for each concept, and how many each has, [C]."""
    counts = torch.tensor([len(own) for own in texts])
    most = max(1, int(counts.max()))
    table = torch.full((len(texts), most, length), PADDING)
    filled = torch.arange(most) < counts.unsqueeze(1)
    table[filled] = words.encode([text for own in texts for text in own], length)
    return table.to(device), counts.to(device)
