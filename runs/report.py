"""The report of one or several runs: one HTML page that needs nothing else, pictures, and tables for papers.

Everything is computed from `metrics.jsonl`, `config.json` and `status.json`; a film comes from `videos/`. What stands
on the page is in `sections.py`, how it looks in `page.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runs import figures
from runs.compare import has_direction, lower_is_better
from runs.errors import UsageError, nearest
from runs.files import replacing, write_atomically
from runs.results import Run, method_labels, read_runs
from runs.tasks import TASK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
PICTURE = "learning_curve"
FORMATS = ("html", "png", "svg", "csv", "latex")
RETURNS = {"eval/return": "Return in evaluation", "train/return": "Return while training"}
_MAIN_METRICS = ("eval/return", "cl/average_accuracy", "retrieval/text_to_image_r1", "train/return")


@dataclass(frozen=True)
class Report:
    """What all parts of a report share: the runs, a short label for each, and the style of every line."""

    runs: list[Run]
    labels: list[str]
    styles: dict[str, int]

    @property
    def several(self) -> bool:
        return len(self.runs) > 1

    @property
    def places(self) -> list[str]:
        """Environments or benchmarks, in order of appearance."""
        return list(dict.fromkeys(run.place for run in self.runs))

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, in order of appearance."""
        return list(dict.fromkeys(name for run in self.runs for name in run.metrics))

    @property
    def main_metric(self) -> str:
        """What the runs are judged by: returns or accuracy if there are any, else the first metric with a curve."""
        known = next((name for name in _MAIN_METRICS if any(name in run.metrics for run in self.runs)), None)
        if known is not None:
            return known
        return next((name for name in self.metrics if figures.has_curve(self.lines(name))), "eval/return")

    def lines(self, metric: str, place: str | None = None, task: str | None = None) -> list[figures.Line]:
        """A metric's lines, one a run and task, in one place or (if there is only one) everywhere; of one task only."""
        chosen = [(label, run) for label, run in zip(self.labels, self.runs, strict=True) if place in (None, run.place)]
        rows = {label: run.metrics.get(metric, []) for label, run in chosen}
        if task is not None:
            rows = {label: [row for row in own if row.task == task] for label, own in rows.items()}
        if task is not None or metric.startswith("plasticity/"):  # of the networks, whatever their task is
            rows = {label: [dataclasses.replace(row, task=None) for row in own] for label, own in rows.items()}
        return figures.lines_of(rows, metric, self.styles)

    def task_changes(self, place: str) -> dict[int, str]:
        """By step, the task that began there in all seeds of all runs of a place; none where they do not agree."""
        runs = [run for run in self.runs if run.place == place]
        each = [
            {row.step: str(row.task) for row in run.metrics.get(TASK, []) if row.seed == seed}
            for run in runs
            for seed in sorted({row.seed for row in run.metrics.get(TASK, [])})
        ]
        longest = max(each, key=len, default={})
        return longest if all(own.items() <= longest.items() for own in each) else {}

    @property
    def higher_is_better(self) -> bool:
        """Of the main metric."""
        return has_direction(self.main_metric) and not lower_is_better(self.main_metric)

    @property
    def title(self) -> str:
        """'td3, sac on dmc/walker-walk', 'td3, sac on 5 environments'; run names if settings say nothing."""
        who, places = ", ".join(dict.fromkeys(filter(None, (run.learner for run in self.runs)))), self.places
        if len(places) == 1 and places[0]:
            return f"{who} on {places[0]}" if who else places[0]
        if who and all(places):
            return f"{who} on {len(places)} environments"
        names = [run.name for run in self.runs]
        return ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"

    @property
    def step_label(self) -> str:
        """What a step counts; 'steps' if the runs do not agree."""
        commands = {run.command for run in self.runs}
        labels = {"train": "environment steps", "offline": "updates", "continual": "batches of the stream"}
        return labels.get(commands.pop(), "steps") if len(commands) == 1 else "steps"


def write_report(
    folders: Sequence[Path | str], out: Path | str, formats: Sequence[str] = ("html", "png")
) -> list[Path]:
    """Write the report on the runs in `folders` into `out`, which is created if missing. Returns the files.

    html: report.html. png, svg: learning_curve.png, .svg. csv: summary.csv and curves.csv. latex: summary.tex.
    Raises UsageError for an unknown format or if no run has recorded anything, ValueError if no folder is given, one is
    not a run, or a file of a run is damaged; nothing is written then.
    """
    from runs.exports import curves_csv, summary_csv, summary_latex
    from runs.sections import render_page

    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"a report has no format '{name}'.{nearest(name, FORMATS)}")
    report = read_report(folders)
    if not report.metrics:
        names = ", ".join(f"'{run.path}'" for run in report.runs)
        raise UsageError(f"{names}: nothing has been recorded yet, so there is nothing to report")
    texts = {
        "html": lambda: {PAGE: render_page(report)},
        "csv": lambda: {"summary.csv": summary_csv(report), "curves.csv": curves_csv(report)},
        "latex": lambda: {"summary.tex": summary_latex(report)},
    }
    written: dict[str, str] = {}
    for name in formats:
        written |= texts[name]() if name in texts else {}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for file, text in written.items():
        write_atomically(out / file, text)
    pictures = [f"{PICTURE}.{name}" for name in ("png", "svg") if name in formats]
    for file in pictures:
        with replacing(out / file) as temporary:
            _picture(report).savefig(temporary, format=file.rpartition(".")[2], dpi=160)
    return [out / file for file in (*written, *pictures)]


def read_report(folders: Sequence[Path | str]) -> Report:
    """Read run folders. A missing file counts as empty; ValueError for a folder with neither settings nor table."""
    runs = read_runs(folders)
    labels = method_labels(runs)
    return Report(runs, labels, {label: index for index, label in enumerate(dict.fromkeys(labels))})


def _picture(report: Report) -> Figure:
    """The learning curves alone, one panel an environment."""
    metric = report.main_metric
    label = "return" if metric in RETURNS else metric.split("/", 1)[-1].replace("_", " ")
    panels = {place: report.lines(metric, place) for place in report.places}
    subtitle = " · ".join(filter(None, [metric, figures.band_note(*panels.values())]))
    title = report.title if len(report.title) <= 60 else f"{len(report.runs)} runs"
    return figures.picture(panels, report.step_label, label, title, subtitle)
