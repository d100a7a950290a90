"""PPO: advantages, loss and running scales against numbers worked out by hand, by torch or by a plain loop."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from agents import ppo
from agents.moments import Moments, as_seen
from agents.networks import initialise_
from agents.plastic import Plasticity
from agents.ppo import Agent, Config, Samples
from envs import Step
from plasticity import registry
from runs.catalogue import preset_config
from tests.agents.fakes import BOX, BUTTONS, CPU, FRAMES, VECTOR, fake_gradients, make_step, streams

SMALL: dict[str, Any] = {"rollout_steps": 12, "epochs": 2, "minibatches": 3, "hidden": (8, 8), "learning_rate": 1e-2}


def make_agent(seeds: int | list[int] = 0, spec=BOX, observations=VECTOR, device=CPU, plasticity=None, **settings):
    config = Config(**{**SMALL, **settings})
    made = streams(seeds, device)
    return Agent(observations, spec, config, num_envs=2, device=device, streams=made, plasticity=plasticity)


def column(*values: float) -> Tensor:
    """[T, 1]."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def flags(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)[:, None]


# Advantages


def test_with_lambda_and_discount_one_the_advantage_is_the_return_less_the_value():
    reward, value = column(1, 2, 3), column(0.5, -1, 2)
    found = ppo.advantages(reward, value, column(-1, 2, 99), flags(0, 0, 1), flags(0, 0, 1), 1.0, 1.0)
    assert found[:, 0].tolist() == pytest.approx([6 - 0.5, 5 + 1, 3 - 2])


def test_advantages_by_hand_over_a_termination_and_a_truncation():
    """Three rows: terminated in the middle, truncated in the middle, and one that goes on."""
    g, lam = 0.9, 0.8
    reward = torch.tensor([[1.0, 1, 1], [2, 2, 2], [3, 3, 3]], dtype=torch.float64)
    value = torch.tensor([[10.0, 20, 30], [11, 21, 31], [12, 22, 32]], dtype=torch.float64)
    next_value = torch.tensor([[11.0, 21, 31], [77, 55, 32], [13, 23, 33]], dtype=torch.float64)
    terminated = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    ended = torch.tensor([[0, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    found = ppo.advantages(reward, value, next_value, terminated, ended, g, lam)
    for row, (second, carries) in enumerate(((2 - 11, 0), (2 + g * 55 - 21, 0), (2 + g * 32 - 31, 1))):
        third = 3 + g * next_value[2, row] - value[2, row]
        second = second + carries * g * lam * third
        first = 1 + g * next_value[0, row] - value[0, row] + g * lam * second
        assert found[:, row].tolist() == pytest.approx([float(first), float(second), float(third)])


@pytest.mark.parametrize("seeds", [0, [0, 1]])
def test_frames_are_bootstrapped_from_their_true_successors(seeds):
    """Whether the value of a successor is asked for again or taken from where it was seen next."""
    agent = make_agent(seeds, spec=BUTTONS, observations=FRAMES, rollout_steps=8, minibatches=4)
    lead, world = agent.lead, torch.Generator().manual_seed(0)

    def frames() -> Tensor:
        return torch.randint(0, 256, (*lead, 2, *FRAMES.shape), dtype=torch.uint8, generator=world)

    obs, successors = frames(), []
    for t in range(8):
        agent.act(obs, explore=True)
        terminated, truncated = (torch.zeros(*lead, 2, dtype=torch.bool) for _ in range(2))
        terminated[..., 0], truncated[..., 1] = t == 2, t in (1, 2, 5)
        following = frames()
        final = torch.where((terminated | truncated)[..., None, None, None], frames(), following)
        scalars = torch.zeros(*lead, 2)
        agent.observe(Step(following, scalars, terminated, truncated, final, scalars, scalars.long(), truncated))
        obs = following
        successors.append(final)
    asked = []
    agent.net.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].shape[len(lead)]))
    found = agent._next_value()
    assert sum(asked) == 5  # three truncated steps, and the last one of both rows
    axis = len(lead)
    expected = agent.net(torch.stack(successors, axis).flatten(axis, axis + 1))[1].view_as(found)
    kept = ~agent.rollout.terminated
    torch.testing.assert_close(found[kept], expected[kept].detach())


# The loss


