"""TD7 against hand values and the authors' settings (specs/beer-and-online-rl.md, sections 9 and 12)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from agents import td7
from agents.networks import new_network
from tests.agents.fakes import BOX, CPU, VECTOR, make_step, stream, streams
from tests.agents.test_agents import live
from tests.faithful.test_baseline_losses import BATCH

SMALL = {"warmup_steps": 8, "replay_capacity": 200, "batch_size": 16, "hidden": (16, 16), "embedding": 8}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(seeds=0, **settings) -> td7.Agent:
    config = td7.Config(**{**SMALL, "checkpoints": False, **settings})
    return td7.Agent(VECTOR, BOX, config, num_envs=1, device=CPU, streams=streams(seeds))


def tensors(network: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_published_settings():
    config = td7.Config()
    assert (config.embedding, config.hidden, config.learning_rate, config.batch_size) == (256, (256, 256), 3e-4, 256)
    assert (config.target_update_every, config.policy_delay, config.exploration_noise) == (250, 2, 0.1)
    assert (config.target_noise, config.target_noise_clip) == (0.2, 0.5)
    assert (config.priority_exponent, config.smallest_priority) == (0.4, 1.0)
    judging = config.checkpoint_episodes, config.checkpoint_after, config.checkpoint_reset
    assert judging == (20, 750_000, 0.9)
    assert (config.warmup_steps, config.replay_capacity, config.discount) == (25_000, 1_000_000, 0.99)
    sizes = [sum(p.numel() for p in kind(17, 6, config).parameters()) for kind in (td7.Encoder, td7.Actor, td7.Critics)]
    square = 257 * 256
    assert sizes[0] == 18 * 256 + 2 * square + 263 * 256 + 2 * square
    assert sizes[1] == 18 * 256 + 513 * 256 + square + 257 * 6
    assert sizes[2] == 2 * (24 * 256 + 769 * 256 + square + 257)


def test_embeddings_have_a_mean_size_of_one():
    x = numbers(5, 7) * 100
    torch.testing.assert_close(td7.AvgL1Norm()(x).abs().mean(-1), torch.ones(5))
    assert td7.AvgL1Norm()(torch.tensor([1.0, -3.0])).tolist() == [0.5, -1.5]
    assert not td7.AvgL1Norm()(torch.zeros(3)).any()
    encoder = new_network(lambda: td7.Encoder(3, 2, td7.Config(hidden=(8, 8), embedding=4)), stream(0))
    torch.testing.assert_close(encoder.zs(numbers(5, 3)).abs().mean(-1), torch.ones(5))


def test_loss_of_errors():
    error = torch.tensor([0.5, 1.0, 4.0], requires_grad=True)
    assert td7.lap(error, 1.0).tolist() == [0.125, 1.0, 4.0]
    assert td7.lap(error, 2.0).tolist() == [0.125, 0.5, 8.0]
    assert torch.autograd.grad(td7.lap(error, 1.0).sum(), error)[0].tolist() == [0.5, 1.0, 1.0]


class Encodes(nn.Module):
    """z^s = 1, z^sa = a."""

    def zs(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(obs), 1)

    def zsa(self, zs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return zs * action


class Values(nn.Module):
    count = 2

    def forward(self, obs, action, zsa, zs):
        return torch.stack([10 * zsa[:, 0], 12 * action[:, 0] + zs[:, 0]])


def test_target_by_hand():
    """a' = clip(0.9 + clip(0.7, 0.5)) = 1; min(10, 13) = 10, clipped to what was seen; γ = 0.5; the first ended."""

    def act(obs, zs):
        return 0.9 * zs

    for bounds, value in (((-99.0, 99.0), 10), ((0.0, 0.0), 0), ((-3.0, 8.0), 8), ((11.0, 20.0), 11)):
        lowest, highest = torch.tensor(bounds)
        target = td7.td_target(act, Values(), Encodes(), BATCH, torch.full((2, 1), 0.7), 0.5, lowest, highest)  # type: ignore[arg-type]
        assert target.tolist() == pytest.approx([1.0, 1 + 0.5 * value])


def test_critic_loss_and_priorities_by_hand():
    """At a = 0: Q = (0, 1) for both rows, y = (0.5, 4)."""
    loss, error, _ = td7.critic_loss(Values(), Encodes(), BATCH, torch.tensor([0.5, 4.0]), 1.0)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx((0.125 + 4) / 2 + (0.125 + 3) / 2)
    assert error.tolist() == [0.5, 4.0]


def test_encoder_predicts_what_it_will_say_of_the_next_state():
    agent = build()
    live(agent, 12)
    batch, parameters = agent.replay.sample(16, 0.99), list(agent.encoder.parameters())
    following = agent.encoder.zs(batch.next_obs).detach()
    prediction = agent.encoder.zsa(agent.encoder.zs(batch.obs), batch.action)
    expected = nn.functional.mse_loss(prediction, following)
    loss = td7.encoder_loss(agent.encoder, batch)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(each, parameters) for each in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_copies_by_schedule_and_in_order():
    agent = build(target_update_every=3)
    live(agent, 8)
    for update in range(1, 7):
        fixed, targets = tensors(agent.fixed_encoder), tensors(agent.target_critics)
        bounds = agent.bounds.clone()
        agent._update_once()
        if update % 3:
            assert same(fixed, tensors(agent.fixed_encoder))
            assert same(targets, tensors(agent.target_critics))
            assert torch.equal(bounds, agent.bounds)
            continue
        assert same(fixed, tensors(agent.target_encoder))
        for copied, source in (("fixed_encoder", "encoder"), ("target_actor", "actor"), ("target_critics", "critics")):
            assert same(tensors(getattr(agent, copied)), tensors(getattr(agent, source)))
        assert agent.bounds[0] <= agent.bounds[1]
        assert torch.equal(agent.bounds, agent.seen)
        assert agent.replay.largest[0] == agent.replay.tree.levels[-1].max()


