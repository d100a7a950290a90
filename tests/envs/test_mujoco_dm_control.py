"""The native dm_control tasks are dm_control's, bit for bit."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from mujoco_parity import ControlReference, assert_equal_to_reference

import envs
from envs import gymnasium_vector, registry
from envs.mujoco_batch import MujocoBatch, make, make_task
from envs.runner import RunnerSpec
from envs.tasks.dm_control import TASKS, base
from envs.tasks.dm_control.dog import Dog, DogFetch
from envs.tasks.dm_control.humanoid import Humanoid
from envs.tasks.dm_control.manipulator import Manipulator
from envs.tasks.dm_control.point_mass import PointMassRandomGains
from envs.tasks.tolerance import tolerance

SEEDS = (11, 18, 25)
# one light task of every kind of start: drawn, drawn again, lifted, settled, with a model of its own
FULL_LENGTH = (
    "dmc/acrobot-swingup",
    "dmc/cartpole-balance",
    "dmc/cheetah-run",
    "dmc/finger-turn_hard",
    "dmc/hopper-hop",
    "dmc/point_mass-hard",
    "dmc/quadruped-walk",
    "dmc/reacher-easy",
    "dmc/walker-walk",
)


def shortened(env_id: str, actions: int) -> dict[str, float]:
    task = make_task(env_id)
    return {"time_limit": actions * task.substeps * task.model.opt.timestep}


def assert_equal_over_a_full_episode(env_id: str) -> None:
    settings = shortened(env_id, 1000) if "lqr" in env_id else {}
    totals = assert_equal_to_reference(env_id, ControlReference, SEEDS, steps=1100, **settings)
    assert totals.episodes == 3


def test_the_tasks_are_the_suite_but_for_one():
    from dm_control import suite

    missing = {f"dmc/{domain}-{task}" for domain, task in suite.ALL_TASKS} ^ set(TASKS)
    assert missing == {"dmc/quadruped-escape"}
    assert registry._backend("dmc/quadruped-escape") is gymnasium_vector


@pytest.mark.parametrize("env_id", TASKS)
def test_equal_to_dm_control_over_many_short_episodes(env_id):
    totals = assert_equal_to_reference(env_id, ControlReference, SEEDS[:2], steps=50, **shortened(env_id, 9))
    assert totals.episodes >= 10


@pytest.mark.parametrize("env_id", FULL_LENGTH)
def test_equal_to_dm_control_across_the_end_of_an_episode(env_id):
    assert_equal_over_a_full_episode(env_id)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [env_id for env_id in TASKS if env_id not in FULL_LENGTH])
def test_equal_to_dm_control_across_the_end_of_an_episode_in_every_task(env_id):
    assert_equal_over_a_full_episode(env_id)


@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        ("dmc/manipulator-insert_peg", {"fully_observable": False}),
        ("dmc/stacker-stack_4", {"fully_observable": False}),
        ("dmc/cartpole-three_poles", {"num_poles": 5, "sparse": True}),
    ],
)
def test_settings_of_the_reference_mean_the_same(env_id, settings):
    limit = shortened(env_id, 9)
    assert_equal_to_reference(env_id, ControlReference, SEEDS[:1], steps=25, **settings, **limit)


# --- models


def numbers(model: Any) -> dict[str, np.ndarray]:
    """Every array of a model but addresses of file names."""
    names = [name for name in dir(model) if not name.startswith("_") and "path" not in name]
    return {name: value for name in names if isinstance(value := getattr(model, name), np.ndarray)}


@pytest.mark.parametrize(
    "env_id",
    [
        "dmc/cartpole-three_poles",
        "dmc/dog-trot",
        "dmc/dog-fetch",
        "dmc/finger-spin",
        "dmc/fish-upright",
        "dmc/lqr-lqr_6_2",
        *(env_id for env_id in TASKS if "manipulator" in env_id),
        "dmc/quadruped-run",
        "dmc/quadruped-fetch",
        "dmc/reacher-hard",
        "dmc/stacker-stack_2",
        "dmc/swimmer-swimmer15",
    ],
)
def test_edited_models_are_those_of_the_reference(env_id):
    """Also what no observation shows: cameras, colours, names."""
    reference = ControlReference(env_id, 0)
    reference.reset()
    task = make_task(env_id)
    model, expected = task.model, reference.env.physics.model.ptr
    assert model.names == expected.names
    may_differ = {*task.expanded, *(("actuator_ctrlrange",) if "lqr" in env_id else ())}
    if "reacher" in env_id:  # it changes the size of the compiled model, which leaves what follows from it
        may_differ |= {"geom_aabb", "geom_rbound", "bvh_aabb"}
    for name, values in numbers(expected).items():
        if name not in may_differ:
            np.testing.assert_array_equal(getattr(model, name), values, err_msg=name)


MODELS = """
import sys
from envs.mujoco_batch import make_task
for name in ("cartpole-three_poles", "lqr-lqr_2_1", "manipulator-insert_peg", "quadruped-walk", "swimmer-swimmer6"):
    make_task(f"dmc/{name}").model
