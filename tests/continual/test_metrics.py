"""Metrics of continual learning against examples computed by hand."""

from __future__ import annotations

import pytest
import torch

from continual import metrics

# The worked example of specs/uer-and-online-cl.md, section 4.
FIRST = torch.tensor([[0.9, 0, 0], [0.6, 0.8, 0], [0.3, 0.5, 0.7]], dtype=torch.float64)
# Task 1 still improves after it was learned: the variants of forgetting differ.
SECOND = torch.tensor([[0.7, 0, 0], [0.9, 0.8, 0], [0.95, 0.5, 0.7]], dtype=torch.float64)
ONE_TASK = torch.tensor([[0.9]], dtype=torch.float64)


def near(value: float):
    return pytest.approx(value, abs=1e-12)


def test_first_example_by_hand():
    assert float(metrics.average_accuracy(FIRST)) == near(0.5)
    assert [float(metrics.average_accuracy(FIRST, k)) for k in range(3)] == [near(0.9), near(0.7), near(0.5)]
    assert float(metrics.average_incremental_accuracy(FIRST)) == near(0.7)
    assert float(metrics.forgetting(FIRST)) == near(0.45)
    assert float(metrics.forgetting(FIRST, 1)) == near(0.3)
    assert float(metrics.backward_transfer(FIRST)) == near(-0.45)
    assert float(metrics.learning_accuracy(FIRST)) == near(0.8)
    assert float(metrics.forgetting_with_last_row(FIRST, over_all_tasks=True)) == near(0.3)
    assert float(metrics.forgetting_with_last_row(FIRST, over_all_tasks=False)) == near(0.45)
    assert float(metrics.forward_transfer(FIRST, torch.full((3,), 0.1, dtype=torch.float64))) == near(-0.1)
    whole = metrics.diaz_rodriguez(FIRST)
    assert float(whole["accuracy"]) == near(3.8 / 6)
    assert float(whole["backward_transfer"]) == near(-0.4)
    assert float(whole["positive_backward_transfer"]) == 0.0
    assert float(whole["remembering"]) == near(0.6)
    assert float(whole["forward_transfer"]) == 0.0


def test_second_example_tells_the_variants_of_forgetting_apart():
    assert float(metrics.forgetting(SECOND)) == near(0.125)
    assert float(metrics.forgetting_with_last_row(SECOND, over_all_tasks=False)) == near(0.15)
    assert float(metrics.forgetting_with_last_row(SECOND, over_all_tasks=True)) == near(0.1)
    assert float(metrics.forgetting_since_learned(SECOND)) == near(0.025)
    assert float(metrics.backward_transfer(SECOND)) == near(-0.025)
    assert float(metrics.average_accuracy(SECOND)) == near(2.15 / 3)
    assert float(metrics.learning_accuracy(SECOND)) == near(2.2 / 3)


def test_of_one_task_what_compares_tasks_is_not_defined():
    assert float(metrics.average_accuracy(ONE_TASK)) == 0.9
    compared = [
        metrics.forgetting(ONE_TASK),
        metrics.backward_transfer(ONE_TASK),
        metrics.forward_transfer(ONE_TASK, torch.tensor([0.1], dtype=torch.float64)),
        metrics.forgetting_with_last_row(ONE_TASK, over_all_tasks=False),
    ]
    assert all(torch.isnan(value) for value in compared)


def test_a_missing_cell_is_not_a_zero():
    holed = FIRST.clone()
    holed[2, 1] = torch.nan
    assert torch.isnan(metrics.average_accuracy(holed))
    assert torch.isnan(metrics.forgetting(holed))
    assert float(metrics.average_accuracy(holed, 1)) == near(0.7)


def test_members_keep_their_axis_and_their_values():
    both = torch.stack([FIRST, SECOND])
    assert metrics.forgetting(both).tolist() == [near(0.45), near(0.125)]
    assert metrics.diaz_rodriguez(both)["accuracy"].shape == (2,)
    assert metrics.forgetting(torch.stack([ONE_TASK, ONE_TASK])).shape == (2,)


def test_forward_transfer_without_the_untrained_accuracies_is_an_error():
    with pytest.raises(ValueError, match="needs b of shape"):
        metrics.forward_transfer(FIRST, torch.zeros(2))


def test_intransigence_is_what_joint_training_would_have_added():
    reference = torch.tensor([0.9, 0.9, 0.9], dtype=torch.float64)
    assert float(metrics.intransigence(FIRST, reference)) == near((0 + 0.1 + 0.2) / 3)


def test_what_happens_between_the_ends_of_tasks_by_hand():
    nan = torch.nan
    # Two tasks; task 1 falls to 0.2 while task 2 is learned, and ends at 0.6.
    looks = [[0.5, nan], [0.8, nan], [0.2, 0.5], [0.4, 0.6], [0.6, 0.9]]
    evaluations, learned = torch.tensor(looks, dtype=torch.float64), [0, 1, 1, 1, 2]
    matrix = torch.tensor([[0.8, 0], [0.6, 0.9]], dtype=torch.float64)
    assert float(metrics.average_anytime_accuracy(evaluations)) == near((0.5 + 0.8 + 0.35 + 0.5 + 0.75) / 5)
    assert float(metrics.minimum_accuracy(evaluations, learned)) == near(0.2)
    assert float(metrics.worst_case_accuracy(matrix, evaluations, learned)) == near(0.9 / 2 + 0.2 / 2)
    # From 0.8 to 0.6 is forgetting; from 0.6 to 0.2 and back is the gap.
    assert float(metrics.stability_gap(matrix, evaluations, learned)) == near(0.4)
    assert float(metrics.forgetting(matrix)) == near(0.2)


def test_size_and_storage_efficiency_by_hand():
    assert metrics.model_size_efficiency([100, 200, 400]) == near((1 + 0.5 + 0.25) / 3)
    assert metrics.model_size_efficiency([100, 100]) == 1.0
    assert metrics.sample_storage_efficiency([10, 30], 100) == near(0.8)
    assert metrics.sample_storage_efficiency([300], 100) == 0.0
