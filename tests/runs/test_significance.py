"""Comparisons of two groups of seeds, against hand-made tables, SciPy's tests and Kaplan-Meier estimates."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from runs import significance
from runs.significance import Times

few_numbers = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=6)


def test_probability_of_improvement_by_hand():
    assert significance.probability_of_improvement([3, 4], [1, 2, 5]) == 4 / 6
    assert significance.probability_of_improvement([1, 1], [1, 1]) == 0.5
    # Two tasks: 1 and 1/2 on average.
    assert significance.probability_of_improvement([[5, 1], [6, 0]], [[1, 1], [2, 0]]) == 0.75


def test_probability_of_improvement_agrees_with_rliable():
    """rliable 1.2.0 says 1/3 of these, five and four runs of six tasks."""
    x = [
        [0.734, 1.055, 0.427, 1.592, 0.365, 0.394],
        [0.043, 0.208, 0.423, 0.903, 0.602, 0.379],
        [1.251, 0.352, 0.457, 0.269, 0.588, 0.784],
        [0.383, 1.159, 0.205, 1.631, 0.813, 1.739],
        [2.097, 0.869, 0.664, 0.198, 0.914, 0.223],
    ]
    y = [
        [0.582, 2.536, 1.064, 2.33, 1.313, 0.867],
        [1.664, 0.475, 0.865, 0.961, 0.613, 0.251],
        [1.268, 0.435, 0.661, 0.584, 1.005, 0.942],
        [0.233, 1.202, 0.732, 1.533, 0.453, 0.061],
    ]
    assert significance.probability_of_improvement(x, y) == pytest.approx(1 / 3, rel=1e-14)


@given(few_numbers, few_numbers)
def test_probability_of_improvement_is_the_mann_whitney_statistic(x: list[float], y: list[float]):
    statistic = scipy.stats.mannwhitneyu(x, y).statistic
    assert significance.probability_of_improvement(x, y) == pytest.approx(statistic / (len(x) * len(y)))


def test_the_interval_of_a_probability_is_a_root_of_its_equation():
    """Newcombe's method 5: |theta - p| = z sqrt(V(theta)) at both ends, with the variance of Hanley and McNeil."""
    low, high = significance.probability_of_improvement_interval(0.7, 5, 7)
    z = scipy.stats.norm.ppf(0.975)
    for theta in (low, high):
        q1, q2 = theta / (2 - theta), 2 * theta**2 / (1 + theta)
        variance = (theta * (1 - theta) + (6 - 1) * (q1 - theta**2 + q2 - theta**2)) / 35
        assert abs(theta - 0.7) == pytest.approx(z * np.sqrt(variance))
    assert low < 0.7 < high


def test_the_interval_of_a_probability_of_one_is_no_point():
    """Three seeds all ahead of three others: the bootstrap would say [1, 1]."""
    low, high = significance.probability_of_improvement_interval(1.0, 3, 3)
    assert high == 1.0
    assert 0.4 < low < 0.6
    mirrored = significance.probability_of_improvement_interval(0.0, 3, 3)
    assert mirrored == pytest.approx((0.0, 1 - low))
    wide, narrow = (significance.probability_of_improvement_interval(0.6, 5, 5, tasks) for tasks in (1, 10))
    assert narrow[1] - narrow[0] < 0.4 * (wide[1] - wide[0])


@pytest.mark.parametrize(("shift", "seeds"), [(0.0, 5), (1.0, 5), (2.0, 3)])
def test_the_interval_of_a_probability_holds_the_truth(shift: float, seeds: int):
    random = np.random.default_rng(1)
    truth = scipy.stats.norm.cdf(shift / np.sqrt(2))
    hits = 0
    for x, y in zip(random.normal(shift, 1, (1000, seeds)), random.normal(0, 1, (1000, seeds)), strict=True):
        found = significance.probability_of_improvement(x, y)
        low, high = significance.probability_of_improvement_interval(found, seeds, seeds)
        hits += low <= truth <= high
    assert 0.92 < hits / 1000 < 0.99


def test_the_paired_test_by_hand():
    """Differences 1, 2, 3, -1: how many of the 16 choices of signs give a sum as far from 0 as 5."""
    differences = np.array([1.0, 2.0, 3.0, -1.0])
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product([1, -1], repeat=4)
    ]
    p = np.mean([abs(total) >= abs(differences.sum()) for total in sums])
    found = significance.paired_test(differences + 10, np.full(4, 10.0))
    assert found.p == pytest.approx(p) == 6 / 16  # 7, 5, 5 and their negatives
    assert found.smallest == 0.125
    assert significance.paired_test([1, 2, 3], [0, 0, 0]).p == 0.25
    assert significance.paired_test([5, 6, 7], [5, 6, 7]).p == 1.0
    with pytest.raises(ValueError, match="two pairs"):
        significance.paired_test([1.0], [2.0])


def test_the_paired_test_of_many_seeds_agrees_with_the_t_test():
    random = np.random.default_rng(3)
    x = random.normal(0.35, 1, 40)
    found = significance.paired_test(x, np.zeros(40))
    assert found.p == pytest.approx(scipy.stats.ttest_1samp(x, 0).pvalue, abs=0.01)
    assert found.smallest == 1e-4
    assert significance.paired_test(x, np.zeros(40)) == found  # the same numbers, the same p


