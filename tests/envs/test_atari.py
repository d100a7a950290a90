"""Atari games: equal to Gymnasium's own preprocessing frame by frame, whatever the threads, and after a resume."""

from __future__ import annotations

import gc
import io
import math
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs import EnvironmentNotFound, atari
from envs.atari_settings import Settings
from envs.runner import Step
from tests.envs.atari_reference import Reference, assert_equal_steps, draw_actions, start_frames

PLAIN = {"sticky_actions": 0.0, "clip_rewards": False}
NO_OPS_AND_FIRE = {"noop_max": 30, "fire_on_reset": True}


def check_against_gymnasium(game: str, steps: int, seed: int, **changes) -> int:
    """Frames, rewards and ends of one row, to the bit; returns how many episodes ended."""
    changes = {**PLAIN, **changes}
    runner = atari.make(f"atari/{game}", 1, seed, "cpu", **changes)
    reference = Reference(game, Settings(**changes))
    obs, ended = runner.reset(), 0
    assert obs.shape == (1, *runner.observation_spec.shape)
    assert obs.dtype == runner.observation_spec.dtype
    assert torch.equal(obs[0], reference.reset(start_frames(runner)))
    for action in draw_actions(runner, steps, seed):
        step = runner.step(action)
        expected, reward, terminated, truncated, _ = reference.step(int(action))
        assert torch.equal(step.final_obs[0], expected)
        assert (float(step.reward), bool(step.terminated), bool(step.truncated)) == (reward, terminated, truncated)
        if terminated or truncated:
            expected = reference.reset(start_frames(runner))
            ended += 1
        assert torch.equal(step.obs[0], expected)
    runner.close()
    return ended


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("game", "steps"), [("Pong", 350), ("Breakout", 450)])
def test_bit_equal_to_gymnasium_preprocessing(game, steps, seed):
    """Breakout also over several episodes, so that no action is lost at a reset."""
    assert check_against_gymnasium(game, steps, seed) >= (2 if game == "Breakout" else 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"grayscale": False},
        {"grayscale": False, "image_size": 64, "frame_stack": 2, **NO_OPS_AND_FIRE},
        {"image_size": 210, "frame_stack": 1, "frame_skip": 2},
        {"image_size": 40, "frame_stack": 5, "frame_skip": 3, "noop_max": 30},
        {"frame_skip": 1, "full_action_set": True, "max_frames": 50},
        {"max_frames": 98},
        {"max_frames": 100, "grayscale": False},
    ],
    ids=str,
)
def test_every_way_to_show_a_game_is_gymnasiums(changes):
    """With a frame limit also the last picture of a truncated episode, which the simulator does not finish."""
    assert check_against_gymnasium("Breakout", 250, 3, **changes) >= (0 if changes.get("frame_skip") == 2 else 1)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    game=st.sampled_from(["Pong", "Seaquest", "MsPacman"]),
    seed=st.integers(0, 2**31 - 1),
    grayscale=st.booleans(),
    image_size=st.integers(36, 220),
    frame_stack=st.integers(1, 6),
    frame_skip=st.integers(1, 6),
    noop_max=st.integers(0, 40),
)
def test_any_settings_are_gymnasiums(game, seed, **changes):
    check_against_gymnasium(game, 25, seed, **changes)


