"""BEER's grid world: exact values against closed forms, one update by hand, and that the fit finds what is exact."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import representation
from agents.networks import Critics, new_network
from envs.grid_world import GridWorld
from plasticity.population import RandomStream
from runs import grid_study
from runs.grid_study import Settings, Transitions, optimal_values, study

ROOT = Path(__file__).parents[2]
QUICK = Settings(hidden=(32, 32), batch_size=64, target_rate=0.05, updates=1_500, measure_every=1_500, discount=0.9)


def stream(*seeds: int) -> RandomStream:
    return RandomStream([torch.Generator().manual_seed(seed) for seed in seeds])


@pytest.mark.parametrize("size", [2, 5, 20])
def test_exact_values_are_powers_of_the_discount(size):
    """With reward 1 at the goal alone, Q* is γ^(d - 1) where the best path through the step has d steps."""
    grid = GridWorld(size)
    values = optimal_values(grid, 0.99)
    x, y = np.arange(grid.cells) % size, np.arange(grid.cells) // size
    distance = (size - 1 - x) + (size - 1 - y)
    expected = 0.99 ** distance[grid.successor].astype(float)
    assert values[: grid.goal].numpy() == pytest.approx(expected[: grid.goal], abs=1e-12)
    dear = optimal_values(GridWorld(size, goal_reward=0.0, step_reward=-1.0), 0.99)
    paid = -(1 - 0.99 ** distance[grid.successor].astype(float)) / (1 - 0.99)  # steps before the last, which is free
    assert dear[: grid.goal].numpy() == pytest.approx(paid[: grid.goal], abs=1e-9)


def test_exact_values_solve_the_bellman_equation():
    grid = GridWorld(6, goal_reward=0.3, step_reward=-0.2)
    values = optimal_values(grid, 0.95)
    following = values.amax(1)[torch.from_numpy(grid.successor)] * torch.from_numpy(~grid.terminated)
    torch.testing.assert_close(values, torch.from_numpy(grid.reward) + 0.95 * following, atol=1e-12, rtol=0)


def test_values_of_all_actions():
    critic = new_network(lambda: Critics(1, 3, 4, (8, 8), False), stream(0, 1))
    obs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    values = grid_study.values_of(critic, obs)
    assert values.shape == (2, 5, 4)
    for action in range(4):
        each = grid_study.one_hot(torch.full((2, 5), action))
        torch.testing.assert_close(values[..., action], critic.first(obs, each))


@pytest.mark.parametrize("kind", ["beer", "peer", "infer"])
def test_one_step_is_the_loss_written_out(kind):
    """TD loss with max over the target's actions, and the penalty between φ(s, a) and φ(s', greedy action)."""
    grid, seeds = GridWorld(3, step_reward=-1.0), stream(0)
    critic = new_network(lambda: Critics(1, 9, 4, (32, 32), False), seeds)
    target = copy.deepcopy(critic)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter *= 1.1
    fit = grid_study._Fit(critic, target, seeds, kind, 0.5, QUICK)
    batch = Transitions(grid, seeds, 0.9).sample(32)
    before = [p.detach().clone() for p in critic.parameters()]
    with torch.no_grad():
        following = grid_study.values_of(target, batch.next_obs)
        y = batch.reward + 0.9 * ~batch.terminated * following.amax(-1)
    features = critic.features(batch.obs, batch.action)
    td = (critic(batch.obs, batch.action).squeeze(-2) - y).square().mean()
    if kind == "infer":
        assert fit.first is not None
        wanted = 100 * fit.first.first_heads(fit.first.first_network.features(batch.obs, batch.action))
        extra = (fit.first.heads(features) - wanted.detach()).square().mean()
    else:
        best = grid_study.one_hot(following.argmax(-1))
        target_next = target.features(batch.next_obs, best).detach()
        extra = (features * target_next).sum(-1).mean()
        if kind == "beer":
            own = grid_study.one_hot(grid_study.values_of(critic, batch.next_obs).argmax(-1))
            online = critic.features(batch.next_obs, own).detach()
            norm = critic.head.weight.norm().detach().view(1, 1, 1)
            extra, _ = representation.beer(
                features, target_next, online, norm, batch.reward, batch.discount, mask=batch.terminated
            )
    gradients = torch.autograd.grad((td + 0.5 * extra).sum(), list(critic.parameters()))
    fit.step(batch)
    for old, new, gradient in zip(before, critic.parameters(), gradients, strict=True):
        moved = gradient.abs() > 1e-6  # Adam's first step is the learning rate against the sign
        expected = -QUICK.learning_rate * gradient.sign()
        torch.testing.assert_close((new.detach() - old)[moved], expected[moved], rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize("kind", ["none", "beer"])
def test_the_fit_finds_the_exact_values(kind):
    grid = GridWorld(4)
    first, last = study(grid, kind, grid_study.WEIGHTS[kind], (0, 1), QUICK)
    assert first["update"].tolist() == [0, 0]
    assert (last["error"] < 0.02).all()
    assert (last["error"] < first["error"] / 10).all()
    assert (last["greedy_is_optimal"] > 0.9).all()
    assert last["samples"].tolist() == [60, 60]
    assert last["features"].tolist() == [32, 32]


def test_seeds_of_a_study_are_what_they_are_alone():
    quick = Settings(hidden=(8, 8), batch_size=16, updates=30, measure_every=30)
    *_, together = study(GridWorld(3), "beer", 1.0, (4, 5), quick)
    for index, seed in enumerate((4, 5)):
        *_, alone = study(GridWorld(3), "beer", 1.0, (seed,), quick)
        for name, value in alone.items():
            torch.testing.assert_close(together[name][index], value[0], rtol=1e-4, atol=1e-5)


def test_unknown_penalty():
    with pytest.raises(ValueError, match="must be one of none, beer, infer, peer, dr3, got 'bear'"):
        next(study(GridWorld(3), "bear", 1.0, (0,), QUICK))


def test_the_script_prints_a_table():
    command = [sys.executable, "scripts/beer_grid_world.py", "none", "beer", "--seeds", "2", "--updates", "20"]
    ended = subprocess.run([*command, "--size", "4"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 2 * 6
    assert lines[-1].startswith("| beer 0.001 | 20 | ")
