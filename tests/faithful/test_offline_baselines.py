"""Losses of the offline baselines by hand (specs/a2pr-and-offline-rl.md, section 9), and how they choose data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from agents.offline import cql, iql, rebrac
from agents.offline.fitted_q import FittedQ, first_states
from agents.offline.transitions import FixedReplay, Transitions
from agents.replay import Batch
from tests.agents.fakes import stream
from tests.agents.offline_data import CPU, make_transitions, new_agent, streams_and_scale

OBS, ACTION = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [-0.5]])
BATCH = Batch(OBS, ACTION, torch.tensor([1.0, 2.0]), OBS, torch.tensor([False, True]), torch.full((2,), 0.9))


class Sum(nn.Module):
    """Q_1 = s + a, Q_2 = s + 2 a, and V = s."""

    count = 2

    def forward(self, obs: Tensor, action: Tensor | None = None) -> Tensor:
        if action is None:
            return obs.squeeze(-1)
        return torch.stack([(obs + k * action).squeeze(-1) for k in (1, 2)], -2)


def test_iql_value_is_an_expectile_of_the_smaller_critic():
    loss, advantage, _ = iql.value_loss(Sum(), Sum(), BATCH, 0.7)  # type: ignore[arg-type]
    # min over critics of s + k a: 1.5 and 1; minus V = s
    assert advantage.tolist() == [0.5, -1.0]
    assert float(loss) == pytest.approx((0.7 * 0.25 + 0.3 * 1.0) / 2)


def test_iql_critics_regress_to_the_value_of_the_next_state():
    loss, _ = iql.critic_loss(Sum(), BATCH, torch.tensor([10.0, 10.0]))  # type: ignore[arg-type]
    targets, values = (10.0, 2.0), ((1.5, 1.5), (2.0, 1.0))
    by_hand = [(v - t) ** 2 for row in values for v, t in zip(row, targets, strict=True)]
    assert float(loss) == pytest.approx(sum(by_hand) / 4)


def test_iql_actors_weights_are_capped_and_its_density_is_a_normal_one():
    actor = iql.GaussianActor(1, 1, (4,))
    actor.log_std.data.fill_(-1.0)
    normal = torch.distributions.Normal(actor(OBS), math.exp(-1.0))
    expected = -normal.log_prob(ACTION).squeeze(-1)
    torch.testing.assert_close(actor.penalty(OBS, ACTION), expected)
    loss, _ = iql.actor_loss(actor, BATCH, torch.tensor([10.0, -1.0]), 3.0)
    assert float(loss.detach()) == pytest.approx(float((100 * expected[0] + math.exp(-3) * expected[1]) / 2), rel=1e-5)


def test_iql_cosine_reaches_zero_and_return_range_scales_rewards():
    agent = new_agent("iql", 3, 2, iql.Config(hidden=(8,), batch_size=4, reward_scaling="return_range"))
    data = make_transitions(40, 3, 2)
    agent.read(data, 10)
    returns = data.returns()
    assert agent.data.reward_map[0] == pytest.approx(1000 / float(returns.max() - returns.min()), rel=1e-5)
    rates = []
    for _ in range(10):
        agent.update()
        rates.append(agent.actor_optimizer.learning_rate / 3e-4)
    assert rates == pytest.approx([(1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)])


def test_cql_loss_by_hand():
    """Two proposals for each row, laid out batch after batch."""
    actions = torch.tensor([[0.0], [0.0], [1.0], [-1.0]])
    density = torch.tensor([0.0, math.log(2), math.log(0.5), 0.0])
    config = cql.Config(conservatism=2.0, clip_below=0.3)
    loss, metrics = cql.critic_loss(Sum(), BATCH, torch.tensor([1.0, 1.0]), actions, density, None, config)  # type: ignore[arg-type]
    td = sum((v - 1.0) ** 2 for v in (1.5, 1.5, 2.0, 1.0)) / 2
    first = [
        math.log(math.exp(1) + math.exp(2 + math.log(2))) - 1.5,
        math.log(math.exp(2 - math.log(2)) + math.exp(1)) - 1.5,
    ]
    second = [
        math.log(math.exp(1) + math.exp(3 + math.log(2))) - 2.0,
        math.log(math.exp(2 - math.log(2)) + math.exp(0)) - 1.0,
    ]
    by_hand = sum(max(x, -0.3) for x in first + second) / 2
    assert float(metrics["loss/conservative"]) == pytest.approx(2 * by_hand, rel=1e-5)
    assert float(loss) == pytest.approx(td + 2 * by_hand, rel=1e-5)
    _, metrics = cql.critic_loss(Sum(), BATCH, torch.ones(2), actions, density, torch.zeros(()), config)  # type: ignore[arg-type]
    assert float(metrics["loss/conservative"]) == pytest.approx(2 * (by_hand - 2 * 0.8), rel=1e-5)


def test_cql_proposals_are_uniform_and_the_policys_at_both_states():
    agent = new_agent("cql", 3, 2, cql.Config(hidden=(8,), critic_hidden=(8,), batch_size=4))
    agent.read(make_transitions(20, 3, 2), 5)
    batch, uniform = agent.sample(), torch.zeros(5, 4, 2)
    actions, density = cql.proposals(agent.actor, batch, uniform, torch.zeros(2, 5, 4, 2))
    assert actions.shape == (60, 2)
    assert density[:20].tolist() == pytest.approx([2 * math.log(0.5)] * 20)
    torch.testing.assert_close(actions[20:24], agent.actor(batch.obs))
    torch.testing.assert_close(actions[40:44], agent.actor(batch.next_obs))


def test_cql_backup_takes_the_best_of_several_next_actions():
    class Bold(nn.Module):
        def sample(self, obs: Tensor, noise: Tensor):
            return noise, None

    noise = torch.tensor([[[0.1], [0.2]], [[0.4], [-0.3]]])
    target = cql.td_target(Bold(), Sum(), BATCH, noise)  # type: ignore[arg-type]
    assert target.tolist() == pytest.approx([1 + 0.9 * 1.4, 2.0])


def test_rebrac_target_and_actor_by_hand():
    class Zero(nn.Module):
        def forward(self, obs: Tensor) -> Tensor:
            return torch.zeros_like(obs)

    config, noise = rebrac.Config(critic_penalty=2.0), torch.tensor([[0.9], [0.1]])
    following = torch.tensor([[0.1], [0.0]]), torch.tensor([True, True])
    target = rebrac.td_target(Zero(), Sum(), BATCH, noise, following, config)  # type: ignore[arg-type]
    assert target.tolist() == pytest.approx([1 + 0.9 * (1.5 - 2 * 0.4**2), 2.0])
    missing = following[0], torch.tensor([False, True])
    target = rebrac.td_target(Zero(), Sum(), BATCH, noise, missing, config)  # type: ignore[arg-type]
    assert target.tolist() == pytest.approx([1 + 0.9 * 1.5, 2.0])
    loss, _ = rebrac.actor_loss(Zero(), Sum(), BATCH, 3.0)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(3 * 0.25 - 1)


def test_next_actions_stay_within_an_episode():
    data = make_transitions(40, 3, 2, high=2.0)
    sampling, _ = streams_and_scale(2)
    agent = new_agent("rebrac", 3, 2, rebrac.Config(hidden=(4,), critic_hidden=(4,), batch_size=4), high=2.0)
    agent.read(data, 5)
    action, there = agent.data.next_actions(torch.arange(40))
    assert there.tolist() == [(row + 1) % 10 != 0 for row in range(40)]
    torch.testing.assert_close(action[:9], data.action[1:10] / 2)
    assert not action[9].any()
    assert sampling.lead == ()


def test_the_best_episodes_by_return_whole_ones_only():
    data = make_transitions(45, 3, 2)
    data.whole[-1] = False
    rewards = torch.tensor([1.0, 5.0, 2.0, 4.0]).repeat_interleave(10)
    data.rows[:40, 5] = rewards
    data.rows[40:, 5] = 100.0
    assert data.rows_of_best(0.5).tolist() == [*range(10, 20), *range(30, 40)]
    assert data.rows_of_best(0.01).tolist() == list(range(10, 20))
    agent_rows = FixedReplay(data, CPU, *streams_and_scale(2), 0.99, usable=data.rows_of_best(0.01)).draw(50)
    assert set(agent_rows.tolist()) <= set(range(10, 20))
    assert data.returns(0.5)[1] == pytest.approx(5 * (1 - 0.5**10) / 0.5)


def test_fitted_q_evaluation_finds_the_value_of_a_policy():
    """A chain of three states that goes on by itself: rewards 1, 1, 1, then the end; γ = 0.5."""
    rows = torch.tensor([[s, 0.0, 1.0, s + 1, float(s == 2)] for s in (0.0, 1.0, 2.0)]).repeat(20, 1)
    starts = torch.arange(0, 61, 3)
    no = torch.zeros(60, dtype=torch.bool)
    data = Transitions(rows, 1, 1, no, starts, torch.ones(20, dtype=torch.bool))
    replay = FixedReplay(data, CPU, *streams_and_scale(1), 0.5)
    learner = FittedQ(lambda obs: 0 * obs, replay, stream(1), (32,), 1e-2, 0.05, 32)
    assert first_states(replay).flatten().tolist() == [0.0] * 20
    for _ in range(400):
        learner.update()
    assert float(learner.initial_value()) == pytest.approx(1 + 0.5 + 0.25, abs=0.05)