@pytest.mark.parametrize("grayscale", [True, False])
def test_sticky_actions_come_from_the_seed_of_row_and_episode(grayscale):
    """The same frames as a plain emulator seeded by hand, over reseeded and not reseeded episodes; and its picture."""
    reseed_after, row_seed = 250, 77
    changes = {"reseed_after": reseed_after, "grayscale": grayscale}
    runner = atari.make("atari/Breakout", 1, 0, "cpu", row_seeds=[row_seed], **changes)
    reference = Reference("Breakout", Settings(**changes))

    def insert_cartridge(episode: int) -> None:
        words = np.random.SeedSequence((row_seed, episode)).generate_state(1, np.uint32)
        reference.console.ale.setInt("random_seed", int(words[0]) >> 1)
        reference.console.load_game()

    reference.reset()
    insert_cartridge(0)
    assert torch.equal(runner.reset()[0], reference.reset())
    episode, since_seed, reseeded = 0, 0, []
    for count, action in enumerate(draw_actions(runner, 700)):
        step = runner.step(action)
        since_seed += 1
        expected, _, terminated, _, _ = reference.step(int(action))
        assert torch.equal(step.final_obs[0], expected)
        if terminated:
            episode += 1
            if since_seed >= reseed_after:
                insert_cartridge(episode)
                since_seed = 0
                reseeded.append(episode)
            expected = reference.reset()
        assert torch.equal(step.obs[0], expected)
        if count % 100 == 99:
            assert np.array_equal(runner.render(), reference.console.ale.getScreenRGB())
    assert reseeded
    assert len(reseeded) < episode


@pytest.mark.parametrize(
    ("game", "settings"),
    [
        ("Breakout", {"reseed_after": 0}),
        ("Breakout", {"reseed_after": 250, "life_loss_terminates": True, "grayscale": False, **NO_OPS_AND_FIRE}),
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
    left, right = whole.state_dict(), halves.state_dict()
    assert {name for name, value in left.items() if isinstance(value, torch.Tensor)} == {
        "episode", "length", "return", "lives", "seed", "count", "actions", "obs"
    }  # fmt: skip
    for name, value in left.items():
        assert torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name], name


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    saved_at=st.integers(0, 50),
    reseed_after=st.sampled_from([0, 25, 1000]),
    max_frames=st.integers(60, 160),
    choice=st.fixed_dictionaries(
        {"noop_max": st.integers(0, 30), "fire_on_reset": st.booleans(), "life_loss_terminates": st.booleans()}
    ),
)
def test_a_state_may_be_saved_after_any_step(saved_at, reseed_after, max_frames, choice):
    changes = {"reseed_after": reseed_after, "max_frames": max_frames, **choice}
    whole, halves = (atari.make("atari/Breakout", 2, seed, "cpu", **changes) for seed in (5, 6))
    whole.reset()
    actions = draw_actions(whole, 80, saved_at)
    for action in actions[:saved_at]:
        whole.step(action)
    halves.load_state_dict(whole.state_dict())
    for action in actions[saved_at:]:
        assert_equal_steps(whole.step(action), halves.step(action))
    whole.close()
    halves.close()


def test_a_state_that_leads_elsewhere_is_refused():
    runner = atari.make("atari/Breakout", 2, 0, "cpu")
    runner.reset()
    for action in draw_actions(runner, 60):
        runner.step(action)
    state = runner.state_dict()
    with pytest.raises(ValueError, match="lead elsewhere"):
        runner.load_state_dict({**state, "actions": torch.zeros_like(state["actions"])})
    with pytest.raises(ValueError, match="lead elsewhere"):  # the same frames, another score
        runner.load_state_dict({**state, "return": state["return"] + 1})
    with pytest.raises(ValueError, match="settings"):
        atari.make("atari/Breakout", 2, 0, "cpu", sticky_actions=0.0).load_state_dict(state)
    with pytest.raises(ValueError, match="2 rows, not 1"):
        atari.make("atari/Breakout", 1, 0, "cpu").load_state_dict(state)


def test_a_state_from_before_the_first_reset():
    one, other = atari.make("atari/Pong", 1, 3, "cpu"), atari.make("atari/Pong", 1, 4, "cpu")
    other.reset()
    other.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match="reset"):
        other.step(torch.zeros(1, dtype=torch.int64))
    assert torch.equal(one.reset(), other.reset())


ROWS, ROW_STEPS = 5, 60  # with 40 actions an episode, in every row one episode ends


