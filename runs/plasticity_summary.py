"""What a comparison of interventions says: read from the tables of its arms, with intervals over seeds.

first, last: mean online metric of the first and last tenth of the tasks that count; total: of all. Plasticity was lost
where `last` is below that of the anchor `fresh` on the same tasks: the 95 % interval of the difference, pairwise by
seed, lies above zero, with at least five seeds (specs/nap-and-plasticity.md, section 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from plasticity import registry
from runs.groups import FRESH, PLAIN
from runs.plasticity_arm import ArmConfig
from runs.record import Row, read_table
from runs.statistics import Summary, curve, final_values, summarise

ENOUGH_SEEDS = 5
_WIDE = 200  # columns, into which the intervals fit unbroken
HURTS = 0.01  # of accuracy, below the plain learner where nothing changes


def summarise_arms(folder: Path, arms: Sequence[ArmConfig]) -> dict[str, Any]:
    """{"run", "problem", "seeds", "interventions": {NAME: {...}}}, each quantity of an arm a `Summary` over seeds."""
    measured = {arm.name: _measure(folder / arm.name, arm) for arm in arms}
    found: dict[str, Any] = {}
    for arm in arms:
        own = measured[arm.name]
        if arm.stationary or own is None:
            continue
        twin = next((measured[a.name] for a in arms if a.stationary and a.intervention == arm.intervention), None)
        found[arm.intervention] = _summary(own, twin, measured.get(FRESH)) | {
            "uses_boundaries": any(made.uses_boundaries for made in registry.make(arm.intervention)),
        }
    for name, of_arm in found.items():
        of_arm["verdict"] = _verdict(name, of_arm, found)
    return {"run": str(folder), "problem": arms[0].problem, "seeds": list(arms[0].seeds), "interventions": found}


class _Measured:
    """An arm's table. online [S, T]: the online metric of each seed and counted task."""

    def __init__(self, arm: ArmConfig, rows: list[Row]):
        problem = arm.resolved()
        self.metric = problem.online_metric
        self.word = self.metric.removeprefix("online_")
        steps, values = curve(rows, f"plasticity/{self.metric}")
        tasks = steps // problem.steps - 1
        counted = np.array([problem.change.is_measured(int(task)) for task in tasks], dtype=bool)
        self.online = values[:, counted]
        _, chance = curve(rows, "plasticity/chance_accuracy")
        self.chance = chance[:, counted] if chance.size else None
        self.finals = {
            name: final_values(rows, name)
            for name in (
                "plasticity/test_accuracy",
                "plasticity/final_accuracy",
                "plasticity/dormant_fraction",
                "plasticity/effective_rank",
                "plasticity/weight_norm",
                "speed/seconds_per_step",
                "plasticity/parameters",
            )
        }

    @property
    def tenth(self) -> int:
        return max(1, round(self.online.shape[1] / 10))

    @property
    def last(self) -> np.ndarray:
        return self.online[:, -self.tenth :].mean(1)


def _measure(folder: Path, arm: ArmConfig) -> _Measured | None:
    """None for an arm that has not finished a task yet."""
    try:
        measured = _Measured(arm, read_table(folder))
    except FileNotFoundError:
        return None
    return measured if measured.online.size else None


def _summary(own: _Measured, twin: _Measured | None, fresh: _Measured | None) -> dict[str, Any]:
    from scipy.stats import theilslopes

    tasks = np.arange(own.online.shape[1])
    slopes = [np.asarray(theilslopes(row, tasks), float)[0] if len(tasks) > 1 else np.nan for row in own.online]
    word = own.word
    found: dict[str, Any] = {
        f"online_{word}": summarise(own.online.mean(1)),
        f"first_{word}": summarise(own.online[:, : own.tenth].mean(1)),
        f"last_{word}": summarise(own.last),
        "slope": summarise(slopes),
    }
    if fresh is not None and fresh.online.shape == own.online.shape:
        found["behind_fresh"] = summarise(fresh.last - own.last)
        if own.chance is not None:
            chance = own.chance[:, -own.tenth :].mean(1)
            room = fresh.last - chance
            found["retention"] = summarise(
                np.where(room > 0, (own.last - chance) / np.where(room > 0, room, 1), np.nan)
            )
    if twin is not None:
        found[f"stationary_{word}"] = summarise(twin.last)
    for name, values in own.finals.items():
        if values:
            found[name.rpartition("/")[2]] = summarise(values.values())
    return found


def _verdict(name: str, own: dict[str, Any], arms: dict[str, Any]) -> str:
    """loses plasticity, no loss shown, or not enough to say; and whether it costs accuracy where nothing changes."""
    behind: Summary | None = own.get("behind_fresh")
    if name == FRESH:
        verdict = "anchor"
    elif behind is None or "last_error" in own:
        verdict = "no anchor to compare with"
    elif behind["seeds"] < ENOUGH_SEEDS or behind["low"] is None or behind["high"] is None:
        verdict = f"too few seeds to say (at least {ENOUGH_SEEDS})"
    elif behind["low"] > 0:
        verdict = "loses plasticity"
    else:
        verdict = "no loss shown"
    plain, twin = arms.get(PLAIN, {}).get("stationary_accuracy"), own.get("stationary_accuracy")
    if plain and twin and twin["mean"] is not None and plain["mean"] is not None:
        verdict += "; hurts where nothing changes" if twin["mean"] < plain["mean"] - HURTS else ""
    return verdict


def print_table(summary: dict[str, Any], stream: TextIO) -> None:
    """One line an intervention, its intervals in brackets."""
    from rich.console import Console
    from rich.table import Table

    arms = summary["interventions"]
    word = "error" if any("last_error" in arm for arm in arms.values()) else "accuracy"
    columns = {
        f"online {word}": f"online_{word}",
        "first 10 %": f"first_{word}",
        "last 10 %": f"last_{word}",
        "retention": "retention",
        "slope a task": "slope",
        "stationary": f"stationary_{word}",
        "µs a step and seed": "seconds_per_step",
    }
    console = Console(file=stream, width=None if stream.isatty() else _WIDE)
    wide = console.width >= _WIDE
    what = "mean [95 %]" if wide else "mean; intervals: --json, or a wider terminal"
    table = Table(title=f"{summary['problem']}, {len(summary['seeds'])} seeds, {what}", box=None, pad_edge=False)
    for heading in ("intervention", *columns, "verdict"):
        table.add_column(heading, overflow="fold")
    for name, arm in arms.items():
        marked = f"{name} (told of boundaries)" if arm["uses_boundaries"] else name
        cells = [_cell(arm.get(key), 1e6 if key == "seconds_per_step" else 1.0, wide) for key in columns.values()]
        table.add_row(marked, *cells, arm["verdict"])
    console.print(table)


def _cell(summary: Summary | None, factor: float, with_interval: bool) -> str:
    if summary is None or summary["mean"] is None:
        return "-"
    digits = ".0f" if factor != 1.0 else ".3f" if abs(summary["mean"]) >= 0.01 else ".2g"
    mean = f"{factor * summary['mean']:{digits}}"
    if summary["low"] is None or summary["high"] is None or factor != 1.0 or not with_interval:
        return mean
    return f"{mean} [{summary['low']:{digits}}, {summary['high']:{digits}}]"
