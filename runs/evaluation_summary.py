"""What offline runs, and runs that went on from one, are quoted by beside their last evaluation.

Sources differ: some quote the last evaluation, some the mean of the last ten, some the best; all three are told, by
name. A run that went on online is told by what it lost at first and won in the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from runs.config import RunConfig
from runs.record import Row
from runs.statistics import Summary, summarise

_LAST = 10
_EARLY = 0.1  # of the online steps, in which a policy may fall
Points = Sequence[tuple[int, float]]


def evaluation_summary(folder: Path, rows: Sequence[Row]) -> dict[str, Summary]:
    """`eval/return_last10`, `eval/return_best` and the same of scores, of runs with data; {} for others.

    And of runs that began from an offline one `finetune/drawdown`: the offline return minus the lowest of the first
    tenth of the steps, and `finetune/gain`: the last return minus the offline one.
    """
    config = RunConfig.load(folder)
    if config.data is None:
        return {}
    found: dict[str, Summary] = {}
    for name in ("eval/return", *(f"eval/score_{pair}" for pair in config.data["references"])):
        curves = _curves(rows, name)
        found[f"{name}_last10"] = _of(curves, lambda points: float(np.mean([v for _, v in points[-_LAST:]])))
        found[f"{name}_best"] = _of(curves, lambda points: max(v for _, v in points))
        if config.initial is not None:
            early, place = _EARLY * config.steps, name.removeprefix("eval/")
            fallen = _of(curves, lambda points, e=early: points[0][1] - min(v for t, v in points if t <= e))
            found[f"finetune/drawdown_{place}"] = fallen
            found[f"finetune/gain_{place}"] = _of(curves, lambda points: points[-1][1] - points[0][1])
    return found


def _curves(rows: Sequence[Row], name: str) -> dict[int, Points]:
    curves: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row.name == name and row.value is not None:
            curves[row.seed].append((row.step, row.value))
    return {seed: sorted(points) for seed, points in curves.items()}


def _of(curves: dict[int, Points], measure: Callable[[Points], float]) -> Summary:
    return summarise([measure(points) for points in curves.values()])
