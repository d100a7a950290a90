"""`neoteny compare`: which of two or more runs is better, by how much, and how sure that is."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runs import significance, statistics
from runs.errors import UsageError, nearest
from runs.groups import ARM, PLAIN, expand
from runs.page import interval, number
from runs.results import COMPLETE, Run, method_labels, read_runs
from runs.significance import Significance, Times

FEW_SEEDS = 3
_ACCURACIES = tuple(f"plasticity/{when}_accuracy" for when in ("online", "final", "test"))
_ERRORS = ("plasticity/online_error", "plasticity/final_error", "plasticity/test_error", "plasticity/online_loss")
_LOWER_IS_BETTER = ("loss/", "cl/forgetting", "plasticity/dormant_fraction", *_ERRORS)
_HIGHER_IS_BETTER = ("eval/return", "train/return", "acc/", "cl/", "retrieval/", *_ACCURACIES)
_OF_ARMS = ("plasticity/online_accuracy", "plasticity/online_error")


def has_direction(metric: str) -> bool:
    """Whether more (or less) of a metric is known to be better; a weight norm, say, is just higher or lower."""
    return metric.startswith((*_LOWER_IS_BETTER, *_HIGHER_IS_BETTER))


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.startswith(_LOWER_IS_BETTER)


@dataclass(frozen=True)
class Side:
    """One run in a comparison. values: one number for each measured seed; times: the same where they are censored."""

    label: str
    run: Run
    values: dict[int, float]
    times: Times | None = None


@dataclass(frozen=True)
class Verdict:
    """How run `a` compares with run `b`; `difference` is a - b, in the unit of the metric.

    probability: how often a seed of a is ahead of a seed of b (Agarwal et al. 2021). p: two-sided, `p_holm` corrected
    for the number of comparisons made; `smallest_p`: the least these numbers of seeds can give.
    """

    a: str
    b: str
    mean_a: float
    mean_b: float
    difference: float
    low: float | None
    high: float | None
    probability: float
    probability_low: float
    probability_high: float
    test: str | None
    p: float | None
    p_holm: float | None
    smallest_p: float | None
    paired: bool
    seeds_a: int
    seeds_b: int
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """Everything that `compare` says. at: last, auc or threshold:X; horizon: the step up to which all were compared.

    runs: for each run its label, folder, number of seeds that were asked for, value of each seed, and summary; with a
    threshold the values are restricted times, and `reached` counts the seeds that got there.
    """

    metric: str
    at: str
    place: str
    horizon: int
    runs: list[dict[str, Any]]
    verdicts: list[Verdict]
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain values under the names of the fields."""
        return asdict(self)


def compare_runs(folders: Sequence[Path], metric: str | None = None, at: str = "last") -> Comparison:
    """Compare every pair of runs on one metric; interventions are compared with the plain learner, or with the first.

    folders: a run of `neoteny plasticity` stands for all its arms in which something changes. metric: None for
    eval/return, or what interventions are judged by. at: "last" compares final values, "auc" the mean over steps up to
    where the shortest run ended, "threshold:X" the steps it took to reach X. Raises UsageError for fewer than two runs,
    folders that are no runs, runs of different environments, a metric that a run does not have, or one without any
    complete seed.
    """
    threshold = _threshold(at)
    try:
        chosen = expand(folders, with_stationary=False)
        if len(chosen) < 2:
            raise UsageError("compare needs at least two run folders")
        runs, left_out = read_runs(chosen), len(expand(folders)) - len(chosen)
    except ValueError as error:
        raise UsageError(str(error)) from error
    places = list(dict.fromkeys(run.place for run in runs))
    if len(places) > 1:
        raise UsageError(
            f"the runs are not of one environment, but of {', '.join(places)}: compare those of one at a time"
        )
    arms = [run.learner for run in runs] if all(run.command == ARM for run in runs) else []
    baseline = (arms.index(PLAIN) if PLAIN in arms else 0) if arms else None
    comparison = compare_read_runs(runs, metric or _default_metric(runs), at, threshold, baseline)
    if left_out:
        comparison.warnings.append(
            f"arms in which nothing changes ({left_out}) are left out; name their folders for those"
        )
    return comparison


