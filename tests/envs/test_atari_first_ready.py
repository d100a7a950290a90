"""First-ready Atari: each row plays what it would play alone, whatever rows it is handed out with."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import envs
from envs.atari_first_ready import FirstReadyRunner
from envs.atari_settings import Settings
from envs.runner import Step
from tests.envs.atari_reference import Reference
from tests.envs.test_atari import count_threads

SEEDS = [11, 12, 13, 14, 15]


def play(runner: FirstReadyRunner, rounds: int, policies: list[torch.Generator]) -> list[list[tuple[int | None, Step]]]:
    """For each row its actions and what they led to, the first observation with None."""
    history: list[list[tuple[int | None, Step]]] = [[] for _ in range(runner.num_envs)]
    action: list[int | None] = [None] * runner.num_envs
    ready = runner.reset()
    for _ in range(rounds):
        assert ready.rows.shape == ready.is_transition.shape == (runner.batch_size,)
        assert len(set(ready.rows.tolist())) == runner.batch_size
        for index, row in enumerate(ready.rows.tolist()):
            step = Step(**{name: getattr(ready.step, name)[index].clone() for name in Step.__slots__})
            assert bool(ready.is_transition[index]) == (action[row] is not None)
            history[row].append((action[row], step))
            action[row] = int(torch.randint(runner.action_spec.count, (1,), generator=policies[row]))
        runner.send(torch.tensor([action[row] for row in ready.rows.tolist()]))
        ready = runner.recv()
    return history


@pytest.mark.parametrize(
    ("threads", "batch_size", "changes"),
    [
        (1, 2, {"life_loss_terminates": True}),
        (2, 2, {"life_loss_terminates": True, "grayscale": False, "image_size": 50, "frame_stack": 2}),
        (2, 3, {"max_frames": 200}),
    ],
)
def test_every_row_plays_gymnasiums_game(threads, batch_size, changes):
    """Each row against a plain emulator with its seed: sticky actions, life losses, and several episodes."""
    runner = envs.make_first_ready(
        "atari/Breakout", 5, batch_size, threads=threads, row_seeds=SEEDS, clip_rewards=False, **changes
    )
    policies = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    history = play(runner, 1000 // batch_size, policies)
    runner.close()
    settings = Settings(**{**changes, "frame_stack": 1})
    episodes = lost = 0
    for row, seed in enumerate(SEEDS):
        reference = Reference("Breakout", settings)
        reference.console.ale.setInt("random_seed", seed)
        reference.console.load_game()
        shown, lives, length, total = [reference.reset()], 5, 0, 0.0

        def stack(shown: list[torch.Tensor], depth: int = changes.get("frame_stack", 4)) -> torch.Tensor:
            return torch.cat([*[torch.zeros_like(shown[0])] * depth, *shown][-depth:])

        assert len(history[row]) > 60  # nobody starves
        assert torch.equal(history[row][0][1].obs, stack(shown))
        for action, step in history[row][1:]:
            frame, reward, over, cut, now = reference.step(action)
            shown.append(frame)
            length, total = length + 1, total + reward
            ended = over or cut
            died = now < lives and not ended and settings.life_loss_terminates
            lives = now
            assert torch.equal(step.final_obs, stack(shown))
            assert step.reward == reward
            assert (bool(step.terminated), bool(step.truncated)) == (over or died, cut)
            assert bool(step.episode_ended) == ended
            assert (step.episode_length, step.episode_return) == ((length, total) if ended else (0, 0.0))
            if ended:
                shown, lives, length, total = [reference.reset()], 5, 0, 0.0
            elif died:
                shown = [frame]
            assert torch.equal(step.obs, stack(shown))
            episodes, lost = episodes + ended, lost + died
    assert episodes >= (0 if settings.life_loss_terminates else 15)
    assert lost >= (8 if settings.life_loss_terminates else 0)


def test_truncation_keeps_the_last_frame():
    runner = envs.make_first_ready("atari/Pong", 3, 2, max_frames=40)
    ready = runner.reset()
    lengths = []
    for _ in range(60):
        for index in torch.nonzero(ready.step.truncated).flatten().tolist():
            assert not ready.step.terminated[index]
            assert ready.step.final_obs[index, :-1].any()
            assert not ready.step.obs[index, :-1].any()
            lengths.append(int(ready.step.episode_length[index]))
        runner.send(torch.zeros(2, dtype=torch.int64))
        ready = runner.recv()
    assert len(lengths) >= 6
    assert set(lengths) == {10}
    runner.close()


def test_what_is_refused():
    for batch_size in (0, 4, 5):
        with pytest.raises(ValueError, match="batch_size must be in 1 .. num_envs - 1 = 3"):
            envs.make_first_ready("atari/Pong", 4, batch_size)
    with pytest.raises(ValueError, match="only Atari games"):
        envs.make_first_ready("gym/CartPole-v1", 4, 2)
    with pytest.raises(envs.EnvironmentNotFound, match="atari/Pong"):
        envs.make_first_ready("atari/Pongg", 4, 2)
    with pytest.raises(ValueError, match="unknown Atari protocol"):
        envs.make_first_ready("atari/Pong", 4, 2, protocol="none")
    runner = envs.make_first_ready("atari/Pong", 4, 2)
    with pytest.raises(RuntimeError, match="reset"):
        runner.send(torch.zeros(2, dtype=torch.int64))
    runner.reset()
    with pytest.raises(RuntimeError, match="once"):
        runner.reset()
    with pytest.raises(RuntimeError, match="send"):
        runner.recv()
    for wrong in (torch.zeros(4, dtype=torch.int64), torch.tensor([0, 6]), np.zeros(2, np.int64)):
        with pytest.raises(ValueError, match="actions must be"):
            runner.send(wrong)
    runner.send(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="recv"):
        runner.send(torch.zeros(2, dtype=torch.int64))
    runner.close()
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.send(torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("close", [True, False])
def test_no_thread_is_left_while_rows_wait_to_be_received(close):
    gc.collect()
    before = count_threads()
    runner = envs.make_first_ready("atari/Pong", 6, 2, threads=2)
    runner.reset()
    runner.send(torch.zeros(2, dtype=torch.int64))
    assert count_threads() == before + 2
    if close:
        runner.close()
    else:
        del runner
        gc.collect()
    assert count_threads() == before
