"""How a sweep is doing: a live table in a terminal, plain lines elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from runs.files import parse_json
from runs.record import TABLE

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

STATES = ("done", "running", "waiting", "stopped", "failed")
_MOST_LINES = 20
_TAIL = 1 << 16  # bytes of a table that hold its newest evaluation, usually


class Shown(Protocol):
    """A trial as the display sees it."""

    @property
    def folder(self) -> Path: ...
    @property
    def steps(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def attempts(self) -> int: ...
    @property
    def score(self) -> str: ...


class SweepDisplay:
    """Use as a context manager; call `say` at each event and `tick` often. every: seconds between plain lines."""

    def __init__(self, jobs: Sequence[Shown], quiet: bool, every: float = 60.0, stream: TextIO | None = None):
        self._jobs, self._quiet, self._every = jobs, quiet, every
        self._stream = stream if stream is not None else sys.stderr
        self._drawn = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> SweepDisplay:
        if not self._quiet and self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            # No thread of its own: a thread would be in the way of the signals that stop a sweep.
            self._live = Live(self._table(), console=Console(file=self._stream), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def say(self, sentence: str) -> None:
        """Something happened."""
        if self._live is not None:
            self._live.console.print(sentence, markup=False, highlight=False)
            self._live.update(self._table(), refresh=True)
        elif not self._quiet:
            print(sentence, file=self._stream, flush=True)

    def tick(self) -> None:
        """Nothing happened, time passed."""
        if self._quiet or time.monotonic() - self._drawn < (1.0 if self._live else self._every):
            return
        self._drawn = time.monotonic()
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            print(self.counts(), file=self._stream, flush=True)

    def counts(self) -> str:
        """'3 of 8 trials done, 2 running, 3 waiting'."""
        found = Counter(job.state for job in self._jobs)
        others = [f"{found[state]} {state}" for state in STATES[1:] if found[state]]
        return ", ".join([f"{found['done']} of {len(self._jobs)} trials done", *others])

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table("trial", "state", "step", "score", "tries", box=None, title=self.counts(), title_justify="left")
        by_interest = sorted(
            self._jobs, key=lambda job: ("running", "failed", "stopped", "waiting", "done").index(job.state)
        )
        for job in by_interest[:_MOST_LINES]:
            step, score = newest(job.folder, job.score) if job.state == "running" else (None, None)
            progress = "" if step is None else f"{step:,} of {job.steps:,}"
            shown = "" if score is None else f"{score:.4g}"
            tries = str(job.attempts) if job.attempts > 1 else ""
            table.add_row(*map(Text, (job.folder.name, job.state, progress, shown, tries)))
        if len(by_interest) > _MOST_LINES:
            table.add_row(Text(f"and {len(by_interest) - _MOST_LINES} more"))
        return table


def newest(run: Path, name: str) -> tuple[int | None, float | None]:
    """The newest step of a run and the newest value of a metric, from the end of its table; None if there is none."""
    try:
        with (run / TABLE).open("rb") as table:
            table.seek(max(0, table.seek(0, 2) - _TAIL))
            lines = table.read().splitlines(keepends=True)
    except OSError:
        return None, None
    step, score = None, None
    for line in lines:
        if not line.endswith(b"\n"):
            continue
        try:
            row = parse_json(line)
        except ValueError:  # the first line read may be half of one
            continue
        if isinstance(row, dict):
            step = row["step"]
            score = row["value"] if row["name"] == name else score
    return step, score