@pytest.fixture(scope="module")
def rows_alone() -> list[tuple[torch.Tensor, list[Step]]]:
    """Actions and steps of each row of a runner of five, every one played in a runner of its own."""
    played = []
    for row, seed in enumerate(atari.take_row_seeds({}, 3, ROWS)[0]):
        runner = atari.make("atari/Breakout", 1, 0, "cpu", row_seeds=[seed], max_frames=160, noop_max=30)
        runner.reset()
        actions, steps = draw_actions(runner, ROW_STEPS, row), []
        for action in actions:
            step = runner.step(action)
            steps.append(Step(**{name: getattr(step, name)[0].clone() for name in Step.__slots__}))
        runner.close()
        played.append((actions[:, 0], steps))
    return played


@settings(max_examples=6, deadline=None, derandomize=True)
@given(rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=6), threads=st.sampled_from([1, 2, 0]))
def test_a_row_depends_on_neither_threads_nor_neighbours(rows_alone, rows, threads):
    """Any rows in any order, the same one twice too."""
    seeds = [atari.take_row_seeds({}, 3, ROWS)[0][row] for row in rows]
    runner = atari.make("atari/Breakout", len(rows), 9, "cpu", threads, row_seeds=seeds, max_frames=160, noop_max=30)
    runner.reset()
    for time in range(ROW_STEPS):
        step = runner.step(torch.stack([rows_alone[row][0][time] for row in rows]))
        for index, row in enumerate(rows):
            for name in Step.__slots__:
                assert torch.equal(getattr(step, name)[index], getattr(rows_alone[row][1][time], name)), name
    runner.close()


def test_no_op_starts_are_uniform_and_include_both_ends():
    """Six counts, 360 episodes of one action: each between 30 and 90 times (five standard deviations)."""
    runner = atari.make("atari/Pong", 6, 0, "cpu", noop_max=5, max_frames=1)
    runner.reset()
    for _ in range(60):
        runner.step(torch.zeros(6, dtype=torch.int64))
    counts = np.bincount(np.concatenate([frames[:60] for frames in runner._record.start_frames]))
    assert len(counts) == 6
    assert ((counts > 30) & (counts < 90)).all(), counts


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


@pytest.mark.parametrize("grayscale", [True, False])
def test_a_lost_life_is_a_termination_in_a_game_that_goes_on(grayscale):
    """The agent's next episode begins with this frame alone, as in the code of DQN; the game's does not."""
    changes = {**PLAIN, "grayscale": grayscale}
    runner = atari.make("atari/Breakout", 1, 0, "cpu", life_loss_terminates=True, **changes)
    reference = Reference("Breakout", Settings(**changes, frame_stack=1))
    shown = [reference.reset()]
    assert torch.equal(runner.reset()[0, -len(shown[0]) :], shown[0])

    def stack() -> torch.Tensor:
        return torch.cat([*[torch.zeros_like(shown[0])] * 3, *shown][-4:])

    lives, lost, over, length = 5, 0, 0, 0
    for action in draw_actions(runner, 300):
        step = runner.step(action)
        frame, _, terminated, _, now = reference.step(int(action))
        length += 1
        shown.append(frame)
        assert torch.equal(step.final_obs[0], stack())
        assert bool(step.terminated) == (terminated or now < lives)
        assert bool(step.episode_ended) == terminated
        assert step.episode_length == (length if terminated else 0)
        lost += now < lives and not terminated
        if now < lives:
            shown = [frame]
        lives = now
        if terminated:
            over, length, lives = over + 1, 0, 5
            shown = [reference.reset()]
        assert torch.equal(step.obs[0], stack())
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


def test_bad_settings_are_one_sentence():
    with pytest.raises(ValueError, match=r"atari/Pong has no setting 'stickiness'; it accepts .*sticky_actions"):
        atari.make("atari/Pong", 1, 0, "cpu", stickiness=0.1)
    with pytest.raises(ValueError, match="row_seeds must be 2"):
        atari.make("atari/Pong", 2, 0, "cpu", row_seeds=[1])
    with pytest.raises(ValueError, match="threads"):
        atari.make("atari/Pong", 1, 0, "cpu", threads=-1)


