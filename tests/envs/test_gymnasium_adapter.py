"""A runner as a Gymnasium vector environment: Gymnasium's checks, and equality with its own vector environment."""

import itertools
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Discrete
from gymnasium.utils import env_checker
from gymnasium.utils.passive_env_checker import check_action_space, check_observation_space, data_shares_objects
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.vector import DictInfoToList, NormalizeReward, RecordEpisodeStatistics

import envs

COUNTER = "gym/counter_env:neoteny/Counter-v0"
SHORT_PONG = {"max_frames": 48, "sticky_actions": 0.0, "noop_max": 5}
BACKENDS = {
    "mujoco/Hopper-v5": {},
    "dmc/reacher-easy": {"time_limit": 0.24},
    "atari/Pong": SHORT_PONG,
    "gym/CartPole-v1": {},
    "gym/Pendulum-v1": {"max_episode_steps": 12},
    "gym/FrozenLake-v1": {},
    COUNTER: {},
}
# Row 0 alone would not show a seed that goes to the wrong row.
ROWS = 3


@pytest.fixture(params=BACKENDS)
def adapted(request):
    env = envs.as_gymnasium(envs.make(request.param, ROWS, seed=5, **BACKENDS[request.param]))
    yield env
    env.close()


def play(env: VectorEnv, seed: int | None, steps: int = 40) -> list:
    """Everything that a reset and some steps hand out, seconds left out."""
    env.action_space.seed(0)
    said = [env.reset(seed=seed)]
    for _ in range(steps):
        *outcome, infos = env.step(env.action_space.sample())
        for place in (infos, infos.get("final_info", {})):
            if "episode" in place:
                del place["episode"]["t"]
        said.append((*outcome, infos))
    return said


def test_spaces_and_metadata(adapted):
    assert adapted.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    check_observation_space(adapted.observation_space)
    check_action_space(adapted.action_space)
    assert adapted.observation_space == batch_space(adapted.single_observation_space, ROWS)
    assert adapted.action_space == batch_space(adapted.single_action_space, ROWS)
    for obs, *_ in play(adapted, seed=1):
        assert obs in adapted.observation_space


def test_passes_gymnasiums_own_checks(adapted):
    adapted.spec = EnvSpec("Checked-v0")  # without a spec the checker does not compare
    env_checker.check_reset_seed_determinism(adapted)
    env_checker.check_reset_options(adapted)
    env_checker.check_reset_return_type(adapted)
    env_checker.check_reset_return_info_deprecation(adapted)
    env_checker.check_seed_deprecation(adapted)
    said = play(adapted, seed=3, steps=15)
    for former, latter in itertools.combinations(said, 2):
        assert not data_shares_objects(former, latter)


def test_a_seed_decides_everything_whatever_happened_before(adapted):
    first = play(adapted, seed=7)
    unseeded = play(adapted, seed=None)
    again = play(adapted, seed=7)
    assert env_checker.data_equivalence(first, again, exact=True)
    assert not env_checker.data_equivalence(first, unseeded, exact=True)
    fresh = envs.as_gymnasium(
        envs.make(adapted.runner.spec.env_id, ROWS, **BACKENDS[adapted.runner.spec.env_id], row_seeds=[7, 8, 9])
    )
    assert env_checker.data_equivalence(first, play(fresh, seed=None), exact=True)
    fresh.close()


@pytest.mark.parametrize("bad_seed", [[1, 2], -1, [1, 2, 3, 4]])
def test_seeds_that_do_not_fit_are_refused(bad_seed):
    env = envs.as_gymnasium(envs.make("gym/CartPole-v1", ROWS))
    with pytest.raises(ValueError, match="seed must be a non-negative integer or 3 of them"):
        env.reset(seed=bad_seed)
    assert np.array_equal(env.reset(seed=[4, 5, 6])[0], env.reset(seed=4)[0])


def test_what_the_registry_does_not_build_cannot_be_seeded():
    runner = envs.make("gym/CartPole-v1", ROWS)
    runner.spec = envs.RunnerSpec("gym/CartPole-v1", "another backend", 500, 1, {}, {})
    with pytest.raises(RuntimeError, match="cannot seed gym/CartPole-v1 anew: envs.make builds it otherwise"):
        envs.as_gymnasium(runner).reset(seed=1)
    sequence = envs.as_gymnasium(envs.make_sequence(["gym/CartPole-v1", "gym/Acrobot-v1"], ROWS, switch_every=30))
    assert sequence.reset()[0].shape == (ROWS, 6)
    with pytest.raises(RuntimeError, match="give the seeds to envs.make instead: unknown environment"):
        sequence.reset(seed=1)


