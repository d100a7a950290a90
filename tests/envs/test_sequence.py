"""Tasks in turn behind one runner: what each switch looks like, and that nothing else changes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

import envs
from envs.schedules import SCHEDULES
from envs.sequence import Segment, make_sequence

SHORT_WALK = Segment("dmc/walker-walk", {"time_limit": 0.5})
SWING_LEFT = Segment("gym/MountainCar-v0")
SWING = Segment("dmc/cartpole-swingup", {"time_limit": 0.1})


def play(runner, steps: int, seed: int = 0) -> list[envs.Step]:
    """The steps (cloned) of uniformly random actions."""
    generator = torch.Generator().manual_seed(seed)
    told = []
    for _ in range(steps):
        spec = runner.action_spec
        if isinstance(spec, envs.DiscreteActionSpec):
            action = torch.randint(spec.count, (runner.num_envs,), generator=generator)
        else:
            uniform = torch.rand(runner.num_envs, spec.size, generator=generator)
            action = torch.from_numpy(spec.low) + uniform * torch.from_numpy(spec.high - spec.low)
        step = runner.step(action)
        told.append(envs.Step(**{name: getattr(step, name).clone() for name in envs.Step.__dataclass_fields__}))
    return told


def test_a_switch_between_environments_cuts_every_row_with_a_true_final_observation():
    runner = make_sequence([SHORT_WALK, SWING], 2, switch_every=14)
    alone = envs.make("dmc/walker-walk", 2, time_limit=0.5)
    assert runner.observation_spec.shape == (24,)
    assert runner.action_spec.size == 6
    assert torch.equal(runner.reset(), alone.reset())
    assert runner.task.tolist() == [0, 0]
    told, expected = play(runner, 7), play(alone, 7)
    for mine, other in zip(told, expected, strict=True):
        assert torch.equal(mine.final_obs, other.final_obs)
        assert torch.equal(mine.reward, other.reward)
    cut = told[-1]
    assert [bool(step.truncated.any()) for step in told] == [False] * 6 + [True]
    assert cut.truncated.all()
    assert not cut.terminated.any()
    assert not cut.episode_ended.any()
    assert runner.task.tolist() == [1, 1]
    assert (cut.obs[:, 5:] == 0).all()
    assert (cut.obs[:, 1] < -0.99).all()  # the cosine of a pole that hangs
    assert (cut.final_obs[:, 5:] != 0).any()


def test_surplus_action_components_are_ignored_and_the_rest_is_the_tasks_own():
    runner = make_sequence([SWING, SHORT_WALK], 3, seed=4, switch_every=3 * 40)
    alone = envs.make("dmc/cartpole-swingup", 3, seed=4, time_limit=0.1)
    obs = runner.reset().clone()
    assert torch.equal(obs[:, :5], alone.reset())
    for _ in range(39):
        action = torch.rand(3, 6) * 2 - 1
        mine, other = runner.step(action), alone.step(action[:, :1])
        assert torch.equal(mine.obs[:, :5], other.obs)
        assert torch.equal(mine.episode_ended, other.episode_ended)
        assert torch.equal(mine.episode_return, other.episode_return)


def test_it_comes_back_to_the_first_task_and_says_when_it_changed():
    runner = make_sequence([SWING, SHORT_WALK], 2, switch_every=6)
    runner.reset()
    tasks = []
    for _ in range(9):
        play(runner, 1)
        tasks.append(runner.task[0].item())
    assert tasks == [0, 0, 1, 1, 1, 0, 0, 0, 1]
    assert [(s.step, s.index) for s in runner.switches] == [(0, 0), (6, 1), (12, 0), (18, 1)]


def test_episodes_can_decide_when():
    runner = make_sequence([SWING, SHORT_WALK], 2, switch_episodes=4)
    runner.reset()
    told = play(runner, 20)  # ten steps an episode, two rows: four episodes have ended
    assert sum(int(step.episode_ended.sum()) for step in told) == 4
    assert runner.task.tolist() == [1, 1]
    assert told[-1].episode_ended.all()


def test_a_change_of_the_model_waits_for_each_rows_own_episode():
    low, high = ({"friction": factor} for factor in (0.05, 2.0))
    segments = [Segment("mujoco/Hopper-v5", model=low), Segment("mujoco/Hopper-v5", model=high)]
    runner = make_sequence(segments, 3, switch_every=30)
    before = envs.make("mujoco/Hopper-v5", 3)
    before.change_model(low)
    assert torch.equal(runner.reset(), before.reset())
    changed_at = {}
    for t in range(200):
        action = torch.sin(torch.arange(9.0).reshape(3, 3) + t)
        mine, other = runner.step(action), before.step(action)
        assert not mine.truncated.any()
        if t == 9:
            before.change_model(high)
            runner.switch_every = 10**9
            assert runner.switches[-1].waits_for_episodes
        assert torch.equal(mine.obs, other.obs), t
        for row in runner.task.nonzero()[:, 0].tolist():
            changed_at.setdefault(row, (t, bool(mine.episode_ended[row])))
        if len(changed_at) == 3:
            break
    assert {ended for _, ended in changed_at.values()} == {True}
    assert len({t for t, _ in changed_at.values()}) > 1


@pytest.mark.parametrize(
    ("ids", "action", "message"),
    [
        (["mujoco/Hopper-v5", "dmc/walker-walk"], torch.zeros(2), r"must be floating-point \[2, 6\], got"),
        (["mujoco/Hopper-v5", "dmc/walker-walk"], torch.zeros(2, 3), r"must be floating-point \[2, 6\]"),
        (["mujoco/Hopper-v5", "dmc/walker-walk"], torch.zeros(2, 6, dtype=torch.int64), "must be floating-point"),
        (["mujoco/Hopper-v5", "dmc/walker-walk"], torch.zeros(2, 6, device="meta"), "must be on cpu"),
        (["gym/CartPole-v1", "gym/Acrobot-v1"], torch.zeros(2), r"must be int64 \[2\]"),
        (["gym/CartPole-v1", "gym/Acrobot-v1"], torch.tensor([0, -1]), "row 1: action -1 is not one of 0 to 2"),
        (["gym/CartPole-v1", "gym/Acrobot-v1"], torch.tensor([3, 0]), "row 0: action 3 is not one of 0 to 2"),
        (["gym/CartPole-v1", "gym/Acrobot-v1"], [0, 0], "must be a tensor, got list"),
    ],
)
def test_actions_of_another_kind_are_refused(ids, action, message):
    runner = envs.make_sequence(ids, 2, switch_every=100)
    runner.reset()
    with pytest.raises(ValueError, match=message):
        runner.step(action)


def test_actions_with_other_bounds_are_mapped_from_one_box():
    pair = ["mujoco/Humanoid-v5", "mujoco/HalfCheetah-v5"]  # [-0.4, 0.4] and [-1, 1]
    runner = make_sequence(pair, 2, switch_every=100)
    alone = envs.make("mujoco/Humanoid-v5", 2)
    assert runner.action_spec.low.tolist() == [-1.0] * 17
    runner.reset(), alone.reset()
    action = torch.rand(2, 17) * 2 - 1
    assert torch.equal(runner.step(action).reward, alone.step(action * torch.tensor(0.4)).reward)


def test_games_share_the_full_set_of_buttons():
    runner = make_sequence(["atari/Pong", "atari/Boxing"], 1, switch_every=3)
    assert runner.action_spec.count == 18
    assert make_sequence(["atari/Pong"], 1, switch_every=3).action_spec.count == 6
    runner.reset()
    told = play(runner, 4)
    assert [bool(step.truncated) for step in told] == [False, False, True, False]


def test_discrete_actions_that_a_task_lacks_are_its_action_0():
    runner = make_sequence(["gym/Acrobot-v1", "gym/CartPole-v1"], 2, switch_every=2)
    cartpole = envs.make("gym/CartPole-v1", 2, row_seeds=[3, 4])
    assert runner.action_spec.count == 3
    assert runner.observation_spec.shape == (6,)
    runner.reset()
    runner.step(torch.tensor([2, 2]))
    cartpole.reset()
    inner = runner._runners[runner.segment.environment]
    inner.load_state_dict(cartpole.state_dict())
    mine, other = runner.step(torch.tensor([2, 1])), cartpole.step(torch.tensor([0, 1]))
    assert torch.equal(mine.final_obs[:, :4], other.final_obs)


def test_a_shuffle_is_fixed_and_its_change_cuts():
    first, second = (Segment("gym/CartPole-v1", shuffle=seed) for seed in (1, 2))
    runner = make_sequence([first, second, first], 1, switch_every=5)
    plain = envs.make("gym/CartPole-v1", 1)
    obs, raw = runner.reset().clone(), plain.reset().clone()
    assert sorted(obs.abs()[0].tolist()) == sorted(raw.abs()[0].tolist())
    assert not torch.equal(obs, raw)
    told = play(runner, 10)
    assert [bool(step.truncated) for step in told] == [False] * 4 + [True] + [False] * 4 + [True]
    assert len({str(s) for s in runner.segments}) == 2


@pytest.mark.parametrize("until", [3, 7, 25])
def test_resume_is_exact_across_switches(until):
    slow = Segment("mujoco/Hopper-v5", model={"gravity": 0.5})
    make_it = lambda: make_sequence([slow, "mujoco/Hopper-v5", SWING], 2, seed=3, switch_every=20)  # noqa: E731
    runner, again = make_it(), make_it()
    runner.reset()
    play(runner, until)
    buffer = io.BytesIO()
    torch.save(runner.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for mine, other in zip(play(runner, 60, seed=9), play(again, 60, seed=9), strict=True):
        for name in envs.Step.__dataclass_fields__:
            assert torch.equal(getattr(mine, name), getattr(other, name)), name
    assert runner.switches == again.switches
    with pytest.raises(ValueError, match="the saved sequence is not"):
        make_sequence([SWING], 2, switch_every=20).load_state_dict(runner.state_dict())


@pytest.mark.parametrize(
    ("segments", "how", "message"),
    [
        ([], {"switch_every": 1}, "at least one segment"),
        ([SWING], {}, "switch_every .steps. or switch_episodes"),
        ([SWING], {"switch_every": 1, "switch_episodes": 1}, "only one"),
        ([SWING], {"switch_every": 0}, "at least 1, got 0"),
        ([SWING, "gym/CartPole-v1"], {"switch_every": 1}, "cannot share an agent: discrete and continuous"),
        (["atari/Pong", "gym/CartPole-v1"], {"switch_every": 1}, "cannot share an agent: observations of shape"),
        ([Segment("gym/CartPole-v1", model={"mass": 2.0})], {"switch_every": 1}, "no MuJoCo model"),
        ([Segment("atari/Pong", shuffle=1)], {"switch_every": 1}, "only vectors can be shuffled"),
    ],
)
def test_what_makes_no_sequence_is_refused(segments, how, message):
    with pytest.raises(ValueError, match=message):
        make_sequence(segments, 1, **how)


def test_a_segment_checks_its_names():
    with pytest.raises(ValueError, match="unknown environment"):
        Segment("mujoco/Hoper-v5")
    with pytest.raises(ValueError, match="no factor 'weight'"):
        Segment("mujoco/Hopper-v5", model={"weight": 1.0})


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_name_environments_that_exist(name):
    first, other = SCHEDULES[name](0), SCHEDULES[name](0)
    assert first == other
    assert len(first.segments) >= 2
    assert first.switch_every >= 10_000


def test_several_ids_are_a_sequence():
    runner = envs.make(
        ["dmc/walker-walk", "dmc/cartpole-swingup", "dmc/walker-walk"], 2, switch_every=4, time_limit=0.5
    )
    assert runner.task_names == ["dmc/walker-walk", "dmc/cartpole-swingup"]
    assert runner.task_of == [0, 1, 0]
    assert [segment.settings for segment in runner.segments] == [{"time_limit": 0.5}] * 3
    for ids, message in (
        (["gym/CartPole-v1"] * 2, "at least two tasks that differ"),
        (["gym/CartPole-v1", "sequence/seq-ale"], "sequence/seq-ale is a sequence of tasks itself"),
        (["gym/CartPole-v1", "gym/Acrobot-v1"], "needs switch_every"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.make(ids, **({"switch_every": 4} if "differ" in message else {}))


def test_a_task_alone_looks_as_it_does_in_its_sequence():
    changed = Segment("gym/CartPole-v1", shuffle=3)
    sequence = make_sequence(["gym/Acrobot-v1", changed, SWING_LEFT], 2, seed=5, switch_every=4)
    for task in range(3):
        alone = sequence.alone(task, 3, seed=9)
        assert (alone.observation_spec, alone.action_spec) == (sequence.observation_spec, sequence.action_spec)
        assert alone.task_names == [sequence.task_names[task]]
        inner = envs.make(sequence.tasks[task].env_id, 3, seed=9)
        obs, plain = alone.reset(), inner.reset()
        order, signs = (alone._order, alone._signs) if task == 1 else (slice(None), 1.0)
        for _ in range(20):
            assert torch.equal(obs[:, : plain.shape[1]], plain[:, order] * signs)
            assert (obs[:, plain.shape[1] :] == 0).all()
            obs, plain = (
                alone.step(torch.ones(3, dtype=torch.int64)).obs,
                inner.step(torch.ones(3, dtype=torch.int64)).obs,
            )
        assert len(alone.switches) == 1
    assert sequence.alone(1, 1, seed=0).segment == changed


def test_a_model_alone_is_the_changed_one():
    heavy = Segment("dmc/cartpole-swingup", {"time_limit": 0.1}, model={"mass": 3.0})
    alone = make_sequence([SWING, heavy], 1, switch_every=10).alone(1, 1, seed=2, without=("time_limit",))
    assert alone.segment.settings == {}
    same = make_sequence([Segment("dmc/cartpole-swingup", model={"mass": 3.0})], 1, seed=2, switch_every=100)
    unchanged = envs.make("dmc/cartpole-swingup", 1, seed=2)
    for runner in (alone, same, unchanged):
        runner.reset()
    seen = [[step.obs for step in play(runner, 20)] for runner in (alone, same, unchanged)]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not torch.equal(seen[0][-1], seen[2][-1])


def test_slippery_ant_draws_its_frictions_from_the_seed():
    frictions = [[s.model["friction"] for s in SCHEDULES["slippery-ant"](seed).segments] for seed in (0, 1)]
    assert frictions[0] != frictions[1]
    assert len(frictions[0]) == 10
    assert 0.02 <= np.min(frictions) < np.max(frictions) <= 2.0


def test_a_published_schedule_has_an_id_of_its_own():
    runner = envs.make("sequence/shuffled-cartpole", 2, seed=3, switch_every=6)
    runner.reset()
    action = torch.zeros(2, dtype=torch.int64)
    for _ in range(6):
        runner.step(action)
    assert [(switch.step, switch.index) for switch in runner.switches] == [(0, 0), (6, 1), (12, 2)]
    assert runner.spec.env_id.startswith("gym/CartPole-v1")
    other = envs.make("sequence/shuffled-cartpole", 2, seed=4, schedule_seed=1)
    assert other.segments[1].shuffle == 1001
    assert other.switch_every == 10_000
    with pytest.raises(
        ValueError, match="has no setting 'switch'; it has switch_every, switch_episodes, schedule_seed"
    ):
        envs.make("sequence/shuffled-cartpole", switch=3)
    with pytest.raises(ValueError, match="unknown environment 'sequence/slippery-ants'"):
        envs.make("sequence/slippery-ants")
