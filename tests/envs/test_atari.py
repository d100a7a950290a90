"""Atari games: equal to Gymnasium's own preprocessing frame by frame, whatever the threads, and after a resume."""

from __future__ import annotations

import gc
import io
import math
import os

import ale_py
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from envs import atari
from envs.runner import Step

PLAIN = {"sticky_actions": 0.0, "clip_rewards": False}


def reference(game: str, **settings) -> gymnasium.Env:
    gymnasium.register_envs(ale_py)
    env = gymnasium.make(f"ALE/{game}-v5", frameskip=1, **settings)
    return FrameStackObservation(AtariPreprocessing(env, noop_max=0), 4, padding_type="zero")


def draw_actions(runner: atari.AtariRunner, steps: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(runner.action_spec.count, (steps, runner.num_envs), generator=generator)


def assert_equal_steps(left: Step, right: Step) -> None:
    for name in Step.__slots__:
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("game", "steps"), [("Pong", 350), ("Breakout", 450)])
def test_bit_equal_to_gymnasium_preprocessing(game, steps, seed):
    """Frames, rewards and ends; Breakout also over several episodes, so that no action is lost at a reset."""
    runner = atari.make(f"atari/{game}", 1, seed, "cpu", **PLAIN)
    env = reference(game, repeat_action_probability=0.0)
    first, _ = env.reset(seed=seed)
    obs = runner.reset()
    assert np.array_equal(obs[0], first)
    assert not obs[0, :3].any()  # zeros before the first frame
    ended = 0
    for action in draw_actions(runner, steps, seed):
        step = runner.step(action)
        expected, reward, terminated, truncated, _ = env.step(int(action))
        assert np.array_equal(step.final_obs[0], expected)
        assert (float(step.reward), bool(step.terminated), bool(step.truncated)) == (reward, terminated, truncated)
        if terminated or truncated:
            expected, _ = env.reset()
            ended += 1
        assert np.array_equal(step.obs[0], expected)
    assert ended >= (2 if game == "Breakout" else 0)


def test_sticky_actions_come_from_the_seed_of_row_and_episode():
    """The same frames as a plain emulator seeded by hand, over reseeded and not reseeded episodes; and its picture."""
    reseed_after, row_seed = 250, 77
    runner = atari.make("atari/Breakout", 1, 0, "cpu", row_seeds=[row_seed], reseed_after=reseed_after)
    env = reference("Breakout", repeat_action_probability=0.25)
    console = env.unwrapped

    def insert_cartridge(episode: int) -> None:
        words = np.random.SeedSequence((row_seed, episode)).generate_state(1, np.uint32)
        console.ale.setInt("random_seed", int(words[0]) >> 1)
        console.load_game()

    env.reset()
    insert_cartridge(0)
    assert np.array_equal(runner.reset()[0], env.reset()[0])
    episode, since_seed, reseeded = 0, 0, []
    for count, action in enumerate(draw_actions(runner, 900)):
        step = runner.step(action)
        since_seed += 1
        expected, _, terminated, truncated, _ = env.step(int(action))
        assert np.array_equal(step.final_obs[0], expected)
        if terminated or truncated:
            episode += 1
            if since_seed >= reseed_after:
                insert_cartridge(episode)
                since_seed = 0
                reseeded.append(episode)
            expected, _ = env.reset()
        assert np.array_equal(step.obs[0], expected)
        if count % 100 == 99:
            assert np.array_equal(runner.render(), console.ale.getScreenRGB())
    assert reseeded
    assert len(reseeded) < episode


