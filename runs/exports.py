"""The numbers of a report for other programs: CSV for spreadsheets and plots, LaTeX for papers."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from runs import figures, statistics
from runs.page import number
from runs.report import Report
from runs.results import measure, measure_over_tasks

_RUN = ("run", "method", "place", "metric", "task")
_SUMMARY = (*_RUN, "seeds", "seeds_asked", "mean", "low", "high", "iqm", "iqm_low", "iqm_high", "values")
_CURVES = (*_RUN, "step", "mean", "low", "high", "seeds")
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def summary_csv(report: Report) -> str:
    """One line for each run, metric and task: final values over seeds, mean and IQM with their 95 % intervals."""
    rows = []
    for run, label in zip(report.runs, report.labels, strict=True):
        for metric in run.metrics:
            for task in run.tasks(metric):
                found = measure(run, metric, task)
                s = found.summary
                values = " ".join(f"{seed}:{value!r}" for seed, value in found.values.items())
                bounds = [s["mean"], s["low"], s["high"], s["iqm"], found.iqm_low, found.iqm_high]
                rows.append([run.name, label, run.place, metric, task, s["seeds"], len(run.seeds), *bounds, values])
    return _csv(_SUMMARY, rows)


def curves_csv(report: Report) -> str:
    """One line for each run, metric, task and step: mean over seeds, its 95 % interval, number of seeds.

    A curve of more than 300 steps is thinned to means of neighbours, as on the page.
    """
    return _csv(_CURVES, _curve_rows(report))


def _curve_rows(report: Report) -> Iterator[list[Any]]:
    for run, label in zip(report.runs, report.labels, strict=True):
        for metric, task in itertools.chain.from_iterable([(m, t) for t in run.tasks(m)] for m in run.metrics):
            rows = [row for row in run.metrics[metric] if row.task == task]
            for line in figures.lines_of({label: rows}, metric, {}):
                bounds: Sequence[Iterable[float | None]] = ([None] * len(line.steps),) * 2
                if len(line.values) > 1:
                    bounds = statistics.mean_curve_interval(line.values, statistics.report_generator())
                columns = zip(line.steps, line.values.mean(axis=0), *bounds, strict=True)
                for step, *values in columns:
                    yield [run.name, label, run.place, metric, task, int(step), *values, len(line.values)]


def summary_latex(report: Report) -> str:
    r"""A booktabs table of the main metric: a line a method, a column a place, mean and 95 % interval.

    The highest mean of a column is bold if returns or accuracies are shown. Needs \usepackage{booktabs}.
    """
    metric = report.main_metric
    summaries = {
        (label, run.place): measure_over_tasks(run, metric).summary
        for run, label in zip(report.runs, report.labels, strict=True)
    }
    methods, places = dict.fromkeys(report.labels), report.places
    lines = [rf"\begin{{tabular}}{{l{'r' * len(places)}}}", r"\toprule", " & ".join(["", *map(_tex, places)]) + r" \\"]
    lines.append(r"\midrule")
    for method in methods:
        cells = [_tex(method)]
        for place in places:
            means = [s["mean"] for (_, where), s in summaries.items() if where == place and s["mean"] is not None]
            summary = summaries.get((method, place))
            bold = report.higher_is_better and len(means) > 1 and summary is not None and summary["mean"] == max(means)
            cells.append("--" if summary is None or summary["mean"] is None else _tex_value(dict(summary), bold))
        lines.append(" & ".join(cells) + r" \\")
    seeds = sorted({summary["seeds"] for summary in summaries.values()})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    lines += [r"\bottomrule", r"\end{tabular}", f"% final {metric}: mean of {count} seeds, 95 % interval in brackets"]
    return "\n".join(lines) + "\n"


def _tex_value(summary: dict[str, Any], bold: bool) -> str:
    mean = number(summary["mean"])
    text = rf"\textbf{{{mean}}}" if bold else mean
    if summary["low"] is not None:
        text += rf" {{\scriptsize [{number(summary['low'])}, {number(summary['high'])}]}}"
    return text.replace("\u202f", r"\,").replace("-", "$-$")


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
