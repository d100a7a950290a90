"""What critics expect against what episodes return: hand values, a plain loop, every agent that can be asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import envs
from agents import symphony
from agents.agent import Valuing
from agents.fading import FadingReplay
from runs.catalogue import AGENTS
from runs.cli import main
from runs.evaluation import FirstValues, evaluate
from runs.record import read_table
from tests.agents.fakes import CPU, REPLAYING, make_step
from tests.agents.test_agents import build, live


class Expects:
    """Expects the same everywhere, and does nothing."""

    class config:
        discount = 0.5

    def __init__(self, expected: float):
        self.expected = expected

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        return torch.zeros(*obs.shape[:-1], 1)

    def value(self, obs: Tensor) -> Tensor:
        return torch.full(obs.shape[:-1], self.expected)


def test_by_hand():
    """Rewards 1, 2, 4 at discount 1/2. The first episode terminates after two steps, the second is cut off after three:
    G = 1 + 1 = 2 and 1 + 1 + 1 = 3, of which 1/8 of what follows is not seen. The third begins anew in between."""
    values = FirstValues.of(Expects(4.0), torch.zeros(3, 1))  # type: ignore[arg-type]
    ends = [([0, 0, 0], [0, 0, 0]), ([1, 0, 0], [0, 0, 1]), ([0, 0, 0], [0, 1, 1])]
    for reward, (terminated, truncated) in zip((1.0, 2.0, 4.0), ends, strict=True):
        flags = (torch.tensor(flag, dtype=torch.bool) for flag in (terminated, truncated))
        values.add(make_step(torch.zeros(3, 1), reward, *flags))
    assert values.returned.tolist() == [2, 3, 2]
    assert values.beyond.tolist() == [0, 0.125, 0.25]
    assert values.errors(0) == {
        "value/approximation_bias": pytest.approx(5 / 3),
        "value/approximation_error": pytest.approx(5 / 3),
        "value/approximation_relative_bias": pytest.approx(5 / 7),
        "value/approximation_relative_error": pytest.approx(5 / 7),
        "value/approximation_beyond_limit": pytest.approx(0.125),
    }
    values.expected = torch.tensor([1.0, 4, 2])
    errors = values.errors(0)
    assert errors["value/approximation_bias"] == 0
    assert errors["value/approximation_error"] == pytest.approx(2 / 3)


def test_without_any_return_there_is_nothing_to_divide_by():
    values = FirstValues.of(Expects(4.0), torch.zeros(2, 1))  # type: ignore[arg-type]
    values.add(make_step(torch.zeros(2, 1), 0.0, terminated=True))
    assert sorted(values.errors(0)) == [f"value/approximation_{what}" for what in ("beyond_limit", "bias", "error")]


@pytest.mark.parametrize("seeds", [[3], [3, 4]])
def test_evaluation_sums_as_a_plain_loop(seeds):
    environments = [envs.make("gym/Pendulum-v1", 2, seed, CPU) for seed in seeds]
    scores = evaluate(Expects(-4.0), environments, values=True)  # type: ignore[arg-type]
    assert scores is not None
    assert scores.first_values is not None
    for index, seed in enumerate(seeds):
        runner = envs.make("gym/Pendulum-v1", 2, seed, CPU)
        runner.reset()
        returned, factor = torch.zeros(2), 1.0
        for _ in range(200):
            step = runner.step(torch.zeros(2, 1))
            returned += factor * step.reward
            factor *= 0.5
        assert bool(step.truncated.all())
        errors = scores.first_values.errors(index)
        assert errors["value/approximation_bias"] == pytest.approx(float((-4 - returned).mean()), rel=1e-5)
        assert errors["value/approximation_error"] == pytest.approx(float((-4 - returned).abs().mean()), rel=1e-5)


@pytest.mark.parametrize("name", REPLAYING)
@pytest.mark.parametrize("seeds", [0, (0, 1)])
def test_every_agent_with_critics_can_be_asked(name, seeds):
    agent = build(name, seed=seeds)
    assert isinstance(agent, Valuing)
    lead = () if seeds == 0 else (2,)
    obs = torch.randn(*lead, 5, 3, generator=torch.Generator().manual_seed(0))
    values = agent.value(obs)
    assert values.shape == (*lead, 5)
    assert not values.requires_grad
    assert values.std() > 0


def test_symphony_speaks_in_rewards_of_the_environment():
    agent = build("symphony")
    live(agent, 10)
    assert isinstance(agent.replay, FadingReplay)
    obs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        nodes = agent.critics(obs, agent.act(obs, explore=False))
    expected = symphony.aggregate(nodes, agent.weights) * agent.replay.reward_scale
    torch.testing.assert_close(agent.value(obs), expected)
    agent.replay.reward_scale *= 2
    torch.testing.assert_close(agent.value(obs), 2 * expected)


def test_a_run_keeps_them(tmp_path):
    run = ["train", "sac", "--env", "gym/Pendulum-v1", "--steps", "60", "--seeds", "2", "--seeds-as", "population"]
    run += ["--warmup-steps", "20", "--batch-size", "8", "--hidden", "8", "8", "--eval-episodes", "2", "--value-error"]
    assert main([*run, "--eval-every", "30", "--out", str(tmp_path), "--name", "asked", "--quiet"]) == 0
    rows = [row for row in read_table(tmp_path / "asked") if row.name.startswith("value/approximation_")]
    assert {row.seed for row in rows} == {0, 1}
    assert {row.step for row in rows} == {0, 30, 60}
    assert len({row.name for row in rows}) == 5
    tail = [row.value for row in rows if row.name == "value/approximation_beyond_limit"]
    assert tail == pytest.approx([0.99**200] * 6, rel=1e-5)


def test_agents_that_have_no_action_values_are_refused(tmp_path, capsys):
    command = ["train", "ppo", "--env", "gym/CartPole-v1", "--steps", "60", "--value-error"]
    assert main([*command, "--out", str(tmp_path / "results")]) == 2
    said = capsys.readouterr().err
    able = [name for name, module in AGENTS.items() if hasattr(module.Agent, "value")]
    assert f"--value-error needs an agent with action values ({', '.join(able)}), 'ppo' has none" in said
    assert {"beer", "dqn", "sac", "symphony"} <= set(able)
    assert list(tmp_path.iterdir()) == []