def reference_loss(net, samples: Samples, config: Config) -> Tensor:
    """Equation 9 with torch's own distributions, sample by sample."""
    outputs, value = net(samples.obs)
    if net.log_std is None:
        distribution = torch.distributions.Categorical(logits=outputs)
        log, entropy = distribution.log_prob(samples.action), distribution.entropy()
    else:
        normal = torch.distributions.Normal(outputs, net.log_std.exp().expand_as(outputs))
        log, entropy = normal.log_prob(samples.action).sum(-1), normal.entropy().sum(-1)
    scaled = (samples.advantage - samples.advantage.mean()) / (samples.advantage.std() + 1e-8)
    total = torch.zeros(())
    for i in range(len(value)):
        ratio = (log[i] - samples.log_probability[i]).exp()
        kept = ratio.clamp(1 - config.clip, 1 + config.clip)
        target = samples.advantage[i] + samples.value[i]
        near = samples.value[i] + (value[i] - samples.value[i]).clamp(-config.clip, config.clip)
        errors = (value[i] - target) ** 2, (near - target) ** 2
        error = torch.maximum(*errors) if config.clip_value else errors[0]
        policy = -torch.minimum(ratio * scaled[i], kept * scaled[i])
        total = total + policy + config.value_weight * 0.5 * error - config.entropy_weight * entropy[i]
    return total / len(value)


@pytest.mark.parametrize("spec", [BOX, BUTTONS], ids=["continuous", "discrete"])
@pytest.mark.parametrize("clip_value", [True, False])
def test_loss_is_what_a_loop_over_samples_says(spec, clip_value):
    config = Config(**SMALL, entropy_weight=0.03, clip_value=clip_value)
    net = ppo.ActorCritic(VECTOR, spec, config)
    initialise_(net, torch.Generator().manual_seed(0))
    source = torch.Generator().manual_seed(1)
    obs, advantage = torch.randn(20, 3, generator=source), 3 * torch.randn(20, generator=source)
    action = torch.randn(20, 2, generator=source) if spec is BOX else torch.randint(3, (20,), generator=source)
    outputs, value = net(obs)
    log, _ = ppo.log_probability(net, outputs, action)
    moved = 0.5 * torch.randn(2, 20, generator=source)
    samples = Samples(obs, action, log.detach() + moved[0], value.detach() + moved[1], advantage)
    found, metrics = ppo.loss(net, samples, config)
    expected = reference_loss(net, samples, config)
    torch.testing.assert_close(found, expected)
    assert 0.2 < metrics["policy/clip_fraction"] < 1
    mine, theirs = (torch.autograd.grad(loss, list(net.parameters())) for loss in (found, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_first_minibatch_has_ratio_one():
    agent = make_agent(epochs=1, minibatches=1)
    metrics = live(agent, 12)
    assert metrics["policy/approximate_kl"].item() == pytest.approx(0, abs=1e-6)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["loss/policy"].item() == pytest.approx(0, abs=1e-6)  # minus the mean of normalised advantages


# Details


def test_weights_begin_orthogonal():
    net = ppo.ActorCritic(VECTOR, BOX, Config(hidden=(64, 64)))
    initialise_(net, torch.Generator().manual_seed(0))
    for module, gain in ((net.policy[2], math.sqrt(2)), (net.policy[4], 0.01), (net.value[4], 1.0)):
        sigma = torch.linalg.svdvals(module.weight.detach())
        torch.testing.assert_close(sigma, torch.full_like(sigma, gain))
        assert not module.bias.any()
    frames = ppo.ActorCritic(FRAMES, BUTTONS, Config())
    initialise_(frames, torch.Generator().manual_seed(0))
    kernel = next(m for m in frames.encoder.modules() if isinstance(m, torch.nn.Conv2d)).weight.detach()
    sigma = torch.linalg.svdvals(kernel.flatten(1))
    torch.testing.assert_close(sigma, torch.full_like(sigma, math.sqrt(2)))


def test_moments_are_those_of_everything_shown():
    data = 3 + 2 * torch.randn(3, 50, 4, 2, generator=torch.Generator().manual_seed(0))
    moments = Moments((3,), (2,), CPU, limit=10)
    for part in data.unbind(1):
        moments.update(part)
    everything = data.flatten(1, 2)
    torch.testing.assert_close(moments.mean.float(), everything.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.variance.float(), everything.var(1, correction=0), rtol=1e-3, atol=1e-3)
    normalised = moments.normalise(everything)
    assert normalised.mean().abs() < 1e-4
    assert moments.normalise(everything + 1e6).max() == 10


def test_rewards_are_scaled_by_the_deviation_of_discounted_returns():
    agent = make_agent(discount=0.5)
    rewards = [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]), torch.tensor([-1.0, 4.0])]
    returns, seen = torch.zeros(2), []
    for t, reward in enumerate(rewards):
        agent.act(torch.zeros(2, 3), explore=True)
        agent.observe(make_step(torch.zeros(2, 3), reward, terminated=t == 1))
        returns = 0.5 * returns + reward
        seen.append(returns.clone())
        deviation = torch.cat(seen).double().var(correction=0).sqrt()
        torch.testing.assert_close(agent.rollout.reward[t], (reward / deviation).float(), rtol=1e-3, atol=1e-4)
        if t == 1:
            returns = torch.zeros(2)


