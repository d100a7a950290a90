"""The grid world: where steps lead, and that the runner offers it as any other environment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import envs
from envs.grid_world import GridWorld


def test_where_steps_lead():
    """Cells of a 3 x 3 grid:  0 1 2 / 3 4 5 / 6 7 8;  moves up, right, down, left."""
    grid = GridWorld(3, goal_reward=2.0, step_reward=-1.0)
    assert grid.successor.tolist() == [
        [0, 1, 3, 0], [1, 2, 4, 0], [2, 2, 5, 1],
        [0, 4, 6, 3], [1, 5, 7, 3], [2, 5, 8, 4],
        [3, 7, 6, 6], [4, 8, 7, 6], [5, 8, 8, 7],
    ]  # fmt: skip
    assert np.argwhere(grid.terminated).tolist() == [[5, 2], [7, 1], [8, 1], [8, 2]]
    assert grid.reward[5].tolist() == [-1, -1, 2, -1]
    assert np.array_equal(grid.observations, np.eye(9))
    coordinates = GridWorld(3, encoding="coordinates").observations
    assert coordinates[5].tolist() == [1.0, 0.5]
    for bad, message in (({"size": 1}, "size must be at least 2"), ({"encoding": "words"}, "encoding must be one-hot")):
        with pytest.raises(ValueError, match=message):
            GridWorld(**bad)


def test_the_runner_offers_it():
    assert "gym/GridWorld-v0" in envs.known_ids()
    runner = envs.make("gym/GridWorld-v0", 3, seed=0, size=4, encoding="coordinates", step_reward=-1.0)
    assert (runner.observation_spec.shape, runner.action_spec.count, runner.spec.horizon) == ((2,), 4, 200)
    grid, obs = GridWorld(4, encoding="coordinates", step_reward=-1.0), runner.reset()
    source = torch.Generator().manual_seed(0)
    ends = 0
    for _ in range(150):
        action = torch.randint(4, (3,), generator=source)
        cells = [int((grid.observations == row.numpy()).all(1).argmax()) for row in obs]
        step = runner.step(action)
        for row, (cell, move) in enumerate(zip(cells, action.tolist(), strict=True)):
            assert np.array_equal(step.final_obs[row], grid.observations[grid.successor[cell, move]])
            assert step.reward[row] == grid.reward[cell, move]
            assert step.terminated[row] == grid.terminated[cell, move]
        ends += int(step.terminated.sum())
        obs = step.obs.clone()
    assert ends > 3
    assert runner.render(0, 64, 64).shape == (64, 64, 3)
    saved = runner.state_dict()
    action = torch.tensor([1, 2, 2])
    ours = [runner.step(action).obs.clone() for _ in range(20)]
    runner.load_state_dict(saved)
    assert all(torch.equal(a, runner.step(action).obs) for a in ours)


def test_starts_are_anywhere_but_at_the_goal():
    runner = envs.make("gym/GridWorld-v0", 400, seed=1, size=3)
    cells = runner.reset().argmax(1)
    assert set(cells.tolist()) == set(range(8))
