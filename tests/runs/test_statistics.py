"""Statistics against numbers known by hand, SciPy, and the sampling theory of normal data."""

import time

import numpy as np
import pytest
import scipy.stats

from runs import statistics
from runs.record import Row
from runs.statistics import interquartile_mean, stratified_bootstrap_interval


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_interquartile_mean_by_hand():
    assert interquartile_mean(range(8)) == 3.5  # mean of 2, 3, 4, 5
    assert interquartile_mean([100, 1, 2, 3, -50]) == 2.0  # one dropped at each end
    assert interquartile_mean([1, 2, 6]) == 3.0  # too few to drop any
    assert interquartile_mean([[0, 1, 2, 99], [5, 5, 5, 5]]).tolist() == [1.5, 5.0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 10, 30, 101])
def test_interquartile_mean_is_scipys_trimmed_mean(count: int):
    x = generator(count).normal(size=count)
    assert interquartile_mean(x) == pytest.approx(scipy.stats.trim_mean(x, 0.25), rel=1e-14)


def test_mean_and_median_reduce_the_last_axis():
    x = [[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]
    assert statistics.mean(x).tolist() == [3.0, 1.0]
    assert statistics.median(x).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("statistic", [interquartile_mean, statistics.mean, statistics.median])
def test_the_interval_of_a_constant_is_the_constant(statistic: statistics.Statistic):
    assert stratified_bootstrap_interval(np.full((5, 6), 2.5), statistic, generator(), 200) == (2.5, 2.5)


def test_runs_are_resampled_within_each_task():
    """Tasks on very different scales, all runs equal: nothing varies unless values move between tasks."""
    scores = np.tile([0.0, 10.0, 1000.0], (4, 1))
    low, high = stratified_bootstrap_interval(scores, statistics.mean, generator(), 500)
    assert low == high == pytest.approx(1010 / 3)


def test_tasks_are_resampled_independently():
    """The mean of two tasks with opposite runs varies; the same rows drawn in both tasks would cancel to 0 always."""
    scores = np.array([[1.0, -1.0], [-1.0, 1.0]])
    low, high = stratified_bootstrap_interval(scores, statistics.mean, generator(), 2000, widened=False)
    assert (low, high) == (-1.0, 1.0)


def test_the_percentile_interval_of_two_runs_by_hand():
    """Means of two draws from {0, 1}: 0 and 1 with probability 1/4 each, 1/2 with 1/2."""
    scores = np.array([[0.0], [1.0]])
    assert stratified_bootstrap_interval(scores, statistics.mean, generator(), 4000, 0.95, widened=False) == (0, 1)
    assert stratified_bootstrap_interval(scores, statistics.mean, generator(), 4000, 0.4, widened=False) == (0.5, 0.5)


def test_the_widening_by_hand():
    """Two runs of one task: sqrt(2) * t(1 degree of freedom) / z = 1.4142 * 12.7062 / 1.95996."""
    scores = np.array([[0.0], [1.0]])
    factor = np.sqrt(2) * scipy.stats.t.ppf(0.975, 1) / scipy.stats.norm.ppf(0.975)
    assert statistics.small_sample_factor(scores) == pytest.approx(factor) == pytest.approx(9.168, abs=0.001)
    wide = stratified_bootstrap_interval(scores, statistics.mean, generator(), 4000)
    assert wide == pytest.approx((0.5 - 0.5 * factor, 0.5 + 0.5 * factor))


def test_the_widening_counts_the_freedom_of_all_tasks():
    """Equal variances give K (S - 1) degrees of freedom; one task with all the variance gives S - 1."""
    z = scipy.stats.norm.ppf(0.975)
    equal = np.tile([[0.0], [1.0], [2.0]], (1, 4))
    assert statistics.small_sample_factor(equal) == pytest.approx(np.sqrt(1.5) * scipy.stats.t.ppf(0.975, 8) / z)
    one = equal * [1, 0, 0, 0]
    assert statistics.small_sample_factor(one) == pytest.approx(np.sqrt(1.5) * scipy.stats.t.ppf(0.975, 2) / z)
    assert statistics.small_sample_factor(1e-120 * one) == pytest.approx(statistics.small_sample_factor(one))
    assert statistics.small_sample_factor(np.full((3, 4), 7.0)) == 1.0
    assert statistics.small_sample_factor(generator().normal(size=(1000, 5))) == pytest.approx(1, abs=2e-3)


# Five runs of six tasks and four of another method; what rliable 1.2.0 says of them (pandas 2.3, arch 7.2), whose
# percentile intervals come from 50,000 resamples of NumPy's global generator, seed 0.
SCORES = np.array(
    [
        [0.734, 1.055, 0.427, 1.592, 0.365, 0.394],
        [0.043, 0.208, 0.423, 0.903, 0.602, 0.379],
        [1.251, 0.352, 0.457, 0.269, 0.588, 0.784],
        [0.383, 1.159, 0.205, 1.631, 0.813, 1.739],
        [2.097, 0.869, 0.664, 0.198, 0.914, 0.223],
    ]
)


@pytest.mark.parametrize(
    ("statistic", "value", "interval"),
    [
        (interquartile_mean, 0.6061875, (0.44643, 0.80281)),
        (statistics.mean, 0.7240333333333333, (0.55607, 0.9029)),
        (statistics.optimality_gap, 0.3934333333333332, (0.28913, 0.50087)),
        (statistics.median_of_task_means(6), 0.7162, None),
    ],
)
def test_aggregates_agree_with_rliable(
    statistic: statistics.Statistic, value: float, interval: tuple[float, float] | None
):
    assert statistic(SCORES.reshape(-1)) == pytest.approx(value, rel=1e-14)
    found = stratified_bootstrap_interval(SCORES, statistic, generator(), 50_000, widened=False)
    if interval:
        assert found == pytest.approx(interval, abs=0.004)  # 1 % of the width, resampling noise


def test_performance_profiles_agree_with_rliable():
    thresholds = [0.0, 0.25, 0.5, 1.0, 2.0]
    assert statistics.performance_profile(SCORES, thresholds) == pytest.approx([1.0, 25 / 30, 16 / 30, 7 / 30, 1 / 30])
    low, high = statistics.performance_profile_interval(SCORES, thresholds, generator(), 4000)
    widening = np.sqrt(5 / 4) * scipy.stats.t.ppf(0.975, 24) / scipy.stats.norm.ppf(0.975)
    # rliable's 0.7 to 0.967 about 0.833, each end moved away from it; a step of the profile is 1 / 30.
    assert low[1] == pytest.approx(0.8333 - widening * 0.1333, abs=widening / 30)
    assert high[1] == pytest.approx(min(1, 0.8333 + widening * 0.1333), abs=widening / 30)
    assert (low[0], high[0]) == pytest.approx((1.0, 1.0))
    assert (low >= 0).all()
    assert (high <= 1).all()


def test_the_optimality_gap_gives_no_credit_above_the_goal():
    assert statistics.optimality_gap([0.5, 3.0]) == 0.25
    assert statistics.optimality_gap([[1.0, 2.0], [0.0, 0.0]], goal=2.0).tolist() == [0.5, 2.0]


def test_the_interval_agrees_with_scipys_percentile_bootstrap():
    x = generator(3).normal(size=12)
    ours = stratified_bootstrap_interval(x[:, None], statistics.mean, generator(), 40_000, widened=False)
    theirs = scipy.stats.bootstrap((x,), np.mean, n_resamples=40_000, method="percentile", rng=generator(1))
    interval = theirs.confidence_interval
    assert ours == pytest.approx((interval.low, interval.high), abs=0.02)  # 0.02: 1.5 % of the width, resampling noise


def coverage(data: np.ndarray, truth: float, widened: bool) -> float:
    """Share of the data sets [N, S, K] whose interval of the mean holds the truth."""
    random, hits = generator(6), 0
    for scores in data:
        low, high = stratified_bootstrap_interval(scores, statistics.mean, random, 400, widened=widened)
        hits += low <= truth <= high
    return hits / len(data)


@pytest.mark.parametrize(("runs", "percentile"), [(3, 0.73), (5, 0.84), (10, 0.90)])
def test_widened_intervals_hold_the_truth_where_percentiles_do_not(runs: int, percentile: float):
    """1,500 data sets: the standard error of a coverage is below 0.012. docs/results/intervals.md has more laws."""
    data = generator(5).normal(loc=3.0, size=(1500, runs, 1))
    assert coverage(data, 3.0, widened=False) == pytest.approx(percentile, abs=0.03)
    assert coverage(data, 3.0, widened=True) == pytest.approx(0.945, abs=0.02)


def test_widened_intervals_hold_the_truth_over_tasks_of_unequal_spread():
    data = generator(7).normal(size=(1000, 3, 5)) * [1, 2, 3, 4, 5]
    assert coverage(data, 0.0, widened=True) == pytest.approx(0.95, abs=0.025)
    assert coverage(data, 0.0, widened=False) < 0.87


def test_the_same_generator_seed_gives_the_same_interval_and_global_state_has_no_say():
    scores = generator(2).normal(size=(5, 6))
    first = stratified_bootstrap_interval(scores, interquartile_mean, generator(9), 500)
    assert stratified_bootstrap_interval(scores, interquartile_mean, generator(9), 500) == first
    assert stratified_bootstrap_interval(scores, interquartile_mean, generator(10), 500) != first


def test_many_resamples_are_drawn_in_chunks_without_a_change_of_the_law():
    """60 resamples fill a chunk here, so 3,000 of them take 50 chunks."""
    scores = generator(4).normal(size=(8, 4000))
    low, high = stratified_bootstrap_interval(scores, statistics.mean, generator(), 3000)
    spread = scores.std(axis=0).mean() / np.sqrt(scores.size)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(8 / 7) * spread, rel=0.1)


