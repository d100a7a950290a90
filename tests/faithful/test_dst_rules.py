"""Allocation, pruning and growth of sparse masks by hand (specs/dynamic-sparse-training.md, section 15, 1 to 4, 7)."""

from __future__ import annotations

import math

import pytest
import torch

from continual.networks.classifier import NETWORKS
from continual.sparse.allocation import densities, erk
from continual.sparse.masks import lowest, packed, unpacked
from continual.sparse.rules import grown, prune_rate, pruned


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


# Allocation

TOY_NET = [(8, 3, 3, 3), (16, 8, 3, 3), (32, 256), (10, 32)]
LENET = [(300, 784), (100, 300), (10, 100)]


def resnet_shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = NETWORKS["resnet18"]((3, 32, 32), (), 100)
    return {name: tuple(p.shape) for name, p in network.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize(
    ("shapes", "share", "wanted"),
    [
        (TOY_NET, 0.05, (0.103129, 0.034124, 0.046067, 0.171983)),
        (TOY_NET, 0.1, (0.206258, 0.068247, 0.092134, 0.343966)),
        (TOY_NET, 0.2, (323 / 783, 95 / 696, 171 / 928, 399 / 580)),
        (TOY_NET, 0.5, (1, 1835 / 5088, 3303 / 6784, 1)),
        (LENET, 0.05, (0.038484, 0.111334, 0.918507)),
        (LENET, 0.1, (0.079568, 0.230189, 1)),
        (LENET, 0.2, (0.162241, 0.469362, 1)),
        (LENET, 1.0, (1, 1, 1)),
    ],
)
def test_1_erk_by_the_table(shapes, share, wanted):
    found = erk(shapes, share)
    assert found == pytest.approx(wanted, abs=1e-6)
    sizes = [math.prod(shape) for shape in shapes]
    assert sum(d * n for d, n in zip(found, sizes, strict=True)) == pytest.approx(share * sum(sizes), rel=1e-9)


@pytest.mark.parametrize(
    ("share", "first", "rest"),
    [
        (0.2, (1, 0.997528, 0.997528, 0.997528, 0.997528), (0.736980, 0.487598, 1, 0.487598, 0.487598)),
        (0.1, (1, 0.457961, 0.457961, 0.457961, 0.457961), (0.338344, 0.223854, 1, 0.223854, 0.223854)),
        (0.05, (0.518546, 0.218928, 0.218928, 0.218928, 0.218928), (0.161745, 0.107013, 1, 0.107013, 0.107013)),
    ],
)
def test_1_erk_of_the_resnet(share, first, rest):
    shapes = resnet_shapes()
    sizes = [math.prod(shape) for shape in shapes.values()]
    assert sum(sizes) == 11_218_112
    found = erk(list(shapes.values()), share)
    assert found[:10] == pytest.approx((*first, *rest), abs=1e-6)
    assert sum(d * n for d, n in zip(found, sizes, strict=True)) == pytest.approx(share * sum(sizes), rel=1e-9)
    dense = {i for i, d in enumerate(found) if d == 1}
    shortcuts = [i for i, shape in enumerate(shapes.values()) if shape[2:] == (1, 1)]
    wanted = {0.2: {0, *shortcuts, 20}, 0.1: {0, *shortcuts[:2], 20}, 0.05: {shortcuts[0]}}[share]
    assert dense == wanted
    last = {0.2: (0.180058, 0.119806, 1), 0.1: (0.082664, 0.055002, 0.740128), 0.05: (0.039517, 0.026294, 0.353818)}
    assert found[15:18] == pytest.approx(last[share], abs=1e-6)
    assert found[20] == pytest.approx({0.2: 1, 0.1: 1, 0.05: 0.719914}[share], abs=1e-6)


def test_1_what_cannot_be_allocated_is_said():
    with pytest.raises(ValueError, match="density must be above 0 and at most 1, got 0"):
        densities("uniform", TOY_NET, 0)
    with pytest.raises(ValueError, match="init must be one of uniform, erk"):
        densities("even", TOY_NET, 0.2)  # type: ignore[arg-type]


def test_packed_masks_come_back():
    drawn = torch.rand(3, 61, generator=torch.Generator().manual_seed(0)) < 0.3
    bits = packed(drawn)
    assert bits.shape == (3, 8)
    assert bits.dtype == torch.uint8
    assert torch.equal(unpacked(bits, 61), drawn)
    assert torch.equal(unpacked(packed(drawn[:, :56]), 56), drawn[:, :56])


# Rules


def test_3_the_rate_falls_along_a_cosine():
    wanted = {0: 0.5, 10: 0.48788649, 25: 0.42750893, 50: 0.2525, 75: 0.07749107, 90: 0.01711351, 100: 0.005}
    assert {s: prune_rate(s, 100, 0.5, 0.005) for s in wanted} == pytest.approx(wanted, abs=1e-8)


ACTIVE = torch.tensor([[True] * 5 + [False] * 5])
TIES = torch.rand(1, 10, generator=torch.Generator().manual_seed(0))
NONE = torch.zeros(1, 10, dtype=torch.bool)


@pytest.mark.parametrize("strict", [False, True])
def test_4_one_prune_step_by_hand(strict):
    weight = row(0.1, -0.2, 0.3, 0.4, -0.5, 0, 0, 0, 0, 0)
    gone = pruned("magnitude", weight, weight, ACTIVE, 0.4, TIES, strict)
    assert gone.nonzero()[:, 1].tolist() == [0, 1]
    left = ACTIVE & ~gone
    come = grown("random", left, gone.sum(1), weight, NONE, NONE, TIES)
    assert int((left | come).sum()) == 5
    assert not (left & come).any()


def test_equal_weights_go_together_only_by_the_strict_threshold():
    weight = row(0.2, 0.2, 0.2, 0.4, 0.5, 0, 0, 0, 0, 0)
    assert int(pruned("magnitude", weight, weight, ACTIVE, 0.4, TIES, True).sum()) == 3
    found = {tuple(pruned("magnitude", weight, weight, ACTIVE, 0.4, ties.view(1, 10)).nonzero()[:, 1].tolist())
             for ties in torch.rand(20, 10, generator=torch.Generator().manual_seed(1))}  # fmt: skip
    assert found == {(0, 1), (0, 2), (1, 2)}


def test_set_prunes_the_smallest_of_each_sign():
    active = torch.tensor([[True] * 6 + [False] * 2])
    weight, ties = row(0.1, 0.5, 0.9, -0.05, -0.3, -0.8, 0, 0), TIES[:, :8]
    assert pruned("set", weight, weight, active, 0.5, ties).nonzero()[:, 1].tolist() == [0, 1, 3]
    short = row(0.1, 0.5, 0.9, 0.2, 0.3, -0.8, 0, 0)  # one negative weight: the positive ones give more
    assert pruned("set", short, short, active, 4 / 6, ties).nonzero()[:, 1].tolist() == [0, 3, 4, 5]
    short = -short
    assert pruned("set", short, short, active, 4 / 6, ties).nonzero()[:, 1].tolist() == [0, 3, 4, 5]


def test_taylor_prunes_what_changes_the_loss_least():
    weight, gradient = row(1, 2, 3, 4, 5, 0, 0, 0, 0, 0), row(5, -4, 0.1, 0.2, -9, 9, 9, 9, 9, 9)
    assert pruned("taylor", weight, gradient, ACTIVE, 0.4, TIES).nonzero()[:, 1].tolist() == [2, 3]


def test_7_gradient_growth_takes_the_largest_that_no_one_owns():
    score = row(9, 9, 9, 9, 9, 0.1, 0.5, 0.9, 0.3, 0.2)
    owned = NONE.clone()
    owned[0, 7] = True
    count = torch.tensor([2])
    assert grown("gradient", ACTIVE, count, score, NONE, owned, TIES).nonzero()[:, 1].tolist() == [6, 8]
    assert grown("momentum", ACTIVE, count, score, NONE, owned, TIES).nonzero()[:, 1].tolist() == [6, 8]
    every = grown("gradient", ACTIVE, torch.tensor([5]), score, NONE, owned, TIES)
    assert every.nonzero()[:, 1].tolist() == [5, 6, 7, 8, 9]
    flat = [
        grown("gradient", ACTIVE, torch.tensor([1]), 0 * score, NONE, NONE, ties.view(1, 10)).nonzero()[0, 1]
        for ties in torch.rand(40, 10, generator=torch.Generator().manual_seed(2))
    ]
    assert {int(place) for place in flat} == {5, 6, 7, 8, 9}  # not the first ones


def test_unfired_growth_takes_the_others_only_when_there_are_too_few():
    fired = NONE.clone()
    fired[0, :8] = True
    for count in (1, 2, 4):
        found = set(grown("unfired", ACTIVE, torch.tensor([count]), TIES, fired, NONE, TIES).nonzero()[:, 1].tolist())
        assert len(found) == count
        assert found <= {8, 9} if count <= 2 else found >= {8, 9}


def test_random_growth_is_uniform():
    ties = torch.rand(4000, 10, generator=torch.Generator().manual_seed(3))
    every = [part.expand(4000, -1) for part in (ACTIVE, NONE)]
    come = grown("random", every[0], torch.full((4000,), 2), ties, every[1], every[1], ties)
    assert come.sum(0)[:5].tolist() == [0] * 5
    assert (come.float().mean(0)[5:] - 0.4).abs().max() < 0.03
    assert torch.equal(come.sum(1), torch.full((4000,), 2))


def test_lowest_breaks_ties_by_their_order():
    scores, ties = row(1, 0, 1, 1), row(0.9, 0.5, 0.1, 0.4)
    assert lowest(scores, torch.tensor([3]), ties).tolist() == [[False, True, True, True]]
    assert lowest(scores, torch.tensor([2])).tolist() == [[True, True, False, False]]
