"""The faithfulness checks 17-20 of specs/optimizers-and-norms.md: steps within the softmax's convergence radius."""

from __future__ import annotations

import cmath
import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from plasticity.intervention import Batch, Learner
from plasticity.interventions.safe_step import (
    SafeStep,
    inverse_radius,
    inverse_radius_of_two,
    logit_rates,
    proposal_norm,
)
from plasticity.networks.stacked import member, stack
from plasticity.optimisers.adamp import AdamP
from plasticity.optimisers.proposing import scaled_step
from plasticity.optimisers.sgdp import SGDP


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def network(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), **options).double()


def learner_of(net, optimizer, members=None):
    return Learner(net, None, optimizer, members, [generator()], lambda source: network())  # pyright: ignore


def batch_of(size=6, members=1):
    targets = torch.randint(3, (members, size), generator=generator(3))
    return Batch(random(members, size, 4), targets, {})


def set_gradients(net, batch, population=False):
    """Of the summed losses of the members."""
    net.zero_grad()
    outputs = net(batch.inputs if population else batch.inputs[0])
    members = batch.inputs.shape[0]
    F.cross_entropy(outputs.reshape(-1, 3), batch.targets.flatten(), reduction="sum").div(
        batch.targets.numel() / members
    ).backward()


def take_step(net, optimizer, safe, batch, population=False):
    learner = learner_of(net, optimizer, batch.inputs.shape[0] if population else None)
    safe.begin(learner)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    set_gradients(net, batch, population)
    taken = scaled_step(learner, batch, [safe])
    return taken, {name: p.detach() - before[name] for name, p in net.named_parameters()}


def test_17_binary():
    gap, rate = 2.0, 1.5
    logits, rates = torch.tensor([[gap, 0.0]]).double(), torch.tensor([[rate, 0.0]]).double()
    assert 1 / inverse_radius(rates, logits).squeeze() == pytest.approx(2.0943951, abs=1e-7)
    exact = 1 / inverse_radius_of_two(rates, logits, torch.tensor([0])).squeeze()
    assert exact == pytest.approx(2.4827945, abs=1e-7)
    # The zero of e^z_1 + e^z_0 that is nearest: e^(gap + rate t) = -1.
    zero = (-gap + 1j * math.pi) / rate
    assert abs(cmath.exp(gap + rate * zero) + 1) < 1e-12
    assert abs(zero) == pytest.approx(float(exact))


def test_18_linear_model():
    model = nn.Linear(4, 3, bias=False).double()
    x, direction = random(6, 4), random(3, 4, seed=1)
    logits, rates = logit_rates(model, x, {"weight": direction})
    torch.testing.assert_close(logits, model(x).detach())
    moved = x @ direction.T
    torch.testing.assert_close(inverse_radius(rates, logits) * math.pi, moved.amax(1) - moved.amin(1))
    with pytest.raises(ValueError, match="no parameter 'weights'"):
        logit_rates(model, x, {"weights": direction})


def test_18_difference_agrees_with_the_derivative_and_restores():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 3)).double()
    model[0].eval()
    kept = copy.deepcopy(model.state_dict())
    direction = {name: random(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    _, exact = logit_rates(model, random(6, 4), direction)
    _, quotient = logit_rates(model, random(6, 4), direction, difference=1e-4)
    assert (exact - quotient).abs().max() <= 1e-3 * exact.abs().max()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())
    assert [module.training for module in model] == [False, True, True, True, True]
    assert model.training


@pytest.mark.parametrize("optimizer", [lambda ps, lr: AdamP(ps, lr), lambda ps, lr: SGDP(ps, lr, momentum=0.9)])
def test_19_cap(optimizer):
    results = []
    for lr in (1.0, 1000.0):
        net, plain = network(), network()
        batch = batch_of()
        ours, uncontrolled = optimizer(net.parameters(), lr), optimizer(plain.parameters(), lr)
        safe = SafeStep()
        taken, step = take_step(net, ours, safe, batch)
        set_gradients(plain, batch)
        proposal = dict(zip(step, uncontrolled.propose(), strict=True))
        length = proposal_norm(proposal, False)
        reached = proposal_norm(step, False)
        allowed = 0.5 * safe.last["radius"]
        assert reached == pytest.approx(float(torch.minimum(length, allowed)), rel=1e-6)
        assert taken < 1
        assert safe.last["r_after"] == pytest.approx(0.5)
        cosine = sum((step[name] * proposal[name]).sum() for name in step) / (reached * length)
        assert cosine == pytest.approx(1.0, abs=1e-9)
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            for name, value in uncontrolled.state[q].items():
                assert torch.equal(ours.state[p][name], value)
        results.append(step)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-6, atol=1e-12)


def test_19_small_steps_are_taken_whole():
    net = network()
    taken, _ = take_step(net, AdamP(net.parameters(), 1e-6), SafeStep(), batch_of())
    assert taken == 1


def test_20_temperature_scales_the_radius():
    net, batch = network(), batch_of()
    direction = {name: random(*p.shape, seed=i) for i, (name, p) in enumerate(net.named_parameters())}

    class Tempered(nn.Module):
        def __init__(self, temperature):
            super().__init__()
            self.inner, self.temperature = net, temperature

        def forward(self, x):
            return self.inner(x) / self.temperature

    radii = []
    for temperature in (1.0, 4.0):
        inside = {f"inner.{name}": step for name, step in direction.items()}
        logits, rates = logit_rates(Tempered(temperature), batch.inputs[0], inside)
        radii.append(1 / inverse_radius(rates, logits))
    torch.testing.assert_close(radii[1], 4 * radii[0], rtol=1e-12, atol=0)


