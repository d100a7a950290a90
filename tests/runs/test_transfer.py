"""Forgetting and transfer of returns, by hand."""

from __future__ import annotations

import pytest

from runs import transfer

# Rows: untrained, after tasks 0, 1, 2. Columns: return on tasks 0, 1, 2.
ONCE = [[1, 2, 3], [10, 4, 3], [8, 20, 9], [4, 14, 30]]


def test_tasks_learnt_once():
    assert transfer.measures(ONCE, [0, 1, 2]) == {
        "average_return": pytest.approx((4 + 14 + 30) / 3),
        "forgetting": pytest.approx(((10 - 4) + (20 - 14)) / 2),
        "bwt": pytest.approx(((4 - 10) + (14 - 20)) / 2),
        "fwt": pytest.approx(((4 - 2) + (9 - 3)) / 2),
    }


def test_forgetting_is_from_the_best_since_a_task_was_learnt():
    """After task 1 the return on task 0 is higher than after task 0 itself; before it was learnt it does not count."""
    matrix = [[90, 2, 3], [10, 50, 3], [18, 20, 9], [4, 22, 30]]
    assert transfer.forgetting(matrix, [0, 1, 2]) == pytest.approx(((18 - 4) + (20 - 22)) / 2)
    assert transfer.backward_transfer(matrix, [0, 1, 2]) == pytest.approx(((4 - 10) + (22 - 20)) / 2)


def test_tasks_that_come_back():
    """Tasks 0, 1, 0, 1: the last visit to each counts, and what a second visit brings is no forward transfer."""
    matrix = [[0, 0], [10, 3], [6, 12], [11, 8], [9, 13]]
    assert transfer.average_return(matrix, [0, 1, 0, 1]) == 11
    assert transfer.forgetting(matrix, [0, 1, 0, 1]) == 11 - 9
    assert transfer.backward_transfer(matrix, [0, 1, 0, 1]) == 9 - 11
    assert transfer.forward_transfer(matrix, [0, 1, 0, 1]) == 3
    assert transfer.forgetting(matrix[:4], [0, 1, 0]) == 12 - 8


def test_a_single_task_has_an_average_alone():
    assert transfer.measures([[1, 2], [5, 2]], [0]) == {"average_return": 5}
    assert transfer.average_return([[1, 2], [5, 7], [4, 9]], [1, 1]) == 9


def test_areas_and_what_was_left_to_gain():
    curve = [(100, 0.0), (200, 4.0), (400, 8.0)]
    assert transfer.mean_over_steps(curve) == pytest.approx((100 * 2 + 200 * 6) / 300)
    assert transfer.mean_over_steps(curve[:1]) is None
    assert transfer.transfer([3.0, 5.0], [1.0, 6.0]) == pytest.approx((2 - 1) / 2)
    assert transfer.scaled_transfer([0.6, 0.2], [0.5, 0.0]) == pytest.approx((0.1 / 0.5 + 0.2) / 2)
    assert transfer.scaled_transfer([0.6], [1.0]) is None
