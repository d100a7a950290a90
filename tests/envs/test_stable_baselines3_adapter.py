"""A runner under stable-baselines3's agents: equal to its own environments, and good enough to learn on."""

import numpy as np
import pytest
import torch

import envs

pytest.importorskip("stable_baselines3")

from stable_baselines3 import DQN, PPO  # noqa: E402
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402
from stable_baselines3.common.evaluation import evaluate_policy  # noqa: E402
from stable_baselines3.common.monitor import Monitor  # noqa: E402
from stable_baselines3.common.vec_env import VecTransposeImage  # noqa: E402

ROWS = 4


def test_equal_to_its_own_vector_environment():
    theirs, ours = make_vec_env("CartPole-v1", ROWS), envs.as_stable_baselines3(envs.make("gym/CartPole-v1", ROWS))
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    generator, ended = np.random.default_rng(0), 0
    for seed in (3, 8):
        assert ours.seed(seed) == theirs.seed(seed)
        assert np.array_equal(ours.reset(), theirs.reset())
        for _ in range(150):
            actions = generator.integers(2, size=ROWS)
            *outcome, infos = ours.step(actions)
            *expected, expected_infos = theirs.step(actions)
            for mine, other in zip(outcome, expected, strict=True):
                assert np.array_equal(mine, other)
                assert mine.dtype == other.dtype
            for info, other in zip(infos, expected_infos, strict=True):
                if "episode" not in other:
                    assert info == {}
                    continue
                ended += 1
                assert info["episode"].keys() == other["episode"].keys()
                assert (info["episode"]["r"], info["episode"]["l"]) == (other["episode"]["r"], other["episode"]["l"])
                assert info["TimeLimit.truncated"] == other["TimeLimit.truncated"]
                assert np.array_equal(info["terminal_observation"], other["terminal_observation"])
    assert ended > 20
    ours.close()
    theirs.close()


def test_truncation_is_told_from_termination():
    env = envs.as_stable_baselines3(envs.make("gym/counter_env:neoteny/Counter-v0", 6, row_seeds=range(6)))
    env.reset()
    # Of the episodes that the script ends after one step: both true, terminated, truncated.
    infos = env.step(np.zeros(6, np.int64))[3]
    assert [info.get("TimeLimit.truncated") for info in infos] == [None, None, False, False, True, None]


def test_an_agent_learns_and_evaluates_through_it():
    """PPO on CartPole at four rows: from about 20 steps to well above 100."""
    torch.set_num_threads(1)
    env = envs.as_stable_baselines3(envs.make("gym/CartPole-v1", ROWS))
    agent = PPO("MlpPolicy", env, n_steps=128, batch_size=128, n_epochs=10, learning_rate=2e-3, seed=1, device="cpu")
    before, _ = evaluate_policy(agent, env, n_eval_episodes=8)
    agent.learn(8_000)
    after, _ = evaluate_policy(agent, env, n_eval_episodes=8)
    assert before < 60
    assert after > 150
    assert np.mean([episode["r"] for episode in agent.ep_info_buffer]) > 60


def test_replay_agents_store_the_last_observation_of_an_episode():
    env = envs.as_stable_baselines3(envs.make("gym/CartPole-v1", ROWS))
    agent = DQN("MlpPolicy", env, learning_starts=10_000, buffer_size=4_000, seed=0, device="cpu")
    agent.learn(800)
    buffer = agent.replay_buffer
    ends = np.argwhere(buffer.dones[: buffer.pos] > 0)
    assert len(ends) > 10
    for time, row in ends:
        x, _, angle, _ = buffer.next_observations[time, row]
        assert abs(x) > 2.4 or abs(angle) > 0.2094  # the state that ended it, not the next episode's first


def test_rows_are_no_objects():
    env = envs.as_stable_baselines3(envs.make("atari/Pong", 2))
    assert env.get_attr("render_mode") == ["rgb_array"] * 2
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert env.env_is_wrapped(VecTransposeImage, indices=0) == [False]
    assert not env.has_attr("spec")
    with pytest.raises(AttributeError, match="have no method 'fly'"):
        env.env_method("fly")
    env.reset()
    assert env.render("rgb_array").shape == (420, 160, 3)
    env.close()
    env.close()