BAD_ACTIONS = [
    torch.tensor([0, 6]),
    torch.tensor([-1, 0]),
    torch.tensor([2**40, 0]),
    torch.zeros(3, dtype=torch.int64),
    torch.zeros(1, dtype=torch.int64),
    torch.zeros(2, 1, dtype=torch.int64),
    torch.tensor(0),
    torch.zeros(0, dtype=torch.int64),
    torch.zeros(2),
    torch.zeros(2, dtype=torch.int32),
    torch.zeros(2, dtype=torch.bool),
    torch.zeros(2, dtype=torch.int64, device="meta"),
    np.zeros(2, np.int64),
    [0, 0],
    None,
]


def test_a_refused_action_is_one_sentence_and_changes_nothing():
    runner, twin = atari.make("atari/Pong", 2, 0, "cpu"), atari.make("atari/Pong", 2, 0, "cpu")
    with pytest.raises(RuntimeError, match="reset"):
        runner.step(torch.zeros(2, dtype=torch.int64))
    runner.reset()
    twin.reset()
    for action, wrong in zip(draw_actions(runner, len(BAD_ACTIONS)), BAD_ACTIONS, strict=True):
        with pytest.raises(ValueError, match="atari/Pong: actions must be"):
            runner.step(wrong)
        assert_equal_steps(runner.step(action), twin.step(action))
    # Any memory layout of the right numbers will do.
    runner.step(torch.zeros(2, 3, dtype=torch.int64)[:, 1])


def test_calls_in_the_wrong_order():
    runner, actions = atari.make("atari/Pong", 2, 0, "cpu"), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="send"):
        runner.recv()
    runner.reset()
    runner.send(actions)
    for call in (lambda: runner.send(actions), runner.state_dict, runner.render):
        with pytest.raises(RuntimeError, match="recv"):
            call()
    runner.reset()  # takes the answer that is on its way first
    runner.send(actions)
    runner.close()
    runner.close()
    for call in (runner.reset, lambda: runner.step(actions), runner.render):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_a_missing_cartridge(tmp_path, monkeypatch):
    monkeypatch.setenv("ALE_ROMS_DIR", str(tmp_path))
    with pytest.raises(
        EnvironmentNotFound, match=r"'atari/Pong' is known, but its cartridge cannot be read: .*pong.bin"
    ):
        atari.make("atari/Pong", 1, 0, "cpu")


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("close", [True, False])
def test_no_thread_is_left(close, in_flight):
    """Also if nobody closes the runner."""
    gc.collect()  # runners of other tests
    before = count_threads()
    runner = atari.make("atari/Pong", 2, 0, "cpu", threads=2)
    runner.reset()
    assert count_threads() == before + 2
    if in_flight:
        runner.send(torch.zeros(2, dtype=torch.int64))
    if close:
        runner.close()
    else:
        del runner
        gc.collect()
    assert count_threads() == before


def test_runners_in_several_threads_do_not_disturb_each_other():
    """Evaluation may run beside training."""

    def play(results: list[torch.Tensor]) -> None:
        runner = atari.make("atari/Breakout", 2, 0, "cpu", threads=1)
        runner.reset()
        results.extend(runner.step(action).obs.clone() for action in draw_actions(runner, 60))
        runner.close()

    played: list[list[torch.Tensor]] = [[], [], []]
    play(played[0])
    threads = [threading.Thread(target=play, args=(results,)) for results in played[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in played[1:]:
        assert torch.equal(torch.stack(results), torch.stack(played[0]))


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
@pytest.mark.parametrize("changes", [{}, {"grayscale": False, "image_size": 60, "life_loss_terminates": True}], ids=str)
def test_on_a_gpu_the_same_as_on_the_cpu(changes):
    host, device = (atari.make("atari/Breakout", 4, 0, where, max_frames=240, **changes) for where in ("cpu", "cuda"))
    assert torch.equal(host.reset(), device.reset().cpu())
    actions = draw_actions(host, 200)
    for count, action in enumerate(actions):
        if count == 100:
            device.load_state_dict(host.state_dict())
        left, right = host.step(action), device.step(action.cuda())
        for name in Step.__slots__:
            assert getattr(right, name).is_cuda
            assert torch.equal(getattr(left, name), getattr(right, name).cpu()), name
