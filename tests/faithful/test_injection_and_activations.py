"""Check 20 of specs/nap-and-plasticity.md, section 7 (the halves of CReLU: tests/plasticity/test_nonlinearities.py)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plasticity.interventions.activations import WithCReLU, WithFourier
from plasticity.interventions.injection import Injection
from plasticity.networks.structure import find_structure
from tests.plasticity.toy import Residual, draw, learner_of, relu_mlp


def test_injection_keeps_the_logits_and_trains_the_new_branch_only():
    network = Injection().build(relu_mlp(3, 6, 2))
    x, y = draw(32, 3), draw(32, 2, seed=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    learner, injection = learner_of(network, optimizer), Injection()

    def step():
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        optimizer.step()

    step()
    before, theta, head = network(x).detach(), network[2].weight.detach().clone(), network[2].weight
    injection.at_boundary(learner)
    assert network[2].weight is head
    assert not torch.equal(head, theta)
    torch.testing.assert_close(network(x), before, rtol=1e-6, atol=1e-6)
    frozen = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert torch.equal(frozen["2.frozen_weight"], theta)
    assert torch.equal(frozen["2.offset_weight"], head)
    assert optimizer.state[head]["step"] == 0
    step()
    assert all(torch.equal(frozen[name], buffer) for name, buffer in network.named_buffers())
    assert not torch.equal(head, frozen["2.offset_weight"])
    injection.at_boundary(learner)
    assert torch.equal(network[2].get_buffer("frozen_weight"), theta), "it is done once"


def test_the_features_get_no_gradient_through_the_subtracted_branch():
    network = Injection().build(relu_mlp(3, 6, 2))
    Injection().at_boundary(learner_of(network))
    h = draw(4, 6).requires_grad_()
    network[2](h).sum().backward()
    theta, own = network[2].get_buffer("frozen_weight"), network[2].weight.detach()
    torch.testing.assert_close(h.grad, (theta + own).sum(0).expand(4, -1))


def test_crelu_keeps_the_number_of_parameters():
    """9 % fewer units for the network of Kumar et al., as they state."""
    network = relu_mlp(784, 100, 100, 10)
    before = sum(p.numel() for p in network.parameters())
    network = WithCReLU().build(network)
    assert [network[0].out_features, network[2].in_features, network[2].out_features] == [91, 182, 91]
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(before, rel=0.005)
    assert network(torch.zeros(5, 784, dtype=torch.float64)).shape == (5, 10)
    layer = find_structure(network).hidden[0]
    assert (layer.nonlinearity, layer.units, layer.readers[0].copies) == ("crelu", 91, 2)


@pytest.mark.parametrize(("intervention", "units"), [(WithCReLU(keep="units"), 8), (WithFourier(), 4)])
def test_doubled_outputs_in_a_network_of_images(intervention, units):
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8),
        nn.Tanh(), nn.Flatten(), nn.Linear(32, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    state = torch.get_rng_state()
    network = intervention.build(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer.units for layer in find_structure(network).hidden] == [units] * 3
    assert network(torch.zeros(5, 2, 6, 6)).shape == (5, 3)
    assert all(p.isfinite().all() for p in network.parameters())


def test_widths_that_cannot_be_told_are_refused():
    with pytest.raises(ValueError, match="residual sum"):
        WithCReLU().build(Residual())
    with pytest.raises(ValueError, match="normaliser '2'"):
        WithCReLU().build(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="no nonlinearity"):
        WithCReLU().build(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
