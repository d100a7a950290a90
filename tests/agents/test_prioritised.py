"""Prioritised replay: the sum tree against plain sums, what is drawn against exact probabilities, exact resuming."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import prioritised
from agents.prioritised import PrioritisedReplay, SumTree
from agents.replay import Replay
from envs import Step
from tests.agents.fakes import BOX, BUTTONS, CPU, FRAMES, VECTOR, make_step, stream
from tests.agents.test_replay import Story, play_frames


def make_replay(capacity=64, num_envs=1, spec=VECTOR, actions=BOX, seed=0, exponent=0.5, smallest=0.0):
    return PrioritisedReplay(capacity, num_envs, spec, actions, CPU, stream(seed), exponent, smallest)


def leaves(replay: PrioritisedReplay, seed: int = 0) -> torch.Tensor:
    """Priorities of all slots, [N, T]."""
    count = replay.num_envs * replay.slots
    return replay.tree.levels[-1][seed].flatten()[:count].view(replay.num_envs, replay.slots)


CHANGES = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.floats(0, 10, width=32)), min_size=1, max_size=5), min_size=1, max_size=8
)


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 100), trees=st.integers(1, 3), branches=st.sampled_from([2, 3, 7, 32]), changes=CHANGES)
def test_sums_and_shares_are_those_of_a_plain_list(size, trees, branches, changes):
    """Trees of one to seven levels, sizes that fill no level; each tree has its own numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prioritised, "BRANCHES", branches)
        tree = SumTree(trees, size, CPU)
        plain = np.zeros((trees, size))
        for change in changes:
            rows = torch.tensor([[(row + k) % size for row, _ in change] for k in range(trees)])
            values = torch.tensor([[value * (k + 1) for _, value in change] for k in range(trees)], dtype=torch.float64)
            distinct = [len(set(some)) == len(some) for some in rows.tolist()]
            if not all(distinct):
                continue
            tree.set(rows, values)
            for k in range(trees):
                plain[k, rows[k].numpy()] = values[k].numpy()
        np.testing.assert_allclose(tree.total.numpy(), plain.sum(1), rtol=1e-12)
        np.testing.assert_array_equal(tree.levels[-1].flatten(1)[:, :size].numpy(), plain)
        shares = torch.linspace(0, 1 - 2**-53, 41, dtype=torch.float64).expand(trees, -1)
        rows, values = tree.find(shares)
        for k in range(trees):
            if not plain[k].any():
                continue
            np.testing.assert_array_equal(values[k].numpy(), plain[k][rows[k].numpy()])
            assert (values[k] > 0).all()
            until = plain[k].cumsum()
            for share, row in zip(shares[k].tolist(), rows[k].tolist(), strict=True):
                sought, slack = share * until[-1], 1e-9 * until[-1]
                assert until[row] - plain[k][row] - slack <= sought <= until[row] + slack


def test_draws_follow_the_priorities_exactly():
    """P(i) = |δ_i|^α / Σ; two environments, a wrapped ring, 40 000 draws."""
    replay = make_replay(40, num_envs=2)
    story = Story(replay, 2)
    for t in range(33):
        story.play([t % 5 == 0, False], [False, t % 7 == 0])
    errors = torch.rand(2, replay.slots, generator=torch.Generator().manual_seed(0)) * 3
    rows = torch.arange(2 * replay.slots)
    usable = replay.is_transition
    replay.drawn = rows[usable][None]
    replay.set_priorities(errors.flatten()[usable])
    expected = torch.where(usable, errors.flatten() ** 0.5, 0.0).double()
    torch.testing.assert_close(leaves(replay).flatten(), expected)
    expected /= expected.sum()
    counts = torch.zeros(len(rows))
    for _ in range(100):
        counts += torch.bincount(replay._draw(400), minlength=len(rows))
    assert counts[~usable].sum() == 0
    # Stratified draws vary less than independent ones, whose standard deviation this is.
    deviation = (40_000 * expected * (1 - expected)).sqrt()
    assert ((counts - 40_000 * expected).abs() <= 4 * deviation).all()


