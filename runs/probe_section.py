"""What `neoteny probe` found, as a section of a report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from runs.files import read_json
from runs.page import section, table, value_cell
from runs.results import Run

RESULT = "probe.json"


def probe_section(runs: Sequence[Run]) -> str:
    """A table of the networks that were probed, with verdicts; empty if none was.

    Interventions that were probed side by side have one file beside their runs. Raises ValueError if one is damaged.
    """
    beside = [run.path.parent for run in runs if run.command == "plasticity-arm"]
    rows = [row for folder in dict.fromkeys([*(run.path for run in runs), *beside]) for row in _rows(folder)]
    if not rows:
        return ""
    head = ["Network", "Targets", "Fresh", "Checkpoint", "Gap", "Gap at best rates", "Verdict"]
    return section("What can still be learnt", table("score while learning fresh targets", head, rows), _NOTE)


def _rows(folder: Path) -> list[list[str]]:
    path = folder / RESULT
    if not path.is_file():
        return []
    result = read_json(path)
    try:
        return [_cells(folder.name, result["step"], row) for row in result["networks"]]
    except (LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it is no result of a probe") from error


def _cells(run: str, step: int | None, row: dict[str, Any]) -> list[str]:
    numbers = [row[name] for name in ("fresh", "checkpoint", "gap", "gap_at_best_rates")]
    cells = [value_cell(found["mean"], found["low"], found["high"]) for found in numbers]
    where = f"{run}: {row['network']}" + ("" if step is None else f" at step {step:,}")
    return [escape(where), escape(row["family"]), *cells, escape(row["verdict"])]


_NOTE = (
    '<p class="note">Copies of the checkpoint and fresh networks are trained on the same fresh targets; scores are '
    "accuracy, or the share of variance explained, in the mean over all steps. A gap above 0: plasticity is lost. "
    "Intervals: 95 %, over draws of targets, for the networks at hand.</p>"
)