def _default_metric(runs: Sequence[Run]) -> str:
    if not all(run.command == ARM for run in runs):
        return "eval/return"
    return next((metric for metric in _OF_ARMS if any(metric in run.metrics for run in runs)), _OF_ARMS[0])


def compare_read_runs(
    runs: Sequence[Run],
    metric: str,
    at: str = "last",
    threshold: float | None = None,
    baseline: int | None = None,
) -> Comparison:
    """The same for runs of one environment that are read already. Raises UsageError as `compare_runs`.

    baseline: the one with which all others are compared; None compares every pair.
    """
    for run in runs:
        if not run.metrics:
            raise UsageError(f"'{run.name}' has recorded nothing yet, so there is nothing to compare")
        if metric not in run.metrics:
            raise UsageError(f"'{run.name}' has no metric '{metric}'.{nearest(metric, run.metrics)}")
    horizon = min(max(row.step for row in run.metrics[metric]) for run in runs)
    sides = [
        _side(label, run, metric, at, threshold, horizon) for label, run in zip(method_labels(runs), runs, strict=True)
    ]
    for side in sides:
        if not side.values:
            raise UsageError(f"no seed of '{side.run.name}' has a complete {metric}, so there is nothing to compare")
    lower = threshold is not None or lower_is_better(metric)
    pairs = itertools.combinations(sides, 2)
    if baseline is not None:
        pairs = [(side, sides[baseline]) for number, side in enumerate(sides) if number != baseline]
    verdicts = _corrected([_verdict(a, b, metric, lower, horizon) for a, b in pairs])
    warnings = list(_warnings(sides, metric, at, horizon))
    return Comparison(metric, at, runs[0].place, horizon, [_described(side) for side in sides], verdicts, warnings)


def _threshold(at: str) -> float | None:
    kind, _, value = at.partition(":")
    if at in ("last", "auc"):
        return None
    try:
        if kind == "threshold":
            return float(value)
    except ValueError:
        pass
    raise UsageError(f"--at must be last, auc or threshold:NUMBER, got '{at}'")


def _side(label: str, run: Run, metric: str, at: str, threshold: float | None, horizon: int) -> Side:
    rows, tasks = run.metrics[metric], run.tasks(metric)
    if threshold is None and at == "last":
        return Side(label, run, run.means_over_tasks(metric))
    if len(tasks) > 1:
        raise UsageError(f"{metric} of '{run.name}' is of several tasks, which --at {at} cannot join; use --at last")
    curves = statistics.seed_curves(rows, metric, tasks[0])
    if threshold is None:
        areas = statistics.area_under_curve(curves, horizon)
        return Side(label, run, {seed: area for seed, area in areas.items() if area is not None})
    times = significance.times_to_threshold(curves, threshold, above=not lower_is_better(metric))
    times = Times(np.minimum(times.steps, horizon), times.reached & (times.steps <= horizon))
    restricted = significance.restricted_times(times, horizon)
    return Side(label, run, dict(zip(curves, restricted.tolist(), strict=True)), times)


def _described(side: Side) -> dict[str, Any]:
    described = {"label": side.label, "run": str(side.run.path), "seeds_asked": len(side.run.seeds)}
    if side.times:
        reached = {"reached": int(side.times.reached.sum()), "median_steps": significance.median_time(side.times)}
        described |= reached
    values = {str(seed): value for seed, value in side.values.items()}
    return described | {"values": values, **statistics.summarise(side.values.values())}


