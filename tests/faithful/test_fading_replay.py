"""The Fading Replay Buffer number by number: checks 1 to 3 of specs/symphony.md, section 16, and section 7."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.fading import FadingReplay
from agents.replay import fade
from envs import ContinuousActionSpec, ObservationSpec
from tests.agents.fakes import CPU, make_step, stream

ONES = ContinuousActionSpec(np.full(1, -1.0, np.float32), np.full(1, 1.0, np.float32))


def replay(exploration: int, tiles: int, num_envs: int = 1, seeds: int | list[int] = 0, **settings) -> FadingReplay:
    return FadingReplay(exploration, tiles, num_envs, ObservationSpec((1,)), ONES, CPU, stream(seeds), **settings)


def insert(buffer: FadingReplay, value: float, terminated: bool = False, reward: float | None = None) -> None:
    """A transition whose observation is `value` and whose successor is `value` + 0.5."""
    obs = torch.tensor([[value]])
    step = make_step(obs, value if reward is None else reward, terminated, final_obs=obs + 0.5)
    buffer.add(obs, torch.zeros(1, 1), step)


def by_rank(buffer: FadingReplay) -> list[float]:
    """Observations, oldest first."""
    return buffer.gather(torch.arange(buffer.slots), 0.99).obs[:, 0].tolist()


def test_probability_of_each_rank():
    expected = [0, 0.0061687081, 0.0395716001, 0.0993766080, 0.1368757186, 0.1433529765, 0.1436606653, 0.1436645668]
    p = replay(10, 1).probability
    assert p.tolist() == pytest.approx([*expected, 0.1436645783, 0.1436645783], abs=1e-9)
    assert fade(torch.arange(10, dtype=torch.float64) / 10).sum().item() == pytest.approx(6.960658027, abs=1e-9)
    p = replay(1_000, 1).probability
    assert p[0] == 0
    assert (p.diff() >= 0).all()
    assert p[500:].sum().item() == pytest.approx(0.6705932, abs=1e-6)
    assert p[:250].sum().item() == pytest.approx(0.0448537, abs=1e-6)
    assert p[-1].item() == pytest.approx(0.00134133, abs=1e-8)
    p = replay(10_000, 1).probability
    assert p[5_000:].sum().item() == pytest.approx(0.6701900, abs=1e-6)
    assert p[:2_500].sum().item() == pytest.approx(0.0451136, abs=1e-6)


def test_draws_follow_the_probabilities():
    buffer = replay(1_000, 1)
    drawn = buffer.draw(100_000)
    assert (drawn >= 500).float().mean().item() == pytest.approx(0.6706, abs=0.006)
    counts = torch.bincount(drawn // 100, minlength=10) / 100_000
    assert counts.tolist() == pytest.approx(buffer.probability.view(10, 100).sum(-1).tolist(), abs=0.006)
    assert int(drawn.min()) > 0


def test_ring_turns_and_rescues_terminal_transitions():
    """The trace of section 7.3."""
    buffer = replay(3, 2)
    for value in (0, 1, 2):
        insert(buffer, value, terminated=value == 1, reward=1.0)
    buffer.normalise_and_fill()
    assert by_rank(buffer) == [0, 1, 2, 0, 1, 2]
    expected = [[1, 2, 0, 1, 2, 10], [0, 1, 2, 10, 1, 11], [1, 2, 10, 1, 11, 12], [10, 1, 11, 12, 1, 13]]
    for value, order in zip((10, 11, 12, 13), expected, strict=True):
        insert(buffer, value, reward=1.0)
        assert by_rank(buffer) == order
        batch = buffer.gather(torch.arange(6), 0.99)
        assert batch.terminated.tolist() == [obs == 1 for obs in order]
        assert torch.equal(batch.next_obs, batch.obs + 0.5)


def test_terminal_transition_loses_its_lives():
    buffer = replay(3, 1, terminal_lives=2)
    for value in (0, 1, 2):
        insert(buffer, value, terminated=value == 1, reward=1.0)
    buffer.normalise_and_fill()
    orders = []
    for value in range(10, 16):
        insert(buffer, value, reward=1.0)
        orders.append(by_rank(buffer))
    # Rescued by 11 and by 13; 15 finds it oldest for the third time.
    assert orders == [[1, 2, 10], [10, 1, 11], [1, 11, 12], [12, 1, 13], [1, 13, 14], [13, 14, 15]]


def test_second_terminal_transition_in_a_row_is_lost():
    buffer = replay(4, 1)
    for value in range(4):
        insert(buffer, value, terminated=value < 2, reward=1.0)
    buffer.normalise_and_fill()
    insert(buffer, 10, reward=1.0)
    assert by_rank(buffer) == [2, 3, 0, 10]


def test_probability_depends_on_rank_not_on_slot():
    buffer = replay(100, 10)
    for value in range(100):
        insert(buffer, value, reward=1.0)
    buffer.normalise_and_fill()
    for value in range(1_000, 1_500):
        insert(buffer, value, reward=1.0)
    obs = torch.cat([buffer.gather(buffer.draw(1_000), 0.99).obs for _ in range(100)])
    assert (obs >= 1_000).float().mean().item() == pytest.approx(0.6706, abs=0.006)
    assert (obs == 1_499).any()  # what just came in can be drawn


def test_fill_tiles_the_exploration_and_freezes_the_scale_of_rewards():
    buffer = replay(10, 5)
    for value in range(10):
        insert(buffer, value, reward=-2.0 if value % 2 else 6.0)
    buffer.normalise_and_fill()
    everything = buffer.gather(torch.arange(50), 0.99)
    assert everything.obs[:, 0].tolist() == 5 * list(range(10))
    assert everything.reward.abs().mean().item() == pytest.approx(1, abs=1e-5)
    assert everything.reward[:2].tolist() == [1.5, -0.5]
    insert(buffer, 99, reward=8.0)
    newest = buffer.gather(torch.tensor([49]), 0.99)
    assert newest.reward.item() == 2.0
    silent = replay(3, 2)
    for value in range(3):
        insert(silent, value, reward=0.0)
    silent.normalise_and_fill()
    assert silent.reward_scale.item() == 1


def test_termination_ends_the_bootstrap_and_truncation_does_not():
    buffer = replay(2, 1)
    obs = torch.zeros(1, 1)
    buffer.add(obs, torch.zeros(1, 1), make_step(obs, 1.0, terminated=True))
    buffer.add(obs, torch.zeros(1, 1), make_step(obs, 1.0, truncated=True))
    buffer.normalise_and_fill()
    batch = buffer.gather(torch.arange(2), 0.99)
    assert (batch.discount * ~batch.terminated).tolist() == [0.0, pytest.approx(0.99)]


def test_several_environments_go_in_in_order_and_seeds_never_mix():
    buffer = replay(4, 2, num_envs=2, seeds=[0, 1])
    for t in range(2):
        obs = torch.tensor([[[0.0], [1.0]], [[100.0], [101.0]]]) + 10 * t
        step = make_step(torch.zeros(2, 1), 1.0)
        fields = {name: torch.stack([getattr(step, name)] * 2) for name in type(step).__slots__}
        buffer.add(obs, torch.zeros(2, 2, 1), type(step)(**{**fields, "final_obs": obs}))
    buffer.normalise_and_fill()
    both = buffer.gather(torch.arange(8).expand(2, 8), 0.99).obs[..., 0].tolist()
    assert both == [[0, 1, 10, 11, 0, 1, 10, 11], [100, 101, 110, 111, 100, 101, 110, 111]]


def test_half_precision_rounds_what_is_seen_and_keeps_rewards():
    buffer = replay(2, 1, half_precision=True)
    for value in (0.1, 3.3):
        insert(buffer, value, reward=value)
    batch = buffer.gather(torch.arange(2), 0.99)
    assert batch.obs.dtype == torch.float32
    assert batch.obs[:, 0].tolist() == torch.tensor([0.1, 3.3]).half().float().tolist()
    assert batch.reward.tolist() == pytest.approx([0.1, 3.3], abs=1e-7)


def test_clear_begins_the_exploration_again():
    """Ours: the paper has one task. Nothing old is drawn or rescued, rewards get a scale of the new exploration."""
    buffer, other = replay(3, 2), replay(3, 2, seeds=1)
    for value in range(3):
        insert(buffer, value, terminated=value == 1)
    buffer.normalise_and_fill()
    for value in (4, 5):
        insert(buffer, value)
    before = buffer.state_dict()["rings"].head
    buffer.clear()
    assert buffer.explored == 0
    for value in (20, 21, 22):
        insert(buffer, value, reward=2.0 * value)
    assert buffer.explored == 3
    buffer.normalise_and_fill()
    assert by_rank(buffer) == [20, 21, 22, 20, 21, 22]
    assert buffer.reward_scale.item() == pytest.approx(42.0)
    assert buffer.gather(torch.arange(6), 0.99).reward.tolist() == pytest.approx([40 / 42, 1, 44 / 42] * 2)
    # What a checkpoint sees of the heads says that every slot was written.
    assert (buffer.head - before >= buffer.slots).all()
    other.load_state_dict(buffer.state_dict())
    insert(buffer, 30)
    insert(other, 30)
    assert by_rank(other) == by_rank(buffer) == [21, 22, 20, 21, 22, 30]
    assert other.explored == 4