print("dm_control" in sys.modules)
"""


def test_models_are_built_without_the_package_that_starts_opengl():
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", MODELS], cwd=root, capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


# --- rewards


def near_goal(env_id: str, physics: Any) -> None:
    """Change state and model, in a computed pose, so that the task is solved; noise on the state comes afterwards."""
    data, model = physics.named.data, physics.named.model
    domain, task = env_id.removeprefix("dmc/").split("-")
    if domain == "ball_in_cup":
        data.qpos[["ball_x", "ball_z"]] += data.site_xpos["target", ["x", "z"]] - data.xpos["ball", ["x", "z"]]
    elif env_id == "dmc/finger-spin":
        data.qvel["hinge"] = -20.0
    elif domain == "finger":
        model.site_pos["target"] = data.site_xpos["tip"]
    elif env_id == "dmc/fish-swim":
        model.geom_pos["target"] = data.geom_xpos["mouth"]
    elif domain == "reacher":
        model.geom_pos["target", ["x", "y"]] = data.geom_xpos["finger", ["x", "y"]]
    elif domain == "swimmer":
        model.geom_pos["target", ["x", "y"]] = data.geom_xpos["nose", ["x", "y"]]
    elif domain == "manipulator":
        held = task.split("_")[1]
        model.body_pos[f"target_{held}"] = data.xpos[held]
        model.body_quat[f"target_{held}"] = data.xquat[held]
    elif domain == "stacker":
        model.body_pos["target"] = data.xpos["box1"]
    elif task == "fetch" and domain == "dog":
        data.qpos["ball_root"][:3] = data.geom_xpos["target"]
    elif task == "fetch":
        data.qpos["ball_root"][:3] = data.site_xpos["target"]
    elif domain in ("cheetah", "dog", "hopper", "humanoid", "humanoid_CMU", "quadruped", "walker"):
        speeds = {"hop": 2.0, "trot": 3.0, "walk": 0.5 if domain == "quadruped" else 1.0}
        speeds["run"] = {"dog": 9.0, "quadruped": 5.0, "walker": 8.0}.get(domain, 10.0)
        x = "rootx" if domain in ("cheetah", "hopper", "walker") else "root"
        data.qvel[x][:1] = speeds.get(task.partition("_")[0], 0.0)


def seen(task: Any, physics: Any) -> SimpleNamespace:
    """What our functions read of the reference's simulation, as one row."""
    names = ("qpos", "qvel", "ctrl", *task.fields)
    return SimpleNamespace(**{name: np.array(getattr(physics.data, name))[None] for name in names})


