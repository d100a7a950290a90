"""Interventions and schedules in agents: where they act, exact resuming, and that without them nothing changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from agents.plastic import AgentOptimizer, Plasticity
from envs import Step
from plasticity.intervention import Intervention
from plasticity.nap import NaP
from plasticity.networks import projection
from plasticity.networks.normalisation import Normalise
from plasticity.schedules import Cosine, Linear
from runs.catalogue import AGENTS
from tests.agents.fakes import (
    BOX,
    BUTTONS,
    CPU,
    FRAMES,
    ONE_UPDATE_A_STEP,
    REPLAYING,
    SMALL,
    TAKING_NAP,
    VALUING_ACTIONS,
    VECTOR,
    fake_gradients,
    make_step,
    streams,
)


def build(name, plasticity=None, observation_spec=VECTOR, seeds=0, device=CPU, **settings):
    module = AGENTS[name]
    config = module.Config(**{**SMALL, **ONE_UPDATE_A_STEP.get(name, {}), **settings})
    return module.Agent(
        observation_spec,
        BUTTONS if name in VALUING_ACTIONS else BOX,
        config,
        num_envs=1,
        device=device,
        streams=streams(seeds, device),
        plasticity=plasticity,
    )


def live(agent, steps, start=0):
    metrics = {}
    for t in range(start, start + steps):
        world = torch.Generator().manual_seed(t)
        lead = agent.lead
        obs, following = torch.randn(2, *lead, 1, 3, generator=world)
        agent.act(obs, explore=True)
        flat = make_step(following.reshape(-1, 3), 0.5, truncated=t % 7 == 6)
        fields = {name: getattr(flat, name) for name in Step.__slots__}
        agent.observe(Step(**{name: value.reshape(*lead, 1, *value.shape[1:]) for name, value in fields.items()}))
        metrics = agent.update()
    return metrics


def optimizers(agent):
    return [part for part in agent._parts().values() if isinstance(part, AgentOptimizer)]


def networks(agent):
    return {name: part for name, part in agent._parts().items() if isinstance(part, nn.Module)}


def online_norms(agent):
    return [
        [torch.cat([dict(optimizer.learner.network.named_parameters())[name].detach().flatten(group.leading)
                    for name in group.tensors], -1).norm(dim=-1) for group in optimizer.interventions[0].groups]
        for optimizer in optimizers(agent)
    ]  # fmt: skip


@pytest.mark.parametrize("seeds", [0, (0, 1, 2)])
@pytest.mark.parametrize("name", TAKING_NAP)
def test_hidden_weights_of_every_network_keep_their_norms(name, seeds):
    agent = build(name, Plasticity(lambda: [NaP()]), seeds=seeds, learning_rate=0.01)
    assert len(optimizers(agent)) == (1 if name in VALUING_ACTIONS else 2)
    before = online_norms(agent)
    start = [p.detach().clone() for p in agent._parts()["net" if name in VALUING_ACTIONS else "actor"].parameters()]
    live(agent, 30)
    assert agent.updates > 10
    for old, new in zip(before, online_norms(agent), strict=True):
        for a, b in zip(old, new, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    now = agent._parts()["net" if name in VALUING_ACTIONS else "actor"].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(start, now, strict=True))
    for network in networks(agent).values():
        norms = [m for m in network.modules() if isinstance(m, nn.LayerNorm) or "LayerNorm" in type(m).__name__]
        assert len(norms) == (3 if name == "rainbow" else 2)


def test_twin_critics_have_radii_of_their_own():
    agent = build("td3", Plasticity(lambda: [NaP()]))
    critics = agent.critic_optimizer.interventions[0]
    assert [tuple(group.radius.shape) for group in critics.groups] == [(2,), (2,)]
    assert len({float(r) for r in critics.groups[0].radius}) == 2


@pytest.mark.parametrize("name", REPLAYING)
def test_without_interventions_an_agent_is_the_plain_one(name):
    plain, off = build(name), build(name, Plasticity(lambda: [NaP(normalise=False, project=False)]))
    for agent in (plain, off):
        live(agent, 20)
    for key, network in networks(plain).items():
        for a, b in zip(network.parameters(), networks(off)[key].parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("seeds", [0, (0, 1)])
@pytest.mark.parametrize("name", TAKING_NAP)
def test_resumed_exactly(name, seeds):
    def make():
        return build(name, Plasticity(lambda: [NaP(project_every=3)], Linear(40)), seeds=seeds, learning_rate=0.01)

    whole = make()
    live(whole, 30)
    first = make()
    live(first, 17)
    count = len(seeds) if seeds else 1
    saved = [copy.deepcopy(first.state_dict(seed)) for seed in range(count)]
    second = make()
    live(second, 5)  # other weights, moments, counters
    for seed in range(count):
        second.load_state_dict(saved[seed], seed)
    live(second, 13, start=17)
    for key, network in networks(whole).items():
        for a, b in zip(network.parameters(), networks(second)[key].parameters(), strict=True):
            assert torch.equal(a, b), key


def test_an_agent_of_other_interventions_is_refused():
    state = build("td3", Plasticity(lambda: [NaP(), Normalise()])).state_dict()
    with pytest.raises(ValueError, match="other interventions"):
        build("td3", Plasticity(lambda: [NaP()])).load_state_dict(state)


def test_learning_rates_begin_again_with_each_task():
    schedule = Cosine(10, warmup=2, end=0.5, restart=True)
    agent = build("dqn", Plasticity(schedule=schedule, task_steps=10), learning_rate=0.01)
    seen = []
    for step in range(25):
        live(agent, 1, start=step)
        seen.append(agent.optimizer.learning_rate)
    assert seen == pytest.approx([0.01 * schedule.factor(0, step % 10) for step in range(1, 26)])
    assert seen[9] == 0  # the first step of the second task
    assert seen[11] == pytest.approx(0.01)


def test_learning_rates_follow_the_schedule():
    agent = build("sac", Plasticity(schedule=Linear(100, end=0.5)), learning_rate=0.02)
    live(agent, 50)
    for optimizer in (agent.actor_optimizer, agent.critic_optimizer, agent.temperature_optimizer):
        assert optimizer.learning_rate == pytest.approx(0.02 * 0.75)


def test_penalties_reach_the_loss():
    class Shrink(Intervention):
        def penalty(self, learner, parameters):
            return 1e4 * torch.stack([p.flatten(1).square().sum(1) for p in parameters.values()]).sum(0)

    sizes = []
    for plasticity in (None, Plasticity(lambda: [Shrink()])):
        agent = build("dqn", plasticity, learning_rate=0.01)
        live(agent, 40)
        sizes.append(sum(float(p.detach().square().sum()) for p in agent.net.parameters()))
    assert sizes[1] < 0.7 * sizes[0]


def test_images():
    agent = build("dqn", Plasticity(lambda: [NaP()]), FRAMES, replay_capacity=60)
    world = torch.Generator().manual_seed(0)
    for _ in range(12):
        obs = torch.randint(0, 255, (1, 4, 36, 36), dtype=torch.uint8, generator=world)
        agent.act(obs, explore=True)
        agent.observe(make_step(obs, 1.0))
        metrics = agent.update()
    assert math.isfinite(float(metrics["loss/critic"]))
    assert len(agent.optimizer.interventions[0].groups) == 4


@pytest.mark.parametrize("name", TAKING_NAP)
def test_update_does_not_wait_for_a_gpu(name, monkeypatch):
    """See test_every_agent: gradients are stood in for; planning reads the radii once, which is left out here."""
    device = torch.device("cuda")
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    monkeypatch.setattr(torch.autograd, "grad", fake_gradients)
    monkeypatch.setattr(projection, "_check_radii", lambda groups: None)
    with FakeTensorMode():
        agent = build(name, Plasticity(lambda: [NaP()], Linear(100)), device=device, warmup_steps=2)
        obs = torch.zeros(1, 3, device=device)
        flags, scalars = torch.zeros(1, dtype=torch.bool, device=device), torch.zeros(1, device=device)
        for _ in range(4):
            agent.act(obs, explore=True)
            agent.observe(Step(obs, scalars, flags, flags, obs, scalars, scalars.long(), flags))
            metrics = agent.update()
        assert {value.device.type for value in metrics.values()} == {"cuda"}
