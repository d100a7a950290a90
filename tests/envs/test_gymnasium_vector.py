"""Gymnasium environments: equal to plain stepping, exact after a resume, and clear about what is not supported."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import counter_env  # noqa: F401  (registers neoteny/Counter-v0)
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

import envs
from envs import gymnasium_vector
from envs.dm_control_env import SUITE, DmControlEnv
from envs.gymnasium_spaces import actions, observations
from envs.runner import DiscreteActionSpec, Step

CPU = torch.device("cpu")


def draw_actions(runner: gymnasium_vector.GymnasiumRunner, steps: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spec = runner.action_spec
    if isinstance(spec, DiscreteActionSpec):
        return torch.randint(spec.count, (steps, runner.num_envs), generator=generator)
    low, high = torch.from_numpy(spec.low), torch.from_numpy(spec.high)
    return low + (high - low) * torch.rand(steps, runner.num_envs, spec.size, generator=generator)


def assert_equal_steps(left: Step, right: Step) -> None:
    for name in Step.__slots__:
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize(
    ("name", "settings"),
    [("CartPole-v1", {}), ("MountainCarContinuous-v0", {"max_episode_steps": 40}), ("Hopper-v5", {}), ("Taxi-v4", {})],
)
def test_equal_to_plain_stepping(name, settings):
    """Each row is what `gymnasium.make` gives with the row's seed at the first reset and none at the later ones."""
    seeds = [11, 12]
    runner = gymnasium_vector.make(f"gym/{name}", 2, 0, "cpu", row_seeds=seeds, **settings)
    plain = [gymnasium.make(name, **settings) for _ in seeds]

    def row_of(observation) -> np.ndarray:
        if isinstance(plain[0].observation_space, Discrete):
            return np.eye(plain[0].observation_space.n, dtype=np.float32)[observation]
        return observation.astype(np.float32)

    first = [row_of(env.reset(seed=seed)[0]) for env, seed in zip(plain, seeds, strict=True)]
    assert np.array_equal(runner.reset(), first)
    ended = 0
    for action in draw_actions(runner, 250):
        step = runner.step(action)
        for row, env in enumerate(plain):
            taken = int(action[row]) if action.ndim == 1 else action[row].numpy()
            observation, reward, terminated, truncated, _ = env.step(taken)
            assert np.array_equal(step.final_obs[row], row_of(observation))
            assert float(step.reward[row]) == np.float32(reward)
            assert (bool(step.terminated[row]), bool(step.truncated[row])) == (terminated, truncated)
            if terminated or truncated:
                observation, _ = env.reset()
                ended += 1
            assert np.array_equal(step.obs[row], row_of(observation))
    assert ended >= 2


def test_default_seeds_do_not_depend_on_the_number_of_rows():
    three = gymnasium_vector.make("gym/CartPole-v1", 3, 4, "cpu")
    one = gymnasium_vector.make("gym/CartPole-v1", 1, 4, "cpu")
    assert torch.equal(three.reset()[:1], one.reset())
    assert envs.runner.row_seeds(4, 3)[:1] == envs.runner.row_seeds(4, 1)


@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        ("gym/CartPole-v1", {}),
        ("gym/FrozenLake-v1", {}),  # draws during the episode too
        ("gym/Pendulum-v1", {"max_episode_steps": 30}),
        ("gym/Hopper-v5", {}),
        ("dmc/fish-upright", {"max_episode_steps": 30}),  # a RandomState instead of a Generator
    ],
)
def test_resume_is_bit_equal_in_the_middle_of_a_later_episode(env_id, settings):
    whole = gymnasium_vector.make(env_id, 2, 7, "cpu", **settings)
    taken = draw_actions(whole, 280)
    whole.reset()
    for action in taken[:133]:
        whole.step(action)
    state = whole.state_dict()
    assert all(generator != "null" for generator in state["generators"])
    assert any(len(row) for row in state["actions"])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    halves = gymnasium_vector.make(env_id, 2, 8, "cpu", **settings)
    halves.load_state_dict(torch.load(file, weights_only=True))
    for action in taken[133:]:
        assert_equal_steps(whole.step(action), halves.step(action))


