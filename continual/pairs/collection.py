"""Pairs as they are collected: images, the concept that each shows, and what is said of concepts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from continual.pairs.vocabulary import split


@dataclass(frozen=True)
class Concept:
    """What images of one thing share.

    captions: whole ones, the first is that of evaluation. tags: words that may be added, or stand alone. category,
    subcategory: classes for zero-shot answers; "": none. version: when it came, as numbers that sort.
    """

    captions: tuple[str, ...]
    tags: tuple[str, ...] = ()
    category: str = ""
    subcategory: str = ""
    version: tuple[int, ...] = (0,)

    @property
    def prompt(self) -> str:
        """The caption that names its classes; "" if it has none."""
        return ": ".join(filter(None, (self.category, self.subcategory)))

    @property
    def texts(self) -> list[str]:
        """All that may stand in a caption of it."""
        return [*self.captions, *self.tags, *filter(None, [self.prompt])]


@dataclass(frozen=True)
class Pairs:
    """Images uint8 [N, 3, S, S] with the concept [N] and the view [N] of each, int64.

    concepts: what the numbers stand for, C of them. parts: of each concept [C], when it arrives, 0 .. P - 1.
    views: names of view 0, which is trained on, and 1, for tests in another style. unscored: categories that are no
    zero-shot class. Raises ValueError, one sentence, for what does not fit together.
    """

    name: str
    images: Tensor
    concept: Tensor
    view: Tensor
    concepts: Sequence[Concept]
    parts: Tensor
    views: tuple[str, ...] = ("image",)
    part_names: tuple[str, ...] = ()
    unscored: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.dtype != torch.uint8:
            raise ValueError(f"images of '{self.name}' must be uint8 [N, 3, S, S], got {list(self.images.shape)}")
        if not len(self.concepts) or len(self.parts) != len(self.concepts):
            raise ValueError(f"'{self.name}' has {len(self.concepts)} concepts and parts of {len(self.parts)}")
        if sorted(set(self.parts.tolist())) != list(range(self.count)):
            raise ValueError(f"parts of '{self.name}' must be numbered 0, 1, ... without a gap")
        shown = set(self.concept[self.view == 0].tolist())
        for index, concept in enumerate(self.concepts):
            if index not in shown:
                raise ValueError(f"'{concept.captions[0]}' of '{self.name}' has no image in {self.views[0]}")
            for caption in concept.captions or ("",):
                if not split(caption):
                    raise ValueError(f"a caption of '{self.name}' is empty or has no word (a-z, 0-9): {caption!r}")

    @property
    def count(self) -> int:
        """Parts."""
        return int(self.parts.max()) + 1

    @property
    def size(self) -> int:
        """Pixels of an image's side."""
        return self.images.shape[-1]

    def resized(self, size: int) -> Pairs:
        """The same with images of size x size pixels."""
        if size == self.size:
            return self
        chunks = [_resized(chunk, size) for chunk in self.images.split(512)]
        return replace(self, images=torch.cat(chunks))

    def in_parts(self, count: int) -> Pairs:
        """Cut anew into equal parts, by version and then by place. Raises ValueError if there are too few concepts."""
        if not 1 <= count <= len(self.concepts):
            raise ValueError(f"'{self.name}' has {len(self.concepts)} concepts, which make no {count} parts")
        order = sorted(range(len(self.concepts)), key=lambda index: (self.concepts[index].version, index))
        parts = torch.zeros(len(order), dtype=torch.int64)
        parts[torch.tensor(order)] = torch.arange(len(order)) * count // len(order)
        return replace(self, parts=parts, part_names=tuple(f"part {index + 1}" for index in range(count)))

    def limited(self, concepts_per_part: int) -> Pairs:
        """Only the first so many concepts of each part."""
        place = torch.zeros_like(self.parts)
        for part in range(self.count):
            own = self.parts == part
            place[own] = torch.arange(int(own.sum()))
        kept = (place < concepts_per_part).nonzero().flatten()
        number = torch.full_like(self.parts, -1)
        number[kept] = torch.arange(len(kept))
        images = (number[self.concept] >= 0).nonzero().flatten()
        return replace(
            self,
            images=self.images[images],
            concept=number[self.concept[images]],
            view=self.view[images],
            concepts=[self.concepts[index] for index in kept.tolist()],
            parts=self.parts[kept],
        )

    def followed_by(self, other: Pairs) -> Pairs:
        """These parts, then those of another domain, whose images are resized to these."""
        other = other.resized(self.size)
        names = tuple(" / ".join(dict.fromkeys(pair)) for pair in zip(self.views, other.views, strict=True))
        return Pairs(
            name=f"{self.name}-{other.name}",
            images=torch.cat([self.images, other.images]),
            concept=torch.cat([self.concept, other.concept + len(self.concepts)]),
            view=torch.cat([self.view, other.view]),
            concepts=[*self.concepts, *other.concepts],
            parts=torch.cat([self.parts, other.parts + self.count]),
            views=names,
            part_names=(*self.part_names, *other.part_names),
            unscored=(*self.unscored, *other.unscored),
        )

    def fingerprint(self) -> str:
        """SHA-256 over images, concepts and their order, for the record of a run."""
        digest = hashlib.sha256()
        for part in (self.images, self.concept, self.view, self.parts):
            digest.update(f"{part.dtype}{list(part.shape)}".encode())
            digest.update(part.contiguous().numpy().tobytes())
        for concept in self.concepts:
            digest.update(repr((concept.texts, concept.category)).encode())
        return digest.hexdigest()


def _resized(images: Tensor, size: int) -> Tensor:
    small = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return small.round_().clamp_(0, 255).to(torch.uint8)
