"""Norms, rates and angles by hand, each member for itself."""

from __future__ import annotations

import math

import pytest
import torch

from plasticity.measures import norms


def test_norms_by_hand():
    x = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]]])
    assert norms.l2(x).tolist() == [5, 0]
    assert norms.l1(x).tolist() == [7, 0]
    assert norms.rms(x).tolist() == pytest.approx([5 / math.sqrt(2), 0])
    assert norms.mean_magnitude(x).tolist() == [3.5, 0]
    assert norms.total(torch.tensor([[3.0, 1.0], [4.0, 0.0]])).tolist() == [5, 1]


def test_elr_by_hand():
    """Radius 2, norm 4, rate as at the start: 0.25 for SGD, 0.5 for Adam; 1 after projection."""
    radius, norm = torch.tensor([2.0]), torch.tensor([4.0])
    assert norms.elr(norm, radius, 0.01, 0.01, 2).tolist() == [0.25]
    assert norms.elr(norm, radius, 0.01, 0.01, 1).tolist() == [0.5]
    assert norms.elr(radius, radius, 0.01, 0.01, 2).tolist() == [1]
    assert norms.elr(radius, radius, 0.005, 0.01, 1).tolist() == [0.5]


@pytest.mark.parametrize("degrees", [1e-4, 1, 45, 90, 135, 180])
def test_angles_small_and_large(degrees):
    radians = math.radians(degrees)
    before = torch.tensor([[1.0, 0.0]])
    after = 3 * torch.tensor([[math.cos(radians), math.sin(radians)]])
    assert float(norms.angle(after, before)) == pytest.approx(radians, rel=1e-3)


@pytest.mark.parametrize(("size", "rel"), [(1e-5, 1e-2), (1e-3, 1e-3), (1, 1e-3)])
def test_angles_from_norms(size, rel):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(3, 100, 784, generator=generator)
    after = before + size * torch.randn(3, 100, 784, generator=generator)
    found = norms.angle_from_norms(norms.l2(after - before), norms.l2(before), norms.l2(after))
    torch.testing.assert_close(found, norms.angle(after.double(), before.double()).float(), rtol=rel, atol=0)
    zero = torch.zeros(1)
    assert norms.angle_from_norms(zero, zero, zero).tolist() == [0]
    assert norms.angle_from_norms(zero + 2, zero + 1, zero + 1).tolist() == pytest.approx([math.pi])


def test_rows_of_a_transposed_tensor_are_no_copy():
    weight = torch.randn(3, 5, 4).mT
    assert norms.rows(weight).data_ptr() == weight.data_ptr()
    torch.testing.assert_close(norms.l2(weight), weight.flatten(1).norm(dim=1))


def test_angle_of_a_stretched_or_zero_tensor_is_zero():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert norms.angle(2 * x, x).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_ratio_of_nothing_to_nothing_is_zero():
    assert norms.ratio(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])).tolist() == [0, 0.5]


def test_adam_snr_of_a_constant_gradient_is_one():
    """After t steps of gradient g: m = (1 - β1^t) g, v = (1 - β2^t) g²."""
    g, t = torch.tensor([[2.0, -3.0], [1e-12, 1e-12]]), torch.tensor(5.0)
    snr = norms.adam_snr((1 - 0.9**t) * g, (1 - 0.999**t) * g.square(), t, (0.9, 0.999), 1e-8)
    assert snr.tolist() == pytest.approx([1, 1e-4], rel=1e-3)
