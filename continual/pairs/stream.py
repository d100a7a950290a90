"""Pairs that arrive part by part, and the batches of every step.

Each batch follows from seed, part and step alone, so that a run that was cut off sees the same, and candidates of one
growth step can be given the same batches. Images stay on the device as uint8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from continual.pairs.batch import PairBatch
from continual.pairs.captions import Captions, Mixture
from continual.pairs.collection import Pairs
from continual.pairs.vocabulary import Vocabulary

Regime = Literal["cumulative", "incremental", "incremental+replay"]
Split = Literal["train", "held_out"]
REGIMES: tuple[str, ...] = get_args(Regime)
# What numbers are drawn for; new ones go to the end, so that old runs keep theirs.
_PURPOSES = ("held_out", "order", "content", "memory", "proxy", "validation")
_FEWEST = 2  # concepts to match with one another
_SHIFT = 16  # images move by up to this part of their side
_BRIGHTNESS = 0.1


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How pairs arrive. Raises ValueError, one sentence, for a number out of range."""

    batch: int = 128
    """pairs in a step, each of another concept"""
    text_length: int = 16
    """tokens of a caption"""
    regime: Regime = "cumulative"
    """what a part is learnt from: all parts so far, itself, or itself and a memory"""
    memory: int = 200
    """concepts kept, of incremental+replay"""
    replay_ratio: float = 0.5
    """of a batch, from the memory"""
    held_out: float = 0.1
    """of each part's concepts, for tests"""
    train_views: Literal["first", "both"] = "first"
    """images that are trained on; first: the others are for tests in another style"""
    augment: bool = True
    """images are shifted by up to a sixteenth, and made a little lighter or darker"""
    validation_batch: int = 64
    """pairs of a batch of the validation loss"""
    mixture: Mixture = Mixture()

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise ValueError(f"unknown regime '{self.regime}', it is one of {', '.join(REGIMES)}")
        if self.train_views not in ("first", "both"):
            raise ValueError(f"train_views is first or both, got '{self.train_views}'")
        for name, least in {"batch": 2, "text_length": 1, "memory": 1, "validation_batch": 2}.items():
            if vars(self)[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {vars(self)[name]}")
        if not 0 < self.replay_ratio < 1:
            raise ValueError(f"replay_ratio must be between 0 and 1, got {self.replay_ratio}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")


class PairStream:
    """The parts of a collection for any number of seeds. Raises ValueError, one sentence, for too few concepts.

    vocabularies: its size in each part; words of concepts that are held out are not learnt.
    """

    def __init__(self, pairs: Pairs, config: StreamConfig, device: torch.device | str = "cpu"):
        self.pairs, self.config, self.device = pairs, config, torch.device(device)
        self.parts = pairs.count
        self._concepts: dict[tuple[Split, int, int], Tensor] = {}
        self._held_out = held_out(pairs, config.held_out)
        self.words, self.vocabularies = self._learn_words()
        self.captions = Captions(pairs.concepts, self.words, config.text_length, self.device)
        self.images = pairs.images.to(self.device)
        self._of_concept, self._image_counts = self._images_of_concepts()
        self._orders: dict[tuple[int, int, int], Tensor] = {}
        for part in range(self.parts):
            if min(len(self.concepts(split, part, part)) for split in ("train", "held_out")) < _FEWEST:
                raise ValueError(f"part {part + 1} of '{pairs.name}' has too few concepts to train on and to hold out")

    def _learn_words(self) -> tuple[Vocabulary, tuple[int, ...]]:
        words, sizes = Vocabulary(), []
        for part in range(self.parts):
            told = [self.pairs.concepts[index] for index in self.concepts("train", part, part).tolist()]
            words.grow(text for concept in told for text in concept.texts)
            sizes.append(len(words))
        return words, tuple(sizes)

    def _images_of_concepts(self) -> tuple[Tensor, Tensor]:
        """Images that each concept may be trained on, [C, most], and how many, [C]."""
        trained = self.pairs.view == 0 if self.config.train_views == "first" else self.pairs.view >= 0
        images = trained.nonzero().flatten()
        concept = self.pairs.concept[images]
        order = concept.argsort(stable=True)
        counts = concept.bincount(minlength=len(self.pairs.concepts))
        place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[concept[order]]
        table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64)
        table[concept[order], place] = images[order]
        return table.to(self.device), counts.to(self.device)

    def concepts(self, split: Split, last: int, first: int = 0) -> Tensor:
        """Concepts int64 [M] of a split in parts first .. last, in the order of arrival."""
        key = (split, last, first)
        if key not in self._concepts:
            self._concepts[key] = self._in_parts(split, last, first)
        return self._concepts[key]

    def _in_parts(self, split: Split, last: int, first: int) -> Tensor:
        inside = (self.pairs.parts >= first) & (self.pairs.parts <= last)
        inside &= self._held_out if split == "held_out" else ~self._held_out
        found = inside.nonzero().flatten()
        return found[self.pairs.parts[found].argsort(stable=True)]

    def seen(self, part: int) -> int:
        """Training images up to a part: N_t of the growth space."""
        return int(self._image_counts[self.concepts("train", part).to(self.device)].sum())

    def batch(self, seed: int, part: int, step: int) -> PairBatch:
        """What a seed learns from in a step of a part."""
        regime, size = self.config.regime, self.config.batch
        content = self._generator("content", seed, part, step)
        if regime == "cumulative":
            chosen = self._turn(self.concepts("train", part), size, seed, part, step)
        elif regime == "incremental" or part == 0:
            chosen = self._turn(self.concepts("train", part, part), size, seed, part, step)
        else:
            replayed = round(size * self.config.replay_ratio)
            new = self._turn(self.concepts("train", part, part), size - replayed, seed, part, step)
            kept = self.memory(seed, part - 1)
            places = torch.randperm(len(kept), generator=self._generator("memory", seed, part, step))
            chosen = torch.cat([new, kept[places[:replayed]]])
        return self._made(chosen, part, content)

    def proxy_batches(self, part: int, seed: int, steps: int) -> Iterator[PairBatch]:
        """The same batches for every candidate of a growth step: of all parts so far, `steps` of them."""
        concepts = self.concepts("train", part)
        for step in range(steps):
            generator = self._generator("proxy", part, seed, step)
            order = torch.randperm(len(concepts), generator=self._generator("order", part, seed, step, 0, 0))
            yield self._made(concepts[order[: self.config.batch]], part, generator)

    def validation(self, part: int) -> list[PairBatch]:
        """Held-out pairs of the parts so far with their first captions, in batches of one size that never changes."""
        size = min(self.config.validation_batch, len(self.concepts("held_out", 0)))
        concepts = self.concepts("held_out", part)
        order = torch.randperm(len(concepts), generator=self._generator("validation", part))
        # The last, smaller batch is dropped: the loss depends on the size.
        whole = concepts[order].split(size)[: len(concepts) // size]
        return [self.labelled(chosen, part, view=0) for chosen in whole]

    def labelled(self, concepts: Tensor, part: int, view: int) -> PairBatch:
        """Concepts [M] as one image of a view each, and their first captions with the words of a part.

        Concepts without such an image are left out.
        """
        where = torch.full((len(self.pairs.concepts),), -1)
        images = (self.pairs.view == view).nonzero().flatten().flip(0)
        where[self.pairs.concept[images]] = images  # the first one stands last
        concepts = concepts[where[concepts] >= 0]
        chosen = concepts.to(self.device)
        tokens = self.captions.labels(chosen, self.vocabularies[part])
        return PairBatch(self.images[where[concepts].to(self.device)], tokens, chosen)

    def memory(self, seed: int, part: int) -> Tensor:
        """Concepts that a reservoir has kept when a part has ended, a uniform sample of all that came.

        They are those with the smallest of random keys (Efraimidis & Spirakis 2006, with equal weights).
        """
        concepts = self.concepts("train", part)
        keys = torch.rand(len(self.pairs.concepts), generator=self._generator("memory", seed))[concepts]
        return concepts[keys.argsort()[: self.config.memory]].sort().values

    def _turn(self, concepts: Tensor, size: int, seed: int, part: int, step: int) -> Tensor:
        """The concepts of a step: all in turn in a random order, another one in each pass."""
        size = min(size, len(concepts))
        passes, place = divmod(step, len(concepts) // size)
        key = (seed, part, passes)
        if key not in self._orders:
            for old in [other for other in self._orders if other[0] == seed]:
                del self._orders[old]
            self._orders[key] = torch.randperm(len(concepts), generator=self._generator("order", seed, part, passes))
        return concepts[self._orders[key][place * size : (place + 1) * size]]

    def _made(self, concepts: Tensor, part: int, generator: torch.Generator) -> PairBatch:
        """Draw image and caption of each, and augment."""
        chosen = concepts.to(self.device)
        draws = torch.rand(len(chosen), 4, generator=generator, device=self.device)
        which = (draws[:, 0] * self._image_counts[chosen]).long()
        images = self.images[self._of_concept[chosen, which]]
        tokens = self.captions.draw(chosen, self.config.mixture, self.vocabularies[part], generator)
        return PairBatch(augmented(images, draws[:, 1:]) if self.config.augment else images, tokens, chosen)

    def _generator(self, purpose: str, *index: int) -> torch.Generator:
        """On the device for what is drawn there, on the host for orders."""
        numbers = np.random.SeedSequence((_PURPOSES.index(purpose), *index)).generate_state(1, np.uint64)
        device = self.device if purpose in ("content", "proxy") else torch.device("cpu")
        return torch.Generator(device).manual_seed(int(numbers[0] >> np.uint64(1)))


def held_out(pairs: Pairs, share: float) -> Tensor:
    """Which concepts [C] are for tests: so much of each part, but at least two.

    They are the same in every run, whatever its seed.
    """
    found = torch.zeros(len(pairs.concepts), dtype=torch.bool)
    for part in range(pairs.count):
        own = (pairs.parts == part).nonzero().flatten()
        draw = torch.Generator().manual_seed(part)
        found[own[torch.randperm(len(own), generator=draw)[: max(_FEWEST, int(share * len(own)))]]] = True
    return found


def augmented(images: Tensor, draws: Tensor) -> Tensor:
    """Shifted by up to a sixteenth of the side (the border is continued) and lighter or darker by up to a tenth.

    images uint8 [B, 3, S, S], draws [B, 3] in [0, 1). Nothing is mirrored: captions tell left from right.
    """
    size = images.shape[-1]
    most = size // _SHIFT
    shift = torch.floor(draws[:, :2] * (2 * most + 1)).long() - most
    places = torch.arange(size, device=images.device)
    rows, columns = ((places + shift[:, axis : axis + 1]).clamp(0, size - 1) for axis in (0, 1))
    sample = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    moved = images.permute(0, 2, 3, 1)[sample, rows.unsqueeze(2), columns.unsqueeze(1)]
    light = 1 + _BRIGHTNESS * (2 * draws[:, 2] - 1)
    shone = (moved.permute(0, 3, 1, 2).float() * light.view(-1, 1, 1, 1)).round_().clamp_(0, 255)
    return shone.to(torch.uint8)
