"""Statistics of a few seeds: robust means, bootstrap intervals, performance profiles, curves aligned over seeds.

After Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice" (arXiv:2108.13264),
section 4. The table of a run (`record.Row`) is the input, plain arrays and numbers the output.

The percentile bootstrap of that paper is too short for few seeds. Intervals are therefore widened as the t
distribution widens a normal interval (`small_sample_factor`). `scripts/interval_coverage.py` measures what that does:
docs/results/intervals.md.

Axes: S seeds (runs), K tasks, T steps. A statistic reduces the last axis of an array.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

from runs.record import Row

Statistic = Callable[[np.ndarray], np.ndarray]
SeedCurves = dict[int, tuple[np.ndarray, np.ndarray]]  # seed -> (steps [T_seed] increasing, values [T_seed])

RESAMPLES = 10_000  # the bounds of a 95 % interval move by about 1 % of its width between generators
_REPORT_SEED = 20_210_831  # any constant: a report written twice must say the same
_CHUNK = 2_000_000  # numbers held at a time while resampling, 16 MB


class Summary(TypedDict):
    """One metric over seeds: mean with its 95 % interval, interquartile mean, number of seeds measured.

    One seed has no interval: `low` and `high` are None. No seed measured: every number is None and `seeds` is 0.
    """

    mean: float | None
    low: float | None
    high: float | None
    iqm: float | None
    seeds: int


def interquartile_mean(x: ArrayLike) -> np.ndarray:
    """Mean of the middle half of the last axis: floor(N / 4) values are dropped at each end. [..., N] -> [...].

    The definition of `scipy.stats.trim_mean(x, 0.25)`. With N < 4 it is the mean.
    """
    x = np.sort(np.asarray(x, dtype=np.float64), axis=-1)
    drop = x.shape[-1] // 4
    return x[..., drop : x.shape[-1] - drop].mean(axis=-1)


def mean(x: ArrayLike) -> np.ndarray:
    """[..., N] -> [...]."""
    return np.asarray(x, dtype=np.float64).mean(axis=-1)


def median(x: ArrayLike) -> np.ndarray:
    """[..., N] -> [...]. Over all numbers handed in; see `median_of_task_means` for several tasks."""
    return np.median(np.asarray(x, dtype=np.float64), axis=-1)


def median_of_task_means(tasks: int) -> Statistic:
    """The median that published tables of K tasks show: of the tasks' means over seeds. Reduces [..., S * K]."""

    def reduce(x: ArrayLike) -> np.ndarray:
        x = np.asarray(x, dtype=np.float64)
        return np.median(x.reshape(*x.shape[:-1], -1, tasks).mean(axis=-2), axis=-1)

    return reduce


def optimality_gap(x: ArrayLike, goal: float = 1.0) -> np.ndarray:
    """How far scores fall short of a goal on average, without credit for what exceeds it. [..., N] -> [...].

    goal - mean(min(x, goal)), Agarwal et al. 2021, section 4.3. Smaller is better.
    """
    return goal - np.minimum(np.asarray(x, dtype=np.float64), goal).mean(axis=-1)


def report_generator() -> np.random.Generator:
    """The generator of every interval that is printed: the same numbers give the same interval."""
    return np.random.default_rng(_REPORT_SEED)


