"""The probe: exact where arms are equal, and it sees what is lost where something is."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from plasticity import probe
from plasticity.adam import Adam
from plasticity.networks.architectures import draw_, mlp
from plasticity.probe import CHECKPOINT, FRESH, Arm, Settings
from plasticity.problems.losses import member_losses, member_scores

QUICK = Settings(steps=30, batch_size=16, draws=3, learning_rate=1e-2)


def fresh(generator):
    return draw_(mlp([6], [24, 24], 4), "kaiming", generator)


def new(seed=0):
    return fresh(torch.Generator().manual_seed(seed))


def inputs(count=64, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def families(draws=3):
    return [
        probe.random_labels(inputs(), 4, draws, 0),
        probe.random_values(inputs(), 4, draws, 0),
        probe.random_network(inputs(), inputs(32, 1), fresh, draws, 0),
    ]


def dead():
    """A network whose first layer gives nothing but zeros."""
    network = new()
    with torch.no_grad():
        network[1].bias.fill_(-100)
    return network


def test_equal_networks_have_no_gap_at_all():
    """Every arm gets the same batches, targets and optimiser: where weights are equal, so are all scores."""
    network = new()
    for draws in families():
        found = probe.probe(network, lambda _: copy.deepcopy(network), draws, QUICK, 0)
        assert found.gap().tolist() == [0, 0, 0]
        assert found.gap_at_best_rates().tolist() == [0, 0, 0]
        assert found.layers == ("1", "3", "5")
        for layer in found.layers:
            assert found.recovered(layer).tolist() == [0, 0, 0]
        for layer in found.layers[:-1]:
            assert found.features_gap(layer).tolist() == [0, 0, 0]


def test_a_fresh_network_has_lost_nothing():
    settings = Settings(steps=60, draws=5, learning_rate=1e-2, layers=False, factors=())
    found = probe.probe(new(100), fresh, probe.random_labels(inputs(), 4, 5, 0), settings, 0)
    assert abs(float(found.gap().mean())) < 0.05
    assert (found.online(FRESH) > found.chance + 0.05).all()


def test_a_dead_layer_is_seen_and_found():
    for draws in families():
        found = probe.probe(dead(), fresh, draws, dataclasses.replace(QUICK, steps=90), 0)
        chance = float(found.chance.mean())
        assert float(found.online(CHECKPOINT).mean()) < chance + 0.05
        assert (found.gap() > 0.05).all()
        assert (found.gap_at_best_rates() > 0.05).all()
        gain = {layer: float(found.recovered(layer).mean()) for layer in found.layers}
        assert max(gain, key=lambda layer: gain[layer]) == "1"
        assert gain["1"] > 0.4 * float(found.gap().mean())
        assert float(found.features_gap("1").mean()) > 0.05  # of a dead layer; a fresh one serves
        held = found.held_out_gap()
        assert (held is None) == (draws.held_inputs is None)
        assert held is None or (held > 0).all()


def test_a_member_of_the_probe_is_the_network_trained_alone():
    draws, network = probe.random_labels(inputs(), 4, 2, 0), new(7)
    settings = Settings(steps=25, batch_size=8, draws=2, layers=False, factors=())
    found = probe.probe(network, fresh, draws, settings, 0)
    order = probe._order(draws, settings, 0)
    for draw in range(2):
        alone = copy.deepcopy(network)
        optimizer = Adam(list(alone.parameters()), settings.learning_rate)
        scores = []
        for rows in order[draw]:
            outputs, labels = alone(draws.inputs[0, rows]), draws.targets[draw, rows]
            scores.append(member_scores(outputs[None], labels[None]))
            loss = member_losses(outputs[None], labels[None]).sum()
            optimizer.step(torch.autograd.grad(loss, optimizer.parameters))
        result = found.results[settings.learning_rate][CHECKPOINT]
        assert float(result.online[draw]) == pytest.approx(float(torch.cat(scores).mean()), abs=1e-6)
        assert float(result.curve[draw].mean()) == pytest.approx(float(torch.cat(scores).mean()), abs=1e-6)
        fitted = member_scores(alone(draws.inputs[0])[None], draws.targets[draw : draw + 1])
        assert float(result.fitted[draw]) == pytest.approx(float(fitted), abs=1e-6)


def test_arms_trained_in_turns_give_the_same(monkeypatch):
    draws = families(draws=2)[2]
    whole = probe.probe(dead(), fresh, draws, QUICK, 0)
    monkeypatch.setattr(probe, "_HELD", 1)
    monkeypatch.setattr(probe, "_NUMBERS", 6 * 2 * 20)
    parts = probe.probe(dead(), fresh, draws, QUICK, 0)
    for arm, learnt in whole.results[QUICK.learning_rate].items():
        other = parts.results[QUICK.learning_rate][arm]
        torch.testing.assert_close(learnt.online, other.online, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(learnt.held_out, other.held_out, rtol=1e-2, atol=1e-3)


def test_the_network_and_the_global_generator_are_left_alone():
    network = dead()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    network.eval()
    probe.probe(network, fresh, families()[1], QUICK, 0)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not network.training


def test_the_same_seed_gives_the_same_numbers():
    results = [probe.probe(new(), fresh, families()[0], QUICK, seed).online(FRESH) for seed in (3, 3, 4)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_frozen_features_are_not_trained():
    """With random features of the first layer only the rest learns, so the fit falls short of the whole network's."""
    found = probe.probe(new(), fresh, families()[0], Settings(steps=80, draws=3, learning_rate=1e-2), 0)
    results = found.results[found.rate]
    assert set(results) == {
        FRESH, CHECKPOINT, *(Arm("reinitialised", layer) for layer in ("1", "3", "5")),
        *(Arm(kind, layer) for kind in ("features", "fresh features") for layer in ("1", "3")),
    }  # fmt: skip
    fitted = [float(results[arm].fitted.mean()) for arm in (FRESH, *(Arm("fresh features", n) for n in ("1", "3")))]
    assert fitted[0] > fitted[1] > fitted[2]