@pytest.mark.parametrize(
    ("game", "settings"),
    [
        ("Breakout", {"reseed_after": 0}),
        ("Breakout", {"reseed_after": 250, "noop_max": 30, "fire_on_reset": True, "life_loss_terminates": True}),
        # A reset of Assault leaves traces of the episode before; nothing here is random, the traces alone decide.
        ("Assault", {"sticky_actions": 0.0, "max_frames": 300}),
    ],
)
def test_resume_is_bit_equal_in_the_middle_of_a_later_episode(game, settings):
    whole = atari.make(f"atari/{game}", 2, 5, "cpu", **settings)
    actions = draw_actions(whole, 650)
    whole.reset()
    for action in actions[:500]:
        whole.step(action)
    state = whole.state_dict()
    assert (state["episode"] >= 1).all()
    assert (state["length"] > 0).any()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    halves = atari.make(f"atari/{game}", 2, 6, "cpu", threads=1, **settings)
    halves.load_state_dict(torch.load(file, weights_only=True))
    assert np.array_equal(halves.render(1), whole.render(1))
    for action in actions[500:]:
        assert_equal_steps(whole.step(action), halves.step(action))
    assert np.array_equal(halves.render(0), whole.render(0))
    for name in ("episode", "length", "return", "seed", "count", "actions"):
        assert torch.equal(whole.state_dict()[name], halves.state_dict()[name]), name


def test_a_state_that_leads_elsewhere_is_refused():
    runner = atari.make("atari/Breakout", 2, 0, "cpu")
    runner.reset()
    for action in draw_actions(runner, 60):
        runner.step(action)
    state = runner.state_dict()
    with pytest.raises(ValueError, match="other frames"):
        runner.load_state_dict({**state, "actions": torch.zeros_like(state["actions"])})
    with pytest.raises(ValueError, match="settings"):
        atari.make("atari/Breakout", 2, 0, "cpu", sticky_actions=0.0).load_state_dict(state)
    with pytest.raises(ValueError, match="2 rows, not 1"):
        atari.make("atari/Breakout", 1, 0, "cpu").load_state_dict(state)


def test_rows_depend_on_neither_threads_nor_neighbours():
    one = atari.make("atari/Breakout", 4, 3, "cpu", threads=1)
    two = atari.make("atari/Breakout", 4, 3, "cpu", threads=2)
    alone = atari.make("atari/Breakout", 1, 3, "cpu", row_seeds=[atari.take_row_seeds({}, 3, 4)[0][2]])
    assert torch.equal(one.reset(), two.reset())
    alone.reset()
    ended = 0
    for action in draw_actions(one, 300):
        left, right, single = one.step(action), two.step(action), alone.step(action[2:3])
        assert_equal_steps(left, right)
        assert torch.equal(left.obs[2], single.obs[0])
        ended += int(left.episode_ended.sum())
    assert ended >= 4


def test_reset_begins_new_episodes_with_new_seeds():
    runner = atari.make("atari/Breakout", 1, 0, "cpu", sticky_actions=0.5)
    actions = draw_actions(runner, 60)

    def play() -> torch.Tensor:
        runner.reset()
        return torch.stack([runner.step(action).obs for action in actions])

    assert not torch.equal(play(), play())


def test_clipping_leaves_the_return_raw():
    raw = atari.make("atari/Assault", 2, 0, "cpu", max_frames=1200, clip_rewards=False)
    clipped = atari.make("atari/Assault", 2, 0, "cpu", max_frames=1200)
    raw.reset()
    clipped.reset()
    total, returns = torch.zeros(2), torch.zeros(2)
    for action in draw_actions(raw, 300):
        left, right = raw.step(action), clipped.step(action)
        assert torch.equal(right.reward, left.reward.sign())
        assert torch.equal(right.episode_return, left.episode_return)
        total += left.reward
        returns += right.episode_return
    assert (returns >= 21).all()  # a hit is worth 21 points
    assert torch.equal(returns, total)  # 300 actions of 4 frames are one whole episode


def test_a_lost_life_is_a_termination_in_a_game_that_goes_on():
    runner = atari.make("atari/Breakout", 1, 0, "cpu", life_loss_terminates=True, **PLAIN)
    env = reference("Breakout", repeat_action_probability=0.0)
    env.reset()
    runner.reset()
    lives, lost, over = 5, 0, 0
    for action in draw_actions(runner, 300):
        step = runner.step(action)
        _, _, terminated, _, info = env.step(int(action))
        assert bool(step.terminated) == (terminated or info["lives"] < lives)
        assert bool(step.episode_ended) == terminated
        lives = info["lives"]
        if terminated:
            over += 1
            env.reset()
            lives = 5
        elif step.terminated:
            lost += 1
            assert torch.equal(step.obs, step.final_obs)
            assert step.episode_length == 0
            assert step.episode_return == 0
    assert over >= 1
    assert lost >= 4 * over


