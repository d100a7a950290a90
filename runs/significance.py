"""Is one method better than another: probability of improvement, tests over seeds, times to a threshold.

The input are plain numbers, one a seed; larger is better, but for times. SciPy does the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from runs.statistics import SeedCurves

_PERMUTATIONS = 9_999  # all of them are tried where there are fewer: up to 13 pairs, 7 against 7 seeds


@dataclass(frozen=True)
class Significance:
    """A two-sided test. smallest: the least p that so few seeds can give, whatever they measure."""

    test: str
    p: float
    smallest: float


@dataclass(frozen=True)
class Times:
    """Steps [S] at which seeds reached a threshold; where `reached` [S] is False, until when they did not."""

    steps: np.ndarray
    reached: np.ndarray


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> float:
    """How often a run of x beats a run of y, ties count half, averaged over tasks. [Sx] and [Sy], or [Sx, K], [Sy, K].

    Agarwal et al. 2021, equation 1: the Mann-Whitney statistic over the number of pairs.
    """
    better = np.sign(_column(x)[:, None] - _column(y)[None])  # [Sx, Sy, K]
    return float((1 + better).mean() / 2)


def probability_of_improvement_interval(
    probability: float, runs_x: int, runs_y: int, tasks: int = 1, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval (low, high) of a probability of improvement: Newcombe 2006 ("Part 2"), method 5, a score interval.

    The bootstrap says [1, 1] as soon as a few runs are in order and holds the truth in 39 to 94 % of cases; this one
    in 90 to 97 % (docs/results/intervals.md). With K tasks the variance of their mean is 1 / K of one task's.
    """
    from scipy.special import ndtri

    z = ndtri((1 + confidence) / 2)
    half = (runs_x + runs_y) / 2 - 1

    def outside(theta: float) -> bool:
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        variance = theta * (1 - theta) * spread / (runs_x * runs_y * tasks)
        return (theta - probability) ** 2 > z * z * variance

    return _boundary(outside, 0.0, probability), _boundary(outside, 1.0, probability)


def paired_test(x: ArrayLike, y: ArrayLike) -> Significance:
    """Sign-flip permutation test of the mean difference of runs that share their seeds: x [S], y [S] in one order.

    With S pairs no p below 2 / 2^S is possible: 0.25 for 3, 0.06 for 5. Raises ValueError for fewer than two pairs.
    """
    from scipy.stats import permutation_test

    differences = np.asarray(x, dtype=np.float64) - np.asarray(y, dtype=np.float64)
    if differences.ndim != 1 or len(differences) < 2:
        raise ValueError(f"a paired test needs at least two pairs, got shape {list(differences.shape)}")
    smallest = max(2.0 ** (1 - len(differences)), 1 / (_PERMUTATIONS + 1))
    if not differences.any():
        return Significance("paired permutation test", 1.0, smallest)
    found = permutation_test(
        (differences,), np.mean, permutation_type="samples", vectorized=True, n_resamples=_PERMUTATIONS, rng=0
    )
    return Significance("paired permutation test", float(found.pvalue), smallest)


def unpaired_test(x: ArrayLike, y: ArrayLike) -> Significance:
    """Mann-Whitney test of two independent groups of runs [Sx], [Sy], by permutation, so that ties do no harm.

    Raises ValueError for fewer than two runs in a group.
    """
    from scipy.special import comb
    from scipy.stats import PermutationMethod, mannwhitneyu

    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a test needs at least two runs on each side, got {len(x)} and {len(y)}")
    smallest = max(2 / float(comb(len(x) + len(y), len(x))), 1 / (_PERMUTATIONS + 1))
    method = PermutationMethod(n_resamples=_PERMUTATIONS, rng=np.random.default_rng(0))
    found = mannwhitneyu(x, y, method=method)  # pyright: ignore[reportArgumentType]
    return Significance("Mann-Whitney test", float(found.pvalue), smallest)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for having made several comparisons (Holm 1979), in the given order."""
    order = np.argsort(p_values)
    corrected, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def times_to_threshold(curves: SeedCurves, threshold: float, above: bool = True) -> Times:
    """When each seed's curve first was at or above (or at or below) a threshold, seeds in the given order."""
    steps, reached = [], []
    for at, values in curves.values():
        there = np.flatnonzero(values >= threshold if above else values <= threshold)
        steps.append(at[there[0]] if len(there) else at[-1])
        reached.append(len(there) > 0)
    return Times(np.array(steps, dtype=np.float64), np.array(reached, dtype=bool))