def test_numbers_are_fitted_in_units_of_the_network():
    """A network that says the same on a larger scale and around another mean starts from the same score."""
    network = new()
    larger = copy.deepcopy(network)
    with torch.no_grad():
        larger[5].weight.mul_(50)
        larger[5].bias.mul_(50).add_(1000)
    settings = Settings(steps=1, draws=3, batch_size=64, layers=False, factors=())
    scores = [
        probe.probe(n, fresh, families()[2], settings, 0).results[settings.learning_rate][CHECKPOINT].online
        for n in (network, larger)
    ]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-4)


def test_networks_with_normalisation_convolutions_and_custom_layers():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.gain * self.inner(x)

    def build(generator):
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 8, bias=False),
            nn.LayerNorm(8), nn.ReLU(), Scaled(), nn.Linear(8, 3),
        )  # fmt: skip
        for parameter in network.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return network

    network = build(torch.Generator().manual_seed(5))
    images = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = probe.probe(network, build, probe.random_labels(images, 3, 2, 0), QUICK, 0)
    assert found.layers == ("0", "4", "7.inner", "8")
    assert all(learnt.online.isfinite().all() for learnt in found.results[found.rate].values())


def test_gradient_descent_learns_too():
    settings = Settings(steps=100, draws=3, learning_rate=0.1, optimizer="sgd", layers=False)
    found = probe.probe(new(), fresh, families()[0], settings, 0)
    assert (found.online(FRESH) > found.chance + 0.1).all()
    assert sorted(found.results) == pytest.approx([0.1 / 3, 0.1, 0.3])


def test_values_and_networks_are_standardised():
    for draws in families()[1:]:
        torch.testing.assert_close(draws.targets.mean(1), torch.zeros(3, 4), rtol=0, atol=1e-5)
        torch.testing.assert_close(draws.targets.var(1, correction=0), torch.ones(3, 4))
        assert draws.chance.tolist() == [0, 0, 0]
    labels = families()[0]
    assert labels.chance.tolist() == [float(row.bincount().max()) / 64 for row in labels.targets]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="differ in the names or shapes"):
        probe.probe(mlp([6], [8], 4), fresh, families()[0], QUICK, 0)
    for name in ("steps", "batch_size", "draws"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Settings(**{name: 0})
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        Settings(learning_rate=0.0)
