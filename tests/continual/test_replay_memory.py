"""Memories: which samples are kept, that they are kept unharmed, and how they are drawn."""

from __future__ import annotations

import pytest
import torch

from continual.inputs import Inputs
from continual.memory import Batch, Memory, distinct
from plasticity.population import RandomStream

CPU = torch.device("cpu")


def random(members: int, seed: int = 0) -> RandomStream:
    return RandomStream([torch.Generator().manual_seed(1000 * seed + k) for k in range(members)])


def batch(numbers: torch.Tensor, labels: torch.Tensor) -> Batch:
    """Samples whose every pixel says which sample it is. numbers, labels [K, B]."""
    images = numbers.unsqueeze(2).expand(-1, -1, 3).to(torch.int16)
    return Batch(images, labels, images.float(), labels, {})


def filled(policy, capacity, labels, members=1, size=10, seed=0, classes=4) -> Memory:
    """A memory that was offered samples 0, 1, ... with these labels, `size` at a time."""
    memory = Memory(capacity, policy, members, classes, Inputs(1), random(members, seed))
    numbers = torch.arange(len(labels))
    for part in range(0, len(labels), size):
        own = numbers[part : part + size].expand(members, -1), labels[part : part + size].expand(members, -1)
        memory.insert(batch(*own), number=own[0])
    return memory


def test_reservoir_keeps_every_sample_with_the_same_probability():
    """200 samples, 20 kept, 4000 members: each of the first 20 survives with 0.1 ± 0.015 (frozen indices: 0.075)."""
    memory = filled("reservoir", 20, torch.zeros(200, dtype=torch.int64), members=4000)
    kept = memory.columns["images"][:, :, 0].long()
    share = torch.zeros(200).scatter_add_(0, kept.flatten(), torch.ones(kept.numel())) / 4000
    assert kept.sort(1).values.diff(dim=1).min() > 0  # no sample twice
    assert (share[:20] - 0.1).abs().max() < 0.015
    assert (share - 0.1).abs().max() < 0.02
    assert abs(float(share[:20].mean()) - 0.1) < 0.004


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced", "ring"])
def test_label_and_everything_else_stay_with_their_image(policy):
    labels = torch.randint(4, (300,), generator=torch.Generator().manual_seed(1))
    memory = filled(policy, 40, labels, members=3)
    drawn = memory.sample(25)
    number = drawn.images[:, :, 0].long()
    assert torch.equal(drawn.labels, labels[number])
    assert torch.equal(drawn.kept["number"], number)
    assert (drawn.images == drawn.images[:, :, :1]).all()
    assert all(len(set(row.tolist())) == 25 for row in number)  # different samples
    assert not torch.equal(number[0], number[1])  # members draw for themselves


def test_class_balanced_keeps_classes_equal_where_the_stream_is_not():
    labels = torch.cat([torch.zeros(500), torch.ones(60), torch.full((30,), 2), torch.full((3,), 3)]).long()
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))]
    counts = filled("class-balanced", 40, shuffled, members=20).columns["labels"]
    per_class = torch.stack([(counts == c).sum(1) for c in range(4)], 1)
    assert per_class.sum(1).eq(40).all()
    assert per_class[:, 3].eq(3).all()  # all there were
    assert (per_class[:, :3].amax(1) - per_class[:, :3].amin(1)).max() <= 2


def test_class_balanced_is_a_reservoir_within_the_largest_class():
    kept = filled("class-balanced", 10, torch.zeros(100, dtype=torch.int64), members=3000).columns["images"][:, :, 0]
    share = torch.zeros(100).scatter_add_(0, kept.long().flatten(), torch.ones(kept.numel())) / 3000
    assert (share - 0.1).abs().max() < 0.025


def test_ring_keeps_the_last_of_each_class():
    labels = torch.tensor([0, 0, 1, 0, 0, 0, 1, 2, 0, 1, 1, 1])
    memory = filled("ring", 8, labels, size=5)  # two of each of four classes
    kept = {(int(y), int(x[0])) for x, y in zip(memory.columns["images"][0], memory.columns["labels"][0], strict=True)}
    assert kept == {(0, 5), (0, 8), (1, 10), (1, 11), (2, 7), (0, 0)}  # (0, 0): slots that nothing was put into
    drawn = memory.sample(5)
    assert sorted(drawn.images[0, :, 0].tolist()) == [5, 7, 8, 10, 11]
    assert sorted(set(memory.sample(7).images[0, :, 0].tolist())) == [5, 7, 8, 10, 11]  # asked for more: some twice


def test_a_memory_that_holds_less_than_is_asked_for_gives_what_it_has():
    memory = filled("reservoir", 20, torch.zeros(7, dtype=torch.int64), size=7)
    assert sorted(memory.sample(10).images[0, :, 0].tolist()) == list(range(7))


def test_a_memory_without_room_stays_empty():
    memory = filled("reservoir", 0, torch.zeros(30, dtype=torch.int64))
    assert memory.empty
    assert memory.nbytes <= 3 * 2 + 2 * 8  # the row that is of no use


def test_a_memory_smaller_than_the_classes_is_refused_where_each_has_its_part():
    for policy in ("ring", "class-balanced"):
        with pytest.raises(ValueError, match="smaller than the 4 classes"):
            Memory(3, policy, 1, 4, Inputs(1), random(1))
    with pytest.raises(ValueError, match="must not be negative"):
        Memory(-1, "reservoir", 1, 4, Inputs(1), random(1))


def test_subsets_are_uniform():
    """Of all 10 pairs below 5 each comes with 0.1, in either order of drawing."""
    numbers = torch.rand(50_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = distinct(numbers, 5).sort(1).values
    counts = (pairs[:, 0] * 5 + pairs[:, 1]).bincount(minlength=25).float() / 50_000
    assert counts[counts > 0].numel() == 10
    assert (counts[counts > 0] - 0.1).abs().max() < 0.006
    assert torch.equal(distinct(numbers[:9], 2).sort(1).values, torch.tensor([[0, 1]]).expand(9, -1))


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced", "ring"])
def test_a_member_is_what_it_would_be_alone_and_goes_on_from_its_state(policy):
    labels = torch.randint(4, (230,), generator=torch.Generator().manual_seed(3))
    both, alone = filled(policy, 24, labels, members=2), filled(policy, 24, labels, members=1)
    again = filled(policy, 24, labels[:90], members=2)
    other = Memory(24, policy, 2, 4, Inputs(1), random(2, seed=9))
    for _ in range(2):
        again.sample(6)
    other.load_state_dict(again.state_dict())
    drawn = [memory.sample(6).images for memory in (both, alone, again, other)]
    assert torch.equal(drawn[0][:1], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    for memory in (again, other):
        memory.insert(
            batch(torch.arange(300, 310).expand(2, -1), labels[:10].expand(2, -1)),
            number=torch.ones(2, 10, dtype=torch.int64),
        )
    assert torch.equal(again.columns["images"], other.columns["images"])
    assert torch.equal(again.sample(6).images, other.sample(6).images)