def test_resume_keeps_the_spare_normal_draw_of_a_random_state():
    """Normal draws come in pairs; after an odd number of them the next reset begins with the one that is left."""
    whole = gymnasium_vector.make("dmc/fish-upright", 1, 7, "cpu", max_episode_steps=5)
    halves = gymnasium_vector.make("dmc/fish-upright", 1, 8, "cpu", max_episode_steps=5)
    whole.reset()
    whole._envs[0].unwrapped.random.randn()
    taken = draw_actions(whole, 20)
    for action in taken[:7]:
        whole.step(action)
    halves.load_state_dict(whole.state_dict())
    for action in taken[7:]:
        assert_equal_steps(whole.step(action), halves.step(action))


def test_resume_in_the_first_episode_and_before_it():
    whole = gymnasium_vector.make("gym/Pendulum-v1", 1, 7, "cpu")
    fresh = gymnasium_vector.make("gym/Pendulum-v1", 1, 8, "cpu")
    fresh.load_state_dict(whole.state_dict())
    assert torch.equal(whole.reset(), fresh.reset())
    taken = draw_actions(whole, 20)
    for action in taken[:10]:
        whole.step(action)
    fresh.load_state_dict(whole.state_dict())
    for action in taken[10:]:
        assert_equal_steps(whole.step(action), fresh.step(action))


def test_a_state_of_other_environments_is_refused():
    state = gymnasium_vector.make("gym/CartPole-v1", 2, 0, "cpu").state_dict()
    with pytest.raises(ValueError, match="env_id"):
        gymnasium_vector.make("gym/Acrobot-v1", 2, 0, "cpu").load_state_dict(state)
    with pytest.raises(ValueError, match="settings"):
        gymnasium_vector.make("gym/CartPole-v1", 2, 0, "cpu", max_episode_steps=9).load_state_dict(state)
    with pytest.raises(ValueError, match="2 rows, not 3"):
        gymnasium_vector.make("gym/CartPole-v1", 3, 0, "cpu").load_state_dict(state)


def test_actions_belong_to_the_runner_once_sent():
    left = gymnasium_vector.make("gym/Pendulum-v1", 1, 0, "cpu")
    right = gymnasium_vector.make("gym/Pendulum-v1", 1, 0, "cpu")
    left.reset()
    right.reset()
    action = torch.ones(1, 1)
    left.send(action)
    action.fill_(-2.0)
    assert_equal_steps(left.recv(), right.step(torch.ones(1, 1)))


def test_send_and_recv_alternate():
    runner = gymnasium_vector.make("gym/CartPole-v1", 1, 0, "cpu")
    action = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="reset"):
        runner.send(action)
    runner.reset()
    with pytest.raises(RuntimeError, match="send"):
        runner.recv()
    runner.send(action)
    with pytest.raises(RuntimeError, match="recv"):
        runner.send(action)
    with pytest.raises(RuntimeError, match="recv"):
        runner.state_dict()


