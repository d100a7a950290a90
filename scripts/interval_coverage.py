"""How often 95 % intervals of few seeds hold the truth: ours, the percentile bootstrap, BCa and the studentised one.

Data sets are drawn from laws whose mean is known; an interval is worth its name if 95 of 100 hold that mean. The second
number of a cell is the median width, in standard deviations. docs/results/intervals.md shows the output.

    python scripts/interval_coverage.py --data-sets 2000
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import numpy as np
import scipy.stats

from runs import significance, statistics

SEEDS = (2, 3, 4, 5, 7, 10, 20)
RESAMPLES = 1000
Bounds = tuple[float, float]
Interval = Callable[[np.ndarray, np.random.Generator], Bounds]


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.normal(size=shape)


def skewed(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Log-normal with a skewness of 3.3, mean 0, standard deviation 1."""
    s = 0.75
    return (random.lognormal(0, s, shape) - np.exp(s * s / 2)) / np.sqrt((np.exp(s * s) - 1) * np.exp(s * s))


def failing(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """One seed in five does not learn; mean 0, standard deviation 1."""
    return random.normal(0, 0.18, shape) - (random.random(shape) < 0.2) * 2.46 + 0.492


LAWS = {"normal": normal, "skewed": skewed, "one in five fails": failing}


def widened(scores: np.ndarray, random: np.random.Generator) -> Bounds:
    return statistics.stratified_bootstrap_interval(scores, statistics.mean, random, RESAMPLES)


def percentile(scores: np.ndarray, random: np.random.Generator) -> Bounds:
    return statistics.stratified_bootstrap_interval(scores, statistics.mean, random, RESAMPLES, widened=False)


def bca(scores: np.ndarray, random: np.random.Generator) -> Bounds:
    found = scipy.stats.bootstrap((scores[:, 0],), np.mean, n_resamples=RESAMPLES, method="BCa", rng=random)
    return found.confidence_interval.low, found.confidence_interval.high


def studentised(scores: np.ndarray, random: np.random.Generator) -> Bounds:
    x = scores[:, 0]
    drawn = x[random.integers(0, len(x), (RESAMPLES, len(x)))]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (drawn.mean(axis=1) - x.mean()) / drawn.std(axis=1, ddof=1)
    t[np.isnan(t)] = 0.0
    low, high = np.quantile(t, [0.975, 0.025], method="nearest")
    spread = x.std(ddof=1)
    return float(x.mean() - low * spread), float(x.mean() - high * spread)


INTERVALS: dict[str, Interval] = {"ours": widened, "percentile": percentile, "BCa": bca, "studentised": studentised}


def cell(bounds: list[Bounds], truth: float) -> str:
    low, high = np.array(bounds).T
    return f"{100 * np.mean((low <= truth) & (truth <= high)):.0f} % / {np.median(high - low):.2f}"


def show(head: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def of_the_mean(count: int, random: np.random.Generator) -> None:
    print("Mean of one task\n")
    rows = []
    for name, law in LAWS.items():
        for seeds in SEEDS:
            data = law(random, (count, seeds, 1))
            cells = [cell([interval(scores, random) for scores in data], 0.0) for interval in INTERVALS.values()]
            rows.append([name, str(seeds), *cells])
    show(["law", "seeds", *INTERVALS], rows)


def of_the_interquartile_mean(count: int, random: np.random.Generator) -> None:
    print("Interquartile mean over tasks of different levels and spreads\n")
    rows = []
    for name in ("normal", "skewed"):
        for tasks in (1, 6, 26):
            level = np.linspace(0.1, 1.6, tasks) ** 1.5
            spread = 0.1 + 0.2 * level
            truth = float(
                statistics.interquartile_mean((level + spread * LAWS[name](random, (200_000, tasks))).ravel())
            )
            for seeds in (3, 5, 10):
                data = level + spread * LAWS[name](random, (count, seeds, tasks))
                cells = []
                for wide in (True, False):
                    bounds = [
                        statistics.stratified_bootstrap_interval(
                            scores, statistics.interquartile_mean, random, RESAMPLES, widened=wide
                        )
                        for scores in data
                    ]
                    cells.append(cell(bounds, truth))
                rows.append([name, str(tasks), str(seeds), *cells])
    show(["law", "tasks", "seeds", "ours", "percentile"], rows)


def of_the_probability_of_improvement(count: int, random: np.random.Generator) -> None:
    print("Probability of improvement of normal seeds, one ahead of the other by a shift in standard deviations\n")
    rows = []
    for shift in (0.0, 1.0, 2.0):
        truth = float(scipy.stats.norm.cdf(shift / np.sqrt(2)))
        for seeds in (3, 5, 10):
            ours, bootstrap = [], []
            for x, y in zip(random.normal(shift, 1, (count, seeds)), random.normal(0, 1, (count, seeds)), strict=True):
                found = significance.probability_of_improvement(x, y)
                ours.append(significance.probability_of_improvement_interval(found, seeds, seeds))
                drawn = [side[random.integers(0, seeds, (300, seeds))] for side in (x, y)]
                better = (1 + np.sign(drawn[0][:, :, None] - drawn[1][:, None])).mean(axis=(1, 2)) / 2
                bootstrap.append(tuple(np.quantile(better, [0.025, 0.975])))
            rows.append([f"{shift:g}", f"{truth:.2f}", str(seeds), cell(ours, truth), cell(bootstrap, truth)])
    show(["shift", "truth", "seeds", "ours (Newcombe)", "percentile bootstrap"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", type=int, default=2000, help="for each cell")
    count = parser.parse_args().data_sets
    warnings.filterwarnings("ignore", category=scipy.stats.DegenerateDataWarning)
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    random = np.random.default_rng(0)
    of_the_mean(count, random)
    of_the_interquartile_mean(count, random)
    of_the_probability_of_improvement(count, random)


if __name__ == "__main__":
    main()
