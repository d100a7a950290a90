"""Check 16 of specs/nap-and-plasticity.md, section 7: what acts on weights, by hand-made cases."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from plasticity.interventions.churn import Churn
from plasticity.interventions.hare_tortoise import HareTortoise
from plasticity.interventions.perturb import ShrinkPerturb, ShrinkPerturbStep
from plasticity.interventions.regularisers import L2, L2Init, Parseval, Spectral, W2Init
from plasticity.interventions.shifts import AdamW, WeightClip, WeightDecay
from plasticity.networks.redraw import fresh_parameters
from tests.plasticity.toy import NOTHING, draw, learner_of, relu_mlp, watched, with_axis


def test_l2_init_pulls_by_lambda_times_the_distance():
    network = relu_mlp(3, 4, 2)
    learner, l2_init = learner_of(network), L2Init(strength=0.3)
    l2_init.begin(learner)
    l2_init.penalty(learner, with_axis(network)).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in network.parameters())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1)
    l2_init.penalty(learner, with_axis(network)).sum().backward()
    for p in network.parameters():
        torch.testing.assert_close(p.grad, torch.full_like(p, 0.3))


@pytest.mark.parametrize(("distance", "far", "near"), [("l1", 1.0, 1.0), ("huber", 1.0, 0.25), ("l2", 4.0, 0.25)])
def test_distances_of_l2_init(distance, far, near):
    network = relu_mlp(3, 4, 2)
    learner, l2_init = learner_of(network), L2Init(strength=1.0, distance=distance)
    l2_init.begin(learner)
    with torch.no_grad():
        network[0].weight.add_(4.0)
        network[2].bias.sub_(0.25)
    l2_init.penalty(learner, with_axis(network)).sum().backward()
    torch.testing.assert_close(network[0].weight.grad, torch.full_like(network[0].weight, far))
    torch.testing.assert_close(network[2].bias.grad, torch.full_like(network[2].bias, -near))


def test_l2_counts_biases_but_not_gains():
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    learner, l2 = learner_of(network), L2(strength=0.5)
    l2.begin(learner)
    expected = sum(0.25 * p.square().sum() for p in [*network[0].parameters(), *network[3].parameters()])
    torch.testing.assert_close(l2.penalty(learner, with_axis(network)).squeeze(0), expected)
    heads = L2(strength=0.5, hidden=False)
    heads.begin(learner)
    assert heads.names == ["0.bias", "3.weight", "3.bias"]


def test_w2_init_does_not_see_an_exchange_of_values():
    network = relu_mlp(3, 4, 2)
    learner, w2_init = learner_of(network), W2Init(strength=2.0)
    w2_init.begin(learner)
    with torch.no_grad():
        network[0].weight.copy_(network[0].weight.flip(0, 1))
    assert w2_init.penalty(learner, with_axis(network)).sum() == 0
    with torch.no_grad():
        network[0].weight.add_(3.0)
    torch.testing.assert_close(w2_init.penalty(learner, with_axis(network)).sum(), torch.tensor(9.0 * 12).double())


@pytest.mark.parametrize("keep", [0.0, 0.25, 1.0])
def test_shrink_perturb_moves_towards_a_fresh_draw(keep):
    network = relu_mlp(3, 4, 2)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    expected = fresh_parameters(learner_of(network))
    learner = learner_of(network)
    ShrinkPerturb(keep).at_boundary(learner)
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.detach(), keep * before[name] + (1 - keep) * expected[name][0])
        if keep in (0, 1):
            assert torch.equal(p, before[name] if keep else expected[name][0])


def test_shrink_perturb_step_draws_anew_each_time():
    network = relu_mlp(3, 4, 2)
    learner, reference = learner_of(network), learner_of(network)
    expected = network[0].weight.detach().clone()
    for _ in range(3):
        ShrinkPerturbStep(shrink=0.1, perturb=0.2).after_step(learner, NOTHING)
        expected = 0.9 * expected + 0.2 * fresh_parameters(reference)["0.weight"][0]
    torch.testing.assert_close(network[0].weight.detach(), expected)


@pytest.mark.parametrize("clip_last", [True, False])
def test_weight_clip(clip_last):
    network = relu_mlp(784, 5, 3)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(100)
    before = network[2].weight.detach().clone()
    learner, clip = learner_of(network), WeightClip(factor=2.0, clip_last=clip_last)
    clip.begin(learner)
    clip.after_step(learner, NOTHING)
    largest = {name: float(p.detach().abs().max()) for name, p in network.named_parameters()}
    assert [largest["0.weight"], largest["0.bias"]] == pytest.approx([2 / 28, 2 / 28])
    if clip_last:
        assert largest["2.weight"] == pytest.approx(2 / math.sqrt(5))
    else:
        assert torch.equal(network[2].weight, before)


def test_weight_clip_to_the_range_of_another_initialiser():
    network = relu_mlp(6, 5, 3)
    nn.init.kaiming_uniform_(network[0].weight, generator=torch.Generator().manual_seed(0))
    largest = network[0].weight.detach().abs().max()
    learner, clip = learner_of(network), WeightClip(factor=1.5, bound="initial")
    clip.begin(learner)
    with torch.no_grad():
        network[0].weight.mul_(10)
    clip.after_step(learner, NOTHING)
    torch.testing.assert_close(network[0].weight.detach().abs().max(), 1.5 * largest)


def test_hare_becomes_a_copy_of_the_tortoise_with_its_own_storage():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    learner, tortoise = learner_of(network), HareTortoise(momentum=0.9, every=2)
    tortoise.begin(learner)
    start = network[0].weight.detach().clone()
    for step in (1, 2):
        with torch.no_grad():
            network[0].weight.add_(1)
            network(draw(8, 3, seed=step).float())
        learner.steps = step
        tortoise.after_step(learner, NOTHING)
    torch.testing.assert_close(network[0].weight.detach(), start + 0.9 * 0.1 + 0.1 * 2)
    assert network[1].num_batches_tracked == 2
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        assert torch.equal(tortoise.slow[name][0], tensor)
        assert tortoise.slow[name].data_ptr() != tensor.data_ptr()
    assert network[1].running_mean.abs().max() > 0


def test_spectral_finds_the_largest_singular_value():
    network = relu_mlp(7, 9, 4)
    with torch.no_grad():
        network[0].weight.mul_(3)
    learner, spectral = learner_of(network), Spectral(strength=0.1)
    spectral.begin(learner)
    for _ in range(300):
        spectral.after_step(learner, NOTHING)
    penalty = spectral.penalty(learner, with_axis(network)).sum()
    penalty.backward()
    network_again = copy.deepcopy(network)
    sigmas = [torch.linalg.matrix_norm(layer.weight, 2) for layer in (network_again[0], network_again[2])]
    biases = [layer.bias.square().sum() for layer in (network_again[0], network_again[2])]
    expected = 0.1 * (sum((s**2 - 1) ** 2 for s in sigmas) + sum(biases))
    torch.testing.assert_close(penalty, expected)
    network_again.zero_grad()
    expected.backward()
    for p, q in zip(network.parameters(), network_again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)


def test_parseval_by_hand():
    network = relu_mlp(7, 5, 4)
    learner, parseval = learner_of(network), Parseval(strength=0.2, scale=2.0)
    parseval.begin(learner)
    w = network[0].weight
    expected = 0.2 * (w @ w.T - 2 * torch.eye(5)).square().sum()
    torch.testing.assert_close(parseval.penalty(learner, with_axis(network)).sum(), expected)


def test_adamw_is_torchs_and_spares_gains():
    networks = [nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    ours = AdamW(strength=0.3).optimizer(networks[0], dict(networks[0].named_parameters()), 0.01, False)
    layers = [*networks[1][0].parameters(), *networks[1][3].parameters()]
    groups = [{"params": layers, "weight_decay": 0.3}, {"params": networks[1][1].parameters(), "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01)
    for step in range(5):
        for network, optimizer in zip(networks, (ours, theirs), strict=True):
            optimizer.zero_grad()
            network(draw(8, 3, seed=step).float()).square().mean().backward()
            optimizer.step()
    for p, q in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_weight_decay_shrinks_by_rate_times_strength():
    network = relu_mlp(3, 4, 2)
    before = network[0].weight.detach().clone()
    learner, decay = learner_of(network, torch.optim.SGD(network.parameters(), lr=0.1)), WeightDecay(strength=0.5)
    decay.begin(learner)
    decay.after_step(learner, NOTHING)
    torch.testing.assert_close(network[0].weight.detach(), 0.95 * before)


def test_churn_compares_outputs_on_the_batch_before_with_those_of_the_parameters_before():
    network = relu_mlp(3, 4, 2)
    learner, churn = learner_of(network), Churn(strength=5.0)
    churn.begin(learner)
    assert churn.penalty(learner, with_axis(network)) is None
    past = {name: p.detach().clone() for name, p in network.named_parameters()}
    x = draw(8, 3)
    with torch.no_grad():
        network[0].weight.add_(0.1)
    churn.after_step(learner, watched(learner, x)[0])
    expected = 5 * (network(x) - functional_call(network, past, (x,))).square().mean()
    torch.testing.assert_close(churn.penalty(learner, with_axis(network)).sum(), expected)
    with pytest.raises(ValueError, match="BatchNorm"):
        churn.begin(learner_of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))))