@pytest.mark.parametrize("env_id", TASKS)
def test_rewards_and_observations_near_the_goal(env_id):
    """Random actions reach few of the rewards that the parity above compares, so states are made by hand here."""
    reference = ControlReference(env_id, 5)
    physics, task, random = reference.env.physics, make_task(env_id), np.random.RandomState(1)
    best = 0.0
    for scale in (0.0, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3):
        reference.reset()
        physics.data.qpos[:] = physics.model.qpos0
        physics.data.qvel[:] = 0.0
        mujoco.mj_forward(physics.model.ptr, physics.data.ptr)
        near_goal(env_id, physics)
        for joint in ("qpos", "qvel"):
            values = getattr(physics.data, joint)
            values[:] += scale * random.uniform(-1.0, 1.0, values.shape)
        physics.data.ctrl[:] = min(1.0, 10.0 * scale) * random.uniform(-1.0, 1.0, physics.model.nu)
        mujoco.mj_forward(physics.model.ptr, physics.data.ptr)
        row = seen(task, physics)
        reward, terminated = task.outcome(np, row, None)
        expected = float(reference.env.task.get_reward(physics))
        assert abs(np.ravel(reward)[0] - expected) <= 1e-12, scale
        observation = np.concatenate(task.observe(np, row), axis=1)[0]
        wanted = reference._flat(reference.env.task.get_observation(physics))
        np.testing.assert_array_equal(observation, wanted)
        discount = reference.env.task.get_termination(physics)
        assert (terminated is not None and bool(terminated[0])) == (discount == 0.0)
        best = max(best, expected)
    assert best > 0.7, f"the best reward seen is {best}"


def test_reward_factors_may_be_observed():
    """The reference has them as an argument of its classes only."""
    from dm_control.suite import dog

    for env_id, ours, theirs in (
        ("dmc/dog-stand", Dog(observe_reward_factors=True), dog.Stand(0, True)),
        ("dmc/dog-trot", Dog(move_speed=3.0, observe_reward_factors=True), dog.Move(3.0, 0, True)),
        ("dmc/dog-fetch", DogFetch(observe_reward_factors=True), dog.Fetch(0, True)),
    ):
        reference = ControlReference(env_id, 0)
        reference.reset()
        physics = reference.env.physics
        theirs.initialize_episode(physics)
        expected = reference._flat(theirs.get_observation(physics))
        observation = np.concatenate(ours.observe(np, seen(ours, physics)), axis=1)[0]
        np.testing.assert_allclose(observation, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", ["gaussian", "linear", "quadratic", "long_tail", "reciprocal"])
@pytest.mark.parametrize("margin", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("lower", "upper"), [(0.0, 0.0), (-1.0, 2.0), (1.2, float("inf"))])
def test_tolerance_equals_dm_control(shape, margin, lower, upper):
    from dm_control.utils import rewards

    x = np.linspace(-6.0, 6.0, 241)
    value = 0.0 if shape in ("linear", "quadratic") else 0.1
    expected = rewards.tolerance(x, (lower, upper), margin, shape, value)
    np.testing.assert_allclose(tolerance(np, x, lower, upper, margin, shape, value), expected, rtol=0, atol=1e-15)
    numbers = [tolerance(np, number, lower, upper, margin, shape, value) for number in x.tolist()]
    np.testing.assert_allclose(numbers, expected, rtol=0, atol=1e-15)
    assert all(isinstance(number, float) for number in numbers)


# --- starts


def generator_positions(runner: MujocoBatch) -> list[int]:
    return [generator["state"]["pos"] for generator in runner.state_dict()["generators"]]


def test_finger_spin_draws_again_as_the_reference_does():
    """Seeds 1, 27, 30 and 63 first draw a pose in contact, so that their generators have moved on further."""
    seeds = (1, 2, 27, 30, 31, 63)
    runner = make("dmc/finger-spin", 6, 0, torch.device("cpu"), 1, row_seeds=seeds)
    runner.reset()
    positions = generator_positions(runner)
    assert [position > min(positions) for position in positions] == [True, False, True, True, False, True]
    runner.close()
    assert_equal_to_reference("dmc/finger-spin", ControlReference, seeds=seeds, steps=5)


def test_the_target_of_the_finger_is_drawn_once_the_pose_again():
    """Of the same seeds two draw a contact; the target is that of the first draw."""
    runner = make("dmc/finger-turn_easy", 40, 0, torch.device("cpu"), 1, row_seeds=range(40))
    runner.reset()
    target = runner._task.sites["target"]
    again = 0
    for row, position in enumerate(generator_positions(runner)):
        angle = np.random.RandomState(row).uniform(-np.pi, np.pi)
        x, _, z = runner._physics.site_pos[row, target]
        hinge_x, hinge_z = runner._task._circle[1:3]
        assert np.arctan2(x - hinge_x, z - hinge_z) == pytest.approx(angle)
        again += position > 8  # one draw of an angle, three of joints, two numbers each
    assert again >= 2
    runner.close()


def test_objects_of_the_manipulator_begin_in_the_hand_and_thrown(monkeypatch):
    in_hand, finish = [], Manipulator.finish

    def counted(self, xp, physics):
        in_hand.append(1)
        return finish(self, xp, physics)

    monkeypatch.setattr(Manipulator, "finish", counted)
    for env_id in ("dmc/manipulator-bring_ball", "dmc/manipulator-insert_peg"):
        in_hand.clear()
        totals = assert_equal_to_reference(env_id, ControlReference, SEEDS, steps=60, **shortened(env_id, 2))
        assert totals.episodes == 90
        assert len(in_hand) > 5


def test_gains_of_the_point_mass_are_never_too_parallel():
    task = PointMassRandomGains()
    default = SimpleNamespace(qpos=task.model.qpos0, wrap_prm=task.model.wrap_prm)
    drawn = [task.start(np, np.random.RandomState(seed), default)["wrap_prm"] for seed in range(200)]
    first, second = np.array(drawn).reshape(200, 2, 2).swapaxes(0, 1)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1.0)
    cosines = np.abs((first * second).sum(1))
    assert 0.85 < cosines.max() <= 0.9


