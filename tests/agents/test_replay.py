"""The replay ring against a plain list of transitions."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from agents.replay import Replay, fading_quantiles
from envs import ObservationSpec, Step
from tests.agents.fakes import BOX, BUTTONS, CPU, FRAMES, VECTOR, make_step, stream


def make_replay(capacity=64, num_envs=1, observation_spec=VECTOR, action_spec=BOX, seed=0, fading=False) -> Replay:
    return Replay(capacity, num_envs, observation_spec, action_spec, CPU, stream(seed), fading)


class Story:
    """Plays numbered observations into a replay and keeps every transition in a list, as the plain reference.

    Observation k of row n is filled with 1000 n + k, so a transition is recognised by its first value.
    """

    def __init__(self, replay: Replay, num_envs: int):
        self.replay, self.num_envs, self.clock = replay, num_envs, 0
        self.obs = self.fresh()
        self.transitions: list[dict[int, tuple]] = [{} for _ in range(num_envs)]

    def fresh(self) -> torch.Tensor:
        self.clock += 1
        rows = 1000.0 * torch.arange(self.num_envs) + self.clock
        return rows[:, None].expand(-1, 3).clone()

    def play(self, terminated: list[bool], truncated: list[bool]) -> None:
        ended = torch.tensor(terminated) | torch.tensor(truncated)
        successor = self.fresh()
        following = torch.where(ended[:, None], self.fresh(), successor)
        reward = self.obs[:, 0] % 1000 / 10
        step = make_step(following, reward, torch.tensor(terminated), torch.tensor(truncated), successor)
        self.replay.add(self.obs, self.obs[:, :2] / 10, step)
        for row in range(self.num_envs):
            self.transitions[row][int(self.obs[row, 0])] = (
                float(reward[row]), int(successor[row, 0]), terminated[row], bool(ended[row])
            )  # fmt: skip
        self.obs = following

    def n_step(self, row: int, start: int, discount: float, n: int) -> tuple[float, int, bool, float]:
        """Return, bootstrap observation, terminated and bootstrap factor by walking the list."""
        return_, factor, at = 0.0, 1.0, start
        for _ in range(n):
            reward, successor, terminated, ended = self.transitions[row][at]
            return_ += factor * reward
            factor *= discount
            if ended or successor not in self.transitions[row]:
                break
            at = successor
        return return_, successor, terminated, factor


FLAGS = st.tuples(st.booleans(), st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    num_envs=st.integers(1, 3),
    n_step=st.integers(1, 4),
    slots=st.integers(4, 40),
    steps=st.lists(st.lists(FLAGS, min_size=3, max_size=3), min_size=1, max_size=60),
)
def test_every_sampled_transition_is_one_that_happened(num_envs, n_step, slots, steps):
    replay = make_replay(capacity=slots * num_envs, num_envs=num_envs)
    story = Story(replay, num_envs)
    for flags in steps:
        story.play([f[0] for f in flags[:num_envs]], [f[1] for f in flags[:num_envs]])
    batch = replay.sample(32, discount=0.9, n_step=n_step)
    for i in range(32):
        start = int(batch.obs[i, 0])
        row = start // 1000
        return_, successor, terminated, factor = story.n_step(row, start, 0.9, n_step)
        assert batch.reward[i].item() == pytest.approx(return_, rel=1e-5)
        assert int(batch.next_obs[i, 0]) == successor
        assert bool(batch.terminated[i]) is terminated
        assert batch.discount[i].item() == pytest.approx(factor, rel=1e-5)
        torch.testing.assert_close(batch.action[i], batch.obs[i, :2] / 10)


def saved_and_read(replay: Replay) -> dict:
    file = io.BytesIO()
    torch.save(replay.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=80, deadline=None)
@given(
    num_envs=st.integers(1, 3),
    stack=st.sampled_from([1, 4]),
    slots=st.integers(6, 24),
    story=st.lists(st.tuples(st.sampled_from(["go on"] * 8 + ["clear", "restore"]), st.integers(0, 7)), max_size=70),
)
def test_what_may_be_drawn_is_what_is_stored_and_no_more(num_envs, stack, slots, story):
    """All that came since the last `clear`, in slots that are not written next and with all their frames."""
    spec = ObservationSpec((stack, 1, 1), torch.uint8, stack)
    replay = make_replay(slots * num_envs, num_envs, spec, BUTTONS)
    position, start = [0] * num_envs, [0] * num_envs
    added: list[list[tuple[int, int]]] = [[] for _ in range(num_envs)]
    obs, never = torch.zeros(num_envs, stack, 1, 1, dtype=torch.uint8), torch.zeros(num_envs, dtype=torch.bool)
    for t, (event, ends) in enumerate(story):
        if event == "clear":
            replay.clear()
            start = list(position)
        if event == "restore":
            before, replay = replay, make_replay(slots * num_envs, num_envs, spec, BUTTONS, seed=1)
            for _ in range(ends * slots // 4):  # into a replay that has a past, or none
                replay.add(obs, torch.zeros(num_envs, dtype=torch.int64), make_step(obs))
            replay.load_state_dict(saved_and_read(before))
            if not replay.is_empty:
                assert torch.equal(replay._draw(50), before._draw(50))
            assert torch.equal(replay.is_transition, before.is_transition)
        ended = torch.tensor([bool(ends >> env & 1) for env in range(num_envs)])
        replay.add(obs, torch.full((num_envs,), t), make_step(obs, 0.0, ended, never, obs))
        for env in range(num_envs):
            added[env].append((position[env], t))
            position[env] += 1 + int(ended[env])
        reachable = [
            (env, number)
            for env in range(num_envs)
            for at, number in added[env]
            if at >= start[env] and position[env] - 1 - at < slots - stack
        ]
        drawn = replay._draw(2_000)
        assert {(row // slots, int(replay.action[row])) for row in drawn.tolist()} == set(reachable)
        assert replay.count.sum() == len(reachable)


def test_one_row_of_one_transition():
    replay = make_replay()
    story = Story(replay, 1)
    for _ in range(40):
        story.play([True], [False])
        assert replay.sample(1, 0.9).terminated.tolist() == [True]


def test_all_transitions_are_equally_likely():
    """Half of the slots are boundaries here: every episode has one step."""
    replay = make_replay(capacity=40)
    story = Story(replay, 1)
    for _ in range(10):
        story.play([True], [False])
    for _ in range(5):
        story.play([False], [False])
    counts = torch.zeros(100)
    for _ in range(100):
        counts += torch.bincount(replay.sample(300, 0.99).obs[:, 0].long(), minlength=100)
    seen = counts[counts > 0]
    assert len(seen) == 15
    # 30 000 draws over 15: 2 000 each, standard deviation 43; five of them
    assert (seen - 2000).abs().max() < 216


@pytest.mark.parametrize("steps", [150, 450])
def test_fading_samples_by_age_within_each_environment(steps):
    """Before and after the ring is full: shares as in Symphony's table, never a row that is no transition."""
    replay = make_replay(600, num_envs=2, fading=True)
    story = Story(replay, 2)
    for t in range(steps):
        story.play([t % 50 == 0, False], [False, False])
    rows = torch.cat([replay.sample(2_000, 0.99).obs[:, 0] for _ in range(50)])
    drawn = torch.bincount(rows.long(), minlength=2_000).double() / len(rows)
    for row in (0, 1):
        count = int(replay.is_transition.view(2, -1)[row].sum())
        own = drawn[torch.tensor(list(story.transitions[row])[-count:])]
        assert own.sum().item() == pytest.approx(0.5, abs=0.01)
        newest, oldest = own[len(own) // 2 :].sum(), own[: len(own) // 4].sum()
        assert (newest / own.sum()).item() == pytest.approx(0.6706, abs=0.012)
        assert (oldest / own.sum()).item() == pytest.approx(0.045, abs=0.006)


def test_quantiles_of_fading():
    """Mass of the newest fractions, specs/symphony.md, section 7.1."""
    quantiles = fading_quantiles()
    masses = {0.01: 0.0134, 0.05: 0.06702, 0.1: 0.13404, 0.25: 0.33511, 0.5: 0.67015, 0.75: 0.95486, 0.9: 0.99845}
    for newest, mass in masses.items():
        assert (quantiles >= 1 - newest).double().mean().item() == pytest.approx(mass, abs=3e-5)


def add_to_each(together: Replay, alone: list[Replay], t: int) -> None:
    """A step of two environments to a population and to its seeds; no two seeds see or do the same."""
    steps = []
    for index, replay in enumerate(alone):
        obs = torch.full((2, 3), t + 100.0 * index)
        steps.append((obs, obs[:, :2] / 10, make_step(obs, 1.0, terminated=(t + index) % 9 == 0)))
        replay.add(*steps[-1])
    obs, action = (torch.stack([each[field] for each in steps]) for field in (0, 1))
    fields = {name: torch.stack([getattr(step, name) for *_, step in steps]) for name in Step.__slots__}
    together.add(obs, action, Step(**fields))


def test_fading_population_draws_what_its_seeds_draw():
    together = make_replay(100, 2, seed=[3, 4], fading=True)
    alone = [make_replay(100, 2, seed=seed, fading=True) for seed in (3, 4)]
    for t in range(70):
        add_to_each(together, alone, t)
    batch = together.sample(30, 0.99)
    for index, replay in enumerate(alone):
        assert torch.equal(batch.obs[index], replay.sample(30, 0.99).obs)


def test_an_old_transition_leaves_when_the_ring_is_full():
    replay = make_replay(capacity=10)
    story = Story(replay, 1)
    for _ in range(50):
        story.play([False], [False])
    seen = set(replay.sample(2000, 0.99).obs[:, 0].int().tolist())
    # 10 slots: 9 transitions and the observation that waits for its action; the story counts by two
    assert seen == set(range(82, 100, 2))


def test_truncated_rows_bootstrap_from_the_true_last_observation():
    replay = make_replay()
    first, last, restart = torch.full((1, 3), 1.0), torch.full((1, 3), 2.0), torch.full((1, 3), 9.0)
    replay.add(first, torch.zeros(1, 2), make_step(restart, 5.0, truncated=True, final_obs=last))
    batch = replay.sample(4, 0.9)
    assert batch.next_obs[:, 0].tolist() == [2.0] * 4
    assert not batch.terminated.any()


def play_frames(replay: Replay, episodes: list[int], channels: int = 1) -> list[torch.Tensor]:
    """Episodes of the given lengths with frames numbered 1, 2, ...; returns the stacks that the environment showed."""
    shown, number = [], 0

    def frame() -> torch.Tensor:
        nonlocal number
        number += 1
        return torch.full((channels, 36, 36), number, dtype=torch.uint8)

    def first() -> torch.Tensor:
        return torch.cat([torch.zeros(3 * channels, 36, 36, dtype=torch.uint8), frame()])[None]

    stack = first()
    for length in episodes:
        for t in range(length):
            shown.append(stack)
            successor = torch.cat([stack[0, channels:], frame()])[None]
            ended = t == length - 1
            following = first() if ended else successor
            replay.add(stack, torch.zeros(1, dtype=torch.int64), make_step(following, 0.0, ended, False, successor))
            stack = following
    return shown


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("capacity", [200, 23])
def test_frame_stacks_are_rebuilt_as_they_were_shown(capacity, channels):
    """Also at episode starts (zeros) and, in the full ring of 23, without frames that were overwritten."""
    spec = ObservationSpec((4 * channels, *FRAMES.shape[1:]), FRAMES.dtype, FRAMES.stacked_frames)
    replay = make_replay(capacity, observation_spec=spec, action_spec=BUTTONS)
    shown = {int(stack[0, -1, 0, 0]): stack[0] for stack in play_frames(replay, [1, 2, 3, 7, 30, 2, 5], channels)}
    batch = replay.sample(400, 0.99)
    newest = batch.obs[:, -1, 0, 0].tolist()
    assert len(set(newest)) > 10
    for i, number in enumerate(newest):
        assert torch.equal(batch.obs[i], shown[number])
        # the successor's stack: the same frames moved by one
        assert torch.equal(batch.next_obs[i, :-channels], batch.obs[i, channels:])


@pytest.mark.parametrize("grayscale", [True, False])
def test_stacks_of_a_game_with_lives_come_back_as_the_policy_saw_them(grayscale):
    """Every stored transition of Breakout, over lost lives, truncations and ends."""
    lives = {"life_loss_terminates": True, "grayscale": grayscale, "image_size": 40, "max_frames": 400}
    runner = envs.make("atari/Breakout", 1, 0, **lives)
    replay = Replay(400, 1, runner.observation_spec, runner.action_spec, CPU, stream(0))
    shown, obs = [], runner.reset().clone()
    for action in torch.randint(4, (300, 1), generator=torch.Generator().manual_seed(1)):
        step = runner.step(action)
        replay.add(obs, action, step)
        shown.append((obs[0], action[0], step.reward[0].clone(), step.terminated[0].clone(), step.final_obs[0].clone()))
        obs = step.obs.clone()
    batch = replay.gather(torch.nonzero(replay.is_transition).flatten(), 0.99)
    fields = batch.obs, batch.action, batch.reward, batch.terminated, batch.next_obs
    for stored, seen in zip(fields, zip(*shown, strict=True), strict=True):
        assert torch.equal(stored, torch.stack(seen))
    assert batch.terminated.sum() >= 4


def test_memory_is_the_raw_arrays_and_no_more():
    """Within 5 % of one observation, action, reward and two flags for each slot (specs: speed and memory)."""
    replay = make_replay(10_000, observation_spec=ObservationSpec((17,)))
    raw = 10_000 * (17 * 4 + 2 * 4 + 4 + 1 + 1)
    owned = [t for t in vars(replay).values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in owned) <= 1.05 * raw


def test_restored_replay_samples_the_same_batches():
    replay, other = make_replay(30, 2, seed=1), make_replay(30, 2, seed=2)
    story = Story(replay, 2)
    for k in range(25):
        story.play([k % 4 == 3, False], [False, k % 7 == 6])
    replay.sample(8, 0.99)
    other.load_state_dict(saved_and_read(replay))
    story.play([False, False], [False, False])
    step_obs = story.obs
    other.add(*last_added(replay, story, step_obs))
    for _ in range(3):
        ours, theirs = replay.sample(16, 0.99, 3), other.sample(16, 0.99, 3)
        for name in ("obs", "action", "reward", "next_obs", "terminated", "discount"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def last_added(replay: Replay, story: Story, successor: torch.Tensor):
    at = torch.arange(replay.num_envs) * replay.slots + (replay.head - 1) % replay.slots
    step = make_step(successor, replay.reward[at], replay.terminated[at])
    return replay.frame[at].clone(), replay.action[at].clone(), step


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="replay capacity must be at least 6"):
        make_replay(5, num_envs=2)
    with pytest.raises(ValueError, match=r"a replay has less than 2147483648 slots, .* got 3000000000"):
        make_replay(3_000_000_000)
    with pytest.raises(ValueError, match="n_step must be at least 1"):
        make_replay().sample(4, 0.99, n_step=0)
    small, large = make_replay(20), make_replay(40)
    story = Story(large, 1)
    for _ in range(39):
        story.play([False], [False])
    with pytest.raises(ValueError, match="saved replay 'frame' has shape"):
        small.load_state_dict(large.state_dict())


@settings(max_examples=60, deadline=None)
@given(
    num_envs=st.integers(1, 3),
    fading=st.booleans(),
    slots=st.integers(16, 40),
    before=st.lists(st.lists(FLAGS, min_size=3, max_size=3), max_size=60),
    after=st.lists(st.lists(FLAGS, min_size=3, max_size=3), min_size=12, max_size=60),
)
def test_a_cleared_replay_samples_only_what_came_after(num_envs, fading, slots, before, after):
    """In rings that were full or not, and are full again or not; rows do not have equally many boundaries."""
    replay = make_replay(capacity=slots * num_envs, num_envs=num_envs, fading=fading)
    story = Story(replay, num_envs)
    for flags in before:
        story.play([f[0] for f in flags[:num_envs]], [f[1] for f in flags[:num_envs]])
    replay.clear()
    first = story.obs[:, 0].long().tolist()
    for flags in after:
        story.play([f[0] for f in flags[:num_envs]], [f[1] for f in flags[:num_envs]])
    batch = replay.sample(64, 0.9, n_step=2)
    for i in range(64):
        start = int(batch.obs[i, 0])
        row = start // 1000
        assert start >= first[row]
        return_, successor, terminated, _ = story.n_step(row, start, 0.9, 2)
        assert batch.reward[i].item() == pytest.approx(return_, rel=1e-5)
        assert (int(batch.next_obs[i, 0]), bool(batch.terminated[i])) == (successor, terminated)


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("before", [0, 3, 7, 20])
def test_after_clear_all_new_transitions_are_equally_likely(before, num_envs):
    replay = make_replay(capacity=12 * num_envs, num_envs=num_envs)
    story = Story(replay, num_envs)
    for k in range(before):
        story.play([k % 3 == 2, False][:num_envs], [False] * num_envs)
    assert replay.is_empty == (before == 0)
    replay.clear()
    assert replay.is_empty
    first = story.obs[:, 0].long().tolist()
    for _ in range(4):
        story.play([True, False][:num_envs], [False] * num_envs)
    counts = torch.bincount(torch.cat([replay.sample(300, 0.99).obs[:, 0] for _ in range(80)]).long(), minlength=1100)
    seen = counts.nonzero().flatten().tolist()
    new = [key for row in range(num_envs) for key in story.transitions[row] if key >= first[row]]
    assert seen == sorted(new)
    assert len(new) == 4 * num_envs
    share = 1 / len(new)
    deviation = math.sqrt(24_000 * share * (1 - share))
    assert (counts[seen] - 24_000 * share).abs().max() < 5 * deviation


def test_a_cleared_replay_is_saved_and_a_population_clears_all_its_seeds():
    together, alone = make_replay(60, 2, seed=[3, 4]), [make_replay(60, 2, seed=seed) for seed in (3, 4)]
    for t in range(40):
        add_to_each(together, alone, t)
        for replay in (together, *alone) if t == 24 else ():
            replay.clear()
    restored = make_replay(60, 2, seed=9)
    restored.load_state_dict(together.state_dict(1))
    batch, again = together.sample(50, 0.99), restored.sample(50, 0.99)
    assert torch.equal(batch.obs[1], again.obs)
    assert (batch.obs.amin((1, 2)) >= torch.tensor([25, 125])).all()
    for index, replay in enumerate(alone):
        assert torch.equal(batch.obs[index], replay.sample(50, 0.99).obs)
