"""MuJoCo Warp on its CPU device: minutes to compile, then the same code that a GPU runs. Needs the extra `gpu`.

What needs no Warp is in test_device_episodes.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mujoco_parity import random_actions
from scripted_task import KINDS, follow_the_script, scripted
from test_final_obs_contract import check_contract
from torch import Tensor

import envs
from envs import mujoco_batch, mujoco_warp
from envs.device_episodes import STATE_FIELDS
from envs.model_changes import changed_model
from envs.mujoco_batch import MujocoBatch, make_task
from envs.mujoco_warp import CapacityExceeded, MujocoWarp
from envs.runner import Step, row_seeds

pytest.importorskip("mujoco_warp")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore:.*for tests only")]
CPU = torch.device("cpu")
NAMES = Step.__dataclass_fields__
# Trajectories are compared where the C engine computes the same: it turns the friction pyramids of capsules otherwise,
# so that robots in space (Ant, humanoids, ...) slide differently, and planar ones do not.
AGREEING = [
    "mujoco/HalfCheetah-v5",
    "mujoco/Hopper-v5",
    "mujoco/Walker2d-v5",
    "mujoco/InvertedDoublePendulum-v5",
    "mujoco/Pusher-v5",
    "dmc/cheetah-run",
    "dmc/walker-walk",
    "dmc/cartpole-swingup",
    "dmc/finger-turn_hard",
]
CALM = ["mujoco/InvertedDoublePendulum-v5", "dmc/cheetah-run", "dmc/cartpole-swingup"]


def make(env_id: str, num_envs: int, seed: int = 0, **settings: Any) -> MujocoWarp:
    return mujoco_warp.make(env_id, num_envs, seed, CPU, 1, **settings)


def actions_for(runner: Any, steps: int, seed: int) -> Tensor:
    return torch.from_numpy(random_actions(runner, steps, seed)).float()


def put_into(twin: MujocoBatch, runner: MujocoWarp) -> None:
    """Set the C engine's simulations to the state of the runner."""
    episodes = runner._episodes
    for name, values in episodes.state.items():
        if name in STATE_FIELDS - {"qacc_warmstart"}:
            twin._simulations.bind(name)[...] = values.numpy()
        elif name not in STATE_FIELDS:
            twin._expanded[name][...] = values.numpy()
    if episodes.progress is not None:
        twin._progress = episodes.progress.numpy().astype(np.float64)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to numbers above 1."""
    return float(((ours - theirs).abs() / (1.0 + theirs.abs())).max())


@pytest.mark.parametrize("env_id", AGREEING)
def test_each_of_100_steps_is_that_of_the_c_engine(env_id):
    """From the same state, contacts and ends of episodes included: within 1e-3, and 5e-5 in the median step."""
    runner = make(env_id, 6)
    twin = mujoco_batch.make(env_id, 6, 0, CPU, 1, dtype=torch.float64)
    runner.reset()
    twin.reset()
    errors, rewards = [], []
    for action in actions_for(runner, 100, seed=1):
        put_into(twin, runner)
        step, expected = runner.step(action), twin.step(action)
        assert torch.equal(step.terminated, expected.terminated)
        errors.append(error(step.final_obs, expected.final_obs))
        rewards.append(error(step.reward, expected.reward))
    assert max(errors) < 1e-3
    assert np.median(errors) < 5e-5
    assert max(rewards) < 5e-5
    runner.close()


@pytest.mark.parametrize("env_id", CALM)
def test_100_steps_in_a_row_stay_with_the_c_engine(env_id):
    """Robots that fall or collide are chaotic and leave it; these stay within 1e-4."""
    runner = make(env_id, 4)
    twin = mujoco_batch.make(env_id, 4, 0, CPU, 1, dtype=torch.float64)
    runner.reset()
    twin.reset()
    put_into(twin, runner)
    for action in 0.3 * actions_for(runner, 100, seed=2):
        step, expected = runner.step(action), twin.step(action)
        assert error(step.final_obs, expected.final_obs) < 1e-4
        if step.episode_ended.any():
            put_into(twin, runner)
    runner.close()


@pytest.mark.parametrize("env_id", ["mujoco/Hopper-v5", "dmc/cheetah-run", "dmc/reacher-easy", "dmc/finger-spin"])
def test_first_observations_are_distributed_as_those_of_the_c_engine(env_id):
    runner, twin = make(env_id, 200), mujoco_batch.make(env_id, 200, 0, CPU, 1)
    ours, theirs = runner.reset().double(), twin.reset().double()
    spread = ((ours.var(0) + theirs.var(0)) / 200).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5.0 * spread + 1e-6).all()
    assert ((ours.std(0) - theirs.std(0)).abs() <= 5.0 * spread + 1e-6).all()
    runner.close()


@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        ("mujoco/Hopper-v5", {"max_episode_steps": 15}),
        ("mujoco/Ant-v5", {"max_episode_steps": 30}),
        ("dmc/reacher-easy", {"time_limit": 0.4}),
        ("dmc/finger-turn_hard", {"time_limit": 0.4}),
    ],
)
def test_the_contract_of_final_observations_holds(env_id, settings):
    runner = make(env_id, 4, **settings)
    assert check_contract(runner, 80) >= 8
    runner.close()


def test_a_scripted_task_follows_its_script_to_the_last_observation(tmp_path):
    runner = MujocoWarp("scripted", scripted(tmp_path), list(range(5)), CPU)
    seen = follow_the_script(runner, 150)
    assert seen.keys() == KINDS
    assert min(seen.values()) > 5


def record(runner: MujocoWarp, actions: Tensor) -> list[dict[str, Tensor]]:
    steps = (runner.step(action) for action in actions)
    return [{name: getattr(step, name).clone() for name in NAMES} for step in steps]


def assert_same(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> None:
    for t, (a, b) in enumerate(zip(first, second, strict=True)):
        for name in NAMES:
            assert torch.equal(a[name], b[name]), f"{name} at step {t}"


@pytest.mark.parametrize("env_id", ["mujoco/Hopper-v5", "dmc/reacher-easy"])
def test_a_row_does_not_depend_on_the_others_and_their_resets(env_id):
    settings = {"time_limit": 0.5} if env_id.startswith("dmc") else {}
    together = make(env_id, 4, seed=9, **settings)
    alone = make(env_id, 1, row_seeds=row_seeds(9, 3)[2:], **settings)
    assert torch.equal(together.reset()[2], alone.reset()[0])
    actions = actions_for(together, 120, seed=3)
    many = [{name: x[2:3] for name, x in step.items()} for step in record(together, actions)]
    assert_same(many, record(alone, actions[:, 2:3]))
    assert sum(int(step["episode_ended"].sum()) for step in many) >= 2


def test_what_is_recorded_equals_what_is_not(monkeypatch):
    recorded_runner = make("mujoco/Hopper-v5", 3, seed=4)
    recorded_runner.reset()
    actions = actions_for(recorded_runner, 60, seed=5)
    expected = record(recorded_runner, actions)
    assert recorded_runner._simulate._graph is not None

    def refuse(*arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("no graphs\nhere")

    monkeypatch.setattr("warp.ScopedCapture", refuse)
    eager = make("mujoco/Hopper-v5", 3, seed=4)
    eager.reset()
    with pytest.warns(RuntimeWarning, match="simulation could not be recorded as a CUDA graph .*: no graphs here"):
        assert_same(expected, record(eager, actions))
    assert eager._simulate._graph is None


RESUME = """
import sys, torch
from envs.mujoco_warp import make
env_id, state, actions, out = sys.argv[1:]
runner = make(env_id, 3, 99, torch.device("cpu"), 1, **SETTINGS)
runner.load_state_dict(torch.load(state, weights_only=True))
names = ("obs", "final_obs", "reward", "terminated", "truncated", "episode_return", "episode_length", "episode_ended")
steps = []
for action in torch.load(actions, weights_only=True):
    step = runner.step(action)
    steps.append({name: getattr(step, name).clone() for name in names})
