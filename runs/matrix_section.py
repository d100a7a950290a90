"""How well each task is done after each task was learnt, on the page of a report."""

from __future__ import annotations

import re
from html import escape

from runs import page
from runs.page import section, table, value_cell
from runs.report import Report
from runs.results import Run, measure
from runs.tasks import TASK

_ACCURACY = re.compile(r"acc/task_(\d+)_after_(\d+)")
_RETURN = re.compile(r"return/task_(\d+)_after_(\d+)")
# What the numbers of a sequence mean; `runs.transfer` has the formulas.
_MEANINGS = {
    "average_return": "return at the end, mean over tasks",
    "forgetting": "how much lower earlier tasks are than at their best; below 0: none was ever better",
    "bwt": "backward transfer: change of earlier tasks since they were last learnt",
    "fwt": "forward transfer: return on a task just before it is learnt, over that of the untrained networks",
    "transfer": "mean return while a task is learnt, over that of learning it from scratch",
}


def in_a_matrix(name: str) -> bool:
    """Whether a metric is one of the many that a matrix shows, or only says where tasks begin."""
    return bool(_ACCURACY.fullmatch(name) or _RETURN.fullmatch(name)) or name == TASK


def matrices(report: Report) -> str:
    """The accuracy matrix of each continual run: one line for each task learnt, one column for each task tested."""
    parts = []
    for run in report.runs:
        found = _cells(run, _ACCURACY)
        if not found:
            continue
        tested, learnt = (sorted({key[side] for key in found}) for side in (0, 1))
        rows = [[f"after {i}", *(_shaded(found.get((j, i)), 0, 1, ".3f") for j in tested)] for i in learnt]
        caption = (
            f"{run.name}: accuracy on a task (column) after learning a task (line), mean of {len(run.seeds)} seeds"
        )
        parts.append(table(caption, ["", *(f"task {j}" for j in tested)], rows, "numbers matrix"))
    return section("Accuracy of every task", f'<div class="matrices">{"".join(parts)}</div>') if parts else ""


def sequences(report: Report) -> str:
    """Tasks that an agent learnt in turn: returns on all of them after each, and what that says of transfer."""
    parts = [_returns(run) for run in report.runs]
    if not any(parts):
        return ""
    note = (
        '<p class="note">Shades go from the lowest to the highest return on a task, column by column. '
        "Returns of different tasks are on different scales; what averages them says so. Names in "
        "<code>score</code> are the same of normalised scores, 0 to 1 between reference returns.</p>"
    )
    return section("Tasks in turn", f'<div class="matrices">{"".join(parts)}</div>', _transfer(report), note)


def _returns(run: Run) -> str:
    found = _cells(run, _RETURN)
    if not found:
        return ""
    begun = [row for row in run.metrics.get(TASK, []) if row.seed == run.metrics[TASK][0].seed]
    names = {round(row.value): str(row.task) for row in begun if row.value is not None}
    tested, visits = (sorted({key[side] for key in found}) for side in (0, 1))
    bounds = {j: [found[key] for key in found if key[0] == j] for j in tested}
    rows = []
    for i in visits:
        head = "untrained" if i == 0 else f"after {_short(str(begun[i - 1].task))}" if i <= len(begun) else f"after {i}"
        cells = (_shaded(found.get((j, i)), min(bounds[j]), max(bounds[j]), "") for j in tested)
        rows.append([escape(head), *cells])
    caption = f"{run.name}: return on a task (column) after learning one (line), mean of {len(run.seeds)} seeds"
    return table(caption, ["", *(_short(names.get(j, f"task {j}")) for j in tested)], rows, "numbers matrix")


def _transfer(report: Report) -> str:
    known = {f"cl/{name.removesuffix('_return')}_score": f"{text}, of scores" for name, text in _MEANINGS.items()}
    known = {f"cl/{name}": text for name, text in _MEANINGS.items()} | known
    rows = []
    for name, text in known.items():
        for run in report.runs:
            if name in run.metrics:
                s = measure(run, name).summary
                run_cell = [escape(run.name)] * report.several
                rows.append([escape(name), *run_cell, value_cell(s["mean"], s["low"], s["high"]), escape(text)])
    return table("After the last task, over seeds", ["Metric", *(["Run"] * report.several), "Mean [95 %]", ""], rows)


def _cells(run: Run, pattern: re.Pattern[str]) -> dict[tuple[int, int], float]:
    """(task, after which) -> mean over seeds."""
    named = {name: match for name in run.metrics if (match := pattern.fullmatch(name))}
    means = {(int(match[1]), int(match[2])): measure(run, name).summary["mean"] for name, match in named.items()}
    return {key: mean for key, mean in means.items() if mean is not None}


def _short(name: str) -> str:
    """'gym/CartPole-v1 (shuffle 3)' -> 'CartPole-v1 (shuffle 3)'."""
    return name.partition("/")[2] or name


def _shaded(value: float | None, low: float, high: float, form: str) -> str:
    if value is None:
        return ""
    share = round(70 * min(1.0, max(0.0, (value - low) / (high - low)))) if high > low else 0
    shade = f"background:color-mix(in srgb,var(--line-0) {share}%,transparent)"
    text = f"{value:{form}}" if form else page.number(value)
    return f'<span style="{shade};display:block;padding:.1rem .4rem;border-radius:.2rem">{text}</span>'
