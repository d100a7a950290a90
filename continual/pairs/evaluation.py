"""What is measured on pairs: retrieval in both directions, zero-shot classes, and both beside chance.

Ties count against the encoder: a query has found its partner only if nothing else is as near. An encoder that maps
everything to one point therefore finds nothing, and can never be above chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from continual.pairs.batch import PairBatch
from continual.pairs.stream import PairStream

Scores = dict[str, Tensor]  # numbers of one seed, [] by name
_CHUNK = 256  # images or texts that are encoded at a time
_ROWS = 1024  # of the similarities that are compared at a time
_ROUNDING = 1e-12  # of a float64 product of two unit vectors


class Encoder(Protocol):
    """Two encoders into one space; embeddings have length 1."""

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> [B, E]."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] -> [B, E]."""
        ...


class Embedded(NamedTuple):
    """Pairs as embeddings [N, E], image n and text n of one concept, and which [N]."""

    images: Tensor
    texts: Tensor
    concepts: Tensor

    def of(self, concepts: Tensor) -> Embedded:
        """Only the pairs of these concepts."""
        kept = torch.isin(self.concepts, concepts)
        return Embedded(*(part[kept] for part in self))


@torch.no_grad()
def embedded(encoder: Encoder, pairs: PairBatch) -> Embedded:
    """Encode pairs, so many at a time that memory does not depend on their number."""
    images = torch.cat([encoder.encode_image(chunk) for chunk in pairs.images.split(_CHUNK)])
    texts = torch.cat([encoder.encode_text(chunk) for chunk in pairs.tokens.split(_CHUNK)])
    return Embedded(images, texts, pairs.concepts)


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """How many candidates are as near to query n as candidate n is, or nearer: int64 [N], 0 is best. Both [N, E].

    In float64 and with room for its rounding: a product may sum one column's terms in another order than the next's.
    """
    queries, candidates = queries.double(), candidates.double()
    found = []
    for start in range(0, len(queries), _ROWS):
        similar = queries[start : start + _ROWS] @ candidates.T
        own = similar.diagonal(start).unsqueeze(1)
        found.append((similar >= own - _ROUNDING).sum(1) - 1)
    return torch.cat(found)


def recalls(pairs: Embedded, prefix: str, most: Sequence[int] = (1, 5)) -> Scores:
    """R@k in both directions, `retrieval/{prefix}text_to_image_r1` and so on."""
    both = {"text_to_image": ranks(pairs.texts, pairs.images), "image_to_text": ranks(pairs.images, pairs.texts)}
    return {f"retrieval/{prefix}{way}_r{k}": (rank < k).double().mean() for way, rank in both.items() for k in most}


def chance(count: int, prefix: str, most: Sequence[int] = (1, 5)) -> Scores:
    """R@k of guesses among so many candidates."""
    return {f"retrieval/{prefix}chance_r{k}": torch.tensor(min(1.0, k / count), dtype=torch.float64) for k in most}


class Classes(NamedTuple):
    """Zero-shot classes. tokens: prompts [P, T]; owners: the class of each [P]; of_concept: of each concept [C], or -1.

    A class is the mean of the embeddings of its prompts, as in CLIP's prompt ensembles.
    """

    tokens: Tensor
    owners: Tensor
    of_concept: Tensor

    @property
    def count(self) -> int:
        return int(self.owners.max()) + 1


def classes_of(stream: PairStream, part: int) -> Classes | None:
    """Categories of the training concepts of the parts so far, with a prompt for each subcategory; None: below two."""
    concepts = stream.pairs.concepts
    seen = [concepts[index] for index in stream.concepts("train", part).tolist()]
    prompts = sorted({(c.category, c.prompt) for c in seen if c.category and c.category not in stream.pairs.unscored})
    names = list(dict.fromkeys(category for category, _ in prompts))
    if len(names) < 2:
        return None
    known, device = stream.vocabularies[part], stream.device
    tokens = stream.words.encode([prompt for _, prompt in prompts], stream.config.text_length).to(device)
    owners = torch.tensor([names.index(category) for category, _ in prompts], device=device)
    of_concept = torch.tensor([names.index(c.category) if c.category in names else -1 for c in concepts], device=device)
    return Classes(torch.where(tokens < known, tokens, 1), owners, of_concept)


