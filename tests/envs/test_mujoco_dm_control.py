"""The native dm_control tasks are dm_control's, bit for bit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mujoco_parity import ControlReference, assert_equal_to_reference

from envs.mujoco_batch import make, make_task
from envs.tasks.dm_control import TASKS
from envs.tasks.tolerance import tolerance


@pytest.mark.parametrize("env_id", TASKS)
def test_equal_to_dm_control_across_the_end_of_an_episode(env_id):
    totals = assert_equal_to_reference(env_id, ControlReference, seeds=(11, 18, 25), steps=1100)
    assert totals.episodes == 3


@pytest.mark.parametrize("shape", ["gaussian", "linear", "quadratic"])
@pytest.mark.parametrize("margin", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("lower", "upper"), [(0.0, 0.0), (-1.0, 2.0), (1.2, float("inf"))])
def test_tolerance_equals_dm_control(shape, margin, lower, upper):
    from dm_control.utils import rewards

    x = np.linspace(-6.0, 6.0, 241)
    value = 0.1 if shape == "gaussian" else 0.0
    expected = rewards.tolerance(x, (lower, upper), margin, shape, value)
    np.testing.assert_allclose(tolerance(np, x, lower, upper, margin, shape, value), expected, rtol=0, atol=1e-15)


def test_sparse_cartpole_pays_only_near_upright_and_near_the_middle():
    """Random actions never get there, so the parity above does not see this reward."""
    xmat = np.zeros((4, 3, 9))
    xmat[:, 2, 8] = [0.996, 0.996, 0.994, -1.0]
    physics = SimpleNamespace(qpos=np.array([[0.2, 0.0], [0.3, 0.0], [0.0, 0.0], [0.0, 0.0]]), xmat=xmat)
    reward, terminated = make_task("dmc/cartpole-swingup_sparse").outcome(np, physics, None)
    assert reward.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert terminated is None


@pytest.mark.parametrize(("env_id", "reach"), [("dmc/reacher-easy", 0.06), ("dmc/reacher-hard", 0.025)])
def test_reacher_pays_where_the_spheres_touch(env_id, reach):
    """Radii: target 0.05 or 0.015, finger 0.01."""
    task = make_task(env_id)
    geom_xpos = np.zeros((2, task.model.ngeom, 3))
    geom_xpos[:, task.model.geom("target").id, 0] = [0.999 * reach, 1.001 * reach]
    reward, _ = task.outcome(np, SimpleNamespace(geom_xpos=geom_xpos), None)
    assert reward.tolist() == [1.0, 0.0]


def test_finger_spin_draws_again_as_the_reference_does():
    """Seeds 1, 27, 30 and 63 first draw a pose in contact, so that their generators have moved on further."""
    seeds = (1, 2, 27, 30, 31, 63)
    runner = make("dmc/finger-spin", 6, 0, torch.device("cpu"), 1, row_seeds=seeds)
    runner.reset()
    positions = [generator["state"]["pos"] for generator in runner.state_dict()["generators"]]
    assert [position > min(positions) for position in positions] == [True, False, True, True, False, True]
    runner.close()
    assert_equal_to_reference("dmc/finger-spin", ControlReference, seeds=seeds, steps=5)
