"""What the MuJoCo runner promises beyond equality with the references."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mujoco_parity import random_actions

import envs
from envs.mujoco_batch import MujocoBatch, known_ids, make, make_task
from envs.runner import Step, row_seeds

CPU = torch.device("cpu")
# One id of each class: the tests of each family compare every id with the reference.
KINDS = list({type(make_task(env_id)): env_id for env_id in reversed(known_ids())}.values())
# short episodes, so that a few hundred steps see many of them
SHORT = {
    env_id: {"max_episode_steps": 150} if env_id.startswith("mujoco") else {"time_limit": 1.5} for env_id in known_ids()
}


def record(runner: MujocoBatch, actions: np.ndarray) -> list[dict[str, np.ndarray]]:
    names = Step.__dataclass_fields__
    steps = (runner.step(torch.from_numpy(action)) for action in actions)
    return [{name: getattr(step, name).numpy().copy() for name in names} for step in steps]


def assert_same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    for t, (a, b) in enumerate(zip(first, second, strict=True)):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"{name} at step {t}")


@pytest.mark.parametrize("env_id", ["mujoco/Hopper-v5", "mujoco/Ant-v5", "dmc/cheetah-run", "dmc/reacher-easy"])
def test_threads_change_nothing(env_id):
    runs = []
    for threads in (1, 2, 5):
        runner = make(env_id, 5, 0, CPU, threads, dtype=torch.float64, **SHORT[env_id])
        runner.reset()
        runs.append(record(runner, random_actions(runner, 200, seed=1)))
        runner.close()
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.parametrize("env_id", ["mujoco/Hopper-v5", "mujoco/Humanoid-v5", "dmc/cheetah-run", "dmc/finger-spin"])
def test_a_row_does_not_depend_on_the_others(env_id):
    """Row 2 of 4, whose neighbours are reset at other times, is the one row of a runner of its own."""
    together = make(env_id, 4, 9, CPU, 2, **SHORT[env_id])
    alone = make(env_id, 1, 0, CPU, 1, row_seeds=row_seeds(9, 3)[2:], **SHORT[env_id])
    np.testing.assert_array_equal(together.reset()[2], alone.reset()[0])
    actions = random_actions(together, 250, seed=2)
    many = [{name: x[2:3] for name, x in step.items()} for step in record(together, actions)]
    assert_same(many, record(alone, actions[:, 2:3]))
    assert sum(step["episode_ended"].sum() for step in many) >= 1


def test_a_reset_leaves_the_other_rows_untouched():
    runner = make("mujoco/Hopper-v5", 6, 3, CPU, 2, dtype=torch.float64)
    runner.reset()
    partial = 0
    for action in random_actions(runner, 200, seed=4):
        step = runner.step(torch.from_numpy(action))
        ended = step.episode_ended
        assert torch.equal(step.obs[~ended], step.final_obs[~ended])
        if ended.any() and not ended.all():
            partial += 1
            assert (step.obs[ended] != step.final_obs[ended]).any(1).all()
            assert torch.equal(step.terminated | step.truncated, ended)
            assert not step.episode_length[~ended].any()
    assert partial > 10


@pytest.mark.parametrize("env_id", KINDS)
def test_resume_is_exact(env_id, tmp_path):
    brief = {name: type(limit)(0.4 * limit) for name, limit in SHORT[env_id].items()}
    whole = make(env_id, 2, 5, CPU, 1, dtype=torch.float64, **brief)
    whole.reset()
    actions = random_actions(whole, 187, seed=6)
    record(whole, actions[:53])
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    rest = record(whole, actions[53:])
    assert sum(step["episode_ended"].sum() for step in rest) >= 2

    resumed = make(env_id, 2, 99, CPU, 2, dtype=torch.float64, **brief)
    for _ in ("fresh", "used"):
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert_same(rest, record(resumed, actions[53:]))


RESUME = """
import sys, torch
from envs.mujoco_batch import make
state, actions, out = sys.argv[1:]
runner = make("mujoco/Ant-v5", 3, 0, torch.device("cpu"), 1, dtype=torch.float64)
runner.load_state_dict(torch.load(state, weights_only=True))
steps = []
for action in torch.load(actions, weights_only=True):
    step = runner.step(action)
    names = ("obs", "final_obs", "reward", "terminated", "truncated", "episode_return", "episode_length")
    steps.append({name: getattr(step, name).clone() for name in names})
