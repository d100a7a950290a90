"""Problems and their streams: what changes, what stays, and that nothing depends on how much was drawn."""

from __future__ import annotations

import dataclasses
import gzip

import numpy as np
import pytest
import torch

from plasticity.problems import datasets
from plasticity.problems.changes import (
    Alternating,
    ClassPairs,
    Constant,
    Content,
    FlippingBits,
    Growing,
    Permuted,
    Pool,
    Redrawn,
    Renamed,
    Shuffled,
)
from plasticity.problems.published import PROBLEMS, SMALL, Problem
from plasticity.problems.streams import BitStream, generator, open_stream

CPU = torch.device("cpu")
TOY = Problem(data="blobs", change=Redrawn(), tasks=3, steps=7, batch_size=4, examples=30)


def contents(change, tasks=4, seed=0) -> list[Content]:
    labels = torch.arange(40) % 10
    pool = Pool(labels, labels[:20], 16, 10)
    return [change.content(task, pool, lambda k: generator(CPU, seed, "content", k)) for task in range(tasks)]


def test_shuffle_keeps_counts_rename_keeps_the_partition_redraw_keeps_neither():
    true = torch.arange(40) % 10
    for content in contents(Shuffled()):
        assert content.labels.bincount(minlength=10).tolist() == [4] * 10
        assert not torch.equal(content.labels, true)
    for content in contents(Renamed()):
        names = torch.stack([content.labels[true == c] for c in range(10)])
        assert (names == names[:, :1]).all()  # one new name a class
        assert names[:, 0].sort().values.tolist() == list(range(10))
    counts = torch.stack([content.labels.bincount(minlength=10) for content in contents(Redrawn())])
    assert (counts != 4).any(1).all()
    assert all(content.test_labels is None for content in contents(Redrawn()))


def test_permutations_compose_or_are_independent():
    own = [content.permutation for content in contents(Permuted())]
    composed = [content.permutation for content in contents(Permuted(composed=True))]
    assert torch.equal(own[0], composed[0])
    assert torch.equal(composed[1], composed[0][own[1]])
    assert torch.equal(composed[2], composed[0][own[1]][own[2]])
    assert all(p.sort().values.tolist() == list(range(16)) for p in own + composed)
    unpermuted = [content.permutation for content in contents(Permuted(first_unpermuted=True))]
    assert torch.equal(unpermuted[0], torch.arange(16))
    assert torch.equal(unpermuted[1], own[1])


def test_class_pairs_use_every_class_once_before_any_twice():
    found = contents(ClassPairs(), tasks=10)
    true = torch.arange(40) % 10
    classes = [set(true[content.rows].tolist()) for content in found]
    assert all(len(pair) == 2 for pair in classes)
    assert set.union(*classes[:5]) == set.union(*classes[5:]) == set(range(10))
    for content in found:
        assert set(content.labels[content.rows].tolist()) == {0, 1}
        assert (content.test_labels >= 0).sum() == 4


def test_alternating_and_growing_tasks():
    true = torch.arange(40) % 10
    sets = [set(true[c.rows].tolist()) for c in contents(Alternating(3, 1), tasks=4)]
    assert [len(s) for s in sets] == [3, 1, 3, 1]
    assert len(set.union(*sets)) == 8  # disjoint
    assert [Alternating(3, 1).is_measured(t) for t in range(3)] == [True, False, True]
    with pytest.raises(ValueError, match="10 classes are used up before task 4"):
        contents(Alternating(3, 1), tasks=5)
    grown = [set(true[c.rows].tolist()) for c in contents(Growing(3), tasks=4)]
    assert [len(s) for s in grown] == [3, 6, 9, 10]
    assert grown[0] < grown[1] < grown[2]


def test_a_stationary_twin_repeats_the_first_task():
    first, second = contents(Constant(Permuted()), tasks=2)
    assert torch.equal(first.permutation, second.permutation)
    stream = open_stream(TOY.stationary(), [0], CPU)
    tasks = [stream.task(k) for k in range(2)]
    assert torch.equal(tasks[0].labels, tasks[1].labels)
    assert not torch.equal(tasks[0].order, tasks[1].order)


@pytest.mark.parametrize("change", [Permuted(), Redrawn(), Shuffled(), ClassPairs(), Growing(2)])
def test_a_member_sees_the_same_alone_in_company_and_in_any_order(change):
    problem = dataclasses.replace(TOY, change=change, outputs=10, examples=None)
    together, alone = open_stream(problem, [4, 9, 2], CPU), open_stream(problem, [9], CPU)
    for task in (2, 0):
        x, y = together.task(task).batches(0, 7)
        own_x, own_y = alone.task(task).batches(0, 7)
        assert torch.equal(x[1], own_x[0])
        assert torch.equal(y[1], own_y[0])
        later_x, later_y = together.task(task).batches(5, 7)
        assert torch.equal(later_x, x[:, 5:])
        assert torch.equal(later_y, y[:, 5:])
        assert not torch.equal(x[0], x[1])