@pytest.mark.parametrize(
    ("env_id", "action", "message"),
    [
        ("gym/CartPole-v1", torch.zeros(2), r"must be int64 \[2\], got torch.float32 \[2\]"),
        ("gym/CartPole-v1", torch.zeros(2, 1, dtype=torch.int64), r"must be int64 \[2\]"),
        ("gym/CartPole-v1", torch.zeros(3, dtype=torch.int64), r"must be int64 \[2\]"),
        ("gym/CartPole-v1", torch.zeros(2, dtype=torch.int64, device="meta"), "must be on cpu, it is on meta"),
        ("gym/CartPole-v1", [0, 0], "must be a tensor, got list"),
        ("gym/CartPole-v1", torch.tensor([0, 2]), r"row 1: action 2 is not one of 0 to 1"),
        ("gym/CartPole-v1", torch.tensor([-1, 0]), r"row 0: action -1 is not one of"),
        ("gym/Pendulum-v1", torch.zeros(2), r"must be floating-point \[2, 1\]"),
        ("gym/Pendulum-v1", torch.zeros(2, 1, dtype=torch.int64), r"must be floating-point \[2, 1\]"),
        ("gym/Pendulum-v1", torch.zeros(2, 1, device="meta"), "must be on cpu"),
        ("gym/Pendulum-v1", torch.tensor([[0.0], [2.1]]), r"row 1: action \[0\] is 2.1, outside of \[-2, 2\]"),
        ("gym/Pendulum-v1", torch.tensor([[np.inf], [0.0]]), r"row 0: action \[0\] is inf, outside of"),
    ],
)
def test_wrong_actions_are_refused_and_change_nothing(env_id, action, message):
    runner, twin = (gymnasium_vector.make(env_id, 2, 0, CPU) for _ in range(2))
    runner.reset()
    twin.reset()
    with pytest.raises(ValueError, match=message):
        runner.step(action)
    fine = draw_actions(runner, 1)[0]
    assert torch.equal(runner.step(fine).obs, twin.step(fine).obs)


def test_actions_that_are_no_numbers_are_found_at_every_step():
    runner = gymnasium_vector.make("gym/Pendulum-v1", 2, 0, CPU)
    runner.reset()
    runner.step(torch.zeros(2, 1))
    with pytest.raises(FloatingPointError, match=r"row 1: action \[0\] is NaN"):
        runner.step(torch.tensor([[0.0], [np.nan]]))
    runner.step(torch.zeros(2, 1, dtype=torch.bfloat16))


def test_observation_spaces():
    spec, encode = observations("gym/X", Box(-1, 1, (2, 3), np.float64))
    assert spec.shape == (6,)
    assert spec.dtype == torch.float32
    assert np.ravel(encode(np.arange(6.0).reshape(2, 3))).tolist() == [0, 1, 2, 3, 4, 5]
    spec, _ = observations("gym/X", Box(0, 255, (8, 8, 3), np.uint8))
    assert (spec.shape, spec.dtype) == ((8, 8, 3), torch.uint8)
    spec, _ = observations("gym/X", Box(0, 255, (128,), np.uint8))  # console memory is a vector, not an image
    assert (spec.shape, spec.dtype) == ((128,), torch.float32)
    spec, encode = observations("gym/X", Discrete(4, start=-1))
    assert spec.shape == (4,)
    assert encode(0).tolist() == [0, 1, 0, 0]


