"""Pairs of images and captions: words, captions, batches, regimes, and what is measured."""

import dataclasses

import pytest
import torch

from continual.pairs import evaluation
from continual.pairs.batch import PairBatch
from continual.pairs.captions import Mixture
from continual.pairs.shapes import shapes_captions
from continual.pairs.stream import PairStream, StreamConfig, augmented
from continual.pairs.vocabulary import PADDING, UNKNOWN, Vocabulary, split


@pytest.fixture(scope="module")
def shapes():
    return shapes_captions(16)


@pytest.fixture(scope="module")
def stream(shapes):
    return PairStream(shapes, StreamConfig(batch=32, text_length=8))


def same(first: PairBatch, second: PairBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_vocabulary_grows_and_keeps_its_numbers():
    words = Vocabulary()
    assert split("Man's 2nd BOX, größe") == ["man's", "2nd", "box", "gr", "e"]
    assert words.grow(["red box", "a BOX"]) == 3
    before = words.encode(["red box"], 4)
    assert words.grow(["new red"]) == 1
    assert torch.equal(words.encode(["red box"], 4), before)
    assert words.encode(["new never"], 3).tolist() == [[5, UNKNOWN, PADDING]]
    assert Vocabulary(words.words).encode(["box new"], 2).tolist() == words.encode(["box new"], 2).tolist()
    with pytest.raises(ValueError, match="has no word"):
        words.encode(["???"], 3)


def test_shapes_are_all_different_and_told_apart_by_their_captions(shapes):
    assert len(shapes.concepts) == 1296
    assert len({concept.captions[0] for concept in shapes.concepts}) == 1296
    assert len({image.numpy().tobytes() for image in shapes_captions(32).images}) == 2592
    # Later parts have shapes and colours that the first does not have.
    first = {c.category for c, part in zip(shapes.concepts, shapes.parts.tolist(), strict=True) if part == 0}
    assert first == {"circle", "square"}
    assert shapes.fingerprint() == shapes_captions(16).fingerprint()
    assert len(shapes_captions(16, relations=3).concepts) == 1296 + 15


def test_batches_have_distinct_concepts_follow_from_the_step_and_differ_by_seed(stream):
    for step in (0, 7, 40):
        batch = stream.batch(3, 2, step)
        assert len(batch.concepts.unique()) == 32
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (32, 3, 16, 16)
        assert same(batch, PairStream(stream.pairs, stream.config).batch(3, 2, step))
    assert not torch.equal(stream.batch(3, 2, 0).concepts, stream.batch(4, 2, 0).concepts)
    # One pass sees every concept once.
    size = len(stream.concepts("train", 0))
    seen = torch.cat([stream.batch(0, 0, step).concepts for step in range(size // 32)])
    assert len(seen.unique()) == len(seen) == size // 32 * 32


@pytest.mark.parametrize("regime", ["cumulative", "incremental", "incremental+replay"])
def test_regimes_draw_from_the_right_parts(shapes, regime):
    stream = PairStream(shapes, StreamConfig(batch=32, text_length=8, regime=regime, memory=40))
    parts = torch.cat([shapes.parts[stream.batch(0, 2, step).concepts] for step in range(12)])
    old = float((parts < 2).double().mean())
    assert parts.max() == 2
    assert (old == 0) if regime == "incremental" else (old == 0.5) if "+" in regime else 0.4 < old < 0.8
    if "+" in regime:
        kept = [stream.memory(0, part) for part in range(3)]
        assert [len(found) for found in kept] == [40, 40, 40]
        new = torch.isin(kept[1], stream.concepts("train", 1, 1))
        assert torch.isin(kept[1][~new], kept[0]).all()  # nothing that was thrown away comes back
        assert 5 < int(new.sum()) < 35


def test_captions_follow_the_mixture(shapes):
    def drawn(**mixture: float) -> list[set[str]]:
        rest = dict.fromkeys((f.name for f in dataclasses.fields(Mixture)), 0.0)
        stream = PairStream(shapes, StreamConfig(batch=200, text_length=24, mixture=Mixture(**rest | mixture)))
        batch = stream.batch(0, 4, 0)
        words = [{stream.words.words[t - 2] for t in row if t > 1} for row in batch.tokens.tolist()]
        assert ((batch.tokens == PADDING).to(torch.int8).diff(dim=1) >= 0).all()  # no gaps
        told = [shapes.concepts[index] for index in batch.concepts.tolist()]
        return [own - set(split(" ".join(c.captions))) for own, c in zip(words, told, strict=True)]

    assert not any(drawn(caption=1.0))
    extra = drawn(caption_and_tags=1.0)
    assert 0.5 < sum(map(bool, extra)) / 200 <= 1
    only = drawn(tags=1.0)
    assert all(len(words) <= 4 for words in only)
    with pytest.raises(ValueError, match="sum to 1"):
        Mixture(caption=1.0)


def test_words_of_later_parts_are_unknown_until_they_come(stream):
    ring = next(index for index, c in enumerate(stream.pairs.concepts) if c.category == "ring")
    before, after = (stream.captions.labels(torch.tensor([ring]), stream.vocabularies[part]) for part in (0, 4))
    assert (before == UNKNOWN).any()
    assert not (after == UNKNOWN).any()
    assert (before[after != PADDING] != PADDING).all()


def test_augmentation_moves_and_lights_images_a_little(shapes):
    images = shapes.images[:64]
    middle = torch.full((64, 3), 0.5)
    assert torch.equal(augmented(images, middle), images)
    moved = augmented(images, torch.tensor([[0.0, 0.99, 0.5]]).expand(64, 3))
    assert torch.equal(moved[:, :, 1:, :-1], images[:, :, :-1, 1:])  # content is moved by one pixel down and left
    darker = augmented(images, torch.tensor([[0.5, 0.5, 0.0]]).expand(64, 3))
    assert torch.equal(darker, (images.float() * 0.9).round().to(torch.uint8))


def test_proxy_batches_are_the_same_for_every_candidate(stream):
    first, again, other = (list(stream.proxy_batches(1, repeat, 2)) for repeat in (0, 0, 1))
    assert all(map(same, first, again))
    assert not same(first[0], other[0])
    assert not torch.equal(first[0].concepts, first[1].concepts)
    assert shapes_parts(stream, first[0]) == {0, 1}


def shapes_parts(stream: PairStream, batch: PairBatch) -> set[int]:
    return set(stream.pairs.parts[batch.concepts].tolist())


def test_bad_collections_and_settings_are_refused_in_a_sentence(shapes):
    for change, words in (
        ({"batch": 1}, "batch must be at least 2"),
        ({"regime": "replay"}, "unknown regime"),
        ({"held_out": 1.0}, "held_out must be between"),
        ({"replay_ratio": 0.0}, "replay_ratio"),
    ):
        with pytest.raises(ValueError, match=words):
            StreamConfig(**change)
    with pytest.raises(ValueError, match="make no 2000 parts"):
        shapes.in_parts(2000)
    with pytest.raises(ValueError, match="too few concepts"):
        PairStream(shapes.limited(3), StreamConfig())
    assert len(PairStream(shapes.limited(4), StreamConfig()).concepts("held_out", 4)) == 10  # two of each, to match
    blank = dataclasses.replace(shapes.concepts[0], captions=("!",))
    with pytest.raises(ValueError, match="caption of 'shapes-captions' is empty"):
        dataclasses.replace(shapes, concepts=[blank, *shapes.concepts[1:]])


def test_recall_counts_ties_against_the_encoder():
    line = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert evaluation.ranks(line, line).tolist() == [0] * 6
    twice = torch.cat([line, line[:1]])  # the first and the last cannot be told apart
    assert evaluation.ranks(twice, twice).tolist() == [1, 0, 0, 0, 0, 0, 1]
    collapsed = line[:1].repeat(37, 1)  # a network that gives everything the same embedding finds nothing
    assert evaluation.ranks(collapsed, collapsed).tolist() == [36] * 37
    swapped = line[[1, 0, 2, 3, 4, 5]]
    assert (evaluation.ranks(line, swapped) > 0).tolist() == [True, True, False, False, False, False]