@torch.no_grad()
def class_embeddings(encoder: Encoder, classes: Classes) -> Tensor:
    """[classes, E], of length 1."""
    prompts = encoder.encode_text(classes.tokens)
    sums = torch.zeros(classes.count, prompts.shape[1], device=prompts.device).index_add_(0, classes.owners, prompts)
    return torch.nn.functional.normalize(sums, dim=1)


def zero_shot(pairs: Embedded, classes: Classes, centres: Tensor) -> Tensor:
    """Share of images whose own class is strictly nearest, []. nan if none has a class."""
    own = classes.of_concept[pairs.concepts]
    images, own = pairs.images[own >= 0], own[own >= 0]
    similar = images @ centres.T
    right = (similar >= similar.gather(1, own.unsqueeze(1))).sum(1) == 1
    return right.double().mean()


def evaluate(encoder: Encoder, stream: PairStream, part: int) -> Scores:
    """Everything but losses after a part: on its held-out concepts and those before, on seen ones, in the other view.

    `retrieval/*` without a further word is on held-out concepts in the view that is trained on.
    """
    parts, names = stream.pairs, {"held_out": "", "train": "seen_"}
    found: Scores = {}
    sets = {split: stream.concepts(split, part) for split in ("held_out", "train")}
    classes = classes_of(stream, part)
    centres = None if classes is None else class_embeddings(encoder, classes)
    for split, concepts in sets.items():
        own = embedded(encoder, stream.labelled(concepts, part, view=0))
        found |= recalls(own, names[split]) | chance(len(own.concepts), names[split])
        if split == "held_out":
            found |= _each_part(own, stream, part)
            if classes is not None and centres is not None:
                found["zero_shot/accuracy"] = zero_shot(own, classes, centres)
                found["zero_shot/chance"] = torch.tensor(1 / classes.count, dtype=torch.float64)
    if int(parts.view.max()) > 0:
        own = embedded(encoder, stream.labelled(sets["train"], part, view=1))
        found |= recalls(own, "other_view_") | chance(len(own.concepts), "other_view_")
        if classes is not None and centres is not None:
            found["zero_shot/other_view_accuracy"] = zero_shot(own, classes, centres)
    return found


def _each_part(pairs: Embedded, stream: PairStream, part: int) -> Scores:
    """R@1 from text to image on the held-out concepts of each part so far, among those of the part."""
    found = {}
    for index in range(part + 1):
        own = pairs.of(stream.concepts("held_out", index, index).to(pairs.concepts.device))
        found[f"acc/task_{index + 1}_after_{part + 1}"] = (ranks(own.texts, own.images) < 1).double().mean()
    return found


def on_arrival(encoder: Encoder, stream: PairStream, part: int) -> Tensor:
    """Forward transfer: R@1 from text to image on the held-out concepts of a part that was not trained on yet, []."""
    concepts = stream.concepts("held_out", part, part)
    own = embedded(encoder, stream.labelled(concepts, part, view=0))
    return (ranks(own.texts, own.images) < 1).double().mean()


@torch.no_grad()
def gallery(encoder: Encoder, stream: PairStream, part: int, queries: int = 6, shown: int = 5) -> dict[str, np.ndarray]:
    """What a few held-out captions find among all held-out images up to a part, to look at.

    captions [Q] str, images uint8 [Q, shown, S, S, 3] from the nearest on, right [Q, shown] bool, rank [Q] of the
    caption's own image.
    """
    pairs = stream.labelled(stream.concepts("held_out", part), part, view=0)
    own = embedded(encoder, pairs)
    places = torch.linspace(0, len(pairs.images) - 1, min(queries, len(pairs.images)), device=stream.device).long()
    nearest = (own.texts[places] @ own.images.T).topk(min(shown, len(pairs.images)), dim=1).indices
    captions = [stream.pairs.concepts[index].captions[0] for index in own.concepts[places].tolist()]
    return {
        "captions": np.array(captions),
        "images": pairs.images[nearest].permute(0, 1, 3, 4, 2).numpy(force=True),
        "right": (nearest == places.unsqueeze(1)).numpy(force=True),
        "rank": ranks(own.texts, own.images)[places].numpy(force=True),
    }
