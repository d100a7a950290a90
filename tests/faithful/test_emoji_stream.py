"""Image-caption pairs as specs/growclip-and-growth.md has them: checks 12 (its retrieval) and 20."""

import re

import pytest
import torch
from torch.nn import functional as F

from continual.pairs import evaluation, packaged
from continual.pairs.shapes import shapes_captions
from continual.pairs.stream import PairStream, StreamConfig
from continual.pairs.vocabulary import split


class Constant:
    """Everything at one point."""

    def encode_image(self, images):
        return F.normalize(torch.ones(len(images), 4), dim=1)

    def encode_text(self, tokens):
        return F.normalize(torch.ones(len(tokens), 4), dim=1)


class Guessing:
    """Points drawn at random."""

    def __init__(self, seed: int):
        self.draw = torch.Generator().manual_seed(seed)

    def encode_image(self, images):
        return F.normalize(torch.randn(len(images), 16, generator=self.draw), dim=1)

    def encode_text(self, tokens):
        return F.normalize(torch.randn(len(tokens), 16, generator=self.draw), dim=1)


def test_12_ties_count_against_an_encoder_and_guesses_are_at_chance():
    stream = PairStream(shapes_captions(16), StreamConfig(text_length=8))
    found = evaluation.evaluate(Constant(), stream, 4)
    recalls = {name: float(value) for name, value in found.items() if re.search(r"(image|text)_r\d|accuracy", name)}
    assert len(recalls) == 14
    assert set(recalls.values()) == {0.0}  # so never above chance
    guesses = [evaluation.evaluate(Guessing(seed), stream, 4) for seed in range(8)]
    for name in recalls:
        stem = re.sub(r"(image_to_text|text_to_image)", "chance", name)
        chance = "zero_shot/chance" if name.startswith("zero_shot") else stem
        mean = float(torch.stack([found[name] for found in guesses]).mean())
        expected = float(guesses[0][chance])
        pairs = len(stream.concepts("held_out" if "seen" not in name and "other" not in name else "train", 4))
        assert abs(mean - expected) < 4 * (expected / (8 * pairs)) ** 0.5, name


def test_12_validation_pairs_do_not_depend_on_the_training_batch():
    """Their loss depends on how many pairs compete, so their number is the same whatever is trained on, and when."""
    shapes = shapes_captions(16)
    small, large = (PairStream(shapes, StreamConfig(batch=batch, text_length=8)) for batch in (16, 64))
    for part in (0, 2, 4):
        pairs = list(zip(small.validation(part), large.validation(part), strict=True))
        assert {len(batch.concepts) for both in pairs for batch in both} == {21}
        assert all(torch.equal(a, b) for both in pairs for a, b in zip(*both, strict=True))
        assert torch.isin(torch.cat([batch.concepts for batch, _ in pairs]), small.concepts("held_out", part)).all()


@pytest.fixture(scope="module")
def emoji():
    if not packaged.is_here("emoji"):
        pytest.skip("the emoji are not here: `neoteny data fetch emoji`")
    return packaged.load("emoji")


def test_20_emoji_stream(emoji):
    assert len(emoji.concepts) == 1911
    assert emoji.parts.bincount().tolist() == [1033, 271, 264, 175, 168]
    assert emoji.view.bincount().tolist() == [1911, 1911]
    assert emoji.images.shape == (3822, 3, 64, 64)
    categories = {concept.category for concept in emoji.concepts}
    assert len(categories) == 10
    assert emoji.unscored == ("Component",)
    assert len({concept.subcategory for concept in emoji.concepts}) == 99
    assert len({word for concept in emoji.concepts for word in split(concept.captions[0])}) > 1700
    for concept in emoji.concepts:  # neither a version nor the name of a file
        assert not any(re.search(r"\d\.\d|\.png|fe0f", text.lower()) for text in concept.texts)


def test_20_held_out_emoji_are_the_same_in_every_run_and_never_trained_on(emoji):
    small = emoji.resized(8)
    stream = PairStream(small, StreamConfig(train_views="both", text_length=8))
    held_out = stream.concepts("held_out", 4)
    assert [len(stream.concepts("held_out", part, part)) for part in range(5)] == [103, 27, 26, 17, 16]
    assert torch.equal(held_out, PairStream(small, StreamConfig(batch=7)).concepts("held_out", 4))
    assert held_out[:5].tolist() == [2, 4, 13, 29, 103]
    trained = torch.cat([stream.batch(seed, 4, step).concepts for seed in (0, 1) for step in range(26)])
    assert len(trained.unique()) > 1600
    assert not torch.isin(trained, held_out).any()
    assert not torch.isin(stream._of_concept[stream.concepts("train", 4)].flatten() // 2, held_out).any()
    classes = evaluation.classes_of(stream, 4)
    assert classes is not None
    assert classes.count == 9
