"""What every agent promises: schedule, state, purity, devices, and that it learns what a probe asks of it."""

from __future__ import annotations

import copy
import dataclasses
import io
import typing
from collections.abc import Callable

import pytest
import torch

from agents import beer, crossq, ddpg, dqn, qrdqn, rainbow, sac, td3, td7
from agents.agent import updates_due
from runs.catalogue import AGENTS
from tests.agents.fakes import (
    ANY_REPLAYING,
    BOX,
    BUTTONS,
    CPU,
    FRAMES,
    ONE_UPDATE_A_STEP,
    OPTIONED,
    SMALL,
    VALUING_ACTIONS,
    VECTOR,
    make_step,
    streams,
)

CONTINUOUS = {"beer": beer, "crossq": crossq, "ddpg": ddpg, "sac": sac, "td3": td3, "td7": td7}


def build(name: str, observation_spec=VECTOR, num_envs=1, seed=0, device=CPU, compiled=False, **settings):
    module = AGENTS[name]
    config = module.Config(**{**SMALL, **ONE_UPDATE_A_STEP.get(name, {}), **settings})
    spec = BUTTONS if name in VALUING_ACTIONS else BOX
    return module.Agent(
        observation_spec,
        spec,
        config,
        num_envs=num_envs,
        device=device,
        streams=streams(seed, device),
        compiled=compiled,
    )


def live(agent, steps: int, seed: int = 0, observations: int = 3) -> dict:
    """Random observations and rewards from a fixed stream; returns the last metrics."""
    world = torch.Generator().manual_seed(seed)
    rows = agent.num_envs
    obs, metrics = torch.randn(rows, observations, generator=world), {}
    for t in range(steps):
        agent.act(obs, explore=True)
        following = torch.randn(rows, observations, generator=world)
        reward = torch.rand(rows, generator=world)
        agent.observe(make_step(following, reward, truncated=t % 7 == 6))
        metrics = agent.update()
        obs = following
    return metrics


def parameters(agent) -> list[torch.Tensor]:
    """And buffers."""
    nets = [part for part in agent._parts().values() if isinstance(part, torch.nn.Module)]
    return [tensor.clone() for net in nets for tensor in net.state_dict().values()]


@pytest.mark.parametrize("name", ANY_REPLAYING)
def test_no_update_before_the_end_of_the_warmup_and_one_a_step_after(name):
    agent = build(name)
    assert live(agent, 8) == {}
    assert agent.updates == 0
    assert set(live(agent, 5)) >= {"loss/critic", "value/mean"}
    assert agent.updates == 5
    assert agent.steps == 13


def test_updates_keep_their_ratio_with_several_environments():
    agent = build("td3", num_envs=4)
    live(agent, 10)
    assert agent.steps == 40
    assert agent.updates == 40 - 8


def test_updates_due_counts_multiples_since_the_warmup():
    assert [updates_due(s, 1, 4, 3) for s in range(1, 11)] == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0]
    assert updates_due(steps=12, num_envs=8, warmup_steps=8, update_every=1) == 4


def test_td3_leaves_actor_and_targets_alone_on_odd_updates():
    agent = build("td3", policy_delay=2)
    live(agent, 8)
    slow = [p for net in (agent.actor, agent.target_actor, agent.target_critics) for p in net.parameters()]
    for update in range(1, 5):
        before = [p.clone() for p in slow]
        agent._update_once()
        changed = [not torch.equal(a, b) for a, b in zip(before, slow, strict=True)]
        assert all(changed) if update % 2 == 0 else not any(changed)


def test_polyak_average_of_the_critics():
    agent = build("sac", target_rate=0.25)
    live(agent, 8)
    before = [p.clone() for p in agent.target_critics.parameters()]
    agent._update_once()
    for old, new, online in zip(before, agent.target_critics.parameters(), agent.critics.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)


def test_dqn_copies_its_target_network_exactly_and_only_on_schedule():
    agent = build("dqn", target_update_every=5)
    live(agent, 14)
    stale = [p.clone() for p in agent.target_net.parameters()]
    live(agent, 1)  # step 15
    for old, target, online in zip(stale, agent.target_net.parameters(), agent.net.parameters(), strict=True):
        assert torch.equal(target, online)
        assert not torch.equal(old, target)