def test_actor_every_second_step():
    agent = build()
    live(agent, 8)
    for update in range(1, 5):
        before = tensors(agent.actor)
        agent._update_once()
        assert same(before, tensors(agent.actor)) is (update % 2 == 1)


def test_priorities_are_errors_of_at_least_one_to_the_power(monkeypatch):
    agent = build()
    live(agent, 12)
    seen = []

    def spy(*arguments):
        seen.append(td7.critic_loss(*arguments))
        return seen[-1]

    monkeypatch.setattr(agent, "critic_loss", spy)
    before = float(agent.replay.largest)
    agent._update_once()
    expected = seen[0][1].double().clamp(min=1).pow(0.4)
    tree = agent.replay.tree.levels[-1].flatten()
    rows = agent.replay.drawn[0]
    last = {int(row): float(value) for row, value in zip(rows, expected, strict=True)}
    for row, value in last.items():
        assert float(tree[row]) == pytest.approx(value, rel=1e-6)
    assert math.isclose(float(agent.replay.largest), max(before, *last.values()), rel_tol=1e-6)


def test_judging_by_hand():
    """One episode: 5 sets the mark, 3 fails, 7 passes. Up to three: the worst counts, one below the mark ends it."""
    judgement = td7.Judgement()
    assert [judge(judgement, r) for r in (5.0, 3.0, 7.0)] == [True, False, True]
    assert judgement.best_worst == 7
    judgement.limit = 3
    assert [judge(judgement, r) for r in (9.0, 8.0, 7.5)] == [None, None, True]
    assert judgement.best_worst == 7.5
    assert [judge(judgement, r) for r in (8.0, 6.0, 8.0)] == [None, False, None]


def judge(judgement: td7.Judgement, episode_return: float) -> bool | None:
    passed = judgement.passed(episode_return)
    if passed:
        judgement.best_worst = judgement.worst
    if passed is not None:
        judgement.begin()
    return passed


def play(agent: td7.Agent, steps: int, episode_return: float) -> None:
    """One episode."""
    for t in range(steps):
        agent.act(numbers(1, 3, seed=t), explore=True)
        step = make_step(numbers(1, 3, seed=t + 1), 1.0, truncated=t == steps - 1)
        step.episode_return.fill_(episode_return)
        agent.observe(step)
        if t < steps - 1:
            assert agent.update() == {}


def test_training_comes_in_bursts_at_the_ends_of_episodes():
    agent = build(checkpoints=True, checkpoint_after=12, checkpoint_episodes=2)
    play(agent, 10, 0.0)  # the warm-up ends within it
    assert agent.update() == {}
    assert (agent.updates, agent.learning) == (0, True)
    play(agent, 5, 3.0)
    first = tensors(agent.actor)
    agent.update()
    assert (agent.updates, agent.judgement.best_worst) == (5, 3.0)
    assert same(first, tensors(agent.checkpoint_actor))
    assert not same(first, tensors(agent.actor))
    play(agent, 7, 2.0)  # worse: no checkpoint
    agent.update()
    assert agent.updates == 12
    assert same(first, tensors(agent.checkpoint_actor))
    obs = numbers(4, 3)
    kept = agent.checkpoint_actor(obs, agent.checkpoint_encoder.zs(obs))
    torch.testing.assert_close(agent.act(obs, explore=False), agent.scale.to_environment(kept))
    play(agent, 4, 2.9)  # worse again; from the next training step on two episodes judge, against 0.9 · 3
    agent.update()
    assert (agent.updates, agent.judgement.limit) == (16, 2)
    assert agent.judgement.best_worst == pytest.approx(2.7)
    policy = tensors(agent.actor)
    play(agent, 4, 2.8)
    assert agent.update() == {}
    play(agent, 4, 3.5)
    agent.update()
    assert agent.updates == 24
    assert agent.judgement.best_worst == pytest.approx(2.8)
    assert same(policy, tensors(agent.checkpoint_actor))


def test_judging_goes_on_where_it_was_saved():
    whole = build(checkpoints=True)
    play(whole, 10, 0.0)
    play(whole, 5, 3.0)
    whole.update()
    restored = build(checkpoints=True)
    restored.load_state_dict(copy.deepcopy(whole.state_dict()))
    for agent in (whole, restored):
        play(agent, 6, 4.0)
        agent.update()
    assert whole.updates == restored.updates == 11
    assert restored.judgement == whole.judgement
    for name in ("actor", "encoder", "critics", "checkpoint_actor"):
        assert same(tensors(getattr(whole, name)), tensors(getattr(restored, name)))


def test_seeds_are_no_population():
    with pytest.raises(ValueError, match="'td7' cannot train its seeds as a population"):
        build(seeds=[0, 1])