def test_fifty_thousand_resamples_of_five_by_six_take_a_fifth_of_a_second():
    scores = generator(1).normal(size=(5, 6))
    taken = []
    for _ in range(3):
        before = time.process_time()
        stratified_bootstrap_interval(scores, interquartile_mean, generator(), 50_000)
        taken.append(time.process_time() - before)
    assert min(taken) < 0.2


def test_what_has_no_interval_is_refused():
    for scores in ([[1.0, 2.0]], [1.0, 2.0], np.empty((3, 0))):
        with pytest.raises(ValueError, match="runs >= 2"):
            stratified_bootstrap_interval(scores, statistics.mean, generator())
    with pytest.raises(ValueError, match="finite"):
        stratified_bootstrap_interval([[1.0], [np.nan]], statistics.mean, generator())
    with pytest.raises(ValueError, match="confidence"):
        stratified_bootstrap_interval([[1.0], [2.0]], statistics.mean, generator(), confidence=1.0)


def test_summary_by_hand():
    summary = statistics.summarise([0, 1, 2, 3, 4, 5, 6, 100])
    assert (summary["mean"], summary["iqm"], summary["seeds"]) == (121 / 8, 3.5, 8)
    assert summary["low"] is not None
    assert summary["high"] is not None
    assert summary["low"] < 121 / 8 < summary["high"]
    assert statistics.summarise([0, 1, 2, 3, 4, 5, 6, 100]) == summary


