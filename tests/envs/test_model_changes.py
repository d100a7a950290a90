"""A row whose model is changed is an environment with that model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mujoco_parity import random_actions

from envs.model_changes import FACTORS, changed_model
from envs.mujoco_batch import MujocoBatch, make, make_task

CPU = torch.device("cpu")


def with_model_of(env_id: str, seed: int, factors: dict[str, float]) -> MujocoBatch:
    """One row whose task has the changed model from the start."""
    task = make_task(env_id)
    task.__dict__["model"] = changed_model(task.model, factors)
    return MujocoBatch(env_id, task, [seed], CPU, 1, torch.float64)


@pytest.mark.parametrize("env_id", ["mujoco/Ant-v5", "mujoco/HalfCheetah-v5", "dmc/walker-walk", "dmc/cheetah-run"])
@pytest.mark.parametrize(
    "factors", [{name: 1.7} for name in FACTORS] + [dict.fromkeys(FACTORS, 0.6)], ids=[*FACTORS, "all"]
)
def test_a_changed_row_equals_an_environment_of_its_own(env_id, factors):
    runner = make(env_id, 3, 0, CPU, 1, row_seeds=[5, 6, 7], dtype=torch.float64)
    runner.change_model(factors, rows=[1])
    alone = with_model_of(env_id, 6, factors)
    untouched = make(env_id, 3, 0, CPU, 1, row_seeds=[5, 6, 7], dtype=torch.float64)
    obs = [each.reset().clone() for each in (runner, alone, untouched)]
    for action in torch.from_numpy(random_actions(runner, 60, seed=1)):
        np.testing.assert_array_equal(obs[0][1], obs[1][0])
        np.testing.assert_array_equal(obs[0][[0, 2]], obs[2][[0, 2]])
        steps = [runner.step(action), alone.step(action[1:2]), untouched.step(action)]
        np.testing.assert_array_equal(steps[0].reward[1], steps[1].reward[0])
        obs = [step.obs.clone() for step in steps]
    assert not torch.equal(obs[0][1], obs[2][1])


def test_a_change_waits_for_the_next_episode_unless_it_is_for_now():
    changed, plain = (make("dmc/walker-walk", 2, 0, CPU, 1, time_limit=0.25) for _ in range(2))
    for each in (changed, plain):
        each.reset()
    changed.change_model({"gravity": 0.1})
    action = torch.zeros(2, 6)
    for t in range(10):
        steps = changed.step(action), plain.step(action)
        assert torch.equal(steps[0].final_obs, steps[1].final_obs), t
    assert bool(steps[0].truncated.all())
    steps = changed.step(action), plain.step(action)
    assert not torch.equal(steps[0].obs, steps[1].obs)
    before = plain.step(action).obs.clone()
    plain.change_model({"gravity": 0.1}, rows=[1], now=True)
    assert not torch.equal(plain.step(action).obs[1], before[1])


def test_changes_and_those_that_wait_survive_a_resume():
    runner = make("mujoco/Hopper-v5", 2, 0, CPU, 1)
    runner.change_model({"mass": 1.5}, rows=[0], now=True)
    runner.reset()
    runner.change_model({"friction": 0.3}, rows=[1])
    runner.step(torch.zeros(2, 3))
    again = make("mujoco/Hopper-v5", 2, 9, CPU, 1)
    again.load_state_dict(runner.state_dict())
    ended = False
    for action in torch.from_numpy(random_actions(runner, 200, seed=2)):
        steps = runner.step(action), again.step(action)
        assert torch.equal(steps[0].obs, steps[1].obs)
        ended |= bool(steps[0].episode_ended[1])
    assert ended


@pytest.mark.parametrize(
    ("factors", "rows", "message"),
    [
        ({"frictoin": 1.0}, None, "no factor 'frictoin'; it has friction"),
        ({"mass": 0.0}, None, "mass must be positive"),
        ({"gravity": float("nan")}, None, "gravity must be positive and finite, got nan"),
        ({"gravity": 1.0}, [2], "row 2 does not exist; there are 2"),
    ],
)
def test_bad_changes_are_refused(factors, rows, message):
    with pytest.raises(ValueError, match=message):
        make("mujoco/Hopper-v5", 2, 0, CPU, 1).change_model(factors, rows)
