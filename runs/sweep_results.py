"""What came out of a sweep: one long table over all its trials, with their options as columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runs.files import write_atomically
from runs.record import TABLE, Row, read_table
from runs.statistics import final_values, means_over_tasks
from runs.sweep_file import Trial

RESULTS = "results.jsonl"


def write_results(folder: Path, trials: Sequence[Trial]) -> Path:
    """Write `results.jsonl` into a sweep's folder: the last value of every metric, seed and trial recorded so far.

    One object a line: trial, agent and env (or strategy and benchmark), every option that the sweep's file sets (null
    where a trial does not have it), seed, name, value (null if it could not be measured), step, and task where there is
    one. The runs themselves, with the curves, lie beside it in the folder named `trial`.
    """
    options = list(dict.fromkeys(option for trial in trials for option in trial.options))
    lines = []
    for trial in trials:
        if not (folder / trial.name / TABLE).is_file():
            continue
        chosen = {option: trial.options.get(option) for option in options if option not in ("seed", "seeds")}
        head = {"trial": trial.name, **trial.columns, **chosen}
        lines += [json.dumps(head | row, allow_nan=False) for row in _last_rows(read_table(folder / trial.name))]
    write_atomically(folder / RESULTS, "".join(line + "\n" for line in lines))
    return folder / RESULTS


def final_score(run: Path, name: str) -> tuple[float, int] | None:
    """The last value of a metric of a run, mean over the seeds that have one, and their number. None if no seed has."""
    if not (run / TABLE).is_file():
        return None
    finals = [value for value in means_over_tasks(read_table(run), name).values() if value is not None]
    return (sum(finals) / len(finals), len(finals)) if finals else None


def _last_rows(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    by_metric: dict[tuple[str, int | str | None], list[Row]] = {}
    for row in rows:
        by_metric.setdefault((row.name, row.task), []).append(row)
    for (name, task), of_metric in by_metric.items():
        steps = {seed: max(row.step for row in of_metric if row.seed == seed) for seed in {r.seed for r in of_metric}}
        for seed, value in final_values(of_metric, name, task).items():
            where = {} if task is None else {"task": task}
            yield {"seed": seed, "name": name, "value": value, "step": steps[seed], **where}
