"""The native Gymnasium v5 tasks are Gymnasium's, bit for bit, whatever their settings."""

import dataclasses
import inspect
import re
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from mujoco_parity import GymnasiumReference, assert_equal_to_reference, random_actions

from envs.mujoco_batch import make, make_task
from envs.tasks.gymnasium_v5 import TASKS
from envs.tasks.task import package_file

CPU = torch.device("cpu")
NOT_TASK_SETTINGS = {"self", "default_camera_config", "kwargs", "uph_cost_weight"}  # the last one changes nothing

# Another value for every setting of every task; each must show within 150 random steps.
_PATH = {"xml_file": "MODIFIED", "max_episode_steps": 20}
_RUN = {**_PATH, "forward_reward_weight": 3.0, "ctrl_cost_weight": 0.7, "reset_noise_scale": 0.02, "frame_skip": 2}
_RUN |= {"exclude_current_positions_from_observation": False}
_WALK = {**_RUN, "healthy_reward": 0.25, "terminate_when_unhealthy": False}
_BODY = {f"include_{name}_in_observation": False for name in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")}
SETTINGS = {
    "mujoco/HalfCheetah-v5": _RUN,
    "mujoco/Swimmer-v5": _RUN,
    "mujoco/Hopper-v5": {
        **_WALK,
        "healthy_state_range": (-4.0, 3.0),
        "healthy_z_range": [1.15, 1.25],
        "healthy_angle_range": (-0.1, 0.02),
    },
    "mujoco/Walker2d-v5": {**_WALK, "healthy_z_range": (1.1, 1.3), "healthy_angle_range": (-0.2, 0.05)},
    "mujoco/Ant-v5": {
        **_WALK,
        "contact_cost_weight": 0.1,
        "main_body": "aux_1",
        "healthy_z_range": (0.4, 0.9),
        "contact_force_range": (-0.2, 3.0),
        "include_cfrc_ext_in_observation": False,
    },
    "mujoco/Humanoid-v5": {
        **_WALK,
        **_BODY,
        "contact_cost_weight": 1e-3,
        "contact_cost_range": (1.0, 2.0),
        "healthy_z_range": (1.2, 1.39),
    },
    "mujoco/HumanoidStandup-v5": {
        **{name: value for name, value in _RUN.items() if name != "forward_reward_weight"},
        **_BODY,
        "impact_cost_weight": 1e-3,
        "impact_cost_range": (1.0, 2.0),
    },
    "mujoco/InvertedPendulum-v5": {**_PATH, "frame_skip": 1, "reset_noise_scale": 0.1, "max_episode_steps": 3},
    "mujoco/InvertedDoublePendulum-v5": {
        **_PATH,
        "frame_skip": 2,
        "reset_noise_scale": 0.01,
        "healthy_reward": 3.0,
        "max_episode_steps": 3,
    },
    "mujoco/Reacher-v5": {**_PATH, "frame_skip": 3, "reward_dist_weight": 2.0, "reward_control_weight": 0.1},
    "mujoco/Pusher-v5": {
        **_PATH,
        "frame_skip": 2,
        "reward_near_weight": 2.0,
        "reward_dist_weight": 3.0,
        "reward_control_weight": 0.5,
    },
}
# What else it takes for a setting to show.
ALONGSIDE = {("mujoco/Ant-v5", "terminate_when_unhealthy"): {"healthy_z_range": (0.4, 0.9)}}


def settings_of(env_id: str) -> dict[str, Any]:
    return make(env_id, 1, 0, CPU, 1).spec.settings


def packaged(file: str) -> str:
    return package_file("gymnasium", "envs", "mujoco", "assets", file)


@pytest.fixture
def modified(tmp_path):
    """Writes a packaged model with another time step to a file of its own, whose path it returns."""

    def write(file: str) -> str:
        with open(packaged(file)) as source:
            text, count = re.subn(r'timestep="[\d.]+"', 'timestep="0.004"', source.read())
        assert count == 1
        (tmp_path / file).write_text(text)
        return str(tmp_path / file)

    return write


@pytest.mark.parametrize("env_id", TASKS)
def test_equal_to_gymnasium_over_many_episodes(env_id):
    totals = assert_equal_to_reference(env_id, GymnasiumReference, seeds=(11, 18, 25), steps=1100)
    assert totals.episodes >= 3
    assert totals.rewards > 500.0


@pytest.mark.parametrize("env_id", TASKS)
def test_settings_and_their_defaults_are_those_of_gymnasium(env_id):
    spec = gymnasium.spec(env_id.removeprefix("mujoco/"))
    module, _, name = str(spec.entry_point).partition(":")
    signature = inspect.signature(getattr(__import__(module, fromlist=[name]), name).__init__)
    expected = {k: p.default for k, p in signature.parameters.items() if k not in NOT_TASK_SETTINGS}
    expected["max_episode_steps"] = spec.max_episode_steps
    assert settings_of(env_id) == {**expected, "dtype": "float32"}
    assert set(SETTINGS[env_id]) == set(expected)


def everything(env_id: str, **settings) -> np.ndarray:
    """All that 150 steps of one row hand out, side by side."""
    runner = make(env_id, 1, 0, CPU, 1, row_seeds=[4], **settings)
    seen = [runner.reset().numpy().ravel()]
    for action in random_actions(runner, 150, seed=3):
        step = runner.step(torch.from_numpy(action))
        seen.append(np.concatenate([getattr(step, f.name).numpy().ravel() for f in dataclasses.fields(step)]))
    runner.close()
    return np.concatenate(seen)


@pytest.mark.parametrize(
    ("env_id", "setting"), [(env_id, setting) for env_id, settings in SETTINGS.items() for setting in settings]
)
def test_every_setting_means_what_it_means_in_gymnasium(env_id, setting, modified):
    value = SETTINGS[env_id][setting]
    others = ALONGSIDE.get((env_id, setting), {})
    settings = {**others, setting: modified(settings_of(env_id)["xml_file"]) if value == "MODIFIED" else value}
    assert_equal_to_reference(env_id, GymnasiumReference, seeds=(4,), steps=150, **settings)
    assert not np.array_equal(everything(env_id, **others), everything(env_id, **settings))


@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        ("mujoco/Hopper-v5", {"xml_file": "walker2d_v5.xml"}),  # of other sizes
        ("mujoco/Ant-v5", {"main_body": 2, "include_cfrc_ext_in_observation": False, "frame_skip": 1}),
        ("mujoco/Humanoid-v5", {**_BODY, "healthy_z_range": (-np.inf, np.inf)}),
        ("mujoco/Walker2d-v5", {"healthy_reward": 0.0, "terminate_when_unhealthy": False, "max_episode_steps": 60}),
    ],
)
def test_settings_work_together_for_several_rows(env_id, settings):
    assert_equal_to_reference(env_id, GymnasiumReference, seeds=(4, 5, 6), steps=150, **settings)


