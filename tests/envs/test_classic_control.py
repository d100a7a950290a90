"""Native classic control: equal to Gymnasium's own environments, at one row and at many."""

from __future__ import annotations

import io

import gymnasium
import numpy as np
import pytest
import torch

import envs
from envs import classic_control, gymnasium_vector
from envs.classic_control import ClassicControl
from envs.runner import DiscreteActionSpec, Step
from envs.tasks.classic_control import TASKS, many_rows, one_row

# With these settings episodes are cut off, without any they terminate, Pendulum's excepted.
CASES = [
    ("gym/CartPole-v1", {}),
    ("gym/CartPole-v1", {"sutton_barto_reward": True, "max_episode_steps": 15}),
    ("gym/Pendulum-v1", {}),
    ("gym/Pendulum-v1", {"g": 9.81, "max_episode_steps": 70}),
    ("gym/MountainCar-v0", {}),
    ("gym/MountainCar-v0", {"goal_velocity": 0.02, "max_episode_steps": 90}),
    ("gym/MountainCarContinuous-v0", {}),
    ("gym/MountainCarContinuous-v0", {"goal_velocity": 0.01, "max_episode_steps": 150}),
    ("gym/Acrobot-v1", {}),
    ("gym/Acrobot-v1", {"max_episode_steps": 60}),
]
IDS = list(TASKS)