def _test(a: Side, b: Side, lower: bool) -> tuple[float, Significance | None, bool]:
    """Probability that a seed of a is ahead of one of b, the test of it, and whether it was paired by seed.

    Paired only where both runs measured the same seeds, so that none is dropped for want of a partner.
    """
    x, y = (np.array(list(side.values.values())) for side in (a, b))
    if a.times and b.times:
        probability = float((1 + significance.earlier(a.times, b.times)).mean() / 2)
        x, y = significance.gehan_scores(a.times, b.times)
    else:
        sign = -1 if lower else 1
        probability = significance.probability_of_improvement(sign * x, sign * y)
    if min(len(x), len(y)) < 2:
        return probability, None, False
    if list(a.values) == list(b.values):
        return probability, significance.paired_test(x, y), True
    return probability, significance.unpaired_test(x, y), False


def _difference_interval(x: np.ndarray, y: np.ndarray, paired: bool) -> tuple[float | None, float | None]:
    if min(len(x), len(y)) < 2:
        return None, None
    if paired:
        column = (x - y)[:, None]
        return statistics.stratified_bootstrap_interval(column, statistics.mean, statistics.report_generator())
    return statistics.mean_difference_interval(x, y, statistics.report_generator())


def _verdict(a: Side, b: Side, metric: str, lower: bool, horizon: int) -> Verdict:
    x, y = (np.array(list(side.values.values())) for side in (a, b))
    probability, test, paired = _test(a, b, lower)
    low, high = _difference_interval(x, y, paired)
    ahead = significance.probability_of_improvement_interval(probability, len(x), len(y))
    verdict = Verdict(
        a=a.label,
        b=b.label,
        mean_a=float(x.mean()),
        mean_b=float(y.mean()),
        difference=float(x.mean() - y.mean()),
        low=low,
        high=high,
        probability=probability,
        probability_low=ahead[0],
        probability_high=ahead[1],
        test=test.test if test else None,
        p=test.p if test else None,
        p_holm=None,
        smallest_p=test.smallest if test else None,
        paired=paired,
        seeds_a=len(x),
        seeds_b=len(y),
        sentence="",
    )
    return replace(verdict, sentence=_in_words(verdict, metric, lower, horizon if a.times else None))