def test_action_spaces():
    spec, decode = actions("gym/X", Discrete(3, start=5), 2, CPU)
    assert spec.count == 3
    assert decode(torch.tensor([0, 2])) == [5, 7]
    spec, decode = actions("gym/X", Box(-2, 3, (2, 2), np.float64), 1, CPU)
    assert (spec.low.tolist(), spec.high.tolist()) == ([-2.0] * 4, [3.0] * 4)
    (taken,) = decode(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    assert taken.dtype == np.float64
    assert taken.tolist() == [[0.0, 1.0], [2.0, 3.0]]


@pytest.mark.parametrize(
    "space", [Dict({"a": Discrete(2)}), Tuple([Discrete(2)]), MultiDiscrete([2, 2]), MultiBinary(3)]
)
def test_other_spaces_are_named(space):
    with pytest.raises(ValueError, match=f"gym/X observes a {type(space).__name__} space"):
        observations("gym/X", space)
    with pytest.raises(ValueError, match=f"gym/X takes actions in a {type(space).__name__}"):
        actions("gym/X", space, 1, CPU)


def test_actions_without_bounds_are_refused():
    with pytest.raises(ValueError, match="finite bounds"):
        actions("gym/X", Box(-np.inf, np.inf, (2,), np.float32), 1, CPU)
    with pytest.raises(ValueError, match="dmc/lqr-lqr_2_1 takes actions in a Box without finite bounds"):
        gymnasium_vector.make("dmc/lqr-lqr_2_1", 1, 0, "cpu")


def test_a_setting_that_does_not_exist_names_those_that_do():
    with pytest.raises(ValueError, match=r"gym/CartPole-v1 has no setting 'poles'; it accepts .*sutton_barto_reward"):
        envs.make("gym/CartPole-v1", poles=2)
    with pytest.raises(ValueError, match=r"has no setting 'foo'; it accepts .*ctrl_cost_weight"):
        envs.make("gym/Hopper-v5", foo=2)
    with pytest.raises(ValueError, match="dmc/fish-upright has no setting 'foo'"):
        gymnasium_vector.make("dmc/fish-upright", 1, 0, "cpu", foo=2)


def test_a_setting_reaches_the_environment():
    runner = gymnasium_vector.make("gym/CartPole-v1", 1, 0, "cpu", sutton_barto_reward=True)
    assert runner.spec.settings == {"sutton_barto_reward": True}
    runner.reset()
    assert runner.step(torch.tensor([0])).reward.tolist() == [0.0]  # 1 without it


def test_the_step_limit_truncates():
    runner = envs.make("gym/Pendulum-v1", max_episode_steps=3)
    assert runner.spec.horizon == 3
    assert envs.make("gym/Pendulum-v1").spec.horizon == 200
    assert envs.make("gym/CartPole-v0").spec.horizon == 200  # an older version, named explicitly
    assert gymnasium_vector.make("dmc/fish-upright", 1, 0, "cpu", max_episode_steps=3).spec.horizon == 3
    assert gymnasium_vector.make("dmc/fish-upright", 1, 0, "cpu").spec.horizon == 1000
    runner.reset()
    ends = [runner.step(torch.zeros(1, 1)) for _ in range(3)][-1]
    assert (bool(ends.truncated), bool(ends.terminated)) == (True, False)


def test_a_missing_package_is_told_from_an_unknown_id():
    gymnasium.register("neoteny/Missing-v0", "no_such_package.module:Env")
    with pytest.raises(envs.EnvironmentNotFound, match=r"known, but .* not installed: pip install no_such_package"):
        envs.make("gym/neoteny/Missing-v0")
    gymnasium.registry.pop("neoteny/Missing-v0")
    with pytest.raises(envs.EnvironmentNotFound, match="unknown environment"):
        envs.make("gym/neoteny/Missing-v0")


def test_box2d_is_listed_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(gymnasium_vector, "find_spec", lambda name: None)
    assert "gym/LunarLander-v3" not in gymnasium_vector.known_ids()
    assert gymnasium_vector.accepts("gym/LunarLander-v3")
    monkeypatch.setattr(gymnasium_vector, "find_spec", lambda name: object())
    assert "gym/LunarLander-v3" in gymnasium_vector.known_ids()


def test_known_ids_are_the_newest_versions():
    ids = gymnasium_vector.known_ids()
    assert {"gym/CartPole-v1", "gym/neoteny/Counter-v0", "mujoco/Ant-v5", "dmc/dog-run"} <= set(ids)
    assert not {"gym/CartPole-v0", "mujoco/Ant-v4", "gym/Ant-v5", "gym/Blackjack-v1", "dmc/lqr-lqr_2_1"} & set(ids)
    assert not [name for name in ids if name.startswith(("gym/ALE", "gym/phys2d", "gym/tabular", "gym/GymV"))]


def test_render_has_the_size_asked_for():
    runner = envs.make("gym/Hopper-v5")
    runner.reset()
    runner._envs[0].unwrapped.render = lambda: np.full((480, 480, 3), 7, np.uint8)  # OpenGL is not what this is about
    picture = runner.render(0, 120, 90)
    assert picture.shape == (120, 90, 3)
    assert (picture == 7).all()
    counter = envs.make("gym/neoteny/Counter-v0")
    counter.reset()
    counter._envs[0].unwrapped.render = lambda: None
    with pytest.raises(RuntimeError, match="draws no picture"):
        counter.render()


def test_every_suite_task_has_an_id():
    from dm_control import suite

    assert {(domain, task) for domain, tasks in SUITE.items() for task in tasks} == set(suite.ALL_TASKS)


@pytest.mark.parametrize(("domain", "task"), [("fish", "swim"), ("stacker", "stack_2")])
def test_dm_control_equals_the_suite(domain, task):
    """Observations in the order of the task's spec, rewards and ends, over the reset into a second episode."""
    from dm_control import suite

    env = DmControlEnv(domain, task, seed=3)
    expected = suite.load(domain, task, {"random": np.random.RandomState(3)})
    expected_low = expected.action_spec().minimum
    assert np.array_equal(env.action_space.low, expected_low)
    draws = np.random.RandomState(0)
    for episode in range(2):
        time_step = expected.reset()
        observation, _ = env.reset()
        assert observation.shape == env.observation_space.shape
        for count in range(1, 1001):
            assert np.array_equal(observation, np.concatenate([np.ravel(v) for v in time_step.observation.values()]))
            if episode == 1 and count == 50:
                break
            action = draws.uniform(-1, 1, expected_low.shape)
            time_step = expected.step(action)
            observation, reward, terminated, truncated, _ = env.step(action)
            assert reward == time_step.reward
            assert not terminated
            assert truncated == time_step.last() == (count == env.horizon)


def test_dm_control_terminates_where_the_discount_is_zero():
    env = DmControlEnv("lqr", "lqr_2_1", seed=0)
    assert env.horizon is None
    assert np.isinf(env.action_space.high).all()  # which is why the runner refuses it
    env.reset()
    with env._env.physics.reset_context():
        env._env.physics.data.qpos[:] = 0.0
    _, _, terminated, truncated, _ = env.step(np.zeros(env.action_space.shape))  # the task ends at rest in the middle
    assert (terminated, truncated) == (True, False)


def test_a_seeded_reset_of_dm_control_draws_the_model_again():
    """lqr draws its stiffness when it is loaded."""
    env = DmControlEnv("lqr", "lqr_2_1", seed=0)
    first, _ = env.reset()
    stiffness = env._env.physics.model.jnt_stiffness.copy()
    env.reset(seed=1)
    assert not np.array_equal(stiffness, env._env.physics.model.jnt_stiffness)
    again, _ = env.reset(seed=0)
    assert np.array_equal(stiffness, env._env.physics.model.jnt_stiffness)
    assert np.array_equal(first, again)


@pytest.mark.gpu
def test_on_a_gpu_the_same_as_on_the_cpu():
    host, device = envs.make("gym/CartPole-v1", 3), envs.make("gym/CartPole-v1", 3, device="cuda")
    assert torch.equal(host.reset(), device.reset().cpu())
    for action in draw_actions(host, 200):
        left, right = host.step(action), device.step(action.cuda())
        for name in Step.__slots__:
            assert getattr(right, name).is_cuda
            assert torch.equal(getattr(left, name), getattr(right, name).cpu()), name


@pytest.mark.parametrize(
    "start",
    [
        "from envs import gymnasium_vector; gymnasium_vector.make('dmc/acrobot-swingup', 1, 0, 'cpu').reset()",
        "runner = envs.make('mujoco/HalfCheetah-v5'); runner.reset(); runner.render(0, 64, 64); runner.close()",
    ],
)
def test_the_compiler_of_torch_loads_after_opengl_was_started(start):
    """Mesa's driver and triton both bring an LLVM; in the wrong order the process dies (see envs/graphics.py)."""
    code = f"import envs; {start}; import torch._dynamo; print('alive')"
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert "alive" in ended.stdout, ended.stderr