def test_passes_show_each_image_once_and_keep_the_last_incomplete_batch():
    problem = dataclasses.replace(TOY, change=Constant(), steps=15, batch_size=4, examples=30)
    order = open_stream(problem, [0], CPU).task(0).order[0].flatten()
    assert order[:30].sort().values.tolist() == list(range(30))
    assert order[30:].sort().values.tolist() == list(range(30))
    drawn = open_stream(dataclasses.replace(problem, with_replacement=True), [0], CPU).task(0).order
    assert len(drawn[0].flatten()[:30].unique()) < 30


def test_pixels_are_scaled_and_permuted():
    problem = dataclasses.replace(TOY, change=Permuted(), centred=True, examples=None)
    stream = open_stream(problem, [0], CPU)
    task = stream.task(1)
    x, y = task.batches(0, 1)
    row = task.order[0, 0, 0]
    image = stream.images[stream.pool_rows(row.view(1, 1))].flatten()
    torch.testing.assert_close(x[0, 0, 0].flatten(), image[task.permutation[0]] / 255 * 2 - 1)
    assert y[0, 0, 0] == task.labels[0, row]
    tested, labels = task.test()
    assert tested.shape == (1, 100, 1, 8, 8)
    assert labels.shape == (1, 100)


def test_the_target_of_slow_regression():
    """By hand: a threshold unit fires where its weighted bits exceed 0.7 * 21 minus its negative weights."""
    problem = dataclasses.replace(PROBLEMS["slow-regression"], tasks=4, steps=50)
    stream = open_stream(problem, [3, 5], CPU)
    assert isinstance(stream, BitStream)
    x, y = stream.task(2).batches(0, 50)
    assert x.shape == (2, 50, 1, 20)
    assert y.shape == (2, 50, 1, 1)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    bits = np.append(x[1, 7, 0].numpy(), 1.0)
    expected = stream._constant[1, 0].item()
    for unit in range(100):
        weights = stream._inner[1, unit].numpy()
        fires = float(bits @ weights > 0.7 * 21 - (weights < 0).sum())
        expected += fires * stream._outer[1, unit].item()
    assert y[1, 7, 0, 0].item() == pytest.approx(expected)
    slow = torch.stack([stream.slow_bits(3, task) for task in range(4)])
    assert (slow[1:] != slow[:-1]).sum(1).tolist() == [1, 1, 1]
    assert (x[0, :, 0, :15] == slow[2]).all()
    held = open_stream(problem.stationary(), [3], CPU)
    assert torch.equal(held.slow_bits(3, 3), slow[0])
    redrawn = open_stream(dataclasses.replace(problem, change=FlippingBits(all_bits=True)), [3], CPU)
    assert (redrawn.slow_bits(3, 1) != slow[0]).sum() > 1


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_has_a_small_setting_and_opens_where_its_data_is(name):
    problem = dataclasses.replace(PROBLEMS[name], **SMALL[name])
    try:
        stream = open_stream(problem, [0], CPU)
    except datasets.DataMissing as missing:
        assert "not on this machine" in str(missing)  # noqa: PT017
        return
    x, y = stream.task(problem.tasks - 1).batches(0, 2)
    assert x.shape[:3] == (1, 2, problem.batch_size)
    assert y.shape[:3] == (1, 2, problem.batch_size)


def test_bad_problems_are_refused():
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        dataclasses.replace(TOY, tasks=0)
    with pytest.raises(ValueError, match="400 images, the problem wants 500"):
        open_stream(dataclasses.replace(TOY, examples=500), [0], CPU)
    with pytest.raises(ValueError, match="as many outputs, got 3"):
        open_stream(dataclasses.replace(TOY, outputs=3), [0], CPU)
    with pytest.raises(ValueError, match="goes with the change FlippingBits"):
        open_stream(dataclasses.replace(TOY, data="bits"), [0], CPU)
    with pytest.raises(ValueError, match="unknown data set 'digit'"):
        open_stream(dataclasses.replace(TOY, data="digit"), [0], CPU)


def test_data_sets_from_a_folder(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)

    def idx(array: np.ndarray) -> bytes:
        return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()

    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    found = datasets.load("mnist", tmp_path)
    assert found.train_images.shape == (6, 1, 28, 28)
    assert torch.equal(found.train_images[:, 0], torch.from_numpy(images))
    assert found.test_labels.tolist() == list(range(6))
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)[:-1]))
    with pytest.raises(ValueError, match="is cut off: it has 5 of 6 bytes"):
        datasets.load("mnist", tmp_path)
    with pytest.raises(datasets.DataMissing, match="cifar-10-batches-py"):
        datasets.load("cifar10", tmp_path)


def test_digits_are_split_evenly_and_known_by_their_fingerprint():
    found = datasets.load("digits")
    assert len(found.train_labels) + len(found.test_labels) == 1797
    assert found.test_labels.bincount().tolist() == [40] * 10
    assert found.train_images.max() == found.levels == 16
    assert found.fingerprint() == datasets.load("digits").fingerprint()
    assert found.fingerprint() != datasets.load("blobs").fingerprint()