@pytest.mark.parametrize("episodes_before", [0, 1])
def test_a_seed_leaves_a_changed_model_as_it_is(episodes_before):
    """Also one that would have changed at the next episode."""
    changed, original = (envs.make("mujoco/HalfCheetah-v5", ROWS, row_seeds=[3, 4, 5]) for _ in range(2))
    changed.change_model({"gravity": 0.3})
    env = envs.as_gymnasium(changed)
    for _ in range(episodes_before):
        env.reset()
    first, reference = env.reset(seed=3)[0], original.reset().numpy()
    assert np.array_equal(first, reference)
    actions = np.zeros((ROWS, 6), np.float32)
    original.change_model({"gravity": 0.3}, now=True)
    assert np.array_equal(env.step(actions)[0], original.step(torch.from_numpy(actions)).obs.numpy())


def test_reset_options_are_refused():
    env = envs.as_gymnasium(envs.make("gym/CartPole-v1", ROWS))
    with pytest.raises(ValueError, match="no reset options, got 'reset_mask'"):
        env.reset(options={"reset_mask": np.ones(ROWS, bool)})


def reference(name: str, **kwargs) -> VectorEnv:
    sync = gymnasium.make_vec(
        name, ROWS, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}, **kwargs
    )
    return RecordEpisodeStatistics(sync)


@pytest.mark.parametrize(
    ("name", "env_id", "settings"),
    [
        ("CartPole-v1", "gym/CartPole-v1", {}),
        ("Pendulum-v1", "gym/Pendulum-v1", {}),
        ("HalfCheetah-v5", "mujoco/HalfCheetah-v5", {"dtype": torch.float64}),
        ("Hopper-v5", "mujoco/Hopper-v5", {"dtype": torch.float64}),
    ],
)
def test_equal_to_gymnasiums_vector_environment(name, env_id, settings):
    """Spaces, every array and its type, final observations, episode statistics; two seeded plays of the same object.

    Left out: what Gymnasium's environments say of themselves in infos, and seconds.
    """
    theirs, ours = reference(name), envs.as_gymnasium(envs.make(env_id, ROWS, **settings))
    for space in ("single_observation_space", "observation_space", "single_action_space", "action_space"):
        assert getattr(ours, space) == getattr(theirs, space)
        assert getattr(ours, space).dtype == getattr(theirs, space).dtype
    ended = 0
    for seed in (11, 3):
        theirs.action_space.seed(seed)
        obs, expected = ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0]
        assert env_checker.data_equivalence(obs, expected, exact=True)
        for _ in range(1010 if name == "HalfCheetah-v5" else 210):
            action = theirs.action_space.sample()
            *outcome, infos = ours.step(action)
            *expected, expected_infos = theirs.step(action)
            assert env_checker.data_equivalence(outcome[0], expected[0], exact=True)
            assert env_checker.data_equivalence(outcome[1:], expected[1:])
            if not (outcome[2] | outcome[3]).any():
                assert infos == {}
                continue
            ended += 1
            for key in ("final_obs", "_final_obs", "_final_info", "_episode"):
                assert env_checker.data_equivalence(infos[key], expected_infos[key], exact=True)
            assert infos["episode"].keys() == expected_infos["episode"].keys()
            np.testing.assert_allclose(infos["episode"]["r"], expected_infos["episode"]["r"], rtol=1e-5)
            for key in "rlt":
                assert infos["episode"][key].dtype == expected_infos["episode"][key].dtype
            assert np.array_equal(infos["episode"]["l"], expected_infos["episode"]["l"])
    assert ended >= 2
    theirs.close()
    ours.close()


def test_only_rows_that_ended_are_marked():
    env = envs.as_gymnasium(envs.make(COUNTER, 4, row_seeds=[0, 1, 2, 5]))
    env.reset()
    infos = env.step(np.zeros(4, np.int64))[4]  # the script ends row 2 after one step, and no other
    assert infos["_final_obs"].tolist() == infos["_episode"].tolist() == [False, False, True, False]
    assert infos["final_obs"][2].tolist() == [2, 1]
    assert [infos["final_obs"][row] for row in (0, 1, 3)] == [None] * 3
    assert infos["episode"]["l"].tolist() == [0, 0, 1, 0]
    assert infos["episode"]["r"].tolist() == [0, 0, 10, 0]
    assert infos["episode"]["t"][2] > 0
    assert infos["final_info"]["episode"]["r"].tolist() == [0, 0, 10, 0]