@given(few_numbers, few_numbers)
def test_the_unpaired_test_is_exact_with_ties(x: list[float], y: list[float]):
    """All ways to deal the pooled numbers into the two groups, counted here one by one; twice the smaller tail."""
    pooled = np.array(x + y)

    def statistic(chosen: tuple[int, ...]) -> float:
        rest = [index for index in range(len(pooled)) if index not in chosen]
        return np.sign(pooled[list(chosen)][:, None] - pooled[rest][None]).sum()

    ours = statistic(tuple(range(len(x))))
    deals = np.array([statistic(chosen) for chosen in itertools.combinations(range(len(pooled)), len(x))])
    p = min(1.0, 2 * min((deals >= ours).mean(), (deals <= ours).mean()))
    assert significance.unpaired_test(x, y).p == pytest.approx(p, abs=1e-9)


def test_the_smallest_p_of_three_against_three():
    found = significance.unpaired_test([4, 5, 6], [1, 2, 3])
    assert found.p == pytest.approx(0.1)
    assert found.smallest == pytest.approx(0.1)
    with pytest.raises(ValueError, match="two runs on each side"):
        significance.unpaired_test([4], [1, 2, 3])


def test_holm_by_hand():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.5, 0.9]) == [1.0, 1.0]
    assert significance.holm([]) == []


def curves() -> dict[int, tuple[np.ndarray, np.ndarray]]:
    steps = np.array([0, 10, 20, 30])
    return {
        0: (steps, np.array([0.0, 6.0, 1.0, 9.0])),
        1: (steps, np.array([0.0, 1.0, 2.0, 5.0])),
        2: (steps, np.array([0.0, 1.0, 2.0, 3.0])),
        3: (steps[:2], np.array([0.0, 1.0])),
    }


def test_times_to_a_threshold_keep_seeds_that_never_reached_it():
    times = significance.times_to_threshold(curves(), 5.0)
    assert times.steps.tolist() == [10, 30, 30, 10]
    assert times.reached.tolist() == [True, True, False, False]
    below = significance.times_to_threshold(curves(), 0.5, above=False)
    assert below.steps.tolist() == [0, 0, 0, 0]
    assert below.reached.all()


def test_restricted_mean_and_median_time_by_hand():
    """Kaplan-Meier: 3/4 left after 10 (of the four, one ended unseen there), then half of two at 30."""
    times = significance.times_to_threshold(curves(), 5.0)
    assert significance.restricted_mean_time(times, 30) == 10 + 0.75 * 20
    assert significance.restricted_mean_time(times, 40) == 10 + 0.75 * 20 + 0.375 * 10
    assert significance.median_time(times) == 30
    never = Times(np.array([30.0, 30.0]), np.array([False, False]))
    assert significance.restricted_mean_time(never, 30) == 30
    assert significance.median_time(never) is None
    whole = Times(np.array([10.0, 20.0, 30.0]), np.array([True, True, False]))
    assert significance.restricted_mean_time(whole, 30) == 20
    assert significance.restricted_times(whole, 30).tolist() == [10, 20, 30]


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=2, max_size=8))
def test_restricted_mean_time_agrees_with_scipys_kaplan_meier(seeds: list[tuple[int, bool]]):
    steps, reached = np.array([s for s, _ in seeds], dtype=float), np.array([r for _, r in seeds])
    data = scipy.stats.CensoredData(uncensored=steps[reached], right=steps[~reached])
    curve = scipy.stats.ecdf(data).sf
    grid = np.arange(10)  # the curve is constant from one step to the next
    area = sum(float(curve.evaluate(at)) for at in grid)
    times = Times(steps, reached)
    assert significance.restricted_mean_time(times, 10) == pytest.approx(area)
    assert len(significance.restricted_times(times, 10)) == len(seeds)


def test_restricted_times_of_early_ended_seeds_average_near_the_restricted_mean():
    random = np.random.default_rng(0)
    steps = random.exponential(10, 60)
    ended = random.uniform(5, 60, 60)
    times = Times(np.minimum(steps, ended), steps <= ended)
    assert not times.reached[times.steps < 30].all()
    found = significance.restricted_times(times, 30)
    assert found.mean() == pytest.approx(significance.restricted_mean_time(times, 30), rel=0.01)


def test_who_was_earlier_is_unknown_where_a_seed_ended_first():
    x = Times(np.array([10.0, 30.0, 20.0]), np.array([True, False, True]))
    y = Times(np.array([10.0, 20.0]), np.array([True, False]))
    # 10 ties with 10 and is before whatever comes after 20; 30+ is after 10 and unknown against 20+; 20 beats 20+.
    assert significance.earlier(x, y).tolist() == [[0, 1], [-1, 0], [-1, 1]]


@given(few_numbers, few_numbers)
def test_gehan_scores_without_censoring_are_ranks(x: list[float], y: list[float]):
    sides = [Times(np.array(side), np.ones(len(side), dtype=bool)) for side in (x, y)]
    scores = np.concatenate(significance.gehan_scores(*sides))
    ranks = scipy.stats.rankdata(x + y)
    np.testing.assert_allclose(scores, len(scores) + 1 - 2 * ranks)
