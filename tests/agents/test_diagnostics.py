"""Diagnostics of agents: hand values, every agent's networks, and that nothing about the agent changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from agents import ppo
from agents.diagnostics import AgentDiagnostics, representation_ranks
from agents.plastic import Plasticity
from envs import Step
from plasticity.nap import NaP
from plasticity.networks import projection
from tests.agents.fakes import (
    ANY_REPLAYING,
    BOX,
    CPU,
    FRAMES,
    REPLAYING,
    VALUING_ACTIONS,
    VECTOR,
    fake_gradients,
    make_step,
    stream,
    streams,
)
from tests.agents.test_plastic import build, live, networks

RANKS = ("feature_rank", "srank", "effective_rank", "dead_fraction", "samples", "features")
WHOLE = ("dormant_fraction", "effective_rank", "weight_norm", "gradient_norm")


def measured(agent, diagnostics, steps=10):
    found = diagnostics.measure(stream(7, agent.replay.device))
    for step in range(steps):
        live(agent, 1, start=100 + step)
        found |= diagnostics.gradient_norms()
    return found


@pytest.mark.parametrize("name", ANY_REPLAYING)
def test_every_network_of_an_agent(name):
    agent = build(name)
    live(agent, 20)
    diagnostics = AgentDiagnostics(agent)
    found = measured(agent, diagnostics)
    each = [] if name in VALUING_ACTIONS else ["actor", "critic" if name in ("beer", "ddpg") else "critics"]
    each += ["encoder"] if name == "td7" else []
    expected = [f"plasticity/{what}{part}" for what in WHOLE for part in ["", *(f"/{network}" for network in each)]]
    ranks = [f"representation/{what}" for what in RANKS] if name in ("beer", "dqn", "sac", "td3") else []
    layers = {key: value for key, value in found.items() if key.startswith("plasticity/") and key.count("/") > 2}
    assert len(layers) >= 3
    if name in REPLAYING:
        assert_layers_make_the_whole(found, layers, {n: own.features for n, own in diagnostics.networks.items()})
    found = {key: value for key, value in found.items() if key not in layers}
    assert sorted(found) == sorted([*expected, *ranks, "speed/diagnostics_seconds"])
    assert all(value.shape == () and value.isfinite() for value in found.values())
    assert 1 <= found["plasticity/effective_rank"] <= 16
    assert found["plasticity/gradient_norm"] > 0


def assert_layers_make_the_whole(found, layers, features):
    """Hidden layers are equally wide, so shares of dormant units are means; heads have weights too, and read features.

    Where there are two streams, both have some.
    """
    for name in {key.split("/")[2] for key in layers}:
        whole = {what: found.get(f"plasticity/{what}/{name}", found[f"plasticity/{what}"]) for what in WHOLE[:3]}
        own = {what: [v for key, v in layers.items() if key.startswith(f"plasticity/{what}/{name}/")] for what in WHOLE}
        assert 1 <= len(own["dormant_fraction"]) == len(own["effective_rank"]) == len(own["weight_norm"])
        assert own["gradient_norm"] == []
        assert whole["dormant_fraction"] == pytest.approx(float(torch.stack(own["dormant_fraction"]).mean()))
        read = torch.stack([found[f"plasticity/effective_rank/{name}/{layer}"] for layer in features[name]])
        assert len(read) == (2 if any("advantage" in key for key in layers) else 1)
        assert whole["effective_rank"] == read.mean()
        assert whole["weight_norm"].square() > sum(norm.square() for norm in own["weight_norm"])


@pytest.mark.parametrize("name", ANY_REPLAYING)
def test_an_agent_goes_the_same_way_with_and_without(name):
    plain, watched = build(name), build(name)
    diagnostics = AgentDiagnostics(watched)
    for start in (0, 10, 20):
        live(plain, 10, start)
        live(watched, 10, start)
        diagnostics.measure(stream(start))
        diagnostics.gradient_norms()
    for key, network in networks(plain).items():
        for a, b in zip(network.parameters(), networks(watched)[key].parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(plain.replay.stream.generators[0].get_state(), watched.replay.stream.generators[0].get_state())


def test_hand_values_of_twin_critics():
    agent = build("td3")
    live(agent, 5)
    with torch.no_grad():
        agent.critics.layers[1].weight[0, :, :4] = 0  # of 16 units of one of two critics
        agent.critics.layers[1].bias[0, :, :4] = -1
        agent.critics.layers[1].weight[1, :, 1:] = 0
        agent.critics.layers[1].bias[1, :, 1:] = -1
        agent.critics.layers[1].bias[1, :, 0] = 9
    found = AgentDiagnostics(agent).measure(stream())
    agent.replay.stream = stream()
    batch = agent.replay.sample(512, 1.0)
    with torch.no_grad():
        x = torch.cat([batch.obs, batch.action], -1).expand(2, -1, -1)
        first = agent.critics.acts[0](agent.critics.layers[0](x)).mean(1)  # [2, 16]
        second = agent.critics.acts[1](agent.critics.layers[1](agent.critics.layers[0](x).relu())).mean(1)
    dormant = sum(int((h <= 0.025 * h.mean(1, keepdim=True)).sum()) for h in (first, second))
    assert dormant >= 19
    assert found["plasticity/dormant_fraction/critics"] == pytest.approx(dormant / 64)
    own = [p for n, p in agent.critics.named_parameters() if n.endswith("weight")]
    norm = sum(float(p.detach().square().sum()) for p in own) ** 0.5
    assert found["plasticity/weight_norm/critics"] == pytest.approx(norm, rel=1e-5)
    # Dead but for one unit, the second critic has features of rank 1.
    assert 1 < found["plasticity/effective_rank/critics"] < (1 + 12) / 2


def test_ranks_of_a_representation_by_hand():
    """Twin critics: diag(10, 5, 1, 0.05, 0.001) above 95 rows of zeros, where srank is 3 and so is the feature rank;
    and a matrix with one direction and four dead features. Specification, check 9."""
    first, second = torch.zeros(2, 100, 5)
    first[:5] = torch.diag(torch.tensor([10, 5, 1, 0.05, 0.001]))
    second[:, 0] = 1.0
    found = representation_ranks(torch.stack([first, second]))
    shares = torch.tensor([10, 5, 1, 0.05, 0.001]) / 16.051
    entropy_rank = float((-(shares * shares.log()).sum()).exp())
    assert {name.removeprefix("representation/"): float(value) for name, value in found.items()} == {
        "feature_rank": 2,
        "srank": 2,
        "effective_rank": pytest.approx((entropy_rank + 1) / 2, rel=1e-5),
        "dead_fraction": pytest.approx(0.4),
        "samples": 100,
        "features": 5,
    }
    assert representation_ranks(10 * first)["representation/feature_rank"] == 4
    assert representation_ranks(10 * first)["representation/srank"] == 3


@pytest.mark.parametrize("name", ["beer", "dqn", "sac"])
def test_ranks_are_of_what_the_head_reads(name):
    agent = build(name)
    live(agent, 20)
    found = AgentDiagnostics(agent).measure(stream(3))
    agent.replay.stream = stream(3)
    agent.replay.sample(512, 1.0)  # what units are measured on
    batch = agent.replay.sample(2048, 1.0)
    with torch.no_grad():
        if name == "dqn":
            features = agent.net.features(batch.obs)
        else:
            critic = agent.critics if name == "sac" else agent.critic
            features = critic.features(batch.obs, batch.action)
    expected = representation_ranks(features)
    assert (expected["representation/samples"], expected["representation/features"]) == (2048, 16)
    for key, value in expected.items():
        assert float(found[key]) == pytest.approx(float(value), rel=1e-4)


def test_gradient_norms_are_those_of_the_next_step_and_survive_a_checkpoint(monkeypatch):
    agent = build("td3", policy_delay=2)
    live(agent, 20)
    diagnostics = AgentDiagnostics(agent)
    assert diagnostics.gradient_norms() == {}
    diagnostics.measure(stream())
    seen = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    live(agent, 1, start=20)
    assert len(seen) == 1  # the actor waits
    assert diagnostics.gradient_norms() == {}
    saved = copy.deepcopy(diagnostics.state_dict())
    resumed = AgentDiagnostics(agent)
    resumed.load_state_dict(saved)
    live(agent, 1, start=21)
    found = resumed.gradient_norms()
    norms = [float(sum(g.square().sum() for g in gradients) ** 0.5) for gradients in (seen[0], seen[2])]
    assert found["plasticity/gradient_norm/critics"] == pytest.approx(norms[0], rel=1e-5)
    assert found["plasticity/gradient_norm/actor"] == pytest.approx(norms[1], rel=1e-5)
    assert found["plasticity/gradient_norm"] == pytest.approx((norms[0] ** 2 + norms[1] ** 2) ** 0.5, rel=1e-5)
    assert resumed.gradient_norms() == {}


def test_images_and_interventions():
    agent = build("dqn", Plasticity(lambda: [NaP()]), FRAMES, replay_capacity=60)
    world = torch.Generator().manual_seed(0)
    diagnostics = AgentDiagnostics(agent)
    for _ in range(12):
        obs = torch.randint(0, 255, (1, 4, 36, 36), dtype=torch.uint8, generator=world)
        agent.act(obs, explore=True)
        agent.observe(make_step(obs, 1.0))
        agent.update()
    found = diagnostics.measure(stream())
    assert 0 <= found["plasticity/dormant_fraction"] <= 1
    assert found["plasticity/effective_rank"] >= 1


def test_networks_that_read_an_encoder_are_measured_on_what_it_makes():
    agent = build("symphony", encoder_features=4)
    live(agent, 20)
    diagnostics = AgentDiagnostics(agent)
    found = measured(agent, diagnostics)
    assert found["plasticity/effective_rank/critics"] >= 1
    seen = agent.inputs_of(torch.randn(5, 3), torch.rand(5, 2))
    state = agent.encoder.state_size
    assert [part.shape[1] for part in (*seen["actor"], *seen["critics"])] == [state, agent.encoder.pair_size, 2]
    assert agent.actor(*seen["actor"])[0].shape == (5, 2)


@pytest.mark.parametrize("name", [*REPLAYING, "ppo"])
def test_a_population_is_measured_as_its_seeds_are(name):
    more = {"rollout_steps": 8, "minibatches": 2, "epochs": 1} if name == "ppo" else {}
    build_one = build_ppo if name == "ppo" else build
    together, alone = build_one(name, seeds=(3, 4), **more), [build_one(name, seeds=seed, **more) for seed in (3, 4)]
    watching = [AgentDiagnostics(agent) for agent in (together, *alone)]
    world = torch.Generator().manual_seed(0)
    worlds = torch.randn(2, 24, 2, 1, 3, generator=world)
    found = []
    for agent, diagnostics, seeds in zip((together, *alone), watching, ([3, 4], 3, 4), strict=True):
        which = (0, 1) if agent is together else (seeds - 3,)
        for t in range(16):
            step_in(agent, [worlds[s][t] for s in which])
        own = diagnostics.measure(stream(seeds))
        for t in range(16, 24):
            step_in(agent, [worlds[s][t] for s in which])
            own |= diagnostics.gradient_norms()
        found.append(own)
    assert found[0].keys() == found[1].keys() == found[2].keys()
    assert "plasticity/gradient_norm" in found[0]
    for key, value in found[0].items():
        assert value.shape == (2,)
        if not key.startswith("speed/"):
            torch.testing.assert_close(value, torch.stack([found[1][key], found[2][key]]), rtol=2e-3, atol=2e-3)


def build_ppo(name, seeds=0, **settings):
    config = ppo.Config(hidden=(16, 16), **settings)
    return ppo.Agent(VECTOR, BOX, config, num_envs=1, device=CPU, streams=streams(seeds))


def step_in(agent, worlds):
    """One step of each seed, from and to observations [2, 1, 3]."""
    lead = agent.lead
    obs, following = (torch.stack([w[part] for w in worlds]).view(*lead, 1, 3) for part in (0, 1))
    agent.act(obs, explore=True)
    flat = make_step(following.reshape(-1, 3), 0.5)
    fields = {name: getattr(flat, name) for name in Step.__slots__}
    agent.observe(Step(**{name: value.reshape(*lead, 1, *value.shape[1:]) for name, value in fields.items()}))
    agent.update()


def test_ppo_is_measured_on_its_last_rollout():
    agent = build_ppo("ppo", rollout_steps=8, minibatches=2, epochs=1)
    for t in range(8):
        step_in(agent, [torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(t))])
    with torch.no_grad():
        agent.net.policy[0].weight[:5] = 0
        agent.net.policy[0].bias[:5] = 0
    found = AgentDiagnostics(agent).measure(stream(1))
    layers = [key.removeprefix("plasticity/dormant_fraction/net/") for key in found if "dormant_fraction/net/" in key]
    assert layers == ["policy.1", "policy.3", "value.1", "value.3"]
    assert found["plasticity/dormant_fraction/net/policy.1"] >= 5 / 16
    heads = [found[f"plasticity/effective_rank/net/{layer}"] for layer in ("policy.3", "value.3")]
    assert found["plasticity/effective_rank"] == pytest.approx(float(sum(heads)) / 2)


@pytest.mark.parametrize("name", ANY_REPLAYING)
def test_nothing_waits_for_a_gpu_but_the_ranks(name, monkeypatch):
    """See test_every_agent. The decomposition behind the ranks is made by the device's library, which may wait."""
    device = torch.device("cuda")
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    monkeypatch.setattr(torch.autograd, "grad", fake_gradients)
    monkeypatch.setattr(projection, "_check_radii", lambda groups: None)
    with FakeTensorMode():
        agent = build(name, device=device, warmup_steps=1)
        diagnostics = AgentDiagnostics(agent)
        obs = torch.zeros(1, 3, device=device)
        flags, scalars = torch.zeros(1, dtype=torch.bool, device=device), torch.zeros(1, device=device)
        for _ in range(4):
            agent.act(obs, explore=True)
            agent.observe(Step(obs, scalars, flags, flags, obs, scalars, scalars.long(), flags))
            agent.update()
        found = diagnostics.measure(stream(0, device))
    found.pop("speed/diagnostics_seconds")
    assert {value.device.type for value in found.values()} == {"cuda"}