def test_a_pose_that_always_touches_is_given_up(monkeypatch):
    def in_the_ground(self, xp, random, default):
        return {"qpos": default.qpos - np.eye(default.qpos.size)[2]}

    monkeypatch.setattr(Humanoid, "start", in_the_ground)
    monkeypatch.setattr(base, "MAX_ATTEMPTS", 20)
    with pytest.raises(RuntimeError, match="row 0: no pose without contacts in 20 draws"):
        make("dmc/humanoid-run", 2, 0, torch.device("cpu"), 1).reset()


class RowsOfDraws:
    """`envs.tasks.task.Random` for all rows, as a GPU backend has it."""

    def __init__(self, rows: int):
        self.rows = rows
        self.generator = torch.Generator().manual_seed(0)

    def uniform(self, low, high, size):
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (low, high))
        drawn = torch.rand(self.rows, size, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * drawn

    def standard_normal(self, size):
        return torch.randn(self.rows, size, generator=self.generator, dtype=torch.float64)

    def randint(self, high, size):
        return torch.randint(high, (self.rows, size), generator=self.generator)


def draws(task: Any, xp: Any, random: Any, default: Any, current: Any) -> dict[str, dict[str, Any]]:
    return {
        "construction": task.construction(xp, random, default),
        "start": task.start(xp, random, default),
        "restart": task.restart(xp, random, default, current),
        "after_lift": task.after_lift(xp, random, current),
    }


@pytest.mark.parametrize("env_id", TASKS)
def test_starts_of_all_rows_over_torch_are_distributed_as_those_of_single_rows(env_id):
    rows, task = 400, make_task(env_id)
    fields = {"qpos": task.model.qpos0, **{name: getattr(task.model, name) for name in task.expanded}}
    now = {"qpos": task.model.qpos0, "qvel": np.zeros(task.model.nv)}
    together = draws(
        task,
        torch,
        RowsOfDraws(rows),
        SimpleNamespace(**{name: torch.tensor(value) for name, value in fields.items()}),
        SimpleNamespace(**{name: torch.tensor(value).expand(rows, -1) for name, value in now.items()}),
    )
    default, current = SimpleNamespace(**fields), SimpleNamespace(**now)
    single = [draws(task, np, np.random.RandomState(seed), default, current) for seed in range(rows)]
    shapes = {**now, **fields, "act": np.zeros(task.model.na), "unfinished": np.zeros(())}
    for function, drawn in together.items():
        assert set(drawn) == set(single[0][function])
        for name, values in drawn.items():
            ours = values.double().numpy()
            assert ours.shape == (rows, *shapes[name].shape), (function, name)
            theirs = np.array([row[function][name] for row in single], float)
            error = np.sqrt((ours.var(0) + theirs.var(0)) / rows)
            assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 5.0 * error + 1e-12).all(), (function, name)
            assert (np.abs(ours.std(0) - theirs.std(0)) <= 5.0 * error + 1e-12).all(), (function, name)