def test_dqn_epsilon_falls_linearly_and_stays():
    agent = build("dqn", epsilon_start=1.0, epsilon_end=0.2, epsilon_decay_steps=100)
    seen = []
    for steps in (0, 50, 100, 1000):
        agent.steps = steps
        seen.append(agent.epsilon)
    assert seen == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_dqn_explores_with_probability_epsilon():
    agent = build("dqn", warmup_steps=0, epsilon_start=0.3, epsilon_end=0.3, epsilon_evaluation=0.0)
    obs = torch.zeros(20_000, 3)
    greedy = agent.act(obs, explore=False)
    assert (greedy == greedy[0]).all()
    other = (agent.act(obs, explore=True) != greedy[0]).float().mean().item()
    assert other == pytest.approx(0.3 * 2 / 3, abs=0.012)  # four standard deviations of 20 000 draws


@pytest.mark.parametrize("name", CONTINUOUS)
def test_actions_are_in_the_environments_units(name):
    agent = build(name, num_envs=1, warmup_steps=0)
    obs = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * 50
    for explore in (False, True):
        action = agent.act(obs, explore)
        assert (action >= torch.from_numpy(BOX.low)).all()
        assert (action <= torch.from_numpy(BOX.high)).all()
    warm = build(name, warmup_steps=10).act(torch.zeros(4000, 3), explore=True)
    # uniform over the box [-2, 2] x [0, 1]
    assert warm.mean(0).tolist() == pytest.approx([0.0, 0.5], abs=0.08)
    assert warm.std(0).tolist() == pytest.approx([4 / 12**0.5, 1 / 12**0.5], rel=0.05)


@pytest.mark.parametrize("name", ANY_REPLAYING)
def test_same_seed_same_agent_and_evaluation_changes_nothing(name):
    one, two, other = build(name, seed=3), build(name, seed=3), build(name, seed=4)
    for agent in (one, two, other):
        live(agent, 15)
    for _ in range(5):
        two.act(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), explore=False)
    for agent in (one, two, other):
        live(agent, 15, seed=1)
    for a, b in zip(parameters(one), parameters(two), strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(parameters(one), parameters(other), strict=True))


@pytest.mark.parametrize("name", [*ANY_REPLAYING, *(f"{name} with LayerNorm" for name in OPTIONED)])
def test_saved_and_restored_agent_goes_on_bit_for_bit(name):
    settings = {"layer_norm": True} if "LayerNorm" in name else {}
    name = name.split()[0]
    whole, restored = build(name, **settings), build(name, seed=9, **settings)
    live(whole, 25, seed=1)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    live(whole, 15, seed=2)
    live(restored, 15, seed=2)
    assert (restored.steps, restored.updates) == (whole.steps, whole.updates) == (40, 32)
    for a, b in zip(parameters(whole), parameters(restored), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_agent_is_refused():
    with pytest.raises(ValueError, match="has no 'log_temperature'"):
        build("sac").load_state_dict(build("td3").state_dict())


@pytest.mark.parametrize("name", ANY_REPLAYING)
def test_observe_without_act_is_refused(name):
    with pytest.raises(RuntimeError, match="needs an act"):
        build(name).observe(make_step(torch.zeros(1, 3)))


def test_agents_refuse_what_they_cannot_act_on():
    with pytest.raises(ValueError, match="'td3' needs continuous actions, this environment has 3 discrete ones"):
        td3.Agent(VECTOR, BUTTONS, td3.Config(), num_envs=1, device=CPU, streams=streams())
    with pytest.raises(ValueError, match="'dqn' needs discrete actions, this environment has 2 continuous ones"):
        dqn.Agent(VECTOR, BOX, dqn.Config(), num_envs=1, device=CPU, streams=streams())
    with pytest.raises(ValueError, match="'sac' needs a vector of observations"):
        sac.Agent(FRAMES, BOX, sac.Config(), num_envs=1, device=CPU, streams=streams())


@pytest.mark.parametrize("name", ANY_REPLAYING)
def test_configs_are_frozen_typed_and_checked(name):
    module = AGENTS[name]
    config = module.Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.discount = 0.5
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), typing.get_type_hints(module.Config)[field.name]
        if typing.get_origin(kind) is typing.Literal:
            assert value in typing.get_args(kind), field.name
        else:
            assert type(value) is (typing.get_origin(kind) or kind), field.name
    own = {field.name for field in dataclasses.fields(config)}
    options = (("replay", "newest"), ("representation", "bear"), ("aggregation", "max"))
    choices = [(option, bad) for option, bad in options if option in own]
    assert choices or name == "td7"
    for setting, bad in (
        ("discount", 1.5),
        ("batch_size", 0),
        ("learning_rate", -1.0),
        ("hidden", ()),
        ("warmup_steps", -1),
        *choices,
    ):
        with pytest.raises(ValueError, match=setting):
            dataclasses.replace(config, **{setting: bad})