def stratified_bootstrap_interval(
    scores: ArrayLike,
    statistic: Statistic,
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    widened: bool = True,
) -> tuple[float, float]:
    """Interval (low, high) of a statistic over all runs and tasks, from its stratified bootstrap distribution.

    scores [S, K]; each resample draws S runs with replacement, anew in each task, so every task keeps its weight.
    statistic: reduces the last axis; it sees [..., S * K].
    widened: the distances of the percentiles from the statistic are multiplied by `small_sample_factor`. False gives
    the plain percentile interval, as published tables have it: of 5 normal runs about 84 % hold the true mean.
    Raises ValueError for fewer than two runs, no task, numbers that are not finite, or a confidence outside (0, 1).
    """
    scores = _checked(scores, resamples, confidence)
    runs, tasks = scores.shape
    values = np.empty(resamples)
    chunk = max(1, _CHUNK // scores.size)
    columns = np.arange(tasks)
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        rows = generator.integers(0, runs, size=(count, runs, tasks))
        values[start : start + count] = statistic(scores[rows, columns].reshape(count, runs * tasks))
    bounds = np.quantile(values, _tails(confidence))
    if widened:
        centre = float(statistic(scores.reshape(-1)))
        bounds = centre + small_sample_factor(scores, confidence) * (bounds - centre)
    return float(bounds[0]), float(bounds[1])


def small_sample_factor(scores: ArrayLike, confidence: float = 0.95) -> float:
    """How much wider than its bootstrap percentiles an interval of few runs has to be. scores [S, K].

    sqrt(S / (S - 1)) undoes the bootstrap's division of variances by S instead of S - 1 (Davison & Hinkley 1997,
    section 3.2); t / z allows for the estimated variance, with the degrees of freedom of a mean over K strata with
    variances of their own (Satterthwaite 1946). 2.7 for 3 runs of one task, 1.6 for 5, 1.2 for 10, nearly 1 for many.
    """
    scores = np.asarray(scores, dtype=np.float64)
    runs = scores.shape[0]
    variances = scores.var(axis=0, ddof=1)
    largest = variances.max()
    if largest == 0:
        return 1.0
    variances = variances / largest  # their squares must not underflow
    freedom = (runs - 1) * variances.sum() ** 2 / (variances**2).sum()
    return float(np.sqrt(runs / (runs - 1)) * _t_over_normal(freedom, confidence))


def mean_curve_interval(
    values: ArrayLike, generator: np.random.Generator, resamples: int = 2000, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise interval of the mean over seeds, widened as one task's. values [S, T] -> low [T], high [T].

    A resample draws whole seeds, the same ones at every step. Raises ValueError as `stratified_bootstrap_interval`.
    """
    values = _checked(values, resamples, confidence)
    seeds, steps = values.shape
    rows = generator.integers(0, seeds, size=(resamples, seeds))
    # How often each seed was drawn; the means of all resamples are then one matrix product.
    weights = (rows[:, :, None] == np.arange(seeds)).sum(axis=1) / seeds
    bounds = np.empty((2, steps))
    chunk = max(1, _CHUNK // resamples)
    for start in range(0, steps, chunk):
        part = slice(start, start + chunk)
        bounds[:, part] = np.quantile(weights @ values[:, part], _tails(confidence), axis=0)
    centre = values.mean(axis=0)
    widening = np.sqrt(seeds / (seeds - 1)) * _t_over_normal(seeds - 1, confidence)
    low, high = centre + widening * (bounds - centre)
    return low, high


def mean_difference_interval(
    x: ArrayLike, y: ArrayLike, generator: np.random.Generator, resamples: int = RESAMPLES, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of mean(x) - mean(y) of two independent groups of runs [Sx], [Sy], each drawn from itself.

    Widened with Welch's degrees of freedom. Raises ValueError as `stratified_bootstrap_interval`.
    """
    centre, deviations, parts = 0.0, np.zeros(resamples), []
    for group, sign in ((x, 1.0), (y, -1.0)):
        values = _checked(np.asarray(group, dtype=np.float64)[:, None], resamples, confidence)[:, 0]
        count = len(values)
        drawn = values[generator.integers(0, count, size=(resamples, count))].mean(axis=1)
        centre += sign * values.mean()
        deviations += sign * np.sqrt(count / (count - 1)) * (drawn - values.mean())
        parts.append((values.var(ddof=1) / count, count - 1))
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return float(centre), float(centre)
    freedom = 1 / sum((variance / total) ** 2 / own for variance, own in parts)
    low, high = centre + _t_over_normal(freedom, confidence) * np.quantile(deviations, _tails(confidence))
    return float(low), float(high)


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
    """Fraction of runs whose score is above each threshold, averaged over tasks. scores [S, K], [T] -> [T].

    The run-score distribution of Agarwal et al. 2021, equation 2.
    """
    scores = np.asarray(scores, dtype=np.float64)
    return (scores.reshape(-1, 1) > np.asarray(thresholds, dtype=np.float64)).mean(axis=0)


def performance_profile_interval(
    scores: ArrayLike,
    thresholds: ArrayLike,
    generator: np.random.Generator,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise interval of a performance profile, stratified by task: low [T], high [T], both in 0..1.

    Widened as if all tasks had the same variance. Raises ValueError as `stratified_bootstrap_interval`.
    """
    scores = _checked(scores, resamples, confidence)
    runs, tasks = scores.shape
    above = scores[:, :, None] > np.asarray(thresholds, dtype=np.float64)  # [S, K, T]
    fractions = np.zeros((resamples, above.shape[2]))
    for task in range(tasks):
        rows = generator.integers(0, runs, size=(resamples, runs))
        counts = (rows[:, :, None] == np.arange(runs)).sum(axis=1)
        fractions += counts @ above[:, task] / (runs * tasks)
    centre = performance_profile(scores, thresholds)
    widening = np.sqrt(runs / (runs - 1)) * _t_over_normal(tasks * (runs - 1), confidence)
    low, high = centre + widening * (np.quantile(fractions, _tails(confidence), axis=0) - centre)
    return low.clip(0, 1), high.clip(0, 1)


def summarise(values: Iterable[float | None]) -> Summary:
    """One metric's values, one a seed, as mean, interval, interquartile mean and number of seeds.

    Missing values (None, nan, infinite) are left out of the statistics and of `seeds`. If `seeds` is below the number
    that was run, some were lost, and the rest may flatter the method.
    """
    measured = np.array([v for v in values if v is not None and np.isfinite(v)], dtype=np.float64)
    if measured.size == 0:
        return {"mean": None, "low": None, "high": None, "iqm": None, "seeds": 0}
    low: float | None = None
    high: float | None = None
    if measured.size > 1:
        low, high = stratified_bootstrap_interval(measured[:, None], mean, report_generator())
    return {
        "mean": float(mean(measured)),
        "low": low,
        "high": high,
        "iqm": float(interquartile_mean(measured)),
        "seeds": int(measured.size),
    }


def final_values(rows: Iterable[Row], name: str, task: int | str | None = None) -> dict[int, float | None]:
    """The last value of a metric for each seed that has one, seeds in order. None if the last one is missing.

    Several rows of the last step (episodes that ended together) are averaged.
    """
    last: dict[int, tuple[int, list[float | None]]] = {}
    for row in rows:
        if row.name != name or row.task != task:
            continue
        if row.seed not in last or row.step > last[row.seed][0]:
            last[row.seed] = (row.step, [row.value])
        elif row.step == last[row.seed][0]:
            last[row.seed][1].append(row.value)
    return {seed: _mean_or_missing(last[seed][1]) for seed in sorted(last)}


def means_over_tasks(rows: Sequence[Row], name: str) -> dict[int, float | None]:
    """The mean of a metric's last values over its tasks, for each seed that has all of them; its value without tasks.

    None if one of them is missing.
    """
    tasks = dict.fromkeys(row.task for row in rows if row.name == name)
    finals = [final_values(rows, name, task) for task in tasks]
    seeds = sorted(set.intersection(*map(set, finals))) if finals else []
    return {seed: _mean_or_missing([values[seed] for values in finals]) for seed in seeds}


def summarise_rows(rows: Iterable[Row]) -> dict[str, Summary]:
    """The last value of every metric, over seeds. Of one with tasks NAME, its mean over them, and NAME/TASK of each."""
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row.name].append(row)
    found: dict[str, Summary] = {}
    for name, own in by_name.items():
        found[name] = summarise(means_over_tasks(own, name).values())
        for task in dict.fromkeys(row.task for row in own if row.task is not None):
            found[f"{name}/{task}"] = summarise(final_values(own, name, task).values())
    return found


def seed_curves(rows: Iterable[Row], name: str, task: int | str | None = None) -> SeedCurves:
    """Each seed's own curve of a metric, seeds in order. Rows of one step are averaged, missing values left out."""
    points: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.name == name and row.task == task and row.value is not None:
            points[row.seed][row.step].append(row.value)
    return {
        seed: (np.array(sorted(of_seed)), np.array([float(np.mean(of_seed[step])) for step in sorted(of_seed)]))
        for seed, of_seed in sorted(points.items())
    }


def curve(rows: Iterable[Row], name: str, task: int | str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A metric at the steps that all its seeds share: steps [T], values [S, T]. See `seed_curves` and `align`."""
    return align(seed_curves(rows, name, task))


def align(curves: SeedCurves) -> tuple[np.ndarray, np.ndarray]:
    """Curves at the steps that all seeds share: steps [T], values [S, T], seeds in the given order.

    A step that one seed lacks (not reached, or the value missing there) is left out for all, so no mean changes its
    seeds on the way. No curves: shapes [0] and [0, 0].
    """
    if not curves:
        return np.empty(0, dtype=np.int64), np.empty((0, 0))
    common = set.intersection(*(set(steps.tolist()) for steps, _ in curves.values()))
    steps = np.array(sorted(common), dtype=np.int64)
    return steps, np.stack([values[np.isin(own, steps)] for own, values in curves.values()])


def align_in_bins(curves: SeedCurves, bins: int, last: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Curves whose seeds recorded at steps of their own (ends of episodes): steps [T <= bins], values [S, T].

    The range from 0 to `last` (the last step of all, if None) is cut into equal bins. A value is the mean of a seed's
    points in the bin, its step the bin's right edge. Bins that one seed lacks are left out for all. Raises ValueError
    for no curves or bins.
    """
    if bins < 1 or not curves:
        raise ValueError(f"need at least one bin and one curve, got {bins} and {len(curves)}")
    last = max(int(steps[-1]) for steps, _ in curves.values()) if last is None else last
    edges = np.linspace(0, max(last, 1), bins + 1)
    sums, counts = np.zeros((len(curves), bins)), np.zeros((len(curves), bins))
    for index, (steps, values) in enumerate(curves.values()):
        # Step 0 belongs to the first bin; every other bin is open on the left and closed on the right.
        where = np.clip(np.searchsorted(edges, steps, side="left") - 1, 0, bins - 1)
        np.add.at(sums[index], where, values)
        np.add.at(counts[index], where, 1)
    shared = (counts > 0).all(axis=0)
    return np.round(edges[1:][shared]).astype(np.int64), sums[:, shared] / counts[:, shared]


def area_under_curve(curves: SeedCurves, horizon: int) -> dict[int, float | None]:
    """Each seed's mean over steps up to `horizon`: the area under its curve by the trapezoid rule, over its width.

    None for a seed that was recorded less than 90 % of the way, or at one step only; the last value stands for the
    rest of the way. Same unit as the metric.
    """
    areas: dict[int, float | None] = {}
    for seed, (steps, values) in curves.items():
        inside = steps < horizon
        if steps[-1] < 0.9 * horizon or not inside.any():
            areas[seed] = None
            continue
        at = np.append(steps[inside], horizon)
        heights = np.append(values[inside], np.interp(horizon, steps, values))
        areas[seed] = float(np.trapezoid(heights, at) / (at[-1] - at[0]))
    return areas


def _checked(scores: ArrayLike, resamples: int, confidence: float) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[0] < 2 or scores.shape[1] < 1:
        raise ValueError(f"an interval needs an array [runs >= 2, columns >= 1], got shape {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise ValueError("an interval needs finite numbers; leave missing ones out first")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"need resamples >= 1 and confidence in (0, 1), got {resamples} and {confidence}")
    return scores


def _t_over_normal(freedom: float, confidence: float) -> float:
    """How much longer the central interval of a t distribution is than that of a normal one."""
    from scipy.special import ndtri, stdtrit

    upper = (1 + confidence) / 2
    return float(stdtrit(freedom, upper) / ndtri(upper))


def _tails(confidence: float) -> list[float]:
    return [(1 - confidence) / 2, (1 + confidence) / 2]


def _mean_or_missing(values: Sequence[float | None]) -> float | None:
    """A mean only if nothing is missing."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