def test_evaluation_takes_the_mean_and_moves_no_scale():
    agent = make_agent()
    live(agent, 30)
    before = copy.deepcopy(agent.state_dict())
    obs = torch.randn(7, 3, generator=torch.Generator().manual_seed(3))
    action = agent.act(obs, explore=False)
    assert torch.equal(action, agent.act(obs, explore=False))
    assert torch.equal(before["parts"]["observation_moments"]["mean"], agent.observation_moments.mean)
    assert (action >= torch.from_numpy(BOX.low)).all()


@pytest.mark.parametrize("spec", [BUTTONS, BOX], ids=["buttons", "box"])
def test_evaluation_may_draw_from_the_policy_as_cleanrl_does(spec):
    """Its frequencies, or mean and deviation; what is drawn for training stays as it is."""
    agent, other = (make_agent(spec=spec, deterministic_evaluation=choice) for choice in (False, True))
    obs = torch.full((20_000, 3), 0.7)
    drawn = agent.act(obs, explore=False)
    outputs, _ = agent.net(as_seen(agent, obs[:1]))
    if spec is BUTTONS:
        frequency = torch.nn.functional.one_hot(drawn, spec.count).float().mean(0)
        torch.testing.assert_close(frequency, outputs[0].softmax(-1), rtol=0, atol=0.02)
        assert not torch.equal(drawn, agent.act(obs, explore=False))
    else:
        unit = outputs[0].detach() + torch.randn(200_000, spec.size, generator=torch.Generator().manual_seed(1))
        expected = agent.scale.to_environment(unit.clamp(-1, 1))
        torch.testing.assert_close(drawn.mean(0), expected.mean(0), rtol=0, atol=0.05)
        torch.testing.assert_close(drawn.std(0), expected.std(0), rtol=0, atol=0.05)
    other.act(obs, explore=False)
    assert torch.equal(agent.act(obs[:2], explore=True), other.act(obs[:2], explore=True))


def test_updates_come_with_full_rollouts():
    agent = make_agent()
    assert live(agent, 11) == {}
    assert agent.updates == 0
    live(agent, 1)
    assert agent.updates == 2 * 3
    live(agent, 12)
    assert agent.updates == 12
    with pytest.raises(ValueError, match="less than two samples"):
        make_agent(minibatches=20)


def test_every_sample_is_in_one_minibatch_of_each_epoch(monkeypatch):
    agent = make_agent(epochs=1)
    live(agent, 11)
    seen: list[Tensor] = []

    def spying(net, samples, config):
        seen.append(samples.value)
        return ppo.loss(net, samples, config)

    agent.loss = spying
    live(agent, 1)
    assert [len(part) for part in seen] == [8, 8, 8]
    assert torch.equal(torch.cat(seen).sort().values, agent.rollout.value.flatten().sort().values)


# The agent


class World:
    def __init__(self, seed: int, frames: bool = False):
        self.numbers, self.clock, self.frames = torch.Generator().manual_seed(seed), 0, frames
        self.obs = self.observation()

    def observation(self) -> Tensor:
        if self.frames:
            return torch.randint(0, 255, (2, 4, 36, 36), dtype=torch.uint8, generator=self.numbers)
        return torch.randn(2, 3, generator=self.numbers)

    def step(self) -> Step:
        self.clock += 1
        self.obs, reward = self.observation(), torch.randn(2, generator=self.numbers)
        ended = torch.rand(2, generator=self.numbers) < 0.1
        final = self.observation()
        return make_step(self.obs, reward, terminated=ended, truncated=self.clock % 9 == 0, final_obs=final)


def live(agent: Agent, rounds: int, seed: int = 0, frames: bool = False) -> dict[str, Tensor]:
    worlds = [World(seed + member, frames) for member in range(max(1, math.prod(agent.lead)))]
    metrics: dict[str, Tensor] = {}

    def together(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors) if agent.lead else tensors[0]

    for _ in range(rounds):
        agent.act(together([world.obs for world in worlds]), explore=True)
        steps = [world.step() for world in worlds]
        agent.observe(Step(**{name: together([getattr(s, name) for s in steps]) for name in Step.__slots__}))
        metrics |= agent.update()
    return metrics


@pytest.mark.parametrize("spec", [BOX, BUTTONS], ids=["continuous", "discrete"])
def test_population_does_what_its_seeds_do_alone(spec):
    population = make_agent([0, 1, 2], spec)
    metrics = live(population, 40)
    for index in range(3):
        alone = make_agent(index, spec)
        expected = live(alone, 40, seed=index)
        own, theirs = population.state_dict(index)["parts"], alone.state_dict()["parts"]
        for name in ("net", "observation_moments", "return_moments"):
            for key, value in theirs[name].items():
                torch.testing.assert_close(own[name][key], value, rtol=1e-4, atol=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name][index], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seeds", [0, [0, 1]])