def restricted_mean_time(times: Times, horizon: float) -> float:
    """Mean of min(time, horizon): the area under the Kaplan-Meier curve up to `horizon`.

    A seed that ended before it reached the threshold counts as long as it was seen, and is not dropped.
    """
    area, share, before = 0.0, 1.0, 0.0
    for at in np.unique(times.steps[times.reached & (times.steps <= horizon)]):
        area += share * (at - before)
        share *= 1 - (times.reached & (times.steps == at)).sum() / (times.steps >= at).sum()
        before = at
    return float(area + share * (horizon - before))


def restricted_times(times: Times, horizon: float) -> np.ndarray:
    """One number [S] a seed whose mean is the restricted mean time: min(time, horizon) where nothing is censored early.

    Else the jackknife's pseudo-observations (Andersen, Hansen & Klein 2004), which stand in for what was not seen.
    """
    count = len(times.steps)
    if times.reached[times.steps < horizon].all():
        return np.minimum(times.steps, horizon)
    whole = count * restricted_mean_time(times, horizon)
    others = [np.arange(count) != left_out for left_out in range(count)]
    return np.array(
        [whole - (count - 1) * restricted_mean_time(Times(times.steps[o], times.reached[o]), horizon) for o in others]
    )


def median_time(times: Times) -> float | None:
    """The step by which half of the seeds had reached the threshold (Kaplan-Meier), None if fewer did."""
    share = 1.0
    for at in np.unique(times.steps[times.reached]):
        share *= 1 - (times.reached & (times.steps == at)).sum() / (times.steps >= at).sum()
        if share <= 0.5:
            return float(at)
    return None


def earlier(x: Times, y: Times) -> np.ndarray:
    """Which of two seeds reached the threshold first: [Sx, Sy], 1 for x, -1 for y, 0 where nobody can know."""
    first = x.reached[:, None] & (x.steps[:, None] < np.where(y.reached, y.steps, np.nextafter(y.steps, np.inf)))
    second = y.reached[None] & (y.steps[None] < np.where(x.reached, x.steps, np.nextafter(x.steps, np.inf))[:, None])
    return first.astype(np.float64) - second


def gehan_scores(x: Times, y: Times) -> tuple[np.ndarray, np.ndarray]:
    """A number for each seed, [Sx] and [Sy], that ranks censored times: how many of all seeds it beat, less lost to.

    Gehan 1965. Without censoring these are the ranks in reverse, so a test of them is the Mann-Whitney test.
    """
    both = Times(np.concatenate([x.steps, y.steps]), np.concatenate([x.reached, y.reached]))
    scores = earlier(both, both).sum(axis=1)
    return scores[: len(x.steps)], scores[len(x.steps) :]


def _column(x: ArrayLike) -> np.ndarray:
    """[S] or [S, K] -> [S, K]."""
    x = np.asarray(x, dtype=np.float64)
    return x[:, None] if x.ndim == 1 else x


def _boundary(outside: Callable[[float], bool], out: float, inside: float) -> float:
    """Where `outside` changes between a point outside and one inside, to 15 digits."""
    if not outside(out):
        return out
    for _ in range(60):
        middle = (out + inside) / 2
        if outside(middle):
            out = middle
        else:
            inside = middle
    return (out + inside) / 2