def test_20_the_batch_has_the_smallest_radius_of_its_samples():
    net, batch = network(), batch_of()
    safe = SafeStep(r_target=1.0, mode="set")
    take_step(net, AdamP(net.parameters(), 0.1), safe, batch)
    each = []
    for i in range(6):
        net = network()
        one = SafeStep(fixed=batch.inputs[0, i : i + 1])
        take_step(net, AdamP(net.parameters(), 0.1), one, batch)
        each.append(float(one.last["radius"]))
    assert safe.last["radius"] == pytest.approx(min(each))
    assert safe.last["r_after"] == pytest.approx(1.0)


def test_sign_of_the_direction_does_not_matter():
    net, x = network(), random(5, 4)
    direction = {name: random(*p.shape, seed=i) for i, (name, p) in enumerate(net.named_parameters())}
    there = inverse_radius(*reversed(logit_rates(net, x, direction)))
    back = inverse_radius(*reversed(logit_rates(net, x, {name: -d for name, d in direction.items()})))
    torch.testing.assert_close(there, back)


def test_masked_actions_and_ignored_tokens_do_not_count():
    rates, logits = torch.tensor([[1.0, 3.0, 90.0]]), torch.tensor([[0.0, 1.0, -math.inf]])
    assert inverse_radius(rates, logits) * math.pi == pytest.approx(2.0)
    assert inverse_radius_of_two(rates, logits, torch.tensor([0])) == pytest.approx(2 / math.sqrt(1 + math.pi**2))
    net, batch = network(), batch_of()
    one = SafeStep(samples=1)
    take_step(net, AdamP(net.parameters(), 0.1), one, batch)
    net = network()
    optimizer, ignored = AdamP(net.parameters(), 0.1), SafeStep()
    targets = batch.targets.clone()
    set_gradients(net, batch)
    targets[:, 1:] = -100
    ignored.scale_step(learner_of(net, optimizer), Batch(batch.inputs, targets, {}), named_proposal(net, optimizer))
    torch.testing.assert_close(ignored.last["radius"], one.last["radius"])


def named_proposal(net, optimizer):
    return dict(zip(dict(net.named_parameters()), optimizer.propose(), strict=True))


def test_quantile_and_top2_are_looser():
    radii = []
    for options in ({}, {"quantile": 0.5}, {"bound": "top2"}):
        net, safe = network(), SafeStep(**options)
        take_step(net, AdamP(net.parameters(), 0.1), safe, batch_of())
        radii.append(float(safe.last["radius"]))
    assert radii[0] < min(radii[1:])


@pytest.mark.parametrize("options", [{}, {"mode": "set"}, {"difference": 1e-4}, {"bound": "top2"}, {"quantile": 0.8}])
def test_members_of_a_population_are_scaled_as_if_alone(options):
    networks = [network(seed) for seed in range(3)]
    population, batch = stack(networks), batch_of(members=3)
    taken, _ = take_step(
        population, AdamP(population.parameters(), 1.0, stacked=True), SafeStep(**options), batch, population=True
    )
    for k, net in enumerate(networks):
        alone, _ = take_step(
            net,
            AdamP(net.parameters(), 1.0),
            SafeStep(**options),
            Batch(batch.inputs[k : k + 1], batch.targets[k : k + 1], {}),
        )
        torch.testing.assert_close(taken[k : k + 1], alone)
        for p, q in zip(member(population, network(), k).parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_a_step_that_is_not_finite_is_refused_counted_and_told_once():
    net, batch, safe = network(), batch_of(), SafeStep()
    optimizer = SGDP(net.parameters(), 0.1)
    learner = learner_of(net, optimizer)
    safe.begin(learner)
    set_gradients(net, batch)
    net[0].weight.grad[0, 0] = math.inf
    before = [p.detach().clone() for p in net.parameters()]
    assert scaled_step(learner, batch, [safe]) == 0
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))
    with pytest.warns(UserWarning, match="not finite"):
        assert safe.metrics(learner)["safe_step/refused"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        safe.metrics(learner)
    other = SafeStep()
    other.begin(learner)
    other.load_state_dict(safe.state_dict())
    assert other.refused == 1


def test_no_step_is_taken_as_it_is():
    net, batch, safe = network(), batch_of(), SafeStep(mode="set")
    taken, step = take_step(net, SGDP(net.parameters(), 0.0), safe, batch)
    assert taken == 1
    assert proposal_norm(step, False) == 0


def test_bad_settings():
    for options in ({"r_target": 0.0}, {"mode": "off"}, {"quantile": 0.0}, {"samples": 0}, {"difference": -1.0}):
        with pytest.raises(ValueError):
            SafeStep(**options)
    with pytest.raises(ValueError, match="top2"):
        SafeStep(bound="top2", fixed=random(3, 4))
    net = network()
    regression = Batch(random(1, 6, 4), random(1, 6, 3), {})
    with pytest.raises(ValueError, match="class labels"):
        SafeStep().scale_step(learner_of(net, None), regression, {})