def draw_actions(runner: envs.Runner, steps: int, seed: int = 0) -> torch.Tensor:
    """Each action is held for some steps, so that cars and links gain speed."""
    generator = torch.Generator().manual_seed(seed)
    spec = runner.action_spec
    if isinstance(spec, DiscreteActionSpec):
        drawn = torch.randint(spec.count, (steps, runner.num_envs), generator=generator)
        held = 4
    else:
        low, high = torch.from_numpy(spec.low), torch.from_numpy(spec.high)
        drawn = low + (high - low) * torch.rand(steps, runner.num_envs, 1, generator=generator)
        drawn[::5] = drawn[::5].sign() * high  # bounds included
        held = 20
    return drawn[torch.arange(steps) // held * held] if runner.spec.env_id != "gym/CartPole-v1" else drawn


def pump(runner: envs.Runner, obs: torch.Tensor) -> torch.Tensor:
    """The action that adds energy: along the speed of the car, or of the second link."""
    faster = obs[:, {"gym/Acrobot-v1": 5}.get(runner.spec.env_id, 1)] > 0
    return 2 * faster.long() if isinstance(runner.action_spec, DiscreteActionSpec) else 2.0 * faster[:, None] - 1.0


def clone(step: Step) -> dict[str, torch.Tensor]:
    return {name: getattr(step, name).clone() for name in Step.__slots__}


def assert_equal_steps(left: Step, right: Step) -> None:
    for name in Step.__slots__:
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize(("env_id", "settings"), CASES)
@pytest.mark.parametrize("rows", [1, 3])
def test_equal_to_gymnasium(env_id, settings, rows):
    """Observations and rewards bit for bit, over 1 500 steps and the ends of episodes."""
    seeds = list(range(20, 20 + rows))
    runner = envs.make(env_id, rows, row_seeds=seeds, **settings)
    assert isinstance(runner, ClassicControl)
    plain = [gymnasium.make(env_id.removeprefix("gym/"), **settings) for _ in seeds]
    first = [env.reset(seed=seed)[0] for env, seed in zip(plain, seeds, strict=True)]
    assert np.array_equal(obs := runner.reset(), first)
    returns, lengths, ends = [0.0] * rows, [0] * rows, {"terminated": 0, "truncated": 0}
    for time, action in enumerate(draw_actions(runner, 1500)):
        if not runner.spec.env_id.startswith(("gym/CartPole", "gym/Pendulum")) and time % 800 < 600:
            action = pump(runner, obs)
        step = runner.step(action)
        obs = step.obs
        for row, env in enumerate(plain):
            taken = int(action[row]) if action.ndim == 1 else action[row].numpy()
            observation, reward, terminated, truncated, _ = env.step(taken)
            returns[row] += float(reward)
            lengths[row] += 1
            assert np.array_equal(step.final_obs[row], observation)
            assert step.reward[row].numpy() == np.float32(reward)
            assert (bool(step.terminated[row]), bool(step.truncated[row])) == (terminated, truncated)
            over = terminated or truncated
            assert bool(step.episode_ended[row]) == over
            assert int(step.episode_length[row]) == (lengths[row] if over else 0)
            assert float(step.episode_return[row]) == (np.float32(returns[row]) if over else 0.0)
            ends["terminated"] += terminated
            ends["truncated"] += truncated
            if over:
                returns[row], lengths[row] = 0.0, 0
                observation, _ = env.reset()
            assert np.array_equal(step.obs[row], observation)
    assert sum(ends.values()) >= 2 * rows
    assert ends["truncated" if settings or env_id == "gym/Pendulum-v1" else "terminated"]


@pytest.mark.parametrize("env_id", IDS)
def test_a_row_is_the_same_at_every_number_of_rows(env_id):
    alone, together = envs.make(env_id, 1, 5), envs.make(env_id, 40, 5)
    assert torch.equal(alone.reset(), together.reset()[:1])
    for action in draw_actions(together, 300):
        one, many = alone.step(action[:1]), together.step(action)
        for name in Step.__slots__:
            assert torch.equal(getattr(one, name), getattr(many, name)[:1]), name


def test_both_arithmetics_are_equal():
    numbers = np.random.default_rng(0).normal(0.0, 20.0, 2000)
    for name in ("cos", "sin", "library_cos", "library_square", "single"):
        of_one, of_many = getattr(one_row, name), getattr(many_rows, name)
        assert np.array_equal([of_one(number) for number in numbers.tolist()], of_many(numbers)), name
    assert np.array_equal([one_row.wrap(x, 3.0) for x in numbers.tolist()], many_rows.wrap(numbers, 3.0))
    assert np.array_equal([one_row.clip(x, -3.0, 9.0) for x in numbers.tolist()], many_rows.clip(numbers, -3.0, 9.0))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("env_id", IDS)
def test_resume_is_bit_equal(env_id, rows):
    settings = {"max_episode_steps": 110}
    whole = envs.make(env_id, rows, 7, **settings)
    before = whole.state_dict()
    taken = draw_actions(whole, 650)
    whole.reset()
    for action in taken[:150]:
        whole.step(action)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    resumed = envs.make(env_id, rows, 8, **settings)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    rest = []
    for action in taken[150:]:
        rest.append(clone(whole.step(action)))
        assert_equal_steps(resumed.step(action), Step(**rest[-1]))
    assert sum(step["episode_ended"].sum() for step in rest) >= rows
    resumed.load_state_dict(before)
    assert torch.equal(resumed.reset(), envs.make(env_id, rows, 7).reset())


def test_a_state_of_other_environments_is_refused():
    state = envs.make("gym/CartPole-v1", 2).state_dict()
    for runner, message in (
        (envs.make("gym/Acrobot-v1", 2), "have env_id gym/CartPole-v1, these have gym/Acrobot-v1"),
        (envs.make("gym/CartPole-v1", 2, max_episode_steps=9), "have settings"),
        (envs.make("gym/CartPole-v1", 3), "2 rows, not 3"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.load_state_dict(state)
    other = gymnasium_vector.make("gym/CartPole-v1", 2, 0, "cpu").state_dict()
    with pytest.raises(ValueError, match="of the backend of other Gymnasium environments"):
        envs.make("gym/CartPole-v1", 2).load_state_dict(other)


@pytest.mark.parametrize("rows", [1, 2])
def test_wrong_actions_are_refused(rows):
    cart_pole, pendulum = envs.make("gym/CartPole-v1", rows), envs.make("gym/Pendulum-v1", rows)
    cart_pole.reset()
    pendulum.reset()
    last = rows - 1
    for runner, action, error, message in (
        (cart_pole, torch.zeros(rows), ValueError, rf"action must be int64 \[{rows}\], got torch.float32"),
        (cart_pole, torch.zeros(rows, 1, dtype=torch.int64), ValueError, "action must be int64"),
        (cart_pole, torch.zeros(rows, dtype=torch.int64, device="meta"), ValueError, "on cpu, it is on meta"),
        (cart_pole, torch.tensor([0, 2])[-rows:], ValueError, f"row {last}: action 2 is not one of 0 to 1"),
        (cart_pole, torch.tensor([1, -1])[-rows:], ValueError, f"row {last}: action -1 is not one of 0 to 1"),
        (pendulum, torch.zeros(rows), ValueError, rf"action must be floating-point \[{rows}, 1\]"),
        (pendulum, torch.zeros(rows, 1, dtype=torch.int64), ValueError, "action must be floating-point"),
        (pendulum, torch.zeros(rows, 1, device="meta"), ValueError, "on cpu, it is on meta"),
        (
            pendulum,
            torch.tensor([[2.0], [2.1]])[-rows:],
            ValueError,
            rf"row {last}: action 2.1 is outside of \[-2, 2\]",
        ),
        (pendulum, torch.tensor([[0.0], [torch.nan]])[-rows:], FloatingPointError, f"row {last}: the action is not a"),
    ):
        for use in (runner.step, runner.send):
            with pytest.raises(error, match=message):
                use(action)
    pendulum.step(torch.full((rows, 1), 2.0005, requires_grad=True))  # rounding is no mistake


@pytest.mark.parametrize("rows", [1, 2])
def test_send_and_recv_are_a_step_and_must_alternate(rows):
    for env_id in ("gym/CartPole-v1", "gym/Pendulum-v1"):
        left, right = envs.make(env_id, rows), envs.make(env_id, rows)
        action = draw_actions(left, 1)[0]
        with pytest.raises(RuntimeError, match="reset"):
            left.send(action)
        with pytest.raises(RuntimeError, match="reset"):
            left.step(action)
        with pytest.raises(RuntimeError, match="reset"):
            left.render()
        left.reset()
        right.reset()
        with pytest.raises(RuntimeError, match="send"):
            left.recv()
        expected = clone(right.step(action))
        left.send(action)
        action.zero_()
        for wrong, arguments in ((left.send, [action]), (left.step, [action]), (left.state_dict, [])):
            with pytest.raises(RuntimeError, match="recv"):
                wrong(*arguments)
        assert_equal_steps(left.recv(), Step(**expected))


def test_float64_actions_are_rounded_as_gymnasium_rounds_them():
    for rows in (1, 2):
        left, right = envs.make("gym/Pendulum-v1", rows), envs.make("gym/Pendulum-v1", rows)
        left.reset()
        right.reset()
        action = torch.full((rows, 1), 0.1, dtype=torch.float64)
        assert_equal_steps(left.step(action), right.step(action.float()))


@pytest.mark.parametrize("env_id", IDS)
def test_pictures_are_the_library_s(env_id):
    """Of every row, after a step (Pendulum shows the torque) and at the beginning of an episode."""
    ours = envs.make(env_id, 2, 3, max_episode_steps=6)
    theirs = gymnasium_vector.make(env_id, 2, 3, "cpu", max_episode_steps=6)
    ours.reset()
    theirs.reset()
    for time, action in enumerate(draw_actions(ours, 7)):
        ours.step(action)
        theirs.step(action)
        if time in (4, 5, 6):
            for row in (0, 1):
                assert np.array_equal(ours.render(row, 120, 160), theirs.render(row, 120, 160))
    ours.close()
    one = envs.make(env_id)
    one.reset()
    assert one.render().shape == (480, 480, 3)


def test_settings_and_spaces_are_the_library_s():
    for env_id in IDS:
        spec = gymnasium.spec(env_id.removeprefix("gym/"))
        runner = envs.make(env_id)
        assert runner.spec.horizon == spec.max_episode_steps
        space = gymnasium.make(spec.id).action_space
        if isinstance(runner.action_spec, DiscreteActionSpec):
            assert runner.action_spec.count == space.n
        else:
            assert (runner.action_spec.low, runner.action_spec.high) == (space.low, space.high)
        assert runner.observation_space == gymnasium.make(spec.id).observation_space
    with pytest.raises(ValueError, match="sutton_barto_reward must be True or False, got 1"):
        envs.make("gym/CartPole-v1", sutton_barto_reward=1)
    with pytest.raises(ValueError, match="max_episode_steps must be a whole number"):
        classic_control.make("gym/CartPole-v1", 1, 0, "cpu", max_episode_steps=0)
    with pytest.raises(ValueError, match="has no setting 'poles'; it accepts max_episode_steps, row_seeds"):
        envs.make("gym/Acrobot-v1", poles=2)