def critic_loss(name: str, agent, batch):
    """The loss of the agent's critics, and what it is called with."""
    target = torch.zeros(16)
    if name == "crossq":
        return crossq.critic_loss, (agent.actor, agent.critics, agent.log_temperature, batch, torch.zeros(16, 2), True)
    if name == "dqn":
        return dqn.dqn_loss, (agent.net, agent.target_net, batch, True)
    if name == "qrdqn":
        return qrdqn.loss, (agent.net, batch, torch.zeros(16, 9), 1.0, torch.rand(16))
    if name == "rainbow":
        noise = agent._draw_noise(streams()["update"])
        wanted = rainbow.target(agent.net, agent.target_net, batch, noise, noise, agent.support, True)
        return rainbow.loss, (agent.net, batch, wanted, noise, agent.support, torch.rand(16))
    if name == "beer":
        return beer.critic_loss, (agent.critic, agent.others, batch, target, agent.config)
    return AGENTS[name].critic_loss, (agent.critic if name == "ddpg" else agent.critics, batch, target)


@pytest.mark.parametrize("name", [*OPTIONED, "crossq"])
def test_losses_are_pure(name):
    """The same inputs twice give the same loss, and inputs are left as they were."""
    agent = build(name)
    live(agent, 12)
    batch = agent.replay.sample(16, 0.99)
    kept = copy.deepcopy(batch)
    before = parameters(agent)
    loss, arguments = critic_loss(name, agent, batch)
    losses = [loss(*arguments)[0] for _ in range(2)]
    assert torch.equal(losses[0], losses[1])
    for field in batch.__slots__:
        assert torch.equal(getattr(batch, field), getattr(kept, field))
    for a, b in zip(before, parameters(agent), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_dqn_takes_stacked_frames(layer_norm):
    agent = build("dqn", FRAMES, layer_norm=layer_norm, replay_capacity=60)
    world = torch.Generator().manual_seed(0)
    for _ in range(12):
        obs = torch.randint(0, 255, (1, 4, 36, 36), dtype=torch.uint8, generator=world)
        assert 0 <= int(agent.act(obs, explore=True)) < 3
        agent.observe(make_step(obs, 1.0))
        metrics = agent.update()
    assert agent.updates == 4
    assert metrics["loss/critic"].isfinite()


class Probe:
    """One-observation worlds whose values are known (idea: A. L. Jones, debugging RL)."""

    def __init__(self, name: str, agent):
        self.name, self.agent = name, agent
        self.world = torch.Generator().manual_seed(0)
        self.stage, self.sign = 0, 1.0

    def play_until_learnt(self, learnt: Callable[[], bool], at_most: int) -> None:
        """Twice in a row, a hundred steps apart, so that it is no accident."""
        found = [False]
        for _ in range(at_most // 100):
            self.play(100)
            found.append(learnt())
            if found[-2:] == [True, True]:
                return
        raise AssertionError(f"not learnt in {at_most} steps: {found[1:]}")

    def play(self, steps: int) -> None:
        agent, stage, sign = self.agent, self.stage, self.sign
        for _ in range(steps):
            obs = torch.tensor([[sign, float(stage), 1.0]])
            action = agent.act(obs, explore=True)
            sign_next = 1.0 if torch.rand((), generator=self.world) < 0.5 else -1.0
            if self.name == "observation":
                reward, ended = sign, True
            elif self.name == "delayed":
                reward, ended = float(stage), stage == 1
            else:  # the action matters, and which one is right depends on the observation
                push = 1.0 - float(action) if action.ndim == 1 else float(action[0, 0]) / 2
                reward, ended = push * sign, True
            following = torch.tensor([[sign_next if ended else sign, 0.0 if ended else 1.0, 1.0]])
            final = torch.tensor([[sign, 1.0, 1.0]])
            agent.observe(make_step(following, reward, terminated=ended, final_obs=final))
            agent.update()
            stage, sign = (0, sign_next) if ended else (1, sign)
        self.stage, self.sign = stage, sign


def value_at(agent, obs: list[float]) -> float:
    x = torch.tensor([obs])
    if hasattr(agent, "value_average"):  # symphony, whose values are in units of its scale of rewards
        with torch.no_grad():
            return (agent.critics(x, agent.act(x, False)).mean() * agent.replay.reward_scale).item()
    return agent.value(x).item()


PROBE_SETTINGS = {"warmup_steps": 50, "replay_capacity": 2_000, "batch_size": 32, "hidden": (32, 32)}
PROBE_SETTINGS |= {"learning_rate": 3e-3, "discount": 0.5}


def probe_agent(name: str):
    extra = {"sac": {"initial_temperature": 1e-6}, "dqn": {"target_update_every": 10, "epsilon_decay_steps": 200}}
    extra["crossq"] = {"initial_temperature": 1e-6, "policy_delay": 1, "batch_norm_momentum": 0.9}
    extra["symphony"] = {"replay_capacity": 800, "fall_window": 0, "updates_per_step": 2, "nodes": 8}
    extra["qrdqn"] = {**extra["dqn"], "adam_epsilon": 1e-8, "quantiles": 11}
    extra["rainbow"] = {"target_update_every": 10, "adam_epsilon": 1e-8, "v_min": -2.0, "v_max": 2.0}
    extra["td7"] = {"embedding": 32, "target_update_every": 20, "learning_rate": 1e-3, "exploration_noise": 0.3}
    rate = {} if name in (*VALUING_ACTIONS, "crossq", "td7") else {"target_rate": 0.05}
    return build(name, **{**PROBE_SETTINGS, **rate, **extra.get(name, {})})


def near(agent, obs: list[float], value: float) -> bool:
    return value_at(agent, obs) == pytest.approx(value, abs=0.15)


@pytest.mark.parametrize("name", ANY_REPLAYING)
def test_probe_learns_the_observed_reward(name):
    agent = probe_agent(name)

    def learnt() -> bool:
        return near(agent, [1.0, 0.0, 1.0], 1.0) and near(agent, [-1.0, 0.0, 1.0], -1.0)

    Probe("observation", agent).play_until_learnt(learnt, 500)


@pytest.mark.parametrize("name", ANY_REPLAYING)
def test_probe_learns_the_discount(name):
    """Two steps, reward 1 at the second: V(first) must become γ = 0.5."""
    agent = probe_agent(name)

    def learnt() -> bool:
        return near(agent, [1.0, 1.0, 1.0], 1.0) and near(agent, [1.0, 0.0, 1.0], 0.5)

    Probe("delayed", agent).play_until_learnt(learnt, 700)


@pytest.mark.parametrize("name", ANY_REPLAYING)
def test_probe_policy_depends_on_the_observation(name):
    agent = probe_agent(name)

    def learnt() -> bool:
        up, down = (agent.act(torch.tensor([[s, 0.0, 1.0]]), explore=False)[0] for s in (1.0, -1.0))
        if name in VALUING_ACTIONS:
            return (up.item(), down.item()) == (0, 2)
        return bool(up[0] > 1.0 and down[0] < -1.0)

    Probe("action", agent).play_until_learnt(learnt, 900)
