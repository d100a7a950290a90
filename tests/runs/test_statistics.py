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
    low, high = stratified_bootstrap_interval(scores, statistics.mean, generator(), 2000)
    assert (low, high) == (-1.0, 1.0)


def test_the_interval_of_two_runs_by_hand():
    """Means of two draws from {0, 1}: 0 and 1 with probability 1/4 each, 1/2 with 1/2."""
    scores = np.array([[0.0], [1.0]])
    assert stratified_bootstrap_interval(scores, statistics.mean, generator(), 4000, 0.95) == (0.0, 1.0)
    assert stratified_bootstrap_interval(scores, statistics.mean, generator(), 4000, 0.4) == (0.5, 0.5)


def test_the_interval_agrees_with_scipys_percentile_bootstrap():
    x = generator(3).normal(size=12)
    ours = stratified_bootstrap_interval(x[:, None], statistics.mean, generator(), 40_000)
    theirs = scipy.stats.bootstrap((x,), np.mean, n_resamples=40_000, method="percentile", rng=generator(1))
    interval = theirs.confidence_interval
    assert ours == pytest.approx((interval.low, interval.high), abs=0.02)  # 0.02: 1.5 % of the width, resampling noise


@pytest.mark.parametrize(("runs", "low", "high"), [(5, 0.80, 0.89), (30, 0.91, 0.96)])
def test_coverage_on_normal_data(runs: int, low: float, high: float):
    """Percentile intervals cover too little with few runs: 0.84 at 5, 0.93 at 30 (theory: t and n - 1 corrections).

    1,500 data sets: the standard error of a coverage is below 0.01.
    """
    random = generator(5)
    data = random.normal(loc=3.0, size=(1500, runs, 1))
    hits = 0
    for scores in data:
        bounds = stratified_bootstrap_interval(scores, statistics.mean, random, 400)
        hits += bounds[0] <= 3.0 <= bounds[1]
    assert low < hits / len(data) < high


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
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)


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
    assert 0 < summary["low"] < 121 / 8 < summary["high"] < 100
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
    for step in range(3):
        alone = stratified_bootstrap_interval(values[:, [step]], statistics.mean, generator(step), 20_000)
        width = alone[1] - alone[0]
        assert (low[step], high[step]) == pytest.approx(alone, abs=0.04 * width)  # resampling noise
    assert (low[3], high[3]) == pytest.approx((7, 7))
