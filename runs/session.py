"""A training run as a whole: its folder, its seeds side by side, its checkpoints, its end.

Every seed trains in a process of its own (a single seed in this one) and reports here; this process alone writes the
table, the status and the manifests. Ctrl-C and SIGTERM ask the seeds to save and stop; a second one kills.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from runs import checkpoint
from runs.config import RunConfig
from runs.progress import Progress
from runs.record import Record, Row, State, write_status
from runs.training import Diverged, SeedTraining

# What ends a run without being a defect of ours; the message tells the user enough.
EXPECTED_FAILURES = (Diverged, OSError, MemoryError)


class SeedFailed(RuntimeError):
    """A seed's training ended with an error. `defect`: not one of EXPECTED_FAILURES; the message is the traceback."""

    def __init__(self, message: str, defect: bool):
        super().__init__(message)
        self.defect = defect


class Session:
    """Hears all seeds of one run (a `Listener`) and keeps its record."""

    def __init__(self, config: RunConfig, folder: Path, quiet: bool):
        self.config, self.folder = config, folder
        self.record = Record(folder, config.seeds, config.tensorboard)
        self.display = Progress(config.steps, config.seeds, quiet)
        self.started = time.monotonic()
        self.steps = dict.fromkeys(config.seeds, 0)
        self.row_count = dict.fromkeys(config.seeds, 0)
        self.gathered: dict[str, dict[int, tuple[int, str, int]]] = {}  # label -> seed -> (step, digest, rows so far)
        self.state: State = "running"
        self._write_status()

    def rows(self, seed: int, rows: list[Row]) -> None:
        self.record.write(rows)
        self.row_count[seed] += len(rows)

    def progress(self, seed: int, step: int, return_: float | None) -> None:
        self.steps[seed] = step
        self.display.update(seed, min(step, self.config.steps), return_)

    def saved(self, seed: int, label: str, step: int, digest: str) -> None:
        """Once every seed has written its file for `label`, the checkpoint is complete."""
        self.steps[seed] = step
        gathered = self.gathered.setdefault(label, {})
        gathered[seed] = step, digest, self.row_count[seed]
        if len(gathered) < len(self.config.seeds):
            return
        del self.gathered[label]
        self.record.sync()
        checkpoint.complete(
            self.folder,
            label,
            max(step for step, _, _ in gathered.values()),
            {seed: digest for seed, (_, digest, _) in gathered.items()},
            {
                "seed_steps": {str(seed): step for seed, (step, _, _) in gathered.items()},
                "seed_rows": {str(seed): rows for seed, (_, _, rows) in gathered.items()},
                "table_bytes": self.record.length,
            },
        )
        self._write_status()

    def finish(self, error: str | None = None) -> State:
        """Write the closing status: failed with an error, done if every seed reached the end, else stopped."""
        complete = min(self.steps.values()) >= self.config.steps
        self.state = "failed" if error else "done" if complete else "stopped"
        self._write_status(error)
        checkpoint.drop_partial(self.folder)
        self.record.close()
        return self.state

    def _write_status(self, error: str | None = None) -> None:
        step = min(self.steps.values())
        write_status(self.folder, self.state, step, self.config.steps, error, time.monotonic() - self.started)


def run_session(config: RunConfig, folder: Path, quiet: bool = False) -> State:
    """Train all seeds of a run whose folder exists and holds its `config.json`. Returns "done" or "stopped".

    Raises SeedFailed after the status says so; checkpoints completed before stay.
    """
    session = Session(config, folder, quiet)
    error: str | None = "interrupted"
    try:
        with session.display, _stop_on_signals() as stopping:
            if len(config.seeds) == 1:
                _train_here(config, folder, session, stopping)
            else:
                _train_in_processes(config, folder, session, stopping)
        error = None
    except SeedFailed as failure:
        error = str(failure)
        raise
    finally:
        state = session.finish(error)
    return state


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second raises KeyboardInterrupt."""
    stopping = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _train_here(config: RunConfig, folder: Path, session: Session, stopping: threading.Event) -> None:
    try:
        SeedTraining(config, config.seeds[0], folder, session).run(stopping.is_set)
    except EXPECTED_FAILURES as error:
        raise SeedFailed(str(error), defect=False) from error


Message = tuple[Literal["rows", "progress", "saved", "failed", "defect"], tuple[Any, ...]]


class _Pipe:
    """A `Listener` that sends what it hears to the parent process."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def rows(self, seed: int, rows: list[Row]) -> None:
        self.connection.send(("rows", (seed, rows)))

    def progress(self, seed: int, step: int, return_: float | None) -> None:
        self.connection.send(("progress", (seed, step, return_)))

    def saved(self, seed: int, label: str, step: int, digest: str) -> None:
        self.connection.send(("saved", (seed, label, step, digest)))


def _train_in_child(config: RunConfig, seed: int, folder: Path, connection: Connection, stopping: Any) -> None:
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        SeedTraining(config, seed, folder, _Pipe(connection)).run(stopping.is_set)
    except EXPECTED_FAILURES as error:
        connection.send(("failed", (str(error),)))
    except Exception:  # noqa: BLE001 - not swallowed: the parent raises it as a defect
        connection.send(("defect", (traceback.format_exc(),)))
    finally:
        connection.close()


def _train_in_processes(config: RunConfig, folder: Path, session: Session, stopping: threading.Event) -> None:
    # A fresh interpreter for each seed: a forked copy would inherit half of the threads of OpenMP or CUDA.
    context = multiprocessing.get_context("spawn")
    stop_children = context.Event()
    children: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        for seed in config.seeds:
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=_train_in_child, args=(config, seed, folder, sender, stop_children))
            child.start()
            sender.close()
            children[receiver] = seed, child
        _listen(children, session, stopping.is_set, stop_children.set)
    finally:
        stop_children.set()
        for _, child in children.values():
            if child.is_alive():
                child.kill()
            child.join()


def _listen(
    children: dict[Connection, tuple[int, BaseProcess]],
    session: Session,
    stop_wanted: Callable[[], bool],
    stop_children: Callable[[], None],
) -> None:
    """Pass on what the seeds report until all have closed their pipes. Raises SeedFailed for the first failure."""
    open_pipes, failure = dict(children), None
    while open_pipes:
        if stop_wanted() or failure:
            stop_children()
        for ready in wait(list(open_pipes), timeout=0.2):
            assert isinstance(ready, Connection)
            seed, child = open_pipes[ready]
            try:
                kind, content = ready.recv()
            except EOFError:
                del open_pipes[ready]
                child.join()
                if child.exitcode and not failure:
                    failure = SeedFailed(f"the process of seed {seed} was killed (exit {child.exitcode})", defect=False)
                continue
            if kind in ("failed", "defect"):
                failure = failure or SeedFailed(content[0], defect=kind == "defect")
            else:
                {"rows": session.rows, "progress": session.progress, "saved": session.saved}[kind](*content)
    if failure:
        raise failure
