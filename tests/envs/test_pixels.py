"""Pixel observations: the pictures are the references' own, and nothing but the observation changes."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import envs
from agents.replay import Replay
from envs.drawing import PROFILES
from envs.runner import Step, row_seeds
from plasticity.population import RandomStream
from tests.envs.pixel_runners import SMALL, pixels, uniform_actions

ROOT = Path(__file__).parents[2]
FIELDS = [name for name in Step.__dataclass_fields__ if name not in ("obs", "final_obs")]


pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def copy_of(step: Step) -> dict[str, torch.Tensor]:
    return {name: getattr(step, name).clone() for name in Step.__dataclass_fields__}


def assert_same(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> None:
    for t, (a, b) in enumerate(zip(first, second, strict=True)):
        for name in a:
            assert torch.equal(a[name], b[name]), f"{name} at step {t}"


class Stack:
    """What a row should show: frames of the reference, zeros before the first of an episode."""

    def __init__(self, frames: int):
        self.frames, self.seen = frames, []

    def restart(self, picture: np.ndarray) -> np.ndarray:
        self.seen = [np.zeros_like(picture)] * self.frames
        return self.add(picture)

    def add(self, picture: np.ndarray) -> np.ndarray:
        self.seen = [*self.seen[1:], picture]
        return np.concatenate([picture.transpose(2, 0, 1) for picture in self.seen])


DMC_LENGTHS = {  # simulated seconds for a few actions
    "dmc/cheetah-run": 0.03,
    "dmc/walker-walk": 0.075,
    "dmc/cartpole-swingup": 0.03,
    "dmc/pendulum-swingup": 0.06,
    "dmc/reacher-hard": 0.06,  # the target's place is a field of the model that differs between rows
    "dmc/finger-spin": 0.06,
}


@pytest.mark.parametrize("env_id", DMC_LENGTHS)
def test_every_picture_is_that_of_dm_control(env_id, opengl):
    from dm_control import suite

    domain, task = env_id.removeprefix("dmc/").split("-", 1)
    seeds, seconds = [3, 4], DMC_LENGTHS[env_id]
    runner = pixels(env_id, 2, row_seeds=seeds, time_limit=seconds, threads=2)
    others = [suite.load(domain, task, task_kwargs={"random": seed, "time_limit": seconds}) for seed in seeds]
    stacks = [Stack(3), Stack(3)]
    for env in others:
        env.reset()
    pictures = [env.physics.render(84, 84, camera_id=0) for env in others]
    expected = [stack.restart(picture) for stack, picture in zip(stacks, pictures, strict=True)]
    np.testing.assert_array_equal(runner.reset().numpy(), expected)
    ends = 0
    for action in uniform_actions(runner, 5):
        step = runner.step(action)
        for row, (env, stack) in enumerate(zip(others, stacks, strict=True)):
            last = env.step(action[row].numpy()).last()
            picture = stack.add(env.physics.render(84, 84, camera_id=0))
            np.testing.assert_array_equal(step.final_obs[row].numpy(), picture)
            if last:
                env.reset()
                picture = stack.restart(env.physics.render(84, 84, camera_id=0))
                ends += 1
            np.testing.assert_array_equal(step.obs[row].numpy(), picture)
    assert ends >= 2
    runner.close()


# Seed, actions until the end of an episode at the latest, settings of ours and of Gymnasium.
V5 = {
    "mujoco/HalfCheetah-v5": (0, 3, {"max_episode_steps": 3}, {"max_episode_steps": 3}),
    "mujoco/Hopper-v5": (0, 12, {"healthy_z_range": (1.24, math.inf)}, {"healthy_z_range": (1.24, math.inf)}),
    "mujoco/Walker2d-v5": (0, 4, {"max_episode_steps": 4}, {"max_episode_steps": 4}),
    "mujoco/Ant-v5": (0, 3, {"max_episode_steps": 3}, {"max_episode_steps": 3}),
    "mujoco/Humanoid-v5": (0, 3, {"max_episode_steps": 3}, {"max_episode_steps": 3}),
}


@pytest.mark.parametrize("env_id", V5)
def test_every_picture_is_that_of_gymnasium(env_id, opengl):
    """Gymnasium draws positions that lag the state by one simulator step, so ours do."""
    import gymnasium

    seed, steps, ours, theirs = V5[env_id]
    runner = pixels(env_id, row_seeds=[seed], image_size=(60, 84), frame_stack=1, **ours)
    view = {"render_mode": "rgb_array", "camera_name": "track", "height": 60, "width": 84}
    env = gymnasium.make(env_id.removeprefix("mujoco/"), **view, **theirs)

    def picture() -> np.ndarray:
        drawn = env.render()
        assert isinstance(drawn, np.ndarray)
        return drawn.transpose(2, 0, 1)

    env.reset(seed=seed)
    np.testing.assert_array_equal(runner.reset()[0].numpy(), picture())
    for action in uniform_actions(runner, steps):
        step = runner.step(action)
        _, _, terminated, truncated, _ = env.step(action[0].numpy())
        np.testing.assert_array_equal(step.final_obs[0].numpy(), picture())
        if terminated or truncated:
            env.reset()
            np.testing.assert_array_equal(step.obs[0].numpy(), picture())
            break
    else:
        pytest.fail("no episode ended")
    env.close()
    runner.close()


@pytest.mark.parametrize(("env_id", "settings"), [("mujoco/Hopper-v5", {}), ("dmc/walker-run", {"time_limit": 0.5})])
def test_rewards_and_ends_are_those_of_the_task_without_pixels(env_id, settings, opengl):
    drawn, plain = pixels(env_id, 3, seed=5, **SMALL, **settings), envs.make(env_id, 3, seed=5, **settings)
    drawn.reset()
    plain.reset()
    ends = 0
    for action in uniform_actions(plain, 70):
        a, b = drawn.step(action), plain.step(action)
        for name in FIELDS:
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        ends += int(b.episode_ended.sum())
    assert ends >= 6
    assert drawn.spec.horizon == plain.spec.horizon
    drawn.close()


@pytest.mark.parametrize("profile", PROFILES)
def test_threads_change_nothing(profile, opengl):
    runs = []
    for threads in (1, 2, 3):
        runner = pixels(
            "mujoco/Hopper-v5", 3, threads=threads, image_size=24, render_profile=profile, max_episode_steps=2
        )
        first = runner.reset().clone()
        runs.append([{"obs": first}, *(copy_of(runner.step(action)) for action in uniform_actions(runner, 3))])
        runner.close()
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_a_row_does_not_depend_on_the_others(opengl):
    together = pixels("dmc/reacher-easy", 4, seed=9, **SMALL)
    alone = pixels("dmc/reacher-easy", 1, row_seeds=row_seeds(9, 3)[2:], **SMALL)
    assert torch.equal(together.reset()[2:3], alone.reset())
    for action in uniform_actions(together, 5):
        assert torch.equal(together.step(action).obs[2:3], alone.step(action[2:3]).obs)
    together.close()
    alone.close()


def test_a_stack_is_moved_by_a_frame_and_begins_with_zeros(opengl):
    runner = pixels("mujoco/Hopper-v5", 4, **{**SMALL, "frame_stack": 4})
    before = runner.reset().clone()
    assert before.shape == (4, 12, 20, 20)
    assert before.dtype == torch.uint8
    assert not before[:, :9].any()
    assert before[:, 9:].any(dim=(1, 2, 3)).all()
    some_but_not_all = 0
    for action in uniform_actions(runner, 60):
        step = runner.step(action)
        assert torch.equal(step.final_obs[:, :9], before[:, 3:])
        ended = step.episode_ended
        assert torch.equal(step.obs[~ended], step.final_obs[~ended])
        assert not step.obs[ended, :9].any()
        if ended.any():
            assert (step.obs[ended, 9:] != step.final_obs[ended, 9:]).any()
            some_but_not_all += int(not ended.all())
        before = step.obs.clone()
    assert some_but_not_all >= 3
    runner.close()


def test_returned_tensors_stay_valid_for_two_further_calls(opengl):
    runner = pixels("mujoco/Hopper-v5", 3, **SMALL)
    runner.reset()
    kept: list[tuple[Step, dict[str, torch.Tensor]]] = []
    for action in uniform_actions(runner, 40):
        step = runner.step(action)
        for earlier, copies in kept[-2:]:
            for name, values in copies.items():
                assert torch.equal(getattr(earlier, name), values), name
        kept.append((step, copy_of(step)))
    assert sum(int(copies["episode_ended"].any()) for _, copies in kept) >= 2
    runner.close()


def test_repeated_actions_sum_rewards_and_show_the_last_frame(opengl):
    """11 control steps an episode: the fourth action of 3 is cut short after 2."""
    settings = {"time_limit": 0.11, "frame_stack": 1, "seed": 1}
    repeated = pixels("dmc/cartpole-balance", 2, action_repeat=3, **SMALL, **settings)
    single = pixels("dmc/cartpole-balance", 2, **SMALL, **settings)
    assert (repeated.spec.horizon, repeated.spec.action_repeat, single.spec.horizon) == (4, 3, 11)
    assert torch.equal(repeated.reset(), single.reset())
    ends = 0
    for action in uniform_actions(repeated, 9):
        rewards = torch.zeros(2)
        for _ in range(3):
            step = single.step(action)
            rewards += step.reward
            if step.episode_ended.all():
                break
        ours = repeated.step(action)
        assert torch.equal(ours.reward, rewards)
        for name in ("obs", "final_obs", "terminated", "truncated", "episode_ended", "episode_return"):
            assert torch.equal(getattr(ours, name), getattr(step, name)), name
        if ours.episode_ended.all():
            ends += 1
            assert ours.episode_length.tolist() == [4, 4]
    assert ends == 2
    repeated.close()
    single.close()


@pytest.mark.parametrize("repeat", [1, 2])
def test_a_simulation_that_diverges_shows_its_last_good_picture(repeat, opengl):
    runner, healthy = (pixels("dmc/walker-walk", 3, action_repeat=repeat, **SMALL) for _ in range(2))
    actions = torch.zeros(3, 6)
    for each in (runner, healthy):
        each.reset()
        last = each.step(actions).obs.clone()
    state = runner.state_dict()
    state["simulation"][2, 4] = float("nan")
    runner.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match="the episode is truncated"):
        step = runner.step(actions)
    assert step.truncated.tolist() == step.episode_ended.tolist() == [False, False, True]
    assert step.episode_length.tolist() == [0, 0, 2]
    assert runner.diverged_episodes == 1
    assert torch.equal(step.final_obs[2], last[2])
    assert not step.obs[2, :6].any()
    if repeat == 1:
        assert torch.equal(step.final_obs[:2], healthy.step(actions).final_obs[:2])
    else:  # the action is cut short in all rows: the next one makes up for it
        assert torch.equal(step.final_obs[:2, :6], healthy.step(actions).final_obs[:2, :6])
        assert (step.reward[:2] < healthy.step(actions).reward[:2]).all()
    runner.close()
    healthy.close()


def test_a_changed_model_changes_what_is_seen(opengl):
    """A pole without gravity does not fall; the row beside it does."""
    runner = pixels("dmc/cartpole-balance", 2, row_seeds=[0, 0], **SMALL)
    runner.change_model({"gravity": 0.0}, rows=[1])
    first = runner.reset().clone()
    assert torch.equal(first[0], first[1])
    for _ in range(60):
        obs = runner.step(torch.zeros(2, 1)).obs
    assert not torch.equal(obs[0], obs[1])
    runner.close()


def test_a_sequence_of_tasks_shows_pictures(opengl):
    settings = {**SMALL, "time_limit": 0.05}
    segments = [envs.Segment(f"dmc/cartpole-{task}", settings) for task in ("balance", "swingup")]
    runner = envs.make_sequence(segments, 2, switch_every=14)
    alone = pixels("dmc/cartpole-swingup", 2, **settings)
    alone.reset()
    hanging = alone.step(torch.zeros(2, 1)).obs[:, -3:].clone()
    runner.reset()
    for _ in range(8):
        step = runner.step(torch.zeros(2, 1))
    assert step.obs.shape == (2, 9, 20, 20)
    difference = (step.obs[:, -3:].int() - hanging.int()).abs().float().mean()
    assert difference < 1  # it hangs, where a balanced pole would stand
    runner.close()
    alone.close()


RESUME = """
import sys, torch, envs
state, actions, out = sys.argv[1:]
runner = envs.make("mujoco/Hopper-v5", 2, seed=99, obs="pixels", image_size=20, render_profile="fast")
runner.load_state_dict(torch.load(state, weights_only=True))
kept = []
for action in torch.load(actions, weights_only=True):
    step = runner.step(action)
    kept.append({name: getattr(step, name).clone() for name in step.__dataclass_fields__})