def test_one_seed_has_no_interval_and_missing_seeds_are_not_counted():
    assert statistics.summarise([7.0]) == {"mean": 7.0, "low": None, "high": None, "iqm": 7.0, "seeds": 1}
    assert statistics.summarise([7.0, None, float("nan")])["seeds"] == 1
    assert statistics.summarise([None]) == {"mean": None, "low": None, "high": None, "iqm": None, "seeds": 0}


def rows() -> list[Row]:
    return [
        Row(10, "r", 1.0, 0),
        Row(20, "r", 2.0, 0),
        Row(20, "r", 4.0, 0),  # two episodes ended at this step
        Row(30, "r", 5.0, 0),
        Row(10, "r", 10.0, 4),
        Row(20, "r", 20.0, 4),
        Row(30, "r", None, 4, missing="nan"),
        Row(40, "r", 50.0, 4),
        Row(10, "r", 99.0, 0, task=1),
        Row(10, "other", 99.0, 0),
    ]


def test_curves_are_aligned_at_the_steps_all_seeds_share():
    steps, values = statistics.curve(rows(), "r")
    assert steps.tolist() == [10, 20]
    assert values.tolist() == [[1.0, 3.0], [10.0, 20.0]]
    steps, values = statistics.curve(rows(), "r", task=1)
    assert (steps.tolist(), values.tolist()) == ([10], [[99.0]])
    steps, values = statistics.curve(rows(), "nothing")
    assert (steps.shape, values.shape) == ((0,), (0, 0))


