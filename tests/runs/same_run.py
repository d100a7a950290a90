"""What two runs must have in common to be the same run, and runs of one seed that become one run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runs import checkpoint
from runs.config import RunConfig
from runs.record import read_table

CLOCKS = "speed/"


def told(run: Path) -> dict[int, list[Any]]:
    """Every row by seed, in order; of what a clock measured only that there is a row."""
    rows: dict[int, list[Any]] = {}
    for row in read_table(run):
        value = "some" if row.name.startswith(CLOCKS) else row.value
        rows.setdefault(row.seed, []).append((row.step, row.name, value))
    return rows


def final_hash(run: Path) -> str:
    """`state_hash` of the newest checkpoint, after a look at every file of it."""
    return checkpoint.verify(checkpoint.newest(run))["state_hash"]


def assert_same(run: Path, whole: Path) -> None:
    """Same rows for every seed, no row twice but those that are in `whole` too, same state."""
    ours, theirs = told(run), told(whole)
    assert ours.keys() == theirs.keys()
    for seed in theirs:
        assert Counter(ours[seed]) == Counter(theirs[seed])
        assert ours[seed] == theirs[seed]
    assert final_hash(run) == final_hash(whole)


def put_together(run: Path, parts: Mapping[int, Path]) -> Path:
    """Make of runs of one seed each the run in which each seed has a process. Returns its checkpoint."""
    (run / "checkpoints").mkdir(parents=True)
    config = RunConfig.load(next(iter(parts.values())))
    dataclasses.replace(config, seeds=tuple(parts), seed_groups=()).save(run)
    table = b"".join((part / "metrics.jsonl").read_bytes() for part in parts.values())
    (run / "metrics.jsonl").write_bytes(table)
    folder = checkpoint.staging(run, "last")
    written = {seed: checkpoint.carry_over(checkpoint.newest(part), seed, folder) for seed, part in parts.items()}
    extra = {"table_bytes": len(table), "wall_seconds": 1.0, "differences": []}
    return checkpoint.complete(run, "last", written, extra)
