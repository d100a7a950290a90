"""What `envs.runner` promises of every Step, proved on a scripted environment and checked on each backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from counter_env import SCRIPT
from scripted_task import KINDS, follow_the_script, scripted

import envs
from envs import gymnasium_vector
from envs.mujoco_batch import MujocoBatch
from envs.runner import Runner, Step

COUNTER = "gym/counter_env:neoteny/Counter-v0"


def random_action(runner: Runner, generator: torch.Generator) -> torch.Tensor:
    spec = runner.action_spec
    if isinstance(spec, envs.DiscreteActionSpec):
        return torch.randint(spec.count, (runner.num_envs,), generator=generator)
    low, high = torch.from_numpy(spec.low), torch.from_numpy(spec.high)
    return low + (high - low) * torch.rand(runner.num_envs, spec.size, generator=generator)


def check_types(runner: Runner, step: Step) -> None:
    n = runner.num_envs
    for obs in (step.obs, step.final_obs):
        assert obs.shape == (n, *runner.observation_spec.shape)
        assert obs.dtype == runner.observation_spec.dtype
    for values, dtype in (
        (step.reward, torch.float32),
        (step.episode_return, torch.float32),
        (step.episode_length, torch.int64),
        (step.terminated, torch.bool),
        (step.truncated, torch.bool),
        (step.episode_ended, torch.bool),
    ):
        assert values.shape == (n,)
        assert values.dtype == dtype


def check_contract(runner: Runner, steps: int, seed: int = 0) -> int:
    """Play random actions and check every Step against the ones before it; the number of episodes that ended."""
    generator = torch.Generator().manual_seed(seed)
    n = runner.num_envs
    horizon = runner.spec.horizon or 10**9
    returns, lengths = np.zeros(n), np.zeros(n, np.int64)
    ended_count = 0
    runner.reset()
    before: tuple[Step, Step] | None = None
    for _ in range(steps):
        step = runner.step(random_action(runner, generator))
        check_types(runner, step)
        returns += step.reward.numpy()
        lengths += 1
        assert torch.equal(step.episode_ended, step.terminated | step.truncated)
        ended = step.episode_ended.numpy().copy()
        assert np.array_equal(step.final_obs.numpy()[~ended], step.obs.numpy()[~ended])
        assert step.episode_length.tolist() == np.where(ended, lengths, 0).tolist()
        np.testing.assert_allclose(step.episode_return, np.where(ended, returns, 0), rtol=1e-5, atol=1e-5)
        assert lengths.max() <= horizon
        assert ended[lengths == horizon].all()
        returns[ended], lengths[ended] = 0, 0
        ended_count += int(ended.sum())
        if before is not None:  # what the step before this one handed out is still what it was
            for name in Step.__slots__:
                assert torch.equal(getattr(before[0], name), getattr(before[1], name)), name
        before = step, Step(**{name: getattr(step, name).clone() for name in Step.__slots__})
    return ended_count


def test_counter_follows_its_script_to_the_last_observation():
    """Every field of every step, from the script alone, for rows that begin at different places in it."""
    starts = [0, 1, 2, 5]
    runner = envs.make(COUNTER, len(starts), row_seeds=starts)
    assert runner.reset().tolist() == [[start, 0] for start in starts]
    episode, taken, total = list(starts), [0] * 4, [0.0] * 4
    for time in range(60):
        action = torch.tensor([(time + row) % 3 for row in range(4)])
        step = runner.step(action)
        for row in range(4):
            taken[row] += 1
            reward = 10.0 * taken[row] + int(action[row])
            total[row] += reward
            length, terminated, truncated = SCRIPT[episode[row] % len(SCRIPT)]
            over = taken[row] == length
            assert step.reward[row] == reward
            assert step.final_obs[row].tolist() == [episode[row], taken[row]]
            assert bool(step.terminated[row]) == (over and terminated)
            assert bool(step.truncated[row]) == (over and truncated)
            assert bool(step.episode_ended[row]) == over
            assert step.episode_length[row] == (length if over else 0)
            assert step.episode_return[row] == (total[row] if over else 0)
            if over:
                episode[row], taken[row], total[row] = episode[row] + 1, 0, 0.0
            assert step.obs[row].tolist() == [episode[row], taken[row]]


def test_counter_keeps_the_contract():
    assert check_contract(envs.make(COUNTER, 5, row_seeds=range(5)), 100) > 200


@pytest.mark.parametrize("place", ["observation", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_names_row_and_quantity(value, place):
    # Step 4 exists only in episode 5, which only row 1 plays.
    settings = {"row_seeds": [3, 5], "bad_step": 4, "bad_value": value, "bad_place": place}
    runner = envs.make(COUNTER, 2, **settings)
    runner.reset()
    for _ in range(3):
        runner.step(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(FloatingPointError, match=f"{place} of row 1"):
        runner.step(torch.zeros(2, dtype=torch.int64))


def test_a_first_observation_that_is_not_finite_is_found():
    runner = envs.make(COUNTER, 1, bad_step=0, bad_value=-np.inf)
    with pytest.raises(FloatingPointError, match="observation of row 0"):
        runner.reset()


def test_a_large_but_finite_observation_passes():
    runner = envs.make(COUNTER, 1, row_seeds=[0], bad_step=1, bad_value=1e30)
    runner.reset()
    assert runner.step(torch.zeros(1, dtype=torch.int64)).obs[0, 1] == np.float32(1e30)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_scripted_mujoco_task_follows_its_script_to_the_last_observation(rows, tmp_path):
    """Termination, truncation, both, and an end after one step; one row is computed with numbers instead of arrays."""
    runner = MujocoBatch("scripted", scripted(tmp_path), list(range(rows)), torch.device("cpu"), 1, torch.float64)
    seen = follow_the_script(runner, 150)
    assert seen.keys() == KINDS
    assert min(seen.values()) > 5


def test_resuming_an_environment_that_remembers_earlier_episodes_is_refused():
    """The counter's episode number is in no generator, so the saved observation can't be reached again."""
    runner = envs.make(COUNTER, 1, row_seeds=[0])
    runner.reset()
    for _ in range(6):  # episodes 0, 1 and 2
        last = runner.step(torch.zeros(1, dtype=torch.int64))
    assert last.obs.tolist() == [[3, 0]]
    with pytest.raises(ValueError, match="another observation"):
        envs.make(COUNTER, 1).load_state_dict(runner.state_dict())


@pytest.mark.parametrize(
    ("env_id", "num_envs", "steps", "settings", "least_ended"),
    [
        ("gym/CartPole-v1", 3, 300, {}, 20),
        ("gym/Pendulum-v1", 1, 450, {}, 2),
        ("gym/FrozenLake-v1", 4, 100, {}, 20),
        ("gym/HalfCheetah-v5", 1, 60, {"max_episode_steps": 20}, 3),
        ("mujoco/HalfCheetah-v5", 3, 60, {"max_episode_steps": 20}, 9),
        ("mujoco/Hopper-v5", 3, 150, {}, 9),
        ("dmc/cartpole-swingup", 2, 1050, {}, 2),
        ("dmc/fish-upright", 1, 60, {"time_limit": 0.8}, 3),
        ("atari/Breakout", 3, 400, {"clip_rewards": False}, 3),
        ("atari/Pong", 2, 60, {"clip_rewards": False, "max_frames": 98}, 4),
    ],
)
def test_backends_keep_the_contract(env_id, num_envs, steps, settings, least_ended):
    assert check_contract(envs.make(env_id, num_envs, 0, threads=1, **settings), steps) >= least_ended


def test_dm_control_through_the_fallback_keeps_the_contract():
    assert check_contract(gymnasium_vector.make("dmc/fish-upright", 1, 0, "cpu", max_episode_steps=20), 60) >= 3
