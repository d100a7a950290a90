"""Nonlinearities that double or smooth their units, alone and stacked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plasticity.networks.nonlinearities import CReLU, Fourier, SmoothLeakyReLU
from plasticity.networks.stacked import stack


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_crelu_of_the_opposite_swaps_its_halves():
    x = draw(4, 5, 2, 2)
    positive, negative = CReLU()(x), CReLU()(-x)
    assert positive.shape == (4, 10, 2, 2)
    assert torch.equal(negative, torch.cat([positive[:, 5:], positive[:, :5]], 1))
    assert torch.equal(positive[:, :5] - positive[:, 5:], x)


def test_fourier_is_sine_and_cosine():
    x = draw(4, 5)
    y = Fourier()(x)
    assert torch.equal(y[:, :5], x.sin())
    torch.testing.assert_close(y[:, :5] ** 2 + y[:, 5:] ** 2, torch.ones(4, 5, dtype=torch.float64))


def test_smooth_leaky_relu_has_its_slopes_far_out():
    x = torch.tensor([-50.0, 0.0, 50.0], dtype=torch.float64, requires_grad=True)
    SmoothLeakyReLU(0.1)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([0.1, 0.55, 1.0])


@pytest.mark.parametrize("make", [CReLU, Fourier, SmoothLeakyReLU])
def test_stacked_is_each_alone(make):
    def network() -> nn.Module:
        width = 3 * make.copies
        return nn.Sequential(
            nn.Conv2d(2, 3, 3), make(), nn.Flatten(), nn.Linear(width * 4, 3), make(), nn.Linear(width, 2)
        )

    networks = [network().double() for _ in range(3)]
    x = draw(3, 5, 2, 4, 4)
    alone = torch.stack([net(x[k]) for k, net in enumerate(networks)])
    population = stack(networks)
    assert isinstance(population.get_submodule("1"), make)
    torch.testing.assert_close(population(x), alone)