def test_paths_of_models_are_found_as_in_gymnasium(modified, tmp_path, monkeypatch):
    path = modified("swimmer.xml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (path, "./swimmer.xml", "~/swimmer.xml"):
        assert make_task("mujoco/Swimmer-v5", xml_file=name).model.opt.timestep == 0.004
    assert make_task("mujoco/Swimmer-v5").model.opt.timestep == 0.01


@pytest.mark.parametrize("env_id", TASKS)
def test_one_row_computed_with_numbers_is_a_row_of_many(env_id):
    many = make(env_id, 3, 0, CPU, 1, row_seeds=[7, 8, 9], dtype=torch.float64)
    one = make(env_id, 1, 0, CPU, 1, row_seeds=[8], dtype=torch.float64)
    assert torch.equal(many.reset()[1], one.reset()[0])
    for actions in random_actions(many, 120, seed=5):
        a, b = many.step(torch.from_numpy(actions)), one.step(torch.from_numpy(actions[1:2]))
        for field in dataclasses.fields(a):
            assert torch.equal(getattr(a, field.name)[1], getattr(b, field.name)[0]), field.name


@pytest.mark.parametrize(
    ("env_id", "settings", "message"),
    [
        ("mujoco/Ant-v5", {"reset_noise_scale": -0.1}, "reset_noise_scale must be .* not negative, got -0.1"),
        ("mujoco/Ant-v5", {"frame_skip": 0}, "frame_skip must be a whole number of at least 1, got 0"),
        ("mujoco/Ant-v5", {"frame_skip": 2.5}, "frame_skip must be a whole number of at least 1, got 2.5"),
        ("mujoco/Pusher-v5", {"max_episode_steps": True}, "max_episode_steps must be a whole number"),
        ("mujoco/Hopper-v5", {"healthy_reward": "much"}, "healthy_reward must be a finite number, got 'much'"),
        ("mujoco/Reacher-v5", {"reward_dist_weight": float("nan")}, "reward_dist_weight must be a finite number"),
        ("mujoco/Hopper-v5", {"healthy_z_range": (2.0, 1.0)}, "healthy_z_range must be two numbers, the lower first"),
        ("mujoco/Hopper-v5", {"healthy_z_range": (0.0, 1.0, 2.0)}, "healthy_z_range must be two numbers"),
        ("mujoco/Hopper-v5", {"healthy_z_range": 0.7}, "healthy_z_range must be two numbers"),
        ("mujoco/Hopper-v5", {"healthy_z_range": (0.0, float("nan"))}, "healthy_z_range must be two numbers"),
        ("mujoco/Ant-v5", {"terminate_when_unhealthy": "no"}, "terminate_when_unhealthy must be True or False"),
        ("mujoco/Ant-v5", {"include_cfrc_ext_in_observation": 0}, "must be True or False, got 0"),
        ("mujoco/Ant-v5", {"main_body": 1.5}, "main_body must be the number or the name of a body, got 1.5"),
        ("mujoco/Ant-v5", {"main_body": 14}, "ant.xml has no body 14"),
        ("mujoco/Ant-v5", {"main_body": "tail"}, "ant.xml has no body 'tail'"),
        ("mujoco/Ant-v5", {"xml_file": 3}, "xml_file must be a string"),
        ("mujoco/Ant-v5", {"xml_file": "spider.xml"}, "xml_file: there is no file .*assets/spider.xml"),
        ("mujoco/Pusher-v5", {"xml_file": "ant.xml"}, "ant.xml has no body 'tips_arm'"),
        ("mujoco/InvertedDoublePendulum-v5", {"xml_file": "ant.xml"}, "ant.xml has no site"),
        ("mujoco/HumanoidStandup-v5", {"uph_cost_weight": 2.0}, "no setting 'uph_cost_weight'"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(env_id, settings, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make(env_id, 1, 0, CPU, 1, **settings)
    assert "\n" not in str(refusal.value)


def test_a_model_that_is_no_model_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "broken.xml"
    path.write_text("<mujoco><worldbody><nothing/></worldbody></mujoco>")
    with pytest.raises(ValueError, match="xml_file: MuJoCo cannot read .*broken.xml: .*nothing") as refusal:
        make("mujoco/Ant-v5", 1, 0, CPU, 1, xml_file=str(path))
    assert "\n" not in str(refusal.value)


class AllRows:
    """A source of draws for all rows, as a GPU backend has one."""

    def __init__(self, num_envs: int):
        self.num_envs, self.generator = num_envs, torch.Generator().manual_seed(0)

    def uniform(self, low, high, size: int) -> torch.Tensor:
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (low, high))
        return low + (high - low) * torch.rand(self.num_envs, size, generator=self.generator, dtype=torch.float64)

    def standard_normal(self, size: int) -> torch.Tensor:
        return torch.randn(self.num_envs, size, generator=self.generator, dtype=torch.float64)


def starts(env_id: str, num_envs: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    """First states that one task draws for all rows over torch, and for one row after another over NumPy."""
    task = make_task(env_id)
    qpos0 = task.model.qpos0
    together = task.start(torch, AllRows(num_envs), SimpleNamespace(qpos=torch.from_numpy(qpos0.copy())))
    generator = task.generator(0)
    alone = [task.start(np, generator, SimpleNamespace(qpos=qpos0)) for _ in range(num_envs)]
    stacked = {name: np.stack([state[name] for state in alone]) for name in together}
    return SimpleNamespace(**{k: v.numpy() for k, v in together.items()}), SimpleNamespace(**stacked)


@pytest.mark.parametrize("env_id", TASKS)
def test_rows_that_start_together_are_distributed_as_rows_that_start_alone(env_id):
    together, alone = starts(env_id, 2000)
    for name in ("qpos", "qvel"):
        a, b = getattr(together, name), getattr(alone, name)
        assert a.shape == b.shape
        deviation = b.std(0)
        np.testing.assert_allclose(a.mean(0), b.mean(0), rtol=0, atol=1e-12 + 0.15 * deviation.max())
        np.testing.assert_allclose(a.std(0), deviation, rtol=0.1, atol=1e-12)


def test_targets_that_start_together_are_where_the_reference_accepts_them():
    together, alone = starts("mujoco/Reacher-v5", 2000)
    for state in (together, alone):
        radius = np.linalg.norm(state.qpos[:, -2:], axis=1)
        assert 0.195 < radius.max() < 0.2
        assert np.mean(radius < 0.1) == pytest.approx(0.25, abs=0.04)  # uniform over the disc
        assert not state.qvel[:, -2:].any()
    together, alone = starts("mujoco/Pusher-v5", 2000)
    for state in (together, alone):
        cylinder = state.qpos[:, -4:-2]
        assert 0.17 < np.linalg.norm(cylinder, axis=1).min() < 0.175
        assert cylinder.min(0) == pytest.approx([-0.3, -0.2], abs=0.005)
        assert not state.qpos[:, -2:].any()
        assert not state.qvel[:, -4:].any()


@pytest.mark.parametrize("env_id", ["mujoco/Ant-v5", "mujoco/Reacher-v5"])
def test_render_follows_a_robot_and_also_shows_models_without_a_camera(env_id):
    runner = make(env_id, 1, 0, CPU, 1)
    runner.reset()
    task = make_task(env_id)
    assert task.camera == (task.model.camera("track").id if env_id == "mujoco/Ant-v5" else -1)
    try:
        picture = runner.render(0, 48, 64)
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        runner.close()
    assert picture.shape == (48, 64, 3)
    assert picture.std() > 1.0
