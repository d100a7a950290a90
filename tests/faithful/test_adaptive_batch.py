"""The faithfulness checks 21-23 of specs/optimizers-and-norms.md: how many samples a gradient needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from plasticity.interventions.adaptive_batch import (
    AdaptiveBatch,
    BatchSize,
    augmented_test,
    coordinate_norm_test,
    inner_product_test,
    micro_batches,
    norm_test,
    per_sample_gradients,
    variance_of_micro_batches,
)
from plasticity.optimisers.adagrad import AdAdaGrad, AdaGrad

FOUR = [torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0], [2.0, -3.0]], dtype=torch.float64)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_21_the_tests_by_hand():
    torch.testing.assert_close(FOUR[0].var(0), torch.tensor([2 / 3, 6.0]).double())
    assert norm_test(FOUR, eta=0.5) == pytest.approx(6.667, abs=1e-3)
    assert inner_product_test(FOUR, theta=0.5) == pytest.approx(0.667, abs=1e-3)
    assert augmented_test(FOUR, theta=0.5, nu=1.0) == pytest.approx(1.5)
    for test, size in (
        (lambda g: norm_test(g, 0.5), 7),
        (lambda g: inner_product_test(g, 0.5), 4),
        (lambda g: augmented_test(g, 0.5, 1.0), 4),
    ):
        assert BatchSize(test, size=4).observe(FOUR) == size


def test_coordinates_without_a_mean_do_not_count():
    g = torch.cat([FOUR[0], FOUR[0][:, :1] * 0.1 + 1], 1)
    assert coordinate_norm_test([g], eta=0.5) == pytest.approx((2 / 3) / (0.25 * 4))
    spread = random(50, 20) + torch.linspace(0.1, 3, 20)
    assert coordinate_norm_test([spread], 0.5, quantile=0.5) < coordinate_norm_test([spread], 0.5)


def test_blocks_are_the_authors_inner_product():
    blocks = [random(8, 3) + 1, random(8, 2, 2, seed=1)]
    mean = torch.cat([b.flatten(1) for b in blocks], 1).mean(0)
    variance = sum((b.flatten(1) @ b.flatten(1).mean(0)).var() for b in blocks)
    torch.testing.assert_close(
        inner_product_test(blocks, 0.5, blockwise=True), variance / (0.25 * mean.square().sum() ** 2)
    )
    assert inner_product_test(blocks, 0.5) != inner_product_test(blocks, 0.5, blockwise=True)


def test_22_variance_of_micro_batches():
    g = random(24, 5)
    micro = g.view(4, 6, 5)
    exact = variance_of_micro_batches(micro.var(1, correction=0), micro.mean(1))
    torch.testing.assert_close(exact, g.var(0, correction=0), rtol=0, atol=1e-12)
    with_ddof = variance_of_micro_batches(micro.var(1), micro.mean(1))
    assert (with_ddof - g.var(0)).abs().min() > 1e-6


def test_23_sizes_never_shrink_and_stay_below_the_largest():
    size = BatchSize(lambda g: norm_test(g, 0.1), size=4, largest=50)
    seen = [size.observe([g]) for g in (random(4, 3) + 4, random(4, 3) + 100, random(4, 3), random(4, 3) + 100)]
    assert seen == sorted(seen)
    assert 4 < seen[0] < 50
    assert seen[2] == seen[3] == 50
    same = BatchSize(lambda g: norm_test(g, 0.1), size=4)
    assert same.observe([torch.ones(4, 3)]) == 4
    zero = BatchSize(lambda g: norm_test(g, 0.1), size=4, largest=9)
    assert zero.observe([torch.tensor([[1.0], [-1.0]])]) == 9
    rare = BatchSize(lambda g: norm_test(g, 0.1), size=4, every=3)
    assert [rare.observe(FOUR) > 4 for _ in range(3)] == [False, False, True]


def test_micro_batches():
    assert micro_batches(7, 100, 32) == (7, 1)
    assert micro_batches(70, 100, 32) == (32, 3)
    assert micro_batches(100, 100, 32) == (32, 3)  # 128 would be above the largest


def test_per_sample_gradients():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = random(6, 4), torch.arange(6) % 3
    each = per_sample_gradients(network, F.cross_entropy, x, y)
    F.cross_entropy(network(x), y).backward()
    for gradient, p in zip(each, network.parameters(), strict=True):
        assert gradient.shape == (6, *p.shape)
        torch.testing.assert_close(gradient.mean(0), p.grad)
    with pytest.raises(ValueError, match="batch normalisation"):
        per_sample_gradients(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), F.cross_entropy, x, y)


def test_bad_input():
    with pytest.raises(ValueError, match="at least two samples"):
        norm_test([torch.ones(1, 3)], 0.5)
    with pytest.raises(ValueError, match="between 2 and largest"):
        BatchSize(lambda g: norm_test(g, 0.5), size=1)
    with pytest.raises(ValueError, match="first must be"):
        AdAdaGrad([nn.Parameter(torch.ones(2))], first=1)
    with pytest.raises(ValueError, match="batch normalisation"):
        AdaptiveBatch().optimizer(nn.Sequential(nn.BatchNorm1d(3)), {}, 0.1, False)


def test_adagrad_norm_and_torchs():
    gradients = [random(3, 4, seed=s) for s in range(5)]
    p, vector = nn.Parameter(random(3, 4)), nn.Parameter(random(2))
    start, squares = p.detach().clone(), 1e-2
    optimizer = AdaGrad([p, vector], lr=0.1)
    for g in gradients:
        p.grad, vector.grad = g, g[0, :2]
        squares += float(g.square().sum() + g[0, :2].square().sum())
        start = start - 0.1 * g / (math.sqrt(squares) + 1e-10)
        optimizer.step()
    torch.testing.assert_close(p.detach(), start)

    p, q = nn.Parameter(random(3, 4)), nn.Parameter(random(3, 4))
    ours = AdaGrad([p], lr=0.1, granularity="coordinate", initial=0.3)
    theirs = torch.optim.Adagrad([q], lr=0.1, initial_accumulator_value=0.3)
    r, start, squares = nn.Parameter(random(3, 4)), random(3, 4), torch.full((3, 1), 0.3, dtype=torch.float64)
    rows = AdaGrad([r], lr=0.1, granularity="row", initial=0.3)
    for g in gradients:
        p.grad, q.grad, r.grad = g, g, g
        squares = squares + g.square().sum(1, keepdim=True)
        start = start - 0.1 * g / (squares.sqrt() + 1e-10)
        for optimizer in (ours, theirs, rows):
            optimizer.step()
    torch.testing.assert_close(p.detach(), q.detach())
    torch.testing.assert_close(r.detach(), start)


@pytest.mark.parametrize("granularity", ["global", "row", "coordinate"])
def test_adadagrad_is_adagrad_on_batches_that_the_norm_test_sizes(granularity):
    """On single samples: the same batches, sizes and parameters as a loop that draws whole batches."""
    samples = random(400, 3, 4) + 0.3
    p, q = nn.Parameter(random(3, 4)), nn.Parameter(random(3, 4))
    ours = AdAdaGrad([p], lr=0.1, eta=0.6, largest=40, granularity=granularity)
    plain = AdaGrad([q], lr=0.1, granularity=granularity)
    size, begin, sizes = BatchSize(lambda g: norm_test(g, 0.6), size=2, largest=40), 0, []
    for i, g in enumerate(samples):
        p.grad = g
        ours.step()
        if i + 1 == begin + size.size:
            batch = samples[begin : i + 1]
            q.grad, begin = batch.mean(0), i + 1
            plain.step()
            sizes.append(size.observe([batch]))
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-9, atol=1e-12)
        assert ours.shared["size"] == size.size
    assert ours.shared["updates"] == len(sizes)
    assert sizes[-1] > 2
    assert sizes == sorted(sizes)


def test_larger_noise_budget_means_smaller_batches_and_tasks_begin_anew():
    finals = []
    for eta in (0.2, 0.8):
        p = nn.Parameter(torch.zeros(3, 4).double())
        optimizer = AdAdaGrad([p], eta=eta, largest=1000)
        for g in random(200, 3, 4) + 0.5:
            p.grad = g
            optimizer.step()
        finals.append(float(optimizer.shared["size"]))
    assert finals[0] > finals[1] > 2
    optimizer.reset_size()
    assert optimizer.shared["size"] == 2
    assert AdaptiveBatch().uses_boundaries
    assert not AdaptiveBatch(on_experience="keep").uses_boundaries
