"""How Rainbow explores, and how prioritised replay and an agent work together."""

from __future__ import annotations

import pytest
import torch

from tests.agents.test_agents import build, live


def test_noise_explores_and_evaluations_have_none():
    agent = build("rainbow", warmup_steps=0, epsilon_evaluation=0.0)
    obs = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    evaluated = {int(agent.act(obs, explore=False)) for _ in range(40)}
    explored = {int(agent.act(obs, explore=True)) for _ in range(40)}
    assert len(evaluated) == 1
    assert len(explored) > 1


def test_chance_of_random_actions_with_and_without_noise():
    noisy, plain = build("rainbow"), build("rainbow", noisy=False, epsilon_decay_steps=100, epsilon_end=0.5)
    seen = []
    for steps in (0, 7, 8, 100):
        noisy.steps = plain.steps = steps
        seen.append((noisy.epsilon, plain.epsilon))
    assert seen == [(1.0, 1.0), (1.0, pytest.approx(0.965)), (0.0, pytest.approx(0.96)), (0.0, pytest.approx(0.5))]


def test_exponent_of_importance_rises_to_one_and_stays():
    agent = build("rainbow", importance_start=0.4, importance_steps=100)
    seen = []
    for steps in (0, 50, 100, 1000):
        agent.steps = steps
        seen.append(agent.importance_exponent)
    assert seen == pytest.approx([0.4, 0.7, 1.0, 1.0])


@pytest.mark.parametrize("name", ["dqn", "qrdqn", "rainbow"])
def test_priorities_are_the_errors_of_the_batch(name):
    """And the loss is the one that their importance weighs."""
    agent = build(name, replay="prioritised")
    live(agent, 20)
    seen = {}
    loss = agent._loss

    def watched(batch, weight):
        seen["weight"], found = weight, loss(batch, weight)
        seen["errors"] = found[2]
        return found

    agent._loss = watched
    agent._update_once()
    drawn, tree = agent.replay.drawn[0], agent.replay.tree
    expected = (seen["errors"].double().abs() + agent.replay.smallest) ** agent.config.priority_exponent
    torch.testing.assert_close(tree.levels[-1].flatten()[drawn], expected)
    assert seen["weight"].max() == 1
    assert seen["weight"].min() > 0


@pytest.mark.parametrize(
    "switch",
    [
        {"double": False},
        {"dueling": False},
        {"n_step": 1},
        {"replay": "uniform"},
        {"distributional": False},
        {"noisy": False},
    ],
    ids=str,
)
def test_every_part_of_rainbow_makes_a_difference(switch):
    whole, without = build("rainbow", learning_rate=0.01), build("rainbow", learning_rate=0.01, **switch)
    for agent in (whole, without):
        live(agent, 30)
    obs = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(whole.value(obs), without.value(obs), atol=1e-6)