def test_final_values_are_each_seeds_last_and_missing_stays_missing():
    assert statistics.final_values(rows(), "r") == {0: 5.0, 4: 50.0}
    assert statistics.final_values([r for r in rows() if r.step < 40], "r") == {0: 5.0, 4: None}
    assert statistics.final_values([r for r in rows() if r.step < 30], "r") == {0: 3.0, 4: 20.0}


def test_bins_average_what_seeds_recorded_at_their_own_steps():
    table = [Row(step, "r", float(step), 0) for step in (0, 3, 5, 6, 10)]
    table += [Row(step, "r", 2.0 * step, 1) for step in (4, 7, 9)]
    steps, values = statistics.align_in_bins(statistics.seed_curves(table, "r"), bins=2)
    assert steps.tolist() == [5, 10]
    assert values.tolist() == [[8 / 3, 8.0], [8.0, 16.0]]  # 5 lies in the first bin, 0 too
    steps, values = statistics.align_in_bins(statistics.seed_curves(table, "r"), bins=5)
    assert steps.tolist() == [4, 10]  # seed 1 has nothing in (0, 2] and (4, 6], seed 0 nothing in (6, 8]
    assert values.tolist() == [[3.0, 10.0], [8.0, 18.0]]


def test_the_band_of_a_curve_is_the_interval_of_each_step():
    values = generator(6).normal(size=(6, 4)) * [1, 2, 3, 0] + [0, 5, 0, 7]
    low, high = statistics.mean_curve_interval(values, generator(), 20_000)
    for step in range(3):  # both are widened as one task's
        alone = stratified_bootstrap_interval(values[:, [step]], statistics.mean, generator(step), 20_000)
        width = alone[1] - alone[0]
        assert (low[step], high[step]) == pytest.approx(alone, abs=0.04 * width)  # resampling noise
    assert (low[3], high[3]) == pytest.approx((7, 7))


def test_the_difference_of_two_groups_has_the_interval_of_welch():
    """For normal groups of unequal size and spread, Welch's t interval is the reference, on average over data sets."""
    random, ours, welch = generator(8), [], []
    for _ in range(150):
        x, y = random.normal(5, 1, 8), random.normal(3, 4, 12)
        low, high = statistics.mean_difference_interval(x, y, generator(0), 2000)
        ours.append(high - low)
        reference = scipy.stats.ttest_ind(x, y, equal_var=False).confidence_interval()
        welch.append(reference.high - reference.low)
    assert np.mean(ours) == pytest.approx(np.mean(welch), rel=0.03)
    assert statistics.mean_difference_interval([2, 2, 2], [1, 1], generator()) == (1.0, 1.0)
    with pytest.raises(ValueError, match="runs >= 2"):
        statistics.mean_difference_interval([1.0], [1.0, 2.0], generator())


def test_the_area_under_a_curve_by_hand():
    steps = np.array([0, 10, 20, 40])
    curves = {
        0: (steps, np.array([0.0, 10.0, 10.0, 30.0])),  # (50 + 100 + 400) / 40
        1: (steps[:3], np.array([1.0, 1.0, 1.0])),  # ended half way
        2: (np.array([10, 38]), np.array([4.0, 4.0])),  # the last value holds for the last two steps
        3: (np.array([40]), np.array([4.0])),  # one point has no area
    }
    assert statistics.area_under_curve(curves, 40) == {0: 13.75, 1: None, 2: 4.0, 3: None}
    # Up to step 15: 50 + 5 * 10, over 15.
    assert statistics.area_under_curve({0: curves[0]}, 15) == {0: pytest.approx(100 / 15)}
    assert statistics.area_under_curve({0: curves[0]}, 30) == {0: pytest.approx((50 + 100 + 150) / 30)}


def test_bins_may_be_laid_out_beyond_a_seeds_end():
    table = [Row(step, "r", float(step), 0) for step in (2, 4)]
    steps, values = statistics.align_in_bins(statistics.seed_curves(table, "r"), bins=5, last=20)
    assert (steps.tolist(), values.tolist()) == ([4], [[3.0]])
