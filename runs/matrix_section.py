"""How well each task is done after each task was learnt, on the page of a report."""

from __future__ import annotations

import re

from runs.page import section, table
from runs.report import Report
from runs.results import measure

ACCURACY = re.compile(r"acc/task_(\d+)_after_(\d+)")


def matrices(report: Report) -> str:
    """The accuracy matrix of each continual run: one line for each task learnt, one column for each task tested."""
    parts = []
    for run in report.runs:
        found = {tuple(map(int, match.groups())): name for name in run.metrics if (match := ACCURACY.fullmatch(name))}
        if not found:
            continue
        tested, learnt = (sorted({key[side] for key in found}) for side in (0, 1))
        rows = []
        for after in learnt:
            means = [measure(run, found[j, after]).summary["mean"] if (j, after) in found else None for j in tested]
            rows.append([f"after {after}", *(_shaded(mean) for mean in means)])
        caption = (
            f"{run.name}: accuracy on a task (column) after learning a task (line), mean of {len(run.seeds)} seeds"
        )
        parts.append(table(caption, ["", *(f"task {j}" for j in tested)], rows, "numbers matrix"))
    return section("Accuracy of every task", f'<div class="matrices">{"".join(parts)}</div>') if parts else ""


def _shaded(value: float | None) -> str:
    if value is None:
        return ""
    share = round(70 * min(1.0, max(0.0, value)))
    shade = f"background:color-mix(in srgb,var(--line-0) {share}%,transparent)"
    return f'<span style="{shade};display:block;padding:.1rem .4rem;border-radius:.2rem">{value:.3f}</span>'