torch.save(kept, out)
"""


def test_resume_is_exact_also_in_a_new_process_that_never_closes(tmp_path, opengl):
    runner = pixels("mujoco/Hopper-v5", 2, seed=2, **SMALL)
    fresh = runner.state_dict()
    runner.reset()
    actions = uniform_actions(runner, 130)
    for action in actions[:31]:
        runner.step(action)
    state, rest, out = (str(tmp_path / name) for name in ("state.pt", "actions.pt", "out.pt"))
    torch.save(runner.state_dict(), state)
    torch.save(actions[31:].clone(), rest)
    expected = [copy_of(runner.step(action)) for action in actions[31:]]
    assert sum(int(step["episode_ended"].sum()) for step in expected) >= 2
    runner.load_state_dict(torch.load(state, weights_only=True))
    assert_same(expected, [copy_of(runner.step(action)) for action in actions[31:]])

    done = subprocess.run([sys.executable, "-c", RESUME, state, rest, out], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same(expected, torch.load(out, weights_only=True))

    runner.load_state_dict(fresh)
    with pytest.raises(RuntimeError, match="reset"):
        runner.step(actions[0])
    runner.close()


def test_a_state_of_other_pictures_is_refused(opengl):
    state = pixels("dmc/cartpole-swingup", **SMALL).state_dict()
    other = pixels("dmc/cartpole-swingup", **{**SMALL, "image_size": 21})
    with pytest.raises(ValueError, match=r"\[20, 20\].*\[21, 21\]"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="pixels None"):
        other.load_state_dict(envs.make("dmc/cartpole-swingup").state_dict())


@pytest.mark.parametrize(("num_envs", "size"), [(1, (480, 640)), (8, (96, 64))])
def test_sizes_up_to_a_screen(num_envs, size, opengl):
    runner = pixels("dmc/walker-walk", num_envs, **{**SMALL, "image_size": size})
    obs = runner.reset()
    assert obs.shape == (num_envs, 9, *size)
    upright = runner.render(num_envs - 1, *size)
    assert upright.shape == (*size, 3)
    # The same scene at reference quality, and not upside down or mirrored.
    difference = np.abs(obs[-1, 6:].numpy().transpose(1, 2, 0).astype(int) - upright).mean()
    assert 0 < difference < 12
    assert np.abs(obs[-1, 6:].numpy().transpose(1, 2, 0)[:, ::-1].astype(int) - upright).mean() > difference
    assert np.abs(obs[-1, 6:].numpy().transpose(1, 2, 0)[::-1].astype(int) - upright).mean() > difference
    runner.close()


def test_cameras_by_name_and_number(opengl):
    by_name, by_number, other = (
        pixels("dmc/cheetah-run", camera=camera, seed=0, **SMALL) for camera in ("back", 1, "side")
    )
    assert torch.equal(by_name.reset(), by_number.reset())
    assert not torch.equal(by_name.reset(), other.reset())
    with pytest.raises(ValueError, match=r"no camera 'front'; it has 0 \('side'\), 1 \('back'\)"):
        pixels("dmc/cheetah-run", camera="front")


def test_settings_are_checked_and_recorded(opengl):
    runner = pixels("dmc/walker-run", image_size=[24, 32], render_profile="fast", frame_stack=2, move_speed=3.0)
    settings = runner.spec.settings
    assert (settings["image_size"], settings["frame_stack"], settings["camera"]) == ([24, 32], 2, 0)
    assert (settings["render_profile"], settings["obs"], settings["move_speed"]) == ("fast", "pixels", 3.0)
    assert "Mesa" in runner.spec.versions["opengl"] or "." in runner.spec.versions["opengl"]
    assert runner.observation_spec == envs.ObservationSpec((6, 24, 32), torch.uint8, 2)
    runner.close()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image_size": 0}, "image_size"),
        ({"image_size": (84,)}, "image_size"),
        ({"image_size": 84.0}, "image_size"),
        ({"image_size": "84"}, "image_size"),
        ({"frame_stack": 0}, "frame_stack"),
        ({"action_repeat": 1.5}, "action_repeat"),
        ({"render_profile": "ugly"}, "reference, fast"),
        ({"dtype": torch.float64}, "no setting 'dtype'"),
        ({"gravity": 1.0}, "no setting 'gravity'.*frame_stack"),
    ]
    for settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            pixels("dmc/walker-run", **settings)
    with pytest.raises(ValueError, match="frame_skip"):
        pixels("mujoco/Hopper-v5", action_repeat=2)
    with pytest.raises(ValueError, match="only with obs='pixels'"):
        envs.make("dmc/walker-run", image_size=84)
    with pytest.raises(ValueError, match="'state' or 'pixels'"):
        envs.make("dmc/walker-run", obs="both")
    with pytest.raises(ValueError, match="no setting 'obs'"):
        envs.make("gym/CartPole-v1", obs="pixels")


def test_send_and_recv_are_a_step_and_must_alternate(opengl):
    first, second = (pixels("dmc/cartpole-balance", action_repeat=2, **SMALL) for _ in range(2))
    with pytest.raises(RuntimeError, match="reset"):
        first.send(torch.zeros(1, 1))
    assert torch.equal(first.reset(), second.reset())
    with pytest.raises(RuntimeError, match="send"):
        first.recv()
    action = torch.ones(1, 1)
    first.send(action)
    action.zero_()  # handed over
    with pytest.raises(RuntimeError, match="recv"):
        first.send(action)
    with pytest.raises(RuntimeError, match="recv"):
        first.state_dict()
    assert torch.equal(first.recv().obs, second.step(torch.ones(1, 1)).obs)
    first.close()
    second.close()


def test_a_replay_that_stores_each_frame_once_gives_back_what_was_shown(opengl):
    runner = pixels("mujoco/Hopper-v5", 2, **SMALL)
    cpu = torch.device("cpu")
    stream = RandomStream(torch.Generator().manual_seed(0))
    replay = Replay(200, 2, runner.observation_spec, runner.action_spec, cpu, stream)
    obs, shown = runner.reset(), {}
    for t, action in enumerate(uniform_actions(runner, 70)):
        action = action.float()
        action[:, 0] = torch.tensor([t, t + 0.5])  # a name for the transition
        step = runner.step(action * 0)
        for row in range(2):
            shown[float(action[row, 0])] = obs[row].clone(), step.final_obs[row].clone()
        replay.add(obs, action, step)
        obs = step.obs
    assert replay.frame.shape == (200, 3, 20, 20)
    batch = replay.sample(300, 0.99)
    names = batch.action[:, 0].tolist()
    assert len(set(names)) > 100
    for i, name in enumerate(names):
        before, after = shown[name]
        assert torch.equal(batch.obs[i], before)
        assert torch.equal(batch.next_obs[i], after)
    runner.close()


def test_a_model_without_cameras_is_seen_whole(opengl):
    from envs.mujoco_batch import make_task

    assert make_task("mujoco/Reacher-v5").camera == -1
    runner = pixels("mujoco/Reacher-v5", 2, image_size=32)
    first = runner.reset()
    assert first[:, -3:].float().std() > 1  # something is seen
    assert not torch.equal(first[0], first[1])  # and it is the row's own
    runner.close()