def test_a_lost_life_is_an_end_but_no_episode():
    env = envs.as_gymnasium(
        envs.make("atari/Breakout", 2, life_loss_terminates=True, fire_on_reset=True, sticky_actions=0.0)
    )
    env.reset(seed=0)
    for _ in range(400):
        obs, _, terminated, _, infos = env.step(np.ones(2, np.int64))
        if terminated.any():
            break
    row = int(terminated.argmax())
    assert infos["_final_obs"].tolist() == terminated.tolist()
    assert np.array_equal(infos["final_obs"][row][-1], obs[row][-1])  # the game goes on in a new stack
    assert not obs[row][:-1].any()
    assert "episode" not in infos
    env.close()


def test_what_is_handed_out_stays_what_it_was():
    env = envs.as_gymnasium(envs.make("mujoco/Hopper-v5", ROWS, seed=1))
    kept = [env.reset(), *(env.step(env.action_space.sample()) for _ in range(60))]
    copies = [tuple(np.array(part) if isinstance(part, np.ndarray) else part for part in said) for said in kept]
    for _ in range(5):
        env.step(env.action_space.sample())
    assert env_checker.data_equivalence(kept, copies, exact=True)


def test_bounds_are_those_of_the_environment():
    cart_pole = envs.as_gymnasium(envs.make("gym/CartPole-v1", 2))
    assert cart_pole.single_observation_space == gymnasium.make("CartPole-v1").observation_space
    frozen_lake = envs.as_gymnasium(envs.make("gym/FrozenLake-v1", 2))
    assert frozen_lake.single_observation_space == Box(0, 1, (16,), np.float32)
    assert frozen_lake.single_action_space == Discrete(4)
    pong = envs.as_gymnasium(envs.make("atari/Pong", 2))
    assert pong.single_observation_space == Box(0, 255, (4, 84, 84), np.uint8)
    humanoid = envs.as_gymnasium(envs.make("mujoco/Humanoid-v5", 2))
    assert humanoid.single_action_space == gymnasium.make("Humanoid-v5").action_space


def test_actions_of_other_types_and_read_only_ones_are_taken(recwarn):
    env = envs.as_gymnasium(envs.make("gym/CartPole-v1", 2))
    results = []
    read_only = np.array([0, 1])
    read_only.flags.writeable = False
    for actions in (np.array([0, 1]), np.array([0, 1], np.int32), [0, 1], read_only):
        env.reset(seed=0)
        results.append(env.step(actions)[0])
    assert all(np.array_equal(result, results[0]) for result in results)
    assert not recwarn.list
    with pytest.raises(ValueError, match="action must be int64"):
        env.step(np.array([0.0, 1.0]))


def test_gymnasiums_wrappers_work_around_it():
    env = envs.as_gymnasium(envs.make("gym/CartPole-v1", ROWS), episode_statistics=False)
    env = DictInfoToList(RecordEpisodeStatistics(env))
    env.reset(seed=2)
    ended = [info for _ in range(60) for info in env.step(np.ones(ROWS, np.int64))[4] if info]
    assert len(ended) >= ROWS
    assert all(info["episode"]["r"] == info["episode"]["l"] > 0 and info["final_obs"].shape == (4,) for info in ended)
    scaled = NormalizeReward(envs.as_gymnasium(envs.make("gym/Pendulum-v1", ROWS)))
    scaled.reset(seed=0)
    rewards = [scaled.step(np.zeros((ROWS, 1), np.float32))[1] for _ in range(300)]
    assert 0 < np.abs(rewards[-1]).max() < 5


def test_closes_twice_and_says_so():
    env = envs.as_gymnasium(envs.make("mujoco/HalfCheetah-v5", 2))
    env.reset()
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(np.zeros((2, 6))), env.render):
        with pytest.raises(
            gymnasium.error.ClosedEnvironmentError, match="the environments of mujoco/HalfCheetah-v5 are"
        ):
            call()


def test_render_gives_a_picture_of_each_row():
    env = envs.as_gymnasium(envs.make("atari/Pong", 2))
    env.reset(seed=0)
    pictures = env.render()
    assert [picture.shape for picture in pictures] == [(210, 160, 3)] * 2
    assert all(picture.any() and picture.dtype == np.uint8 for picture in pictures)
    env.close()


def test_without_stable_baselines3_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['stable_baselines3'] = None; import envs; envs.as_stable_baselines3"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert ended.stderr.strip().splitlines()[-1] == (
        "ModuleNotFoundError: as_stable_baselines3 needs stable-baselines3: pip install 'neoteny[bench]'"
    )
