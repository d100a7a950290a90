"""Streams of tasks: what each task has, that nothing is lost, and that members do not depend on one another."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from continual import datasets
from continual.streams import KINDS, TaskStream
from plasticity.problems.datasets import Images

CPU = torch.device("cpu")
BLOBS = datasets.load("blobs")


def all_samples(stream: TaskStream, index: int, source="task"):
    images, labels = stream.batches(index, 0, stream.steps(index, source), source)
    return images.flatten(1, 2), labels.flatten(1, 2)


def rows(images: torch.Tensor, data: Images = BLOBS) -> list[int]:
    """Which training images these are, [N, ...]."""
    known = {bytes(image.numpy().tobytes()): row for row, image in enumerate(data.train_images)}
    return [known[image.numpy().tobytes()] for image in images]


def test_one_pass_shows_every_training_sample_once_with_its_label():
    stream = TaskStream(BLOBS, [3, 4], tasks=5, batch=10)
    for member in range(2):
        seen = list(
            itertools.chain.from_iterable(rows(all_samples(stream, index)[0][member]) for index in range(stream.tasks))
        )
        assert sorted(seen) == list(range(400))
    images, labels = all_samples(stream, 2)
    assert torch.equal(labels[1], BLOBS.train_labels[torch.tensor(rows(images[1]))])
    assert sorted(labels[1].unique().tolist()) == sorted(stream.class_order[1, 4:6].tolist())
    assert stream.dropped == 0
    odd = TaskStream(BLOBS, [3], tasks=5, batch=7)
    assert odd.dropped == 5 * (80 % 7)
    assert odd.steps(0) == 80 // 7


def test_classes_are_in_an_order_of_each_seed_and_of_all_if_it_is_given():
    stream = TaskStream(BLOBS, [0, 1, 2], tasks=5)
    assert len({tuple(order) for order in stream.class_order.tolist()}) == 3
    assert torch.equal(TaskStream(BLOBS, [1], tasks=5).class_order[0], stream.class_order[1])
    given = TaskStream(BLOBS, [0, 1], tasks=5, class_order=list(range(9, -1, -1)))
    assert given.task(0).outputs.nonzero()[:, 1].view(2, 2).tolist() == [[8, 9], [8, 9]]
    uneven = dataclasses.replace(BLOBS, train_images=BLOBS.train_images[1:], train_labels=BLOBS.train_labels[1:])
    assert len({tuple(order) for order in TaskStream(uneven, [0, 1, 2], tasks=5).class_order.tolist()}) == 1


def test_a_member_sees_what_it_would_see_alone():
    three, one = TaskStream(BLOBS, [5, 6, 7], tasks=2), TaskStream(BLOBS, [6], tasks=2)
    for index, source in itertools.product(range(2), ("task", "seen", "all")):
        together, alone = all_samples(three, index, source), all_samples(one, index, source)
        assert torch.equal(together[0][1], alone[0][0])
        assert torch.equal(together[1][1], alone[1][0])


def test_batches_do_not_depend_on_how_many_are_asked_for():
    stream = TaskStream(BLOBS, [1], tasks=5, epochs=3)
    whole = stream.batches(1, 0, 24)[0]
    parts = [stream.batches(1, start, min(start + 5, 24))[0] for start in range(0, 24, 5)]
    assert torch.equal(torch.cat(parts, 1), whole)
    passes = [sorted(rows(part.flatten(0, 2)[:80])) for part in whole.split(8, 1)]
    assert passes[0] == passes[1] == passes[2]
    assert not torch.equal(whole[:, :8], whole[:, 8:16])  # another order


def test_seen_is_all_so_far_and_all_is_one_shuffled_pass_over_everything():
    stream = TaskStream(BLOBS, [1], tasks=5)
    assert sorted(rows(all_samples(stream, 1, "seen")[0][0])) == sorted(
        itertools.chain.from_iterable(rows(all_samples(stream, index)[0][0]) for index in range(2))
    )
    parts = [rows(all_samples(stream, index, "all")[0][0]) for index in range(5)]
    assert sorted(itertools.chain.from_iterable(parts)) == list(range(400))
    assert len(BLOBS.train_labels[torch.tensor(parts[0])].unique()) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_a_split(kind):
    stream = TaskStream(BLOBS, [4, 5], tasks=5, kind=kind)
    assert stream.outputs == (2 if kind == "domain" else 10)
    labels = [all_samples(stream, index)[1][0] for index in range(5)]
    if kind == "domain":
        assert all(set(own.tolist()) == {0, 1} for own in labels)
        assert stream.task(3).outputs.all()
    else:
        assert len(torch.cat(labels).unique()) == 10
        assert stream.task(1).outputs[0].nonzero().flatten().tolist() == labels[1].unique().tolist()
    assert (stream.scopes is None) == (kind != "task")
    if stream.scopes is not None:
        own = int(labels[2][0])
        assert stream.scopes[0, own].nonzero().flatten().tolist() == labels[2].unique().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_of_different_numbers_of_classes(kind):
    stream = TaskStream(BLOBS, [4, 5], tasks=3, kind=kind, class_groups=[2, 5, 3])
    assert stream.class_order[0].tolist() == stream.class_order[1].tolist() != list(range(10))
    assert [stream.steps(index) for index in range(3)] == [8, 20, 12]
    assert stream.outputs == (5 if kind == "domain" else 10)
    for index, (first, count) in enumerate(((0, 2), (2, 5), (7, 3))):
        images, labels = all_samples(stream, index)
        there = sorted(set(BLOBS.train_labels[torch.tensor(rows(images[0]))].tolist()))
        assert there == sorted(stream.class_order[0, first : first + count].tolist())
        assert labels.unique().tolist() == (list(range(count)) if kind == "domain" else there)
        own = stream.task(index).outputs[0]
        assert int(own.sum()) == (5 if kind == "domain" else count)
        assert own[labels].all()
        if stream.scopes is not None:
            assert torch.equal(stream.scopes[0, there[0]], own)


def test_groups_of_the_data_are_tasks_in_their_order():
    grouped = dataclasses.replace(BLOBS, groups=(4, 6))
    assert TaskStream(grouped, [0, 1], tasks=2).class_order.tolist() == [list(range(10))] * 2
    assert TaskStream(grouped, [0], tasks=2).class_groups == (4, 6)
    assert TaskStream(grouped, [0], tasks=2, class_groups=[5, 5]).class_groups == (5, 5)
    with pytest.raises(ValueError, match="in 2 groups, so there are no 5 tasks"):
        TaskStream(grouped, [0], tasks=5)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_permuted_data(kind):
    stream = TaskStream(BLOBS, [4], tasks=3, kind=kind, change="permuted")
    labels = [all_samples(stream, index)[1][0] for index in range(3)]
    assert stream.outputs == (10 if kind == "domain" else 30)
    first = 0 if kind == "domain" else 20
    assert labels[2].unique().tolist() == list(range(first, first + 10))
    assert stream.test(2)[1].unique().tolist() == labels[2].unique().tolist()


def test_a_permutation_is_the_same_for_all_images_of_a_task_and_another_in_each():
    stream = TaskStream(BLOBS, [4, 5], tasks=2, change="permuted", kind="domain")
    images, _ = all_samples(stream, 0)
    sorted_pixels = {tuple(sorted(image.flatten().tolist())) for image in BLOBS.train_images}
    assert all(tuple(sorted(image.flatten().tolist())) in sorted_pixels for image in images[0, :20])
    first, second = (stream._content[index] for index in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    test = stream.test(1)[0]
    assert torch.equal(test[1, 3].flatten(), BLOBS.test_images[3].flatten()[second[1]])
    seen, _ = all_samples(stream, 1, "seen")  # samples of both tasks, each with its own order of pixels
    undone = [seen[0].flatten(1)[:, order[0].argsort()] for order in (first, second)]
    known = {image.flatten().numpy().tobytes() for image in BLOBS.train_images}
    matches = [sum(row.numpy().tobytes() in known for row in images) for images in undone]
    assert matches == [400, 400]


def test_rotated_images_are_turned_by_the_angle_of_their_task():
    stream = TaskStream(BLOBS, [4], tasks=2, change="rotated", kind="domain")
    assert 0 <= float(stream._content[0]) < 180
    stream._content[1] = torch.full((1, 1), 90.0)
    turned = stream.test(1)[0][0]
    expected = torch.rot90(BLOBS.test_images, 1, (2, 3))
    assert (turned.int() - expected.int()).abs().max() <= 1


def test_blurry_boundaries_exchange_a_part_and_lose_nothing():
    stream = TaskStream(BLOBS, [1, 2], tasks=5, blurry=0.25)
    foreign = []
    seen = []
    for index in range(5):
        images, labels = all_samples(stream, index)
        seen += rows(images[0])
        own = stream.task(index).outputs[0][labels[0]]
        foreign.append(1 - own.float().mean().item())
    assert sorted(seen) == list(range(400))
    assert sum(foreign) / 5 == pytest.approx(0.25 * 4 / 5, abs=0.05)  # a fifth of what is exchanged comes back
    assert torch.equal(stream.test(0)[1], TaskStream(BLOBS, [1, 2], tasks=5).test(0)[1])


def test_what_does_not_fit_together_is_said_in_a_sentence():
    cases = {
        "10 classes do not divide into 3 tasks; choose 1, 2, 5 or 10": {"tasks": 3},
        "a task has 80 training samples, too few for a batch of 81": {"batch": 81},
        "unknown kind 'classes'": {"kind": "classes"},
        "unknown change 'mixed'": {"change": "mixed"},
        "class_order must hold each of 0 .. 9 once": {"class_order": [0, 1]},
        "blurry must be in [0, 1)": {"blurry": 1.0},
        "epochs must be at least 1": {"epochs": 0},
        "class_groups must share out 10 classes, got [3, 3]": {"tasks": 2, "class_groups": [3, 3]},
        "the classes of 'blobs' are in 2 groups, so there are no 5 tasks": {"tasks": 5, "class_groups": [3, 7]},
        "class_groups are of split data": {"class_groups": [5, 5], "change": "permuted"},
    }
    for sentence, settings in cases.items():
        with pytest.raises(ValueError) as error:
            TaskStream(BLOBS, [0], **settings)
        assert str(error.value).startswith(sentence)


def test_data_of_ones_own():
    x, y = torch.rand(20, 7), torch.arange(20) % 2
    own = datasets.from_tensors((x, y), (x[:4], y[:4]))
    stream = TaskStream(own, [0], tasks=2, batch=5)
    images, labels = all_samples(stream, 0)
    assert images.shape == (1, 10, 7)
    assert len(labels.unique()) == 1
    pairs = torch.utils.data.TensorDataset(x, y)
    read = datasets.from_datasets(pairs, pairs)
    assert torch.equal(read.train_images, x)
    bad = {
        "must be 0 .. C - 1": ((x, y + 1), (x, y + 1)),
        "class 2 of 'tensors' is only in one": ((x, torch.arange(20) % 3), (x, y)),
        "must be whole numbers": ((x, y.float()), (x, y)),
        "as many labels as inputs": ((x, y[:3]), (x, y)),
        "differ in shape or type": ((x, y), (x[:, :2], y)),
    }
    for sentence, parts in bad.items():
        with pytest.raises(ValueError, match=sentence):
            datasets.from_tensors(*parts)


def test_a_subset_takes_the_first_of_each_class():
    few = datasets.subset(BLOBS, 3, 2)
    assert few.train_labels.bincount().tolist() == [3] * 10
    assert few.test_labels.bincount().tolist() == [2] * 10
    first = (BLOBS.train_labels == 4).nonzero().flatten()[:3]
    assert torch.equal(few.train_images[few.train_labels == 4], BLOBS.train_images[first])
    with pytest.raises(ValueError, match="class 0 has 40, not 41"):
        datasets.subset(BLOBS, 41, None)


@pytest.mark.parametrize("name", [*datasets.LOADERS, "cifar100", "mnist"])
def test_missing_data_says_how_to_place_it(name, tmp_path):
    with pytest.raises(ValueError, match=f"'{name}' is not on this machine: (put|save)"):
        datasets.load(name, tmp_path)


def test_pictures_are_read_from_an_archive_and_from_its_folder(tmp_path, monkeypatch):
    import tarfile

    from PIL import Image

    monkeypatch.setenv(datasets.CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = tmp_path / "cifar10-jpeg"
    for part, label, shade in itertools.product(("train", "test"), ("bird", "airplane"), (40, 200)):
        (folder / part / label).mkdir(parents=True, exist_ok=True)
        grey = shade if label == "bird" else shade + 20
        Image.new("RGB", (32, 32), (grey,) * 3).save(folder / part / label / f"{shade:04}.jpg")
    unpacked = datasets.load("cifar10-jpeg", tmp_path)
    with tarfile.open(tmp_path / "cifar10-jpeg.tar.xz", "w:xz") as archive:
        for part in ("test", "train"):
            archive.add(folder / part, part)
    for _ in range(2):  # decoded, then from the cache
        packed = datasets.load("cifar10-jpeg", tmp_path)
        assert packed.fingerprint() == unpacked.fingerprint()
    assert packed.train_labels.tolist() == [0, 0, 1, 1]
    assert packed.train_images[:, 0, 0, 0].tolist() == pytest.approx([60, 220, 40, 200], abs=2)
    assert (tmp_path / "cache").is_dir()


def test_alphabets_of_omniglot_are_tasks(tmp_path, monkeypatch):
    import io
    import zipfile

    from PIL import Image

    monkeypatch.setenv(datasets.CACHE_VARIABLE, str(tmp_path / "cache"))
    alphabets = {1: {"Greek": 2, "Latin": 3}, 2: {"Greek": 2, "Korean": 1}}
    (tmp_path / "python").mkdir()
    for number, own in alphabets.items():
        name = f"images_background_small{number}"
        with zipfile.ZipFile(tmp_path / "python" / f"{name}.zip", "w") as files:
            for alphabet, character in ((a, c) for a, count in own.items() for c in range(count)):
                for drawing in range(8):
                    ink = io.BytesIO()
                    picture = Image.new("1", (105, 105), 1)
                    picture.paste(0, (0, 0, 105, 15 * (character + 1) + drawing))
                    picture.save(ink, "PNG")
                    path = f"{name}/{alphabet}/character{character + 1:02}/{drawing:04}.png"
                    files.writestr(path, ink.getvalue())
    found = datasets.load("omniglot", tmp_path)
    assert found.groups == (2, 1, 3)  # Greek, Korean, Latin
    assert found.train_labels.bincount().tolist() == [3] * 6
    assert found.test_labels.bincount().tolist() == [5] * 6
    assert found.train_images.shape[1:] == (1, 28, 28)
    rows_of_ink = [(found.train_images[found.train_labels == label] > 127)[:, 0, :, 0].sum(1) for label in range(6)]
    thickness = [float(rows.float().mean()) * 105 / 28 for rows in rows_of_ink]
    assert [round((height - 3) / 15) for height in thickness] == [1, 2, 1, 1, 2, 3]
    assert datasets.load("omniglot", tmp_path).fingerprint() == found.fingerprint()
    assert TaskStream(found, [0, 1], tasks=3, batch=3, kind="task").steps(2) == 3
