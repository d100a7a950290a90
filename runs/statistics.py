"""Statistics of a few seeds: interquartile mean, stratified bootstrap, curves aligned over seeds.

After Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice" (arXiv:2108.13264),
sections 4.1 and 4.3. Only NumPy. The table of a run (`record.Row`) is the input, plain arrays and numbers the output.

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
    """One metric over seeds: mean with the 95 % bootstrap interval of the mean, interquartile mean, seeds measured.

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
    """[..., N] -> [...]. Over all numbers handed in; medians of task means are up to the caller."""
    return np.median(np.asarray(x, dtype=np.float64), axis=-1)


def report_generator() -> np.random.Generator:
    """The generator of every interval that is printed: the same numbers give the same interval."""
    return np.random.default_rng(_REPORT_SEED)


def stratified_bootstrap_interval(
    scores: ArrayLike,
    statistic: Statistic,
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval (low, high) of a statistic over all runs and tasks.

    scores [S, K]; each resample draws S runs with replacement, anew in each task, so every task keeps its weight.
    statistic: reduces the last axis; it sees [..., S * K].
    Percentile intervals of few runs are too short: with 5 normal runs about 85 % hold the true mean, not 95 %.
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
    low, high = np.quantile(values, _tails(confidence))
    return float(low), float(high)


def mean_curve_interval(
    values: ArrayLike, generator: np.random.Generator, resamples: int = 2000, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise percentile interval of the mean over seeds. values [S, T] -> low [T], high [T].

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
    return bounds[0], bounds[1]


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


def align_in_bins(curves: SeedCurves, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Curves whose seeds recorded at steps of their own (ends of episodes): steps [T <= bins], values [S, T].

    The range from 0 to the last step is cut into equal bins. A value is the mean of a seed's points in the bin, its
    step the bin's right edge. Bins that one seed lacks are left out for all. Raises ValueError for no curves or bins.
    """
    if bins < 1 or not curves:
        raise ValueError(f"need at least one bin and one curve, got {bins} and {len(curves)}")
    last = max(int(steps[-1]) for steps, _ in curves.values())
    edges = np.linspace(0, max(last, 1), bins + 1)
    sums, counts = np.zeros((len(curves), bins)), np.zeros((len(curves), bins))
    for index, (steps, values) in enumerate(curves.values()):
        # Step 0 belongs to the first bin; every other bin is open on the left and closed on the right.
        where = np.clip(np.searchsorted(edges, steps, side="left") - 1, 0, bins - 1)
        np.add.at(sums[index], where, values)
        np.add.at(counts[index], where, 1)
    shared = (counts > 0).all(axis=0)
    return np.round(edges[1:][shared]).astype(np.int64), sums[:, shared] / counts[:, shared]


def _checked(scores: ArrayLike, resamples: int, confidence: float) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[0] < 2 or scores.shape[1] < 1:
        raise ValueError(f"an interval needs an array [runs >= 2, columns >= 1], got shape {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise ValueError("an interval needs finite numbers; leave missing ones out first")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"need resamples >= 1 and confidence in (0, 1), got {resamples} and {confidence}")
    return scores


def _tails(confidence: float) -> list[float]:
    return [(1 - confidence) / 2, (1 + confidence) / 2]


def _mean_or_missing(values: Sequence[float | None]) -> float | None:
    """A mean only if nothing is missing."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
