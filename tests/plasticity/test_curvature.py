"""Curvature against matrices written out, and against each member alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from plasticity.measures import curvature
from plasticity.networks.functional import evaluating, population_function, trainable
from plasticity.networks.stacked import stack
from plasticity.problems.losses import member_losses

K, B = 3, 24


def half_squares(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(2).mean(1)


def networks(make, count=K):
    torch.manual_seed(0)
    return [make().double() for _ in range(count)]


def small():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(K, B, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (K, B), generator=generator)


def hessian(network, x, y):
    """[P, P] of one ordinary network, written out."""
    names = [name for name, _ in network.named_parameters()]
    shapes = [p.shape for p in network.parameters()]

    def value(vector):
        pieces = vector.split([shape.numel() for shape in shapes])
        tensors = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(network, tensors, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in network.parameters()])
    return torch.autograd.functional.hessian(value, flat)


def test_sharpness_of_linear_least_squares():
    """½ (w x - y)² has Hessian XᵀX / n for each output."""
    network = nn.Linear(5, 1, bias=False).double()
    x = torch.randn(1, 40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = curvature.sharpness(network, None, x, torch.zeros(1, 40, 1, dtype=torch.float64), half_squares, number=5)
    expected = torch.linalg.eigvalsh(x[0].T @ x[0] / 40).flip(0)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=0)


def test_top_eigenvalues_of_networks(data):
    x, y = data
    members = networks(small)
    found = curvature.sharpness(stack(members), K, x, y, member_losses, number=3)
    for k, network in enumerate(members):
        expected = torch.linalg.eigvalsh(hessian(network, x[k], y[k])).flip(0)[:3]
        torch.testing.assert_close(found[k], expected, rtol=1e-3, atol=0)
        alone = curvature.sharpness(network, None, x[k : k + 1], y[k : k + 1], member_losses, number=3)
        torch.testing.assert_close(found[k], alone[0], rtol=1e-9, atol=1e-12)


def test_equal_eigenvalues_are_found_as_often_as_they_are_there():
    diagonal = torch.tensor([[5.0, 5.0, 5.0, 2.0, -9.0, 0.0]], dtype=torch.float64)
    values, residuals = curvature.top_eigenvalues(lambda v: diagonal * v, diagonal, number=5)
    torch.testing.assert_close(values, torch.tensor([[5.0, 5.0, 5.0, 2.0, 0.0]], dtype=torch.float64))
    assert residuals.max() < 1e-9


def test_the_largest_eigenvalue_of_a_negative_operator_is_negative():
    diagonal = torch.tensor([[-1.0, -2.0, -2.0, -2.0]], dtype=torch.float64)
    values, _ = curvature.top_eigenvalues(lambda v: diagonal * v, diagonal)
    assert float(values) == pytest.approx(-1)


def test_residuals_bound_the_error():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, 200, 200, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    values, residuals = curvature.top_eigenvalues(lambda v: (matrix @ v.unsqueeze(2)).squeeze(2), matrix[:, 0])
    error = (torch.linalg.eigvalsh(matrix)[:, -1] - values[:, 0]).abs()
    assert (error <= residuals[:, 0]).all()
    assert float(residuals) > 1e-6  # 20 steps are not enough here, and it says so


def test_normed_sharpness_does_not_see_the_scale_of_a_normalised_tensor():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8, eps=0, elementwise_affine=False), nn.ReLU())
    network = nn.Sequential(*network, nn.Linear(8, 3)).double()
    larger = copy.deepcopy(network)
    larger[0].weight.data.mul_(7)
    x, y = torch.randn(1, B, 4, dtype=torch.float64), torch.randint(3, (1, B))
    plain, scaled = (
        [curvature.sharpness(n, None, x, y, member_losses, by_norm=by_norm) for n in (network, larger)]
        for by_norm in (False, True)
    )
    torch.testing.assert_close(scaled[0], scaled[1], rtol=1e-6, atol=0)
    assert not torch.allclose(plain[0], plain[1], rtol=0.1)


def test_hessian_erank_of_small_networks_and_of_a_linear_loss(data):
    x, y = data
    members = networks(small)
    found = curvature.hessian_erank(stack(members), K, x, y, member_losses)
    for k, network in enumerate(members):
        magnitudes = torch.linalg.eigvalsh(hessian(network, x[k], y[k])).abs()
        p = magnitudes / magnitudes.sum()
        assert float(found[k]) == pytest.approx(float(torch.special.entr(p).sum().exp()), rel=1e-6)
    flat = curvature.hessian_erank(nn.Linear(4, 3).double(), None, x[:1], y[:1], lambda f, _: f.sum((1, 2)))
    assert flat.tolist() == [0]


def test_gradient_kernel_and_cosines(data, monkeypatch):
    x, y = data
    members = networks(small)
    kernel = curvature.gradient_kernel(stack(members), K, x, y, member_losses)
    cosines = curvature.grad_cov(kernel)
    for k, network in enumerate(members):
        rows = []
        for i in range(B):
            value = F.cross_entropy(network(x[k, i : i + 1]), y[k, i : i + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(network.parameters()))]))
        gradients = torch.stack(rows)
        torch.testing.assert_close(kernel[k], gradients @ gradients.T)
        torch.testing.assert_close(cosines[k], F.normalize(gradients, dim=1) @ F.normalize(gradients, dim=1).T)
    torch.testing.assert_close(cosines.diagonal(dim1=1, dim2=2), torch.ones(K, B, dtype=torch.float64))
    monkeypatch.setattr(curvature, "_GRADIENTS", 2 * 51 * 5)  # five samples at a time
    torch.testing.assert_close(curvature.gradient_kernel(stack(members), K, x, y, member_losses), kernel)


def test_fisher_stands_for_a_large_hessian(data, monkeypatch):
    x, y = data
    monkeypatch.setattr(curvature, "_FORMED", 10)
    network = networks(small)[0]
    found = curvature.hessian_erank(network, None, x[:1], y[:1], member_losses)
    values = torch.linalg.eigvalsh(curvature.gradient_kernel(network, None, x[:1], y[:1], member_losses)[0])
    p = values.clamp(min=0) / values.clamp(min=0).sum()
    assert float(found) == pytest.approx(float(torch.special.entr(p).sum().exp()))


def test_off_diagonal_statistics_by_hand():
    matrix = torch.tensor([[[1.0, 0.5, -1.0], [0.5, 1.0, 0.2], [-1.0, 0.2, 1.0]]])
    assert curvature.off_diagonal_mean(matrix).tolist() == pytest.approx([-0.1])
    assert curvature.negative_share(matrix).tolist() == pytest.approx([1 / 3])


def test_jacobian_norm_of_a_linear_network_is_that_of_its_weights():
    network = nn.Linear(4, 3)
    found = curvature.jacobian_norm(network, None, torch.randn(1, 7, 4))
    torch.testing.assert_close(found, network.weight.detach().norm().view(1))


def test_evaluating_restores_every_mode_and_moves_no_statistic():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    network[1].eval()
    before = copy.deepcopy(network.state_dict())
    with evaluating(network):
        assert not network.training
        population_function(network, None)(trainable(network, None), torch.randn(1, 6, 4))
    assert [m.training for m in network] == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))