def _corrected(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """With p values corrected for the number of comparisons, if there are several."""
    tested = [index for index, verdict in enumerate(verdicts) if verdict.p is not None]
    if len(verdicts) < 2:
        return [replace(verdict, p_holm=verdict.p) for verdict in verdicts]
    holm = significance.holm([verdicts[index].p or 0.0 for index in tested])
    found = dict(zip(tested, holm, strict=True))
    return [replace(verdict, p_holm=found.get(index)) for index, verdict in enumerate(verdicts)]


def _in_words(v: Verdict, metric: str, lower: bool, horizon: int | None) -> str:
    """'td3 is better than sac: eval/return is higher by 55 [12, 98], …'. horizon: of times to a threshold."""
    times = horizon is not None
    if v.low is None or v.high is None:
        return f"{v.a} and {v.b} cannot be compared with one seed on a side; the difference is {number(v.difference)}"
    swap = (v.difference > 0) == lower if has_direction(metric) or times else v.difference < 0
    first, second, sign = (v.b, v.a, -1) if swap else (v.a, v.b, 1)
    chance = v.probability if sign > 0 else 1 - v.probability
    chances = (v.probability_low, v.probability_high) if sign > 0 else (1 - v.probability_high, 1 - v.probability_low)
    low, high = sorted((abs(v.low), abs(v.high)))
    clear = v.low > 0 or v.high < 0
    what = "it is faster by" if times else f"{metric} is {'higher' if (sign * v.difference) > 0 else 'lower'} by"
    unit = f" of the first {number(horizon)} steps" if times else ""
    odds = f"a seed of {first} is ahead of a seed of {second} with probability {chance:.2f}"
    odds += f" [{chances[0]:.2f}, {chances[1]:.2f}]"
    if v.difference == 0:
        return f"No difference between {v.a} and {v.b}: their means are equal"
    if clear:
        better = "better" if has_direction(metric) or times else "higher"
        return (
            f"{first} is {better} than {second}: {what} {number(abs(v.difference))}{unit} {interval(low, high)}; {odds}"
        )
    bounds = interval(v.low, v.high)
    return (
        f"No clear difference between {v.a} and {v.b}: {first} is ahead by {number(abs(v.difference))}{unit}, "
        f"but the 95 % interval of the difference, {bounds}, holds 0; {odds}"
    )


def _warnings(sides: Sequence[Side], metric: str, at: str, horizon: int) -> Iterator[str]:
    """What a reader must know before believing the numbers, one sentence each."""
    for side in sides:
        count = len(side.values)
        if count < FEW_SEEDS:
            seeds = "1 seed" if count == 1 else f"{count} seeds"
            yield f"{side.label} has {seeds}: with fewer than {FEW_SEEDS}, intervals and tests mean little"
        for lost in side.run.lost_seeds(metric):
            handled = "counted as long as it was seen" if side.times else "left out"
            yield f"{side.label}: {lost}; it is {handled}"
        if side.times and not side.times.reached.all():
            never = int((~side.times.reached).sum())
            yield f"{side.label}: {never} of {count} seeds did not reach the threshold; censored, not dropped"
    lengths = {side.label: max(row.step for row in side.run.metrics[metric]) for side in sides}
    if max(lengths.values()) > horizon / COMPLETE:
        told = ", ".join(f"{label} {length:,}" for label, length in lengths.items())
        used = "final values are compared all the same" if at == "last" else f"compared up to step {horizon:,}"
        yield f"the runs are not equally long ({told} steps): {used}"
    if any(list(side.values) != list(sides[0].values) for side in sides):
        yield "not all runs measured the same seeds, so those pairs are tested as independent groups"


def print_comparison(comparison: Comparison) -> None:
    """Sentences first, then the table, then what to be careful about. Warnings go to stderr."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Piped output is wide enough for a table, and a sentence stays one line.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for verdict in comparison.verdicts:
        console.print(Text(verdict.sentence + "."), soft_wrap=True)
    what = "steps to reach it" if comparison.at.startswith("threshold") else comparison.metric
    console.print(Text(f"\n{what} ({comparison.at}) on {comparison.place or 'an unnamed environment'}\n"))
    runs = Table("run", "mean [95 %]", "IQM", "seeds", box=None, pad_edge=False, header_style="bold")
    for run in comparison.runs:
        seeds = f"{run['seeds']} of {run['seeds_asked']}"
        reached = f", {run['reached']} reached it" if "reached" in run else ""
        mean = f"{number(run['mean'])} {interval(run['low'], run['high'])}"
        runs.add_row(*map(Text, [run["label"], mean, number(run["iqm"]), seeds + reached]))
    console.print(runs)
    console.print()
    several = len(comparison.verdicts) > 1
    head = ["a - b", "difference [95 %]", "P(a ahead) [95 %]", "p", *(["p Holm"] * several), "seeds"]
    pairs = Table(*head, box=None, pad_edge=False, header_style="bold")
    for v in comparison.verdicts:
        p = "-" if v.p is None else f"{v.p:.3g}{' (least possible)' if v.p == v.smallest_p else ''}"
        chance = f"{v.probability:.2f} [{v.probability_low:.2f}, {v.probability_high:.2f}]"
        cells = [f"{v.a} - {v.b}", f"{number(v.difference)} {interval(v.low, v.high)}", chance, p]
        cells += ["-" if v.p_holm is None else f"{v.p_holm:.3g}"] * several
        pairs.add_row(*map(Text, [*cells, f"{v.seeds_a}, {v.seeds_b}{' paired' if v.paired else ''}"]))
    console.print(pairs)
    errors = Console(stderr=True, highlight=False)
    for warning in comparison.warnings:
        errors.print(Text(f"note: {warning}"), soft_wrap=True)
