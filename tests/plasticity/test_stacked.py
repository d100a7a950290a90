"""A stacked population gives what its members give alone, forward, backward and in state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plasticity.networks.stacked import Vmapped, member, stack

K, B = 3, 5


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.gain = nn.Parameter(torch.full((6,), 0.5))
        self.register_buffer("shift", torch.arange(6.0))

    def forward(self, x):
        return x + self.gain * self.inner(x) + self.shift


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.RMSNorm(8), nn.Linear(8, 4)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


CASES = {
    "mlp": (mlp, (6,)),
    "cnn": (cnn, (2, 8, 8)),
    "custom": (lambda: nn.Sequential(Residual(), nn.Linear(6, 2)), (6,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm([4, 6]), nn.Linear(6, 2)), (4, 6)),
}


def build(case):
    make, shape = CASES[case]
    torch.manual_seed(0)
    networks = [make().double() for _ in range(K)]
    for network in networks:  # normalisations begin alike: make them differ
        for parameter in network.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return networks, torch.randn(K, B, *shape, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_members_are_the_networks_alone(case, training):
    networks, x = build(case)
    population = stack([network.train(training) for network in networks])
    names = dict(networks[0].named_parameters())
    assert dict(population.named_parameters()).keys() == names.keys()
    assert dict(population.named_buffers()).keys() == dict(networks[0].named_buffers()).keys()

    alone = torch.stack([network(x[k]) for k, network in enumerate(networks)])
    together = population(x)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)

    alone.square().sum().backward()
    together.square().sum().backward()
    for name in names:
        expected = torch.stack([dict(network.named_parameters())[name].grad for network in networks])
        torch.testing.assert_close(population.get_parameter(name).grad, expected, rtol=1e-10, atol=1e-12)
    for name, buffer in population.named_buffers():
        expected = torch.stack([dict(network.named_buffers())[name] for network in networks])
        torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_member_comes_back_as_an_ordinary_network(case):
    networks, x = build(case)
    population = stack(networks)
    single = member(population, networks[0], 2).eval()
    torch.testing.assert_close(single(x[2]), networks[2].eval()(x[2]))
    single.get_parameter(next(iter(dict(single.named_parameters())))).data.zero_()
    assert all(bool((p != 0).any()) for p in population.parameters())


def test_a_frozen_parameter_stays_frozen():
    networks = [mlp() for _ in range(2)]
    for network in networks:
        network[0].weight.requires_grad_(False)
    assert not stack(networks)[0].weight.requires_grad
    residuals = [Residual() for _ in range(2)]
    for network in residuals:
        network.gain.requires_grad_(False)
    population = stack(residuals)
    assert isinstance(population, Vmapped)
    assert not population.gain.requires_grad


def test_other_architectures_do_not_stack():
    with pytest.raises(ValueError, match="networks 0 and 1"):
        stack([nn.Linear(2, 3), nn.Linear(3, 3)])
    with pytest.raises(ValueError, match="at least one"):
        stack([])