def test_importance_weights():
    replay = make_replay(10, exponent=1.0)
    story = Story(replay, 1)
    for _ in range(3):
        story.play([False], [False])
    replay.drawn = torch.tensor([[0, 1, 2]])
    replay.set_priorities(torch.tensor([4.0, -1.0, 2.0]))
    batch = replay.sample(7, 0.9)
    # Seven equal parts of 4 + 1 + 2: each row comes as often as its priority says.
    assert replay.drawn.tolist() == [[0, 0, 0, 0, 1, 2, 2]]
    assert torch.equal(batch.obs, replay.frame[replay.drawn[0]])
    # (N P)^-β, divided by the largest of the batch, which is of priority 1
    expected = torch.tensor([0.5, 1.0, 0.5**0.5])[replay.drawn[0]]
    torch.testing.assert_close(replay.importance_weights(0.5), expected)
    assert replay.importance_weights(0.0).tolist() == [1.0] * 7


def test_a_new_transition_has_the_largest_priority_that_there_ever_was():
    replay = make_replay(10, exponent=0.5)
    story = Story(replay, 1)
    story.play([False], [False])
    assert leaves(replay)[0, 0] == 1
    replay.sample(2, 0.9)
    replay.set_priorities(torch.tensor([9.0, 9.0]))
    replay.sample(2, 0.9)
    replay.set_priorities(torch.tensor([0.25, 0.25]))
    story.play([True], [False])
    story.play([False], [False])
    # The terminal transition's successor, slot 2, is none, nor is the observation that waits in slot 4.
    assert leaves(replay)[0].tolist()[:5] == [0.5, 3.0, 0.0, 3.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(
    slots=st.integers(4, 25),
    steps=st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=2), min_size=1, max_size=60),
)
def test_what_may_be_drawn_is_what_uniform_replay_may_draw(slots, steps):
    """And multi-step returns are those of a plain list; the ring wraps."""
    replay = make_replay(2 * slots, num_envs=2)
    story = Story(replay, 2)
    for flags in steps:
        story.play([f[0] for f in flags], [f[1] for f in flags])
    assert torch.equal(leaves(replay).flatten() > 0, replay.is_transition)
    assert replay.tree.total[0] == replay.is_transition.sum()
    batch = replay.sample(16, discount=0.9, n_step=3)
    for i in range(16):
        start = int(batch.obs[i, 0])
        return_, successor, terminated, factor = story.n_step(start // 1000, start, 0.9, 3)
        assert batch.reward[i].item() == pytest.approx(return_, rel=1e-5)
        assert int(batch.next_obs[i, 0]) == successor
        assert bool(batch.terminated[i]) is terminated
        assert batch.discount[i].item() == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize("capacity", [200, 23])
def test_frame_stacks_are_whole(capacity):
    """Rows whose frames are being overwritten are not drawn, all others are."""
    replay = make_replay(capacity, spec=FRAMES, actions=BUTTONS)
    uniform = Replay(capacity, 1, FRAMES, BUTTONS, CPU, stream(0))
    episodes = [1, 2, 3, 7, 30, 2, 5]
    shown = {int(stack[0, -1, 0, 0]): stack[0] for stack in play_frames(replay, episodes)}
    play_frames(uniform, episodes)
    ours, theirs = (torch.cat([r.sample(400, 0.99).obs for _ in range(5)]) for r in (replay, uniform))
    newest = ours[:, -1, 0, 0].tolist()
    assert set(newest) == set(theirs[:, -1, 0, 0].tolist())
    for stack, number in zip(ours, newest, strict=True):
        assert torch.equal(stack, shown[number])


def live(replay, rounds, start=0, num_envs=2, first_seed=0):
    """Adds, draws and new priorities in turn; returns what the last batches were. No two seeds see the same."""
    seen = []
    of_seeds = 100.0 * torch.arange(first_seed, first_seed + math.prod(replay.lead)).view(*replay.lead, 1, 1)
    for t in range(start, start + rounds):
        obs = torch.full((num_envs, 3), float(t)) + torch.arange(num_envs)[:, None] / 10
        step = make_step(obs + 1, float(t), terminated=t % 9 == 0)
        obs, fields = (of_seeds + obs).view(*replay.lead, num_envs, 3), {n: getattr(step, n) for n in Step.__slots__}
        fields = {name: value.expand(*replay.lead, *value.shape) for name, value in fields.items()}
        replay.add(obs, obs[..., :2], Step(**fields))
        batch = replay.sample(8, 0.99, 3)
        replay.set_priorities(batch.obs[..., 0].sin())
        seen.append((batch.obs, replay.importance_weights(0.4)))
    return seen


def test_a_population_draws_what_its_seeds_draw():
    together = make_replay(60, 2, seed=[3, 4])
    found = live(together, 50)
    for index, seed in enumerate((3, 4)):
        alone = make_replay(60, 2, seed=seed)
        for (obs, weight), (expected, its_weight) in zip(found, live(alone, 50, first_seed=index), strict=True):
            assert torch.equal(obs[index], expected)
            assert torch.equal(weight[index], its_weight)
        assert torch.equal(leaves(together, index), leaves(alone))


def test_a_seed_that_diverges_leaves_the_others_alone():
    together, alone = make_replay(60, 2, seed=[3, 4]), make_replay(60, 2, seed=4)
    for first_seed, replay in enumerate((together, alone)):
        live(replay, 20, first_seed=first_seed)
    errors = torch.rand(8, generator=torch.Generator().manual_seed(0))
    together.set_priorities(torch.stack([torch.full((8,), torch.nan), errors]))
    alone.set_priorities(errors)
    assert torch.equal(together.sample(8, 0.99).obs[1], alone.sample(8, 0.99).obs)


@pytest.mark.parametrize("seeds", [1, [1, 2]])
def test_restored_replay_goes_on_bit_for_bit(seeds):
    replay, other = make_replay(60, 2, seed=seeds), make_replay(60, 2, seed=9 if seeds == 1 else [8, 9])
    live(replay, 45)
    live(other, 7)
    for seed in range(len(replay.stream.generators)):
        saved = io.BytesIO()
        torch.save(replay.state_dict(seed), saved)
        saved.seek(0)
        other.load_state_dict(torch.load(saved, weights_only=True), seed)
    for (obs, weight), (same, its) in zip(live(replay, 20, 45), live(other, 20, 45), strict=True):
        assert torch.equal(obs, same)
        assert torch.equal(weight, its)


def test_a_state_without_priorities_or_of_another_size_is_refused():
    uniform = Replay(60, 2, VECTOR, BOX, CPU, stream(0))
    with pytest.raises(ValueError, match="has no priorities that fit"):
        make_replay(60, 2).load_state_dict(uniform.state_dict())
    with pytest.raises(ValueError, match="has no priorities that fit"):
        make_replay(3000, 2).load_state_dict(make_replay(60, 2).state_dict())


def test_a_cleared_replay_draws_only_what_came_after():
    replay = make_replay(30, 2)
    story = Story(replay, 2)
    for t in range(25):
        story.play([t % 4 == 3, False], [False, False])
        replay.sample(4, 0.99)
        replay.set_priorities(torch.full((4,), 50.0))
    replay.clear()
    first = story.obs[:, 0]
    for _ in range(3):
        story.play([False, True], [False, False])
    drawn = replay.sample(400, 0.99).obs[:, 0].unique()
    new = [key for row in (0, 1) for key in story.transitions[row] if key >= first[row]]
    assert drawn.tolist() == sorted(new)
    assert leaves(replay)[leaves(replay) > 0].tolist() == [1.0] * 6
