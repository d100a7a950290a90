"""Churn: nothing for equal networks, everything when every greedy action moves (spec, check 22)."""

from __future__ import annotations

import pytest
import torch

from plasticity.measures import churn


def outputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equal_networks_have_no_churn():
    q = outputs(2, 8, 3)
    assert churn.policy_churn(q, q).tolist() == [0, 0]
    assert churn.action_churn(q, q).tolist() == [0, 0]
    assert churn.categorical_churn(q, q).tolist() == [0, 0]
    assert [part.tolist() for part in churn.value_churn(q, q)] == [[0, 0], [0, 0]]


def test_rotated_actions_are_all_churn():
    q = outputs(2, 8, 3)
    assert churn.policy_churn(q.roll(1, 2), q).tolist() == [1, 1]
    assert churn.value_churn(q.roll(1, 2), q)[1].tolist() == [0, 0]


def test_values_by_hand():
    before, after = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[3.0, 2.0], [0.0, 1.0]]])
    assert churn.policy_churn(after, before).tolist() == [1]
    whole, best = churn.value_churn(after, before)
    assert (whole.tolist(), best.tolist()) == ([0.75], [1.0])
    assert churn.action_churn(after, before).tolist() == [2.5]


def test_divergences_are_those_of_torch():
    new, old = outputs(2, 5, 3), outputs(2, 5, 3, seed=1)
    for k in range(2):
        expected = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=new[k]), torch.distributions.Categorical(logits=old[k])
        )
        assert churn.categorical_churn(new, old)[k] == pytest.approx(float(expected.mean()), rel=1e-5)
    scale = outputs(2, 5, 3, seed=2), outputs(2, 5, 3, seed=3)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(new, scale[0].exp()), torch.distributions.Normal(old, scale[1].exp())
    )
    torch.testing.assert_close(churn.gaussian_churn(new, scale[0], old, scale[1]), expected.sum(2).mean(1))


def test_step_plasticity_by_hand():
    before, after = torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([0.5, 2.0, 0.0, 0.0])
    assert churn.step_plasticity(before, after).tolist() == [0.75, 0, 1, 1]


def test_windows_compare_the_right_steps():
    windows = churn.ChurnWindows((1, 3, 10), period=10)
    found = {}
    for step in range(31):
        if windows.due(step):
            pairs = windows.observe(step, torch.full((1, 1, 1), float(step)))
            if pairs:
                found[step] = {name: (float(a), float(b)) for name, (a, b) in pairs.items()}
    assert sorted(found) == [10, 20, 30]
    for step, pairs in found.items():
        assert pairs == {
            "1": (step, step - 1), "3": (step, step - 3), "10": (step, step - 10), "initial": (step, 0),
        }  # fmt: skip


def test_windows_go_on_from_a_saved_state():
    windows, again = churn.ChurnWindows((1, 4), period=4), churn.ChurnWindows((1, 4), period=4)
    for step in (0, 3):
        windows.observe(step, torch.full((1, 1, 1), float(step)))
    again.load_state_dict(windows.state_dict())
    assert {n: float(b) for n, (_, b) in again.observe(4, torch.ones(1, 1, 1)).items()} == {
        "1": 3, "4": 0, "initial": 0,
    }  # fmt: skip


def test_windows_longer_than_the_period_are_refused():
    with pytest.raises(ValueError, match="between 1 and the period 100"):
        churn.ChurnWindows((1, 1000), period=100)