torch.save(steps, out)
"""


def test_resume_is_exact_in_a_new_process(tmp_path):
    """The reward of Ant compares body positions that lag the state; a state alone gives a first reward far off."""
    runner = make("mujoco/Ant-v5", 3, 5, CPU, 1, dtype=torch.float64)
    runner.reset()
    actions = torch.from_numpy(random_actions(runner, 591, seed=7))
    for action in actions[:91]:
        runner.step(action)
    state, rest, out = (str(tmp_path / name) for name in ("state.pt", "actions.pt", "out.pt"))
    torch.save(runner.state_dict(), state)
    torch.save(actions[91:].clone(), rest)
    subprocess.run([sys.executable, "-c", RESUME, state, rest, out], check=True, cwd=Path(__file__).parents[2])
    resumed = [{name: x.numpy() for name, x in step.items()} for step in torch.load(out, weights_only=True)]
    expected = record(runner, actions[91:].numpy())
    assert_same([{name: step[name] for name in resumed[0]} for step in expected], resumed)


def test_a_state_of_other_environments_is_refused():
    state = make("mujoco/Hopper-v5", 2, 0, CPU, 1).state_dict()
    for env_id, rows in (("mujoco/Hopper-v5", 3), ("mujoco/Walker2d-v5", 2)):
        with pytest.raises(ValueError, match="2 x mujoco/Hopper-v5"):
            make(env_id, rows, 0, CPU, 1).load_state_dict(state)


@pytest.mark.parametrize("env_id", ["mujoco/HalfCheetah-v5", "dmc/cartpole-swingup"])
def test_an_action_that_is_not_a_number_raises_with_its_row(env_id):
    runner = make(env_id, 3, 0, CPU, 1)
    runner.reset()
    action = torch.zeros(3, runner.action_spec.size)
    action[1, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="row 1: action .0. is NaN"):
        runner.step(action)
    runner.step(torch.zeros_like(action))
    with pytest.raises(FloatingPointError, match="row 1: .*ctrl"):  # where nobody looked at the actions
        runner.step(action)


@pytest.mark.parametrize("env_id", ["mujoco/Humanoid-v5", "mujoco/HalfCheetah-v5", "dmc/walker-walk"])
def test_a_simulation_that_diverges_ends_its_episode_and_no_other(env_id):
    """Beside a runner in which nothing happens: the other rows must be the same to the last bit."""
    runner, healthy = (make(env_id, 3, 0, CPU, 1) for _ in range(2))
    actions = torch.zeros(3, runner.action_spec.size)
    for each in (runner, healthy):
        each.reset()
        last = each.step(actions).obs.clone()
    state = runner.state_dict()
    state["simulation"][2, 4] = float("nan")
    runner.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match="row 2: .* qpos; the episode is truncated"):
        step = runner.step(actions)
    expected = healthy.step(actions)
    assert step.truncated.tolist() == step.episode_ended.tolist() == [False, False, True]
    assert not step.terminated.any()
    assert float(step.reward[2]) == 0.0
    assert int(step.episode_length[2]) == 2
    assert torch.equal(step.final_obs[2], last[2])
    assert not torch.equal(step.obs[2], last[2])
    assert runner.diverged_episodes == 1
    for _ in range(3):
        assert torch.equal(step.final_obs[:2], expected.final_obs[:2])
        assert torch.equal(step.reward[:2], expected.reward[:2])
        step, expected = runner.step(actions), healthy.step(actions)
        assert step.obs.isfinite().all()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (torch.zeros(2, 5), "must be floating-point"),
        (torch.zeros(2, 6, dtype=torch.int64), "must be floating-point"),
        (torch.full((2, 6), 1.5), "row 0: action .0. is 1.5, outside of"),
        (torch.zeros(2, 6, device="meta"), "must be on cpu"),
        (np.zeros((2, 6), np.float32), "must be a tensor, got ndarray"),
        (None, "must be a tensor, got NoneType"),
    ],
)
def test_actions_of_another_kind_are_refused(action, message):
    runner = make("mujoco/HalfCheetah-v5", 2, 0, CPU, 1)
    runner.reset()
    with pytest.raises(ValueError, match=message):
        runner.step(action)
    runner.step(torch.full((2, 6), 1.0001))  # rounding is no mistake
    runner.step(torch.zeros(2, 6, dtype=torch.bfloat16))


def test_actions_beyond_their_bounds_are_found_within_256_steps():
    runner = make("mujoco/HalfCheetah-v5", 2, 0, CPU, 1)
    runner.reset()
    runner.step(torch.zeros(2, 6))
    action = torch.zeros(2, 6)
    action[1, 5] = -3.0

    def steps():
        for _ in range(257):
            runner.step(action)

    with pytest.raises(ValueError, match="row 1: action .5. is -3, outside of .-1, 1."):
        steps()


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_bad_reward_or_observation_raises_with_its_row_and_name():
    runner = make("mujoco/HalfCheetah-v5", 2, 0, CPU, 1, ctrl_cost_weight=1e308)
    runner.reset()
    action = torch.zeros(2, 6, dtype=torch.float64)
    runner.step(action)
    action[1] = 1.0
    with pytest.raises(FloatingPointError, match="row 1: reward .* -inf"):
        runner.step(action)
    state = runner.state_dict()
    state["simulation"][0, 3] = 1e39  # beyond float32 and beyond what the simulator accepts
    runner.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match="row 0"):
        runner.step(torch.zeros(2, 6))


@pytest.mark.filterwarnings("ignore:overflow")
def test_large_finite_numbers_are_not_mistaken_for_infinity():
    """The quick check squares, and 1e30 squared is infinite in float32."""
    runner = make("mujoco/HalfCheetah-v5", 1, 0, CPU, 1, ctrl_cost_weight=1e30)
    runner.reset()
    assert float(runner.step(torch.ones(1, 6)).reward) == pytest.approx(-6e30)


@pytest.mark.parametrize("env_id", ["mujoco/Hopper-v5", "dmc/cartpole-swingup"])
def test_returned_tensors_stay_valid_for_one_further_step(env_id):
    runner = make(env_id, 4, 0, CPU, 1, **SHORT[env_id])
    names = Step.__dataclass_fields__
    before = runner.reset()
    copy = before.clone()
    last, kept, ends = None, {}, 0
    for action in random_actions(runner, 320, seed=8):
        step = runner.step(torch.from_numpy(action))
        assert torch.equal(before, copy)
        if last is not None:
            for name in names:
                assert torch.equal(getattr(last, name), kept[name]), name
        last, kept = step, {name: getattr(step, name).clone() for name in names}
        before, copy = step.obs, step.obs.clone()
        ends += int(step.episode_ended.any())
    assert ends >= 2


def test_a_step_makes_no_tensors():
    runner = make("mujoco/Hopper-v5", 4, 0, CPU, 1)
    runner.reset()
    steps = {id(runner.step(torch.from_numpy(action))) for action in random_actions(runner, 300, seed=9)}
    assert len(steps) == 4  # two sets of buffers, each with and without ended episodes


def test_float32_is_the_rounded_float64():
    wide, narrow = (make("mujoco/Humanoid-v5", 3, 0, CPU, 1, dtype=d) for d in (torch.float64, torch.float32))
    assert torch.equal(wide.reset().float(), narrow.reset())
    for action in random_actions(wide, 100, seed=10):
        a, b = wide.step(torch.from_numpy(action)), narrow.step(torch.from_numpy(action))
        for name in ("obs", "final_obs", "reward", "episode_return"):
            assert torch.equal(getattr(a, name).float(), getattr(b, name)), name
            assert getattr(b, name).dtype == torch.float32


def test_send_and_recv_are_a_step_and_must_alternate():
    first, second = (make("dmc/pendulum-swingup", 2, 0, CPU, 1) for _ in range(2))
    with pytest.raises(RuntimeError, match="reset"):
        first.send(torch.zeros(2, 1))
    assert torch.equal(first.reset(), second.reset())
    with pytest.raises(RuntimeError, match="send"):
        first.recv()
    first.send(torch.ones(2, 1))
    for wrong in (lambda: first.send(torch.ones(2, 1)), first.state_dict):
        with pytest.raises(RuntimeError, match="recv"):
            wrong()
    assert torch.equal(first.recv().obs, second.step(torch.ones(2, 1)).obs)


def test_a_closed_runner_says_so_and_its_tensors_stay():
    runner = make("mujoco/Hopper-v5", 2, 0, CPU, 1)
    state = runner.state_dict()
    obs = runner.reset()
    copy = obs.clone()
    runner.close()
    runner.close()
    assert torch.equal(obs, copy)
    for use in (runner.reset, runner.render, runner.state_dict, lambda: runner.load_state_dict(state)):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    with pytest.raises(RuntimeError, match="reset"):
        runner.step(torch.zeros(2, 3))


def test_envs_make_chooses_this_backend_and_spawns_the_seeds():
    runner = envs.make("dmc/cartpole-swingup", 2, seed=7, threads=1)
    assert isinstance(runner, MujocoBatch)
    random = np.random.RandomState(row_seeds(7, 2)[1])
    slider, _ = 0.01 * random.randn(2)
    assert float(runner.reset()[1, 0]) == np.float32(slider)


def test_actions_may_carry_gradients_and_must_fit():
    runner = make("mujoco/HalfCheetah-v5", 2, 0, CPU, 1)
    runner.reset()
    runner.step(torch.zeros(2, 6, requires_grad=True))
    for shape in ((6,), (1, 6), (2, 5)):
        with pytest.raises(ValueError, match=r"\[2, 6\]"):
            runner.step(torch.zeros(shape))


def test_settings_are_checked_and_recorded():
    with pytest.raises(ValueError, match="no setting 'gravity'.*frame_skip"):
        make("mujoco/Ant-v5", 1, 0, CPU, 1, gravity=1.0)
    with pytest.raises(ValueError, match="row_seeds needs 2"):
        make("mujoco/Ant-v5", 2, 0, CPU, 1, row_seeds=[1])
    with pytest.raises(ValueError, match="dtype"):
        make("mujoco/Ant-v5", 1, 0, CPU, 1, dtype=torch.float16)
    spec = make("dmc/walker-run", 1, 0, CPU, 1, stand_height=1.0).spec
    assert (spec.backend, spec.horizon, spec.action_repeat) == ("mujoco.batch", 1000, 1)
    assert (spec.settings["move_speed"], spec.settings["stand_height"]) == (8.0, 1.0)
    assert set(spec.versions) == {"mujoco", "dm-control"}


def opengl_works() -> bool:
    runner = make("dmc/pendulum-swingup", 1, 0, CPU, 1)
    runner.reset()
    try:
        runner.render(0, 16, 16)
    except RuntimeError:
        return False
    finally:
        runner.close()
    return True


def test_render_shows_the_row_as_the_reference_does():
    """Pixels equal dm_control's own picture of the same state; Reacher's target differs between rows."""
    if not opengl_works():
        pytest.skip("no OpenGL on this machine")
    from dm_control import suite

    runner = make("dmc/reacher-easy", 2, 0, CPU, 1, row_seeds=[3, 4])
    runner.reset()
    env = suite.load("reacher", "easy", task_kwargs={"random": 4})
    env.reset()
    for _ in range(5):
        runner.step(torch.full((2, 2), 0.5, dtype=torch.float64))
        env.step(np.full(2, 0.5))
    picture = runner.render(1, 96, 128)
    assert (picture.shape, picture.dtype) == ((96, 128, 3), np.uint8)
    expected = env.physics.render(96, 128, camera_id=0)
    np.testing.assert_array_equal(picture, expected)
    assert np.abs(runner.render(0, 96, 128).astype(int) - expected).mean() > 1.0
    assert runner.render(0, 48, 48).shape == (48, 48, 3)
    runner.close()


def test_without_opengl_render_says_so(monkeypatch):
    def refuse(*arguments):
        raise OSError("no EGL device")

    monkeypatch.setattr("envs.drawing.new_context", refuse)
    runner = make("dmc/pendulum-swingup", 1, 0, CPU, 1)
    runner.reset()
    with pytest.raises(RuntimeError, match="OpenGL.*no EGL device"):
        runner.render()


def test_staggered_rows_end_one_after_the_other():
    """First episodes are cut short by the clock alone; all else is as without."""
    settings = {"row_seeds": [0, 1, 2], "time_limit": 0.1}  # ten actions
    runner = envs.make("dmc/cheetah-run", 3, staggered_starts=True, **settings)
    plain = envs.make("dmc/cheetah-run", 3, **settings)
    assert runner.spec.settings["staggered_starts"] is True
    assert torch.equal(runner.reset(), plain.reset())
    for attempt in range(2):  # of all starts, also those of a later reset
        ends, saved = [], None
        for t in range(1, 28):
            action = torch.full((3, 6), 0.1 * math.sin(t))
            step = runner.step(action)
            if attempt == 0 and t <= 4:
                assert torch.equal(step.final_obs, plain.step(action).final_obs)
            rows = step.episode_ended.nonzero()[:, 0].tolist()
            assert step.truncated.tolist() == step.episode_ended.tolist()
            ends += [(t, row, int(step.episode_length[row])) for row in rows]
            if t == 2:
                saved = runner.state_dict()
        first = [(4, 2, 4), (7, 1, 7), (10, 0, 10)]
        assert ends == [*first, (14, 2, 10), (17, 1, 10), (20, 0, 10), (24, 2, 10), (27, 1, 10)]
        runner.reset()
    assert saved is not None
    plain.load_state_dict(saved)
    lengths = [plain.step(torch.zeros(3, 6)).episode_length.tolist() for _ in range(8)]
    assert lengths[1] == [0, 0, 4]
    assert lengths[4] == [0, 7, 0]
    assert lengths[7] == [10, 0, 0]


def test_staggered_starts_need_a_time_limit():
    with pytest.raises(ValueError, match="without a time limit has no staggered_starts"):
        envs.make("dmc/lqr-lqr_2_1", staggered_starts=True, time_limit=math.inf)
    with pytest.raises(ValueError, match="must be True or False, got 1"):
        envs.make("dmc/cheetah-run", staggered_starts=1)