def test_saved_and_restored_agent_goes_on_bit_for_bit(seeds):
    """Saved in the middle of a rollout."""
    whole, restored = make_agent(seeds), make_agent(seeds)
    live(restored, 15, seed=9)
    live(whole, 29)
    for seed in range(max(1, math.prod(whole.lead))):
        file = io.BytesIO()
        torch.save(whole.state_dict(seed), file)
        file.seek(0)
        restored.load_state_dict(torch.load(file, weights_only=True), seed)
    for agent in (whole, restored):
        live(agent, 20, seed=5)
    for a, b in zip(whole.net.parameters(), restored.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (whole.steps, whole.updates) == (restored.steps, restored.updates) == (98, 24)


def test_frames():
    agent = make_agent(spec=BUTTONS, observations=FRAMES, rollout_steps=6)
    metrics = live(agent, 6, frames=True)
    assert agent.rollout.obs.dtype == torch.uint8
    assert agent.observation_moments is None
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("text", ["nap", "redo(every=2)", "l2-init", "layernorm+shrink-perturb-step"])
def test_interventions_go_with_it(text):
    agent = make_agent(plasticity=Plasticity(lambda: registry.make(text)))
    live(agent, 30)
    assert all(p.isfinite().all() for p in agent.net.parameters())


@pytest.mark.parametrize("seeds", [0, [0, 1]])
def test_update_runs_on_a_fake_gpu_without_mixing_devices_or_waiting_for_it(seeds, monkeypatch):
    """As for the other agents, see test_every_agent."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.autograd, "grad", fake_gradients)
    with FakeTensorMode():
        agent = make_agent(seeds, device=device)
        lead = agent.lead
        obs, scalars = torch.zeros(*lead, 2, 3, device=device), torch.zeros(*lead, 2, device=device)
        never = torch.zeros(*lead, 2, dtype=torch.bool, device=device)
        metrics: dict[str, Tensor] = {}
        while agent.updates == 0:
            agent.act(obs, explore=True)
            agent.observe(Step(obs, scalars, never, never, obs, scalars, scalars.long(), never))
            metrics = agent.update()
        assert {value.device.type for value in metrics.values()} == {"cuda"}


def test_compiled_loss_is_one_graph_with_the_same_numbers():
    agent = make_agent()
    live(agent, 11)
    samples = agent._samples()
    whole = torch.compile(ppo.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        whole(agent.net, samples, agent.config)[0], ppo.loss(agent.net, samples, agent.config)[0]
    )


@pytest.mark.parametrize("spec", [BOX, BUTTONS], ids=["continuous", "discrete"])
def test_policy_learns_what_the_observation_asks_for(spec):
    """One-step episodes: the first action must have the sign of the observation."""
    settings = {"rollout_steps": 64, "epochs": 8, "minibatches": 4, "hidden": (16,), "entropy_weight": 0.0}
    agent = make_agent(spec=spec, **settings, normalise_observations=False)
    world = torch.Generator().manual_seed(0)
    sign = torch.ones(2)
    for _ in range(64 * 20):
        obs = torch.stack([sign, torch.ones(2), torch.zeros(2)], -1)
        action = agent.act(obs, explore=True)
        push = action[:, 0] / 2 if spec is BOX else 1.0 - action
        sign = (torch.rand(2, generator=world) < 0.5).float() * 2 - 1
        following = torch.stack([sign, torch.ones(2), torch.zeros(2)], -1)
        agent.observe(make_step(following, push * obs[:, 0], terminated=True, final_obs=obs))
        agent.update()
    up, down = (agent.act(torch.tensor([[s, 1.0, 0.0]] * 2), explore=False)[0] for s in (1.0, -1.0))
    if spec is BUTTONS:
        assert (int(up), int(down)) == (0, 2)
    else:
        assert up[0] > 1.0
        assert down[0] < -1.0


def test_published_settings():
    atari, mujoco = preset_config("ppo", "atari"), Config()
    assert (atari.rollout_steps, atari.epochs, atari.minibatches) == (128, 4, 4)
    assert (atari.learning_rate, atari.clip, atari.entropy_weight) == (2.5e-4, 0.1, 0.01)
    assert (atari.deterministic_evaluation, mujoco.deterministic_evaluation) == (False, True)
    assert (mujoco.rollout_steps, mujoco.epochs, mujoco.minibatches) == (2_048, 10, 32)
    assert (mujoco.learning_rate, mujoco.clip, mujoco.entropy_weight, mujoco.hidden) == (3e-4, 0.2, 0.0, (64, 64))
    assert (mujoco.discount, mujoco.gae_lambda, mujoco.value_weight, mujoco.max_gradient_norm) == (0.99, 0.95, 0.5, 0.5)
