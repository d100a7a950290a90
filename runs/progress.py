"""Progress of a long run on stderr: one live line in a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_WINDOW = 30.0  # seconds over which steps/s is taken, so that a slower phase shows soon
_SAMPLE = 0.1  # seconds between two points of the window; `update` may be called every step


class Progress:
    """Shows per cent, steps/s, last return and time left, summed over seeds. Use as a context manager.

    total_steps: steps of one seed. start: steps a resumed run has behind it, by seed (done, but no part of the speed).
    quiet: print nothing at all. every: seconds between plain lines where `stream` is not a terminal.
    stream: stderr by default, because stdout belongs to `--json`. clock: seconds, for tests.
    """

    def __init__(
        self,
        total_steps: int,
        seeds: Sequence[int],
        quiet: bool = False,
        start: Mapping[int, int] | None = None,
        every: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if total_steps < 1 or not seeds:
            raise ValueError(f"progress needs at least one step and one seed, got {total_steps} and {list(seeds)}")
        self._total = total_steps * len(seeds)
        self._steps = {seed: (start or {}).get(seed, 0) for seed in seeds}
        self._returns: dict[int, float] = {}
        self._quiet, self._every = quiet, every
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._history: deque[tuple[float, int]] = deque([(clock(), self._done)])
        self._printed = clock()
        self._line = ""
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        # Waiting for a process pool or a slow reset before the first update is not part of the speed.
        self._printed = self._clock()
        self._history = deque([(self._printed, self._done)])
        if not self._quiet and self._stream.isatty():
            bar = _live_bar(self._stream)
            bar.add_task("", total=self._total, completed=self._done, state=self._state())
            bar.start()
            self._bar = bar
        return self

    def __exit__(self, *_: object) -> None:
        self._sample(self._clock())
        if self._bar is not None:
            self._draw(self._bar)
            self._bar.stop()
            self._bar = None
        elif not self._quiet:
            self._print()

    def update(self, seed: int, step: int, return_: float | None = None) -> None:
        """Seed `seed` has taken `step` steps in all; `return_` is its newest return, if there is a new one.

        Cheap enough for every step. Raises KeyError for a seed that is not of this run.
        """
        if seed not in self._steps:
            raise KeyError(f"seed {seed} is not of this run, which has {list(self._steps)}")
        self._steps[seed] = step
        if return_ is not None:
            self._returns[seed] = return_
        if self._quiet:
            return
        now = self._clock()
        if now - self._history[-1][0] >= _SAMPLE:
            self._sample(now)
            if self._bar is not None:
                self._draw(self._bar)
        if self._bar is None and now - self._printed >= self._every:
            self._sample(now)
            self._printed = now
            self._print()

    @property
    def _done(self) -> int:
        return sum(self._steps.values())

    def _sample(self, now: float) -> None:
        self._history.append((now, self._done))
        # The oldest sample that is kept lies just outside the window, so the window is always covered.
        while len(self._history) > 2 and now - self._history[1][0] >= _WINDOW:
            self._history.popleft()

    def _speed(self) -> float | None:
        """Steps a second over the window, all seeds together; None before any time has passed."""
        (then, before), (now, done) = self._history[0], self._history[-1]
        return (done - before) / (now - then) if now > then else None

    def _state(self) -> str:
        speed = self._speed()
        parts = ["-- steps/s" if speed is None else f"{_short(speed)} steps/s"]
        if self._returns:
            parts.append(f"return {sum(self._returns.values()) / len(self._returns):.4g}")
        if self._done < self._total:
            parts.append(f"{_duration((self._total - self._done) / speed)} left" if speed else "-- left")
        return " · ".join(parts)

    def _draw(self, bar: Bar) -> None:
        bar.update(bar.task_ids[0], completed=self._done, state=self._state())

    def _print(self) -> None:
        line = f"{self._done:,} of {self._total:,} steps ({100 * self._done / self._total:.0f} %) · {self._state()}"
        if line != self._line:
            print(line, file=self._stream, flush=True)
            self._line = line


def _live_bar(stream: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = BarColumn(bar_width=30), TaskProgressColumn(), TextColumn("{task.fields[state]}", markup=False)
    return Bar(*columns, console=Console(file=stream), refresh_per_second=4)


def _short(number: float) -> str:
    """1234567 -> '1.23M', 45678 -> '45.7k', 321.9 -> '322', 4.56 -> '4.56'."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _duration(seconds: float) -> str:
    """45 -> '45s', 150 -> '2m30s', 7500 -> '2h05m', 200000 -> '2d07h'."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86_400:
        return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
    return f"{seconds // 86_400}d{seconds // 3600 % 24:02d}h"
