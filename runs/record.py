"""The record of a run: `metrics.jsonl`, TensorBoard event files, `status.json`.

`metrics.jsonl` is the truth, everything a report shows comes from it. It is an append-only long table, one JSON object
a line: {"step": 5000, "name": "eval/return", "value": 812.4, "seed": 0}, with "task" where there is one. A number that
could not be measured is null and says why: {..., "value": null, "missing": "nan"}. A row counts once its line end is
written. TensorBoard shows the same numbers live; beside them it holds hyper-parameters, histograms and films.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runs.files import parse_json, read_json, write_atomically, write_json
from runs.settings import flat_settings

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

TABLE = "metrics.jsonl"
STATUS = "status.json"
TENSORBOARD = "tensorboard"
# What TensorBoard's tab of hyper-parameters sets beside them; losses and speed are not what runs are compared by.
_OUTCOMES = ("eval/", "train/return", "cl/", "acc/", "retrieval/", "plasticity/")

State = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Row:
    """One number: metric `name` of `seed` at `step` (environment steps, or updates where there is no environment).

    value: anything `float` takes, or None. nan and infinities become None with `missing` "nan", "inf" or "-inf", so two
    rows with the same content are equal. A None needs its reason in `missing`.
    Raises ValueError for a None without a reason, an empty name, or a negative step.
    """

    step: int
    name: str
    value: float | None
    seed: int
    task: int | str | None = None
    missing: str | None = None

    def __post_init__(self) -> None:
        value = None if self.value is None else float(self.value)
        missing = self.missing
        if value is not None and not math.isfinite(value):
            value, missing = None, missing or str(value)
        if (value is None) != bool(missing):
            raise ValueError(f"row '{self.name}' at step {self.step}: `missing` is the reason of a value that is None")
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "missing", missing)
        # operator.index takes NumPy and 0-d torch integers and refuses 1.5.
        object.__setattr__(self, "step", operator.index(self.step))
        object.__setattr__(self, "seed", operator.index(self.seed))
        if not self.name or self.step < 0:
            raise ValueError(f"a row needs a name and a step of at least 0, got '{self.name}' at step {self.step}")


class Record:
    """Writes the rows of one run into `folder` (created if missing) for the given `seeds`.

    Opening an existing table continues it; a torn last line, left by a crash, is cut off first, and everything behind
    the first `longest` bytes: behind its last `sync`, a table may hold anything after a power cut.
    tensorboard: also write event files to `folder/tensorboard/seed_K`. Use as a context manager, or call `close`.
    """

    def __init__(self, folder: Path | str, seeds: Sequence[int], tensorboard: bool = True, longest: int | None = None):
        self.folder = Path(folder)
        self.seeds = tuple(seeds)
        self._tensorboard = tensorboard
        self._writers: dict[int, SummaryWriter] = {}
        self._tags: dict[int, set[str]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / TABLE
        self._file = self._path.open("ab")
        if longest is not None and longest < self.length:
            self._truncate(longest)
        whole = _whole_length(self._path)
        if whole < self.length:
            self._truncate(whole)
        self._last_rows = self._find_last_rows()

    def write(self, rows: Iterable[Row]) -> None:
        """Append rows, all of them in one write. Raises ValueError for a seed that is not of this run."""
        rows = list(rows)
        for row in rows:
            if row.seed not in self.seeds:
                raise ValueError(f"row '{row.name}' has seed {row.seed}, this run has {list(self.seeds)}")
        if not rows:
            return
        self._file.write(b"".join(_encode(row) for row in rows))
        self._file.flush()
        if self._tensorboard:
            self._write_tensorboard(rows)
        for row in rows:
            _remember(self._last_rows, row)

    @property
    def length(self) -> int:
        """Bytes in the table; a checkpoint keeps it and resuming hands it to `cut_to`."""
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> None:
        """Block until every row is on the disk, and in the event files. Call before a checkpoint counts the rows."""
        os.fsync(self._file.fileno())
        for writer in list(self._writers.values()):
            writer.flush()

    def cut_to(self, length: int) -> None:
        """Drop every row behind the first `length` bytes.

        Raises ValueError if the table is shorter, or if the cut would fall inside a row.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut {self._path} to {length} bytes: it has {self.length}")
        with self._path.open("rb") as table:
            table.seek(max(0, length - 1))
            if length and table.read(1) != b"\n":
                raise ValueError(f"cannot cut {self._path} to {length} bytes: that is inside a row")
        self._close_writers()
        self._truncate(length)
        self._last_rows = self._find_last_rows()

    def keep(self, predicate: Callable[[Row], bool]) -> int:
        """Keep only the rows for which `predicate` is true, in order, atomically. Returns how many were dropped."""
        self._close_writers()
        kept, dropped = [], 0
        for line, row in _lines(self._path):
            if predicate(row):
                kept.append(line)
            else:
                dropped += 1
        if dropped:
            write_atomically(self._path, b"".join(kept))
            self._file.close()
            self._file = self._path.open("ab")
        self._last_rows = self._find_last_rows()
        return dropped

    def histogram(self, step: int, name: str, values: Any, seed: int) -> None:
        """Show the distribution of an array or tensor (weights, gradients, features) in TensorBoard, nowhere else."""
        if self._tensorboard:
            self._writer(seed).add_histogram(name, values, step)

    def close(self) -> None:
        self._write_hyper_parameters()
        self._close_writers()
        self._file.close()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _truncate(self, length: int) -> None:
        os.ftruncate(self._file.fileno(), length)
        self.sync()

    def _find_last_rows(self) -> dict[int, list[Row]]:
        """By seed, the rows with its highest step."""
        last: dict[int, list[Row]] = {}
        for _, row in _lines(self._path):
            _remember(last, row)
        return last

    def _write_tensorboard(self, rows: list[Row]) -> None:
        for row in rows:
            _add_scalar(self._writer(row.seed), row)
            if row.value is not None and row.name.startswith(_OUTCOMES):
                self._tags.setdefault(row.seed, set()).add(_tag(row))

    def _write_hyper_parameters(self) -> None:
        """For TensorBoard's tab of hyper-parameters: the run's settings beside its last outcomes, a line a seed."""
        config = self.folder / "config.json"
        if not self._tags or not config.is_file():
            return
        from torch.utils.tensorboard.summary import hparams

        values = flat_settings(read_json(config))
        plain = {name: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for name, v in values.items()}
        for seed, tags in self._tags.items():
            # The plugin reads the values themselves from the scalars of the same names.
            for summary in hparams(plain | {"seed": seed}, dict.fromkeys(sorted(tags), 0.0)):
                self._writer(seed)._get_file_writer().add_summary(summary)
        self._tags.clear()

    def _writer(self, seed: int) -> SummaryWriter:
        if seed not in self._writers:
            from torch.utils.tensorboard.writer import SummaryWriter

            # Rows dropped before a resume are still in the old event files. TensorBoard hides what they have from the
            # last step on, where rows may have been kept too, so these are told again.
            told = self._last_rows.get(seed, [])
            folder = self.folder / TENSORBOARD / f"seed_{seed}"
            purge = told[0].step if told else 0
            self._writers[seed] = SummaryWriter(str(folder), purge_step=purge, flush_secs=30)
            for row in told:
                _add_scalar(self._writers[seed], row)
        return self._writers[seed]

    def _close_writers(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def read_table(folder: Path | str, longest: int | None = None) -> list[Row]:
    """All rows of the run in `folder`, in the order written. A torn last line (no line end yet) is left out.

    longest: look at the first so many bytes only. Raises FileNotFoundError if there is no table, ValueError naming the
    line if any other line is damaged.
    """
    return [row for _, row in _lines(Path(folder) / TABLE, longest)]


def write_status(folder: Path | str, state: State, step: int, of: int, error: str | None = None, **more: Any) -> None:
    """Write `status.json`: where the run stands, `step` of `of`, and what went wrong if it failed. Atomic.

    more: other plain values; those that are None are left out. A training run has `wall_seconds`, the time spent over
    all its sessions, and `pid` while a process works on it.
    """
    status = {"state": state, "step": step, "of": of, "error": error}
    status |= {name: value for name, value in more.items() if value is not None}
    write_json(Path(folder) / STATUS, status)


def read_status(folder: Path | str) -> dict[str, Any]:
    """`status.json` of a run; empty if there is none or it is damaged: checkpoints and table say the same better."""
    try:
        status = read_json(Path(folder) / STATUS)
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _remember(last: dict[int, list[Row]], row: Row) -> None:
    known = last.setdefault(row.seed, [])
    if known and row.step > known[0].step:
        known.clear()
    if not known or row.step == known[0].step:
        known.append(row)


def _add_scalar(writer: SummaryWriter, row: Row) -> None:
    if row.value is not None:
        writer.add_scalar(_tag(row), row.value, row.step)


def _tag(row: Row) -> str:
    return row.name if row.task is None else f"{row.name}/{row.task}"


def _encode(row: Row) -> bytes:
    entry = {"step": row.step, "name": row.name, "value": row.value, "seed": row.seed}
    if row.task is not None:
        entry["task"] = row.task
    if row.missing is not None:
        entry["missing"] = row.missing
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def _lines(path: Path, longest: int | None = None) -> Iterator[tuple[bytes, Row]]:
    """Every whole line of a table with its row. Raises ValueError naming the first damaged line."""
    end = 0
    with path.open("rb") as table:
        for number, line in enumerate(table, start=1):
            end += len(line)
            if not line.endswith(b"\n") or (longest is not None and end > longest):
                return
            try:
                row = Row(**parse_json(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is damaged: {error}") from error
            yield line, row


def _whole_length(path: Path) -> int:
    """Bytes up to and including the last line end."""
    block = 1 << 16
    with path.open("rb") as table:
        end = table.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - block)
            table.seek(start)
            found = table.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0