@pytest.mark.parametrize(("max_frames", "frame_skip"), [(98, 4), (100, 4), (60, 1)])
def test_the_frame_limit_truncates(max_frames, frame_skip):
    runner = atari.make("atari/Pong", 1, 0, "cpu", max_frames=max_frames, frame_skip=frame_skip)
    horizon = math.ceil(max_frames / frame_skip)
    assert runner.spec.horizon == horizon
    runner.reset()
    for count, action in enumerate(draw_actions(runner, 2 * horizon), 1):
        step = runner.step(action)
        assert not step.terminated
        assert bool(step.truncated) == (count % horizon == 0)
        assert step.episode_length == (horizon if step.truncated else 0)


def test_action_sets():
    assert atari.make("atari/Pong", 1, 0, "cpu").action_spec.count == 6
    assert atari.make("atari/Pong", 1, 0, "cpu", full_action_set=True).action_spec.count == 18


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match=r"atari/Pong has no setting 'stickiness'; it accepts .*sticky_actions"):
        atari.make("atari/Pong", 1, 0, "cpu", stickiness=0.1)
    for wrong in ({"sticky_actions": 1.0}, {"frame_skip": 0}, {"max_frames": 0}, {"noop_max": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            atari.make("atari/Pong", 1, 0, "cpu", **wrong)
    with pytest.raises(ValueError, match="row_seeds must be 2"):
        atari.make("atari/Pong", 2, 0, "cpu", row_seeds=[1])
    runner = atari.make("atari/Pong", 2, 0, "cpu")
    with pytest.raises(RuntimeError, match="reset"):
        runner.step(torch.zeros(2, dtype=torch.int64))
    runner.reset()
    for wrong in (torch.tensor([0, 6]), torch.tensor([-1, 0]), torch.zeros(3, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(ValueError, match="actions must be"):
            runner.step(wrong)
    runner.send(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="recv"):
        runner.state_dict()
    runner.recv()


def test_close_stops_the_threads():
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    gc.collect()  # runners of other tests
    before = threads()
    runner = atari.make("atari/Pong", 2, 0, "cpu", threads=2)
    runner.reset()
    assert threads() == before + 2
    runner.close()
    runner.close()
    assert threads() == before


def test_every_single_player_game_is_known():
    ids = atari.known_ids()
    assert len(ids) == 104
    assert {"atari/Pong", "atari/MsPacman", "atari/Kaboom"} <= set(ids)
    assert not {"atari/Combat", "atari/Joust", "atari/MazeCraze", "atari/Warlords"} & set(ids)  # two players only


@pytest.mark.slow
@pytest.mark.parametrize("env_id", atari.known_ids())
def test_every_game_plays_and_resumes(env_id):
    runner = atari.make(env_id, 1, 0, "cpu", max_frames=240)
    runner.reset()
    actions = draw_actions(runner, 160)
    for action in actions[:100]:
        runner.step(action)
    other = atari.make(env_id, 1, 1, "cpu", max_frames=240)
    other.load_state_dict(runner.state_dict())
    for action in actions[100:]:
        assert_equal_steps(runner.step(action), other.step(action))


@pytest.mark.gpu
def test_on_a_gpu_the_same_as_on_the_cpu():
    settings = {"max_frames": 120}
    host, device = atari.make("atari/Pong", 4, 0, "cpu", **settings), atari.make("atari/Pong", 4, 0, "cuda", **settings)
    assert torch.equal(host.reset(), device.reset().cpu())
    for action in draw_actions(host, 100):
        left, right = host.step(action), device.step(action.cuda())
        for name in Step.__slots__:
            assert getattr(right, name).is_cuda
            assert torch.equal(getattr(left, name), getattr(right, name).cpu()), name
