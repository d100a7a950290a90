"""The C pool behind the MuJoCo runner, against single simulations made with the `mujoco` package."""

import numpy as np
import pytest

from envs.mujoco_simulation import STAGE_NONE, Data, Simulations, engine
from envs.tasks.gymnasium_v5 import Ant, HalfCheetah

mujoco = engine()  # not by `import mujoco` here, before the environment variable that lets it draw is set


def push(data: Data, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, data.ctrl.shape)


def test_apply_runs_an_engine_function_on_every_simulation():
    """mj_rnePostConstraint after a Runge-Kutta step: contact forces of the last stage, as in Gymnasium's Ant."""
    model = Ant().model
    simulations = Simulations(model, 3, 2, persistent=True)
    forces, ctrl = simulations.bind("cfrc_ext"), simulations.bind("ctrl")
    others = [mujoco.MjData(model) for _ in range(3)]
    touched = 0
    for t in range(60):
        for row, data in enumerate(others):
            ctrl[row] = data.ctrl[:] = push(data, 100 * t + row)
            mujoco.mj_step(model, data, nstep=5)
            mujoco.mj_rnePostConstraint(model, data)
        simulations.step(5)
        simulations.apply("mj_rnePostConstraint")
        simulations.forward(stage=STAGE_NONE)
        np.testing.assert_array_equal(forces, [data.cfrc_ext for data in others])
        touched += int(np.any(forces != 0.0))
    assert touched > 30
    simulations.close()


def test_apply_saves_the_state_and_leaves_other_rows():
    model = HalfCheetah().model
    simulations = Simulations(model, 3, 1, persistent=True)
    simulations.forward()
    before = simulations.state.copy()
    simulations.apply("mj_step2", np.array([1], np.int32), save=True)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    mujoco.mj_step2(model, data)
    np.testing.assert_array_equal(simulations.bind("qpos")[1], data.qpos)
    np.testing.assert_array_equal(simulations.state[[0, 2]], before[[0, 2]])
    assert not np.array_equal(simulations.state[1], before[1])
    simulations.close()


def test_apply_needs_persistent_simulations():
    simulations = Simulations(HalfCheetah().model, 1, 1, persistent=False)
    with pytest.raises(ValueError, match="persistent"):
        simulations.apply("mj_step2")
    simulations.close()


def test_an_expanded_model_field_makes_each_row_its_own_model():
    models = [HalfCheetah().model for _ in range(3)]
    simulations = Simulations(models[0], 3, 2, persistent=False)
    gravity, friction = simulations.expand("opt.gravity"), simulations.expand("geom_friction")
    for row, model in enumerate(models):
        model.opt.gravity[2] = gravity[row, 2] = -4.0 * (row + 1)
        model.geom_friction[:, 0] = friction[row, :, 0] = 0.3 * (row + 1)
    others = [mujoco.MjData(model) for model in models]
    for t in range(100):
        for row, (model, data) in enumerate(zip(models, others, strict=True)):
            simulations.bind("ctrl")[row] = data.ctrl[:] = push(data, 100 * t + row)
            mujoco.mj_step(model, data, nstep=5)
        simulations.step(5)
    np.testing.assert_array_equal(simulations.bind("qpos"), [data.qpos for data in others])
    simulations.close()


@pytest.mark.parametrize("name", ["no_such_field", "geom_pos"])
def test_a_field_that_is_not_simulated_cannot_be_bound(name):
    simulations = Simulations(HalfCheetah().model, 1, 1, persistent=False)
    with pytest.raises(ValueError, match=name):
        simulations.bind(name)
    simulations.close()


def test_a_bad_state_is_reported_with_its_row():
    simulations = Simulations(HalfCheetah().model, 4, 2, persistent=False)
    simulations.bind("qvel")[2, 0] = np.inf
    with pytest.raises(FloatingPointError, match="row 2: .*qvel"):
        simulations.step(1)
    simulations.reset()
    simulations.step(1)
    simulations.close()