torch.save(steps, out)
"""


@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        ("mujoco/Ant-v5", {}),
        ("mujoco/HalfCheetah-v5", {"max_episode_steps": 150}),
        ("dmc/reacher-easy", {"time_limit": 2.5}),
    ],
)
def test_500_steps_after_a_resume_in_a_new_process_are_exact(env_id, settings, tmp_path):
    runner = make(env_id, 3, seed=5, **settings)
    runner.change_model({"mass": 1.2}, rows=[1])
    runner.reset()
    actions = actions_for(runner, 591, seed=7)
    record(runner, actions[:91])
    runner.change_model({"friction": 0.4, "gravity": 0.9}, rows=[0])  # waits for the next episode
    state, rest, out = (str(tmp_path / name) for name in ("state.pt", "actions.pt", "out.pt"))
    torch.save(runner.state_dict(), state)
    torch.save(actions[91:].clone(), rest)
    code = RESUME.replace("SETTINGS", repr(settings))
    subprocess.run([sys.executable, "-c", code, env_id, state, rest, out], check=True, cwd=Path(__file__).parents[2])
    expected = record(runner, actions[91:])
    assert_same(expected, torch.load(out, weights_only=True))
    assert sum(int(step["episode_ended"].sum()) for step in expected) >= 3
    runner.load_state_dict(torch.load(state, weights_only=True))
    assert_same(expected[:50], record(runner, actions[91:141]))


def test_a_state_of_another_runner_is_refused():
    state = make("mujoco/Hopper-v5", 2).state_dict()
    with pytest.raises(ValueError, match="state of 2 x mujoco/Hopper-v5 of mujoco.warp given to 3 x mujoco/Hopper-v5"):
        make("mujoco/Hopper-v5", 3).load_state_dict(state)
    other = mujoco_batch.make("mujoco/Hopper-v5", 2, 0, CPU, 1).state_dict()
    with pytest.raises(ValueError, match="of another backend given to"):
        make("mujoco/Hopper-v5", 2).load_state_dict(other)


@pytest.mark.parametrize("env_id", ["mujoco/Hopper-v5", "dmc/cheetah-run"])
@pytest.mark.parametrize("factors", [{"friction": 0.3}, {"gravity": 1.5, "mass": 0.7, "actuator_strength": 1.3}])
def test_a_row_with_a_changed_model_is_an_environment_with_that_model(env_id, factors):
    runner = make(env_id, 3, row_seeds=[5, 6, 7])
    runner.change_model(factors, rows=[1])
    task = make_task(env_id)
    task.__dict__["model"] = changed_model(task.model, factors)
    alone = MujocoWarp(env_id, task, [6], CPU)
    untouched = make(env_id, 3, row_seeds=[5, 6, 7])
    obs = [each.reset().clone() for each in (runner, alone, untouched)]
    for action in actions_for(runner, 60, seed=1):
        torch.testing.assert_close(obs[0][1], obs[1][0], rtol=2e-4, atol=2e-4)
        assert torch.equal(obs[0][[0, 2]], obs[2][[0, 2]])
        obs = [
            each.step(chosen).obs.clone()
            for each, chosen in ((runner, action), (alone, action[1:2]), (untouched, action))
        ]
    assert not torch.equal(obs[0][1], obs[2][1])


def test_a_change_waits_for_the_next_episode_unless_it_is_for_now():
    changed, plain = (make("dmc/walker-walk", 2, time_limit=0.25) for _ in range(2))
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
    plain.change_model({"gravity": 0.1}, rows=[1], now=True)
    kept = plain.step(action).obs.clone()
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize(("env_id", "value"), [("mujoco/Hopper-v5", float("nan")), ("dmc/walker-walk", 1e12)])
def test_a_simulation_that_diverges_ends_its_episode_and_no_other(env_id, value):
    runner, healthy = (make(env_id, 3) for _ in range(2))
    actions = torch.zeros(3, runner.action_spec.size)
    for each in (runner, healthy):
        each.reset()
        last = each.step(actions).obs.clone()
    runner._episodes.state["qvel"][2, 3] = value
    step, expected = runner.step(actions), healthy.step(actions)
    assert step.truncated.tolist() == step.episode_ended.tolist() == [False, False, True]
    assert not step.terminated.any()
    assert float(step.reward[2]) == 0.0
    assert int(step.episode_length[2]) == 2
    assert torch.equal(step.final_obs[2], last[2])
    assert not torch.equal(step.obs[2], last[2])
    assert runner.diverged_episodes == 1
    for _ in range(3):
        assert torch.equal(step.final_obs[:2], expected.final_obs[:2])
        step, expected = runner.step(actions), healthy.step(actions)
        assert step.obs.isfinite().all()
    with pytest.warns(RuntimeWarning, match="1 simulations met NaN"):
        runner.close()


def test_too_little_room_for_constraints_or_contacts_is_reported_with_the_number_to_raise():
    runner = make("mujoco/HalfCheetah-v5", 3, njmax=4)
    runner.reset()
    actions = actions_for(runner, 600, seed=8)
    with pytest.raises(CapacityExceeded, match="constraints of one environment: njmax=4 was not enough .*njmax=8"):
        record(runner, actions)
    assert 256 <= runner._time <= 512
    runner = make("mujoco/HalfCheetah-v5", 3, nconmax=1)
    runner.reset()
    record(runner, actions_for(runner, 100, seed=8))
    with pytest.raises(CapacityExceeded, match="nconmax=1 was not enough"):
        runner.state_dict()


def test_bad_actions_are_found_at_once_or_at_the_next_look():
    runner = make("mujoco/Hopper-v5", 2)
    with pytest.raises(RuntimeError, match="reset"):
        runner.step(torch.zeros(2, 3))
    runner.reset()
    for wrong in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match=r"action must be floating-point \[2, 3\]"):
            runner.step(wrong)
    with pytest.raises(ValueError, match="action must be on cpu"):
        runner.step(torch.zeros(2, 3, device="meta"))
    runner.step(torch.full((2, 3), 1.0001))  # rounding is no mistake
    runner.check()
    runner.step(torch.tensor([[0.0, 0.0, 0.0], [0.0, float("nan"), 0.0]]))
    with pytest.warns(RuntimeWarning, match="NaN"), pytest.raises(ValueError, match=r"row 1 was given .* of \[-1, 1\]"):
        runner.check()


def test_a_reward_that_is_not_finite_is_reported_and_never_handed_out():
    runner = make("mujoco/HalfCheetah-v5", 2, ctrl_cost_weight=1e38)
    runner.reset()
    runner.step(torch.zeros(2, 6))
    step = runner.step(torch.tensor([[0.0] * 6, [1.0] * 6]))
    assert step.reward.isfinite().all()
    with pytest.warns(RuntimeWarning), pytest.raises(FloatingPointError, match="reward of row 1"):
        runner.check()


def test_send_and_recv_alternate_and_a_closed_runner_says_so():
    runner = make("dmc/pendulum-swingup", 2)
    obs = runner.reset()
    runner.send(torch.ones(2, 1))
    for wrong in (lambda: runner.send(torch.ones(2, 1)), runner.state_dict):
        with pytest.raises(RuntimeError, match="recv"):
            wrong()
    runner.recv()
    with pytest.raises(RuntimeError, match="send"):
        runner.recv()
    copy = obs.clone()
    runner.close()
    runner.close()
    assert torch.equal(obs, copy)
    for use in (runner.reset, runner.render, runner.state_dict, lambda: runner.change_model({"mass": 2.0})):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_a_picture_is_that_of_the_c_engine():
    runner = make("dmc/reacher-easy", 2)
    twin = mujoco_batch.make("dmc/reacher-easy", 2, 0, CPU, 1)
    runner.reset()
    twin.reset()
    runner.step(torch.ones(2, 2))
    put_into(twin, runner)
    try:
        picture = runner.render(1, 48, 64)
    except RuntimeError as failure:
        pytest.skip(str(failure))
    np.testing.assert_array_equal(picture, twin.render(1, 48, 64))
    assert not np.array_equal(picture, runner.render(0, 48, 64))
    runner.close()
    twin.close()


def test_every_other_kind_of_start_works():
    """Contacts avoided, lifted above the ground, an object in the hand, springs of a row, contact forces."""
    ids = ("dmc/manipulator-bring_ball", "dmc/quadruped-fetch", "dmc/lqr-lqr_2_1", "mujoco/Humanoid-v5")
    for env_id in ids:
        runner = make(env_id, 3)
        first = runner.reset().clone()
        assert first.isfinite().all()
        assert not torch.equal(first[0], first[1])
        step = runner.step(torch.zeros(3, runner.action_spec.size))
        assert step.obs.isfinite().all()
        assert not step.truncated.any()
        runner.close()


def test_a_quadruped_begins_just_above_the_ground():
    runner = make("dmc/quadruped-fetch", 4)
    twin = mujoco_batch.make("dmc/quadruped-fetch", 4, 0, CPU, 1)
    runner.reset()
    twin.reset()
    put_into(twin, runner)
    height = twin._physics.qpos[:, 2].copy()
    for lowered, touching in ((0.0, False), (0.012, True)):
        twin._physics.qpos[:, 2] = height - lowered
        twin._simulations.forward()
        assert ((twin._physics.ncon > 0) == touching).all()


def test_what_it_cannot_do_is_said_in_one_sentence():
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("dmc/point_mass-hard", {}, "no per-environment 'wrap_prm'; use the C engine"),
        ("gym/CartPole-v1", {}, "runs the native MuJoCo and dm_control tasks, not gym/CartPole-v1"),
        ("mujoco/Hopper-v5", {"obs": "pixels"}, "no pixel observations"),
        ("mujoco/Hopper-v5", {"dtype": torch.float64}, "computes in torch.float32"),
        ("mujoco/Hopper-v5", {"njmax": 0}, "njmax must be a whole number of at least 1, got 0"),
        ("mujoco/Hopper-v5", {"row_seeds": [1, 2]}, "row_seeds needs 1 integers, got 2"),
        ("mujoco/Hopper-v5", {"gravity": 1.0}, "no setting 'gravity'"),
    ]
    for env_id, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            envs.make(env_id, backend="mujoco-warp", **settings)


def test_it_is_a_backend_of_its_own_and_trains(tmp_path):
    """Its record names it, and a resume on the C engine is refused."""
    import json

    from runs.cli import main

    flags = "--steps 300 --num-envs 2 --device cpu --eval-every 300 --eval-episodes 1 --warmup-steps 100 --quiet"
    arguments = ["td3", "--env", "dmc/cartpole-swingup", *flags.split(), "--out", str(tmp_path), "--name", "run"]
    assert main(["train", *arguments, "--env-set", "backend=mujoco-warp"]) == 0
    runner = json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["runner"]
    assert runner["backend"] == "mujoco.warp"
    assert runner["settings"]["dtype"] == "float32"
    assert set(runner["versions"]) == {"mujoco", "mujoco-warp", "warp-lang", "dm-control"}
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("env_id", ["mujoco/Hopper-v5", "dmc/cheetah-run", "dmc/finger-turn_hard"])
def test_on_a_gpu_a_step_never_waits_and_a_resume_is_exact(env_id):
    """Not run yet: no machine of ours has a GPU. `pytest -m gpu` runs it on one that has."""
    cuda = torch.device("cuda")
    runner = mujoco_warp.make(env_id, 64, 0, cuda, 1)
    runner.reset()
    actions = actions_for(runner, 600, seed=1).to(cuda)
    record(runner, actions[:3])  # recorded by now
    assert runner._simulate._graph is not None
    assert all(conclude._graph is not None for conclude in runner._conclude)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for action in actions[3:100]:
            runner.step(action)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    state = runner.state_dict()
    rest = record(runner, actions[100:])
    again = mujoco_warp.make(env_id, 64, 5, cuda, 1)
    again.load_state_dict(state)
    assert_same(rest, record(again, actions[100:]))
    on_cpu = make(env_id, 64)
    on_cpu.load_state_dict(state)
    torch.testing.assert_close(
        rest[0]["final_obs"].cpu(), on_cpu.step(actions[100].cpu()).final_obs, rtol=1e-3, atol=1e-3
    )
