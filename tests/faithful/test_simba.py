"""SimBa's networks and settings against hand values and plain torch (specs/beer-and-online-rl.md, 9 and 12)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from agents import sac, simba
from agents.networks import new_network
from agents.plastic import Plasticity
from plasticity.registry import make
from runs.catalogue import preset_config
from tests.agents.fakes import BOX, CPU, SMALL, VECTOR, make_step, stream, streams
from tests.agents.test_agents import live

SETTINGS = {"architecture": "simba", "hidden": (16,), "critic_hidden": (8, 8), "normalise_observations": True}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(plasticity: Plasticity | None = None, **settings) -> sac.Agent:
    config = sac.Config(**{**SMALL, **SETTINGS, **settings})
    return sac.Agent(VECTOR, BOX, config, num_envs=1, device=CPU, streams=streams(), plasticity=plasticity)


@pytest.mark.parametrize(("decisions", "expected"), [(500, 0.99), (1000, 0.995), (10_000, 0.995), (50, 0.95)])
def test_discount_of_an_episode(decisions, expected):
    assert simba.discount(decisions) == pytest.approx(expected, abs=1e-15)


def test_published_settings():
    config = preset_config("sac", "simba")
    assert (config.hidden, config.critic_hidden, config.critics) == ((128,), (512, 512), 1)
    assert (config.learning_rate, config.weight_decay, config.initial_temperature) == (1e-4, 1e-2, 0.01)
    assert (config.target_entropy_per_action, config.target_rate, config.batch_size) == (-0.5, 0.005, 256)
    assert (config.warmup_steps, config.update_every, config.log_std_min) == (5_000, 1, -10.0)
    critics = sac.make_critics(24, 6, config)
    block = 2 * 512 + (512 + 1) * 2048 + (2048 + 1) * 512
    assert sum(p.numel() for p in critics.parameters()) == (30 + 1) * 512 + 2 * block + 2 * 512 + 512 + 1
    actor = sac.make_actor(24, 6, config)
    block = 2 * 128 + (128 + 1) * 512 + (512 + 1) * 128
    assert sum(p.numel() for p in actor.parameters()) == (24 + 1) * 128 + block + 2 * 128 + (128 + 1) * 12


def test_each_network_is_a_residual_network_of_plain_torch():
    critics = new_network(lambda: simba.ResidualCritics(2, 3, 2, (8, 8)), stream(0))
    with torch.no_grad():
        for parameter in critics.parameters():
            parameter.add_(0.1 * numbers(*parameter.shape, seed=parameter.numel()))
    obs, action = numbers(5, 3), numbers(5, 2, seed=1)
    values = critics(obs, action)
    for k in range(2):

        def linear(layer, x, k=k):
            return x @ layer.weight[k] + layer.bias[k]

        def norm(layer, x, k=k):
            return nn.functional.layer_norm(x, x.shape[-1:]) * layer.weight[k] + layer.bias[k]

        x = linear(critics.encoder.embed, torch.cat([obs, action], -1))
        for block in critics.encoder.blocks:
            x = x + linear(block.narrow, linear(block.widen, norm(block.norm, x)).relu())
        torch.testing.assert_close(values[k], linear(critics.head, norm(critics.encoder.norm, x))[:, 0])
    features = critics.features(obs, action)
    assert features.shape == (2, 5, 8)
    torch.testing.assert_close(critics.head_values(features), values)


def test_first_weights():
    critics = new_network(lambda: simba.ResidualCritics(2, 30, 2, (64, 64)), stream(0))
    for k in range(2):
        embed = critics.encoder.embed.weight[k]  # [32, 64], orthonormal rows
        torch.testing.assert_close(embed @ embed.mT, torch.eye(32), atol=1e-5, rtol=0)
        assert critics.head.weight[k].norm().item() == pytest.approx(1.0, abs=1e-5)
        for block in critics.encoder.blocks:
            assert block.widen.weight[k].std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.03)
            assert block.narrow.weight[k].std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.03)
    assert not torch.equal(critics.encoder.embed.weight[0], critics.encoder.embed.weight[1])
    assert not any(p.any() for name, p in critics.named_parameters() if name.endswith("bias"))


def test_widths_of_blocks_must_agree():
    with pytest.raises(ValueError, match=r"SimBa's blocks must be of one width, got \(8, 16\)"):
        build(critic_hidden=(8, 16))
    with pytest.raises(ValueError, match="layer_norm is for multilayer perceptrons"):
        build(layer_norm=True)


def test_observations_are_counted_when_acting_in_training_and_normalised_for_the_networks():
    agent = build()
    moments, world = agent.observation_moments, numbers(20, 1, 3, seed=3) * 7 + 5
    assert moments is not None
    for obs in world:
        agent.act(obs, explore=True)
        agent.observe(make_step(obs, 1.0))
    torch.testing.assert_close(moments.mean.float(), world[:, 0].mean(0), rtol=1e-4, atol=1e-4)
    counted = moments.mean.clone()
    agent.act(world[0] + 100, explore=False)
    agent._update_once()
    assert torch.equal(counted, moments.mean)
    torch.testing.assert_close(agent.replay.sample(64, 0.99).obs.amax(), world[:-1].amax(), rtol=0.2, atol=0)  # raw
    scaled = (world[0] - world[:, 0].mean(0)) / world[:, 0].std(0, correction=0)
    expected = agent.scale.to_environment(agent.actor(scaled))
    torch.testing.assert_close(agent.act(world[0], explore=False), expected, rtol=1e-3, atol=1e-3)
    memory = moments.mean.data_ptr()  # which recorded updates read
    agent.act(world[0], explore=True)
    assert moments.mean.data_ptr() == memory


def test_weights_decay_of_both_networks_but_not_of_the_temperature():
    agent = build(weight_decay=0.01, critics=1)
    assert (agent.actor_optimizer.weight_decay, agent.critic_optimizer.weight_decay) == (0.01, 0.01)
    assert agent.temperature_optimizer.weight_decay == 0
    assert agent.critics(numbers(4, 3), numbers(4, 2)).shape == (1, 4)


@pytest.mark.parametrize("text", ["nap", "redo(threshold=0.6,every=7,samples=32)", "l2-init"])
def test_interventions_act(text):
    agents = build(), build(Plasticity(lambda: make(text)))
    for agent in agents:
        live(agent, 24)
    for network in ("actor", "critics"):
        plain, acted = (getattr(agent, network).state_dict() for agent in agents)
        assert plain.keys() != acted.keys() or any(not torch.equal(plain[n], acted[n]) for n in plain)