# --- the linear-quadratic regulator


def lqr(row_seeds: tuple[int, ...], **settings: Any) -> MujocoBatch:
    rows = len(row_seeds)
    arguments = {"row_seeds": row_seeds, "dtype": torch.float64, **settings}
    return make("dmc/lqr-lqr_2_1", rows, 0, torch.device("cpu"), 1, **arguments)


def test_the_regulator_terminates_at_rest_as_the_reference_does():
    """Driven by the optimal policy into the next episode."""
    from dm_control.suite import lqr_solver

    reference = ControlReference("dmc/lqr-lqr_2_1", 3)
    _, gain, _ = lqr_solver.solve(reference.env)
    runner = lqr((3,), time_limit=math.inf)
    assert isinstance(runner.spec, RunnerSpec)
    assert runner.spec.horizon is None
    expected = reference.reset()
    obs = runner.reset()
    for _ in range(9_000):
        np.testing.assert_array_equal(obs[0].numpy(), expected)
        action = gain @ expected
        step = runner.step(torch.from_numpy(action)[None])
        expected, reward, terminated, truncated = reference.step(action)
        np.testing.assert_array_equal(step.final_obs[0].numpy(), expected)
        assert abs(float(step.reward[0]) - reward) < 1e-12
        assert (bool(step.terminated[0]), bool(step.truncated[0])) == (terminated, truncated)
        obs = step.obs
        if terminated:
            break
    assert terminated
    np.testing.assert_array_equal(step.obs[0].numpy(), reference.reset())


def test_springs_belong_to_a_row_and_are_saved():
    runner = lqr((3, 4))
    stiffness = runner._expanded["jnt_stiffness"].copy()
    assert not np.array_equal(stiffness[0], stiffness[1])
    np.testing.assert_array_equal(stiffness[1], ControlReference("dmc/lqr-lqr_2_1", 4).env.physics.model.jnt_stiffness)
    runner.reset()
    np.testing.assert_array_equal(runner._expanded["jnt_stiffness"], stiffness)
    vector_env = envs.as_gymnasium(lqr((5, 6)))
    vector_env.reset(seed=[3, 4])
    np.testing.assert_array_equal(vector_env.runner._expanded["jnt_stiffness"], stiffness)
    other = lqr((5, 6))
    other.load_state_dict(runner.state_dict())
    np.testing.assert_array_equal(other._expanded["jnt_stiffness"], stiffness)


@pytest.mark.parametrize(
    ("env_id", "settings", "message"),
    [
        ("dmc/lqr-lqr_2_1", {"n_actuators": 3}, "n_actuators must be from 1 to n_bodies, got 3 for 2"),
        ("dmc/lqr-lqr_2_1", {"control_limit": 0.0}, "must be positive"),
        ("dmc/swimmer-swimmer6", {"n_links": 2}, "n_links must be at least 3"),
        ("dmc/stacker-stack_4", {"n_boxes": 5}, "n_boxes must be from 1 to 4"),
        ("dmc/cartpole-swingup", {"num_poles": 0}, "num_poles must be at least 1"),
        ("dmc/dog-walk", {"move_speed": 0.0}, "move_speed must be positive"),
        ("dmc/quadruped-run", {"desired_speed": 0.0}, "desired_speed must be positive"),
        ("dmc/walker-walk", {"control_timestep": 0.003}, "control_timestep must be a multiple of 0.0025"),
        ("dmc/walker-walk", {"time_limit": 0.0}, "time_limit must be a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(env_id, settings, message):
    with pytest.raises(ValueError, match=message):
        make(env_id, 1, 0, torch.device("cpu"), 1, **settings)
