"""Diagnostics of a learner: they change nothing, members do not mix, and a GPU is never waited for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from plasticity.adam import Adam
from plasticity.intervention import Batch, Learner
from plasticity.measures import activity, norms, ranks
from plasticity.measures.diagnostics import Diagnostics, norm_exponent
from plasticity.networks.stacked import stack
from plasticity.networks.structure import activations, find_structure
from plasticity.problems.losses import member_losses

K, B = 3, 16
SIZES = (6, 12, 10, 4)


def mlp():
    layers = [part for i, o in zip(SIZES, SIZES[1:], strict=False) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


STRUCTURE = find_structure(mlp())


def learner_of(network, members, optimizer=None):
    optimizer = optimizer or Adam(list(network.parameters()), 1e-2)
    return Learner(network, STRUCTURE, optimizer, members, [], lambda _: mlp())


def networks(count=K):
    torch.manual_seed(0)
    return [mlp() for _ in range(count)]


def batches(steps, members=K):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(K, B, SIZES[0], generator=generator)
        y = torch.randint(SIZES[-1], (K, B), generator=generator)
        yield x[:members], y[:members]


def train(learner, diagnostics, steps=7, members=K):
    """The loop of a harness; returns what was measured, by step."""
    single = learner.members is None
    parameters = list(learner.network.parameters())
    found = {}
    for x, y in batches(steps, members):
        learner.steps += 1
        with activations(learner.network, STRUCTURE) as seen:
            outputs = learner.network(x[0] if single else x)
        seen = {name: h.unsqueeze(0) if single else h for name, h in seen.items()}
        losses = member_losses(outputs.unsqueeze(0) if single else outputs, y)
        gradients = torch.autograd.grad(losses.sum(), parameters)
        due = diagnostics is not None and diagnostics.due(learner.steps)
        if due:
            diagnostics.before_step(learner)
        learner.optimizer.step(gradients)
        if due:
            batch = Batch(x, y, seen)
            found[learner.steps] = diagnostics.cheap(learner, batch, gradients, member_losses, losses.detach())
    return found


def test_training_is_bit_identical_with_diagnostics():
    states = []
    for measured in (False, True):
        learner = learner_of(stack(networks()), K)
        torch.manual_seed(5)
        diagnostics = Diagnostics(every=2) if measured else None
        if diagnostics:
            diagnostics.begin(learner)
        train(learner, diagnostics)
        if diagnostics:
            (x, y), *_ = batches(1)
            found = diagnostics.costly(learner, x, y, member_losses)
            assert "plasticity/sharpness" in found
        train(learner, diagnostics)
        states.append((learner.network.state_dict(), torch.get_rng_state(), learner.network.training))
    for name, tensor in states[0][0].items():
        assert torch.equal(tensor, states[1][0][name]), name
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]


def test_cheap_tier_by_hand():
    """Everything of one step of one member, recomputed from weights before and after."""
    learner = learner_of(stack(networks()), K)
    diagnostics = Diagnostics(every=1)
    diagnostics.begin(learner)
    train(learner, diagnostics, steps=4)
    before = {name: p.detach().clone() for name, p in learner.network.named_parameters()}
    found = train(learner, diagnostics, steps=1)[5]
    after = {name: p.detach() for name, p in learner.network.named_parameters()}
    assert all(value.shape == (K,) for value in found.values())
    for name in ("0.weight", "2.weight", "4.weight"):
        assert_close(found[f"plasticity/weight_norm/{name}"], norms.l2(after[name]))
        assert_close(found[f"plasticity/angular_step/{name}"], norms.angle(after[name], before[name]), 1e-3)
        moved = norms.l2(after[name] - before[name])
        assert_close(found[f"plasticity/update_ratio/{name}"], moved / norms.l2(before[name]))
    ratio = norms.l2(networks_stacked()["0.weight"]) / norms.l2(after["0.weight"])
    assert_close(found["plasticity/elr/0.weight"], ratio)
    assert set(found) >= {
        "plasticity/elr", "plasticity/gradient_norm", "plasticity/gradient_l1/4.weight", "plasticity/grad_to_param",
        "plasticity/zero_fraction", "plasticity/step_plasticity", "plasticity/angular_step",
    }  # fmt: skip
    assert (found["plasticity/step_plasticity"] > 0).any()


def assert_close(a, b, rtol=1e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7, check_dtype=False)


def networks_stacked():
    return dict(stack(networks()).named_parameters())


def test_members_are_the_networks_alone():
    """The same three networks, stacked and one by one: every metric of both tiers."""
    learner = learner_of(stack(networks()), K)
    diagnostics = Diagnostics(every=3)
    diagnostics.begin(learner)
    cheap = train(learner, diagnostics, steps=3)[3]
    (x, y), *_ = batches(1)
    costly = diagnostics.costly(learner, x, y, member_losses)
    for k, network in enumerate(networks()):
        alone, own = learner_of(network, None), Diagnostics(every=3)
        own.begin(alone)
        for sample, target in ((a[k : k + 1], b[k : k + 1]) for a, b in batches(3)):
            single_step(alone, own, sample, target)
        assert_same(own.found, cheap, k)
        assert_same(own.costly(alone, x[k : k + 1], y[k : k + 1], member_losses), costly, k)


def single_step(learner, diagnostics, x, y):
    learner.steps += 1
    with activations(learner.network, STRUCTURE) as seen:
        losses = member_losses(learner.network(x[0]).unsqueeze(0), y)
    gradients = torch.autograd.grad(losses.sum(), list(learner.network.parameters()))
    diagnostics.before_step(learner)
    learner.optimizer.step(gradients)
    batch = Batch(x, y, {name: h.unsqueeze(0) for name, h in seen.items()})
    diagnostics.found = diagnostics.cheap(learner, batch, gradients, member_losses, losses.detach())


def assert_same(alone, population, k):
    assert set(alone) == set(population)
    for name, value in alone.items():
        torch.testing.assert_close(
            value[0], population[name][k], rtol=2e-3, atol=1e-5, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_costly_tier_sees_dead_and_dormant_units():
    learner = learner_of(stack(networks()), K)
    with torch.no_grad():
        bias = learner.network.get_parameter("0.bias")
        bias[1, :6] = -100  # half of the first layer of member 1 is dead
    x = next(batches(1))[0]
    found = Diagnostics(taus=(0.025, 0.0)).costly(learner, x)
    assert float(found["plasticity/dead_fraction/1"][1]) >= 0.5
    assert float(found["plasticity/dead_fraction"][1]) >= 6 / 22
    assert float(found["plasticity/dormant_fraction"][1]) >= float(found["plasticity/dormant_fraction_0"][1]) >= 6 / 22
    assert float(found["plasticity/dead_fraction/1"][0]) < 0.5
    h = F.relu(F.linear(x[0], learner.network.get_parameter("0.weight")[0], bias[0]))
    assert_close(found["plasticity/effective_rank/1"][0], ranks.erank(ranks.singular_values(h.unsqueeze(0)))[0])
    assert_close(found["plasticity/dormant_fraction/1"][0], activity.fraction([activity.dormant(h[None], 0.025)])[0])
    assert "plasticity/sharpness" not in found
    assert "plasticity/relative_distance_from_init" not in found  # `begin` was not called


def test_dead_units_are_not_reported_of_tanh():
    network = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    optimizer = Adam(list(network.parameters()), 1e-3)
    learner = Learner(network, find_structure(network), optimizer, None, [], mlp)
    found = Diagnostics().costly(learner, torch.randn(1, B, 6))
    assert "plasticity/dead_fraction" not in found
    assert "plasticity/saturated_fraction" in found


def test_a_run_goes_on_from_a_saved_state():
    learner = learner_of(stack(networks()), K)
    diagnostics, again = Diagnostics(every=4), Diagnostics(every=4)
    diagnostics.begin(learner)
    state = copy.deepcopy(diagnostics.state_dict())
    again.load_state_dict(state)
    found = train(learner, diagnostics, steps=4)[4]
    other = learner_of(stack(networks()), K)
    for name, value in train(other, again, steps=4)[4].items():
        assert torch.equal(value, found[name]), name


def test_exponent_follows_the_optimiser():
    parameters = [nn.Parameter(torch.ones(2))]
    assert norm_exponent(torch.optim.SGD(parameters, 0.1)) == 2
    assert norm_exponent(torch.optim.Adam(parameters, 0.1)) == 1


def test_adam_of_torch_and_ours_give_the_same_signal_to_noise():
    found = []
    for ours in (True, False):
        network = stack(networks())
        parameters = list(network.parameters())
        optimizer = Adam(parameters, 1e-2) if ours else torch.optim.Adam(parameters, 1e-2)
        learner = learner_of(network, K, optimizer)
        for x, y in batches(3):
            learner.steps += 1
            gradients = torch.autograd.grad(member_losses(network(x), y).sum(), parameters)
            if ours:
                optimizer.step(gradients)
            else:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
        found.append(Diagnostics().costly(learner, x)["plasticity/adam_snr"])
    assert_close(found[0], found[1], 1e-3)
    assert (found[0] > 0).all()


def test_cost_is_counted():
    learner = learner_of(stack(networks()), K)
    diagnostics = Diagnostics(every=2)
    diagnostics.begin(learner)
    train(learner, diagnostics, steps=5)
    assert diagnostics.calls == {"cheap": 2, "costly": 0}
    assert 0 < diagnostics.seconds["cheap"] < 5
    assert diagnostics.seconds["costly"] == 0


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="every=0"):
        Diagnostics(every=0)
    with pytest.raises(ValueError, match="threshold"):
        Diagnostics(taus=())


def test_cheap_tier_runs_on_a_fake_gpu_without_mixing_devices_or_waiting_for_it():
    """FakeTensorMode refuses host/device mixing, and any read of a tensor's value."""
    members = networks()
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda")
        network = stack(members)
        network = nn.Sequential(*network)
        for module in network.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=device))
        learner = learner_of(network, K)
        diagnostics = Diagnostics(every=1)
        diagnostics.begin(learner)
        diagnostics.before_step(learner)
        x = torch.empty(K, B, SIZES[0], device=device)
        y = torch.zeros(K, B, dtype=torch.int64, device=device)
        h = {"1": torch.empty(K, B, 12, device=device), "3": torch.empty(K, B, 10, device=device)}
        gradients = [torch.empty_like(p) for p in network.parameters()]
        losses = torch.empty(K, device=device)
        found = diagnostics.cheap(learner, Batch(x, y, h), gradients, member_losses, losses)
        assert {value.device.type for value in found.values()} == {"cuda"}
