"""A training run as a whole: its folder, its seeds side by side, its checkpoints, its end.

Every group of seeds that train as one population (or seed that trains alone) has a process of its own, a single group
this one, and reports here; this process alone writes the table, the status and the manifests. Ctrl-C and SIGTERM ask
the seeds to save and stop; a second one kills. Nothing in the folder changes before every seed has its environments
and, if resumed, its saved state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runs import checkpoint
from runs.checkpoint import Damaged, SeedPart
from runs.config import RunConfig
from runs.lock import RunLock
from runs.progress import Progress
from runs.record import Record, Row, State, write_status
from runs.stopping import stop_on_signals
from runs.training import LAST, CannotContinue, Diverged, Training

# What ends a run without being a defect of ours; the message tells the user enough.
EXPECTED_FAILURES = (Diverged, CannotContinue, Damaged, OSError, MemoryError)

# How a session failed: as bad input that changed nothing, for a reason outside (a full disk, a killed process), by
# numbers that a second attempt would repeat, or by a defect; then the message is the traceback.
Kind = Literal["refused", "outside", "diverged", "defect"]


class SeedFailed(RuntimeError):
    """A seed's training ended with an error."""

    def __init__(self, message: str, kind: Kind):
        super().__init__(message)
        self.kind: Kind = kind


@dataclass(frozen=True)
class Progressed:
    """How far the seeds of a run are, as its newest whole checkpoint has it; `checkpoint` is None before the first.

    steps: taken by each seed. rows: that each has in the table. done: seeds with nothing left to do. without_state:
    seeds that it lacks, because their numbers were not finite before there was one; they begin again. table_bytes: of
    the table, at least all those rows. differences: what keeps the run from being bit for bit reproducible.
    """

    checkpoint: Path | None
    steps: Mapping[int, int]
    rows: Mapping[int, int]
    done: frozenset[int]
    without_state: frozenset[int] = frozenset()
    table_bytes: int = 0
    wall_seconds: float = 0.0
    differences: tuple[str, ...] = ()

    def state_of(self, group: Sequence[int]) -> Path | None:
        """The checkpoint that a group goes on from, None if it begins."""
        return None if self.without_state.issuperset(group) else self.checkpoint


def from_scratch(config: RunConfig) -> Progressed:
    """No step taken yet."""
    nothing = dict.fromkeys(config.seeds, 0)
    return Progressed(None, nothing, nothing, frozenset())


class Session:
    """Hears all seeds of one run (a `Listener`) and keeps its record.

    `saved` may be called from other threads than the rest; it shares nothing with them but the open table and what
    `saving` guards.
    """

    def __init__(self, config: RunConfig, folder: Path, quiet: bool, before: Progressed):
        self.config, self.folder, self.before = config, folder, before
        start = {seed: min(step, config.steps) for seed, step in before.steps.items()}
        self.display = Progress(config.steps, config.seeds, quiet, start)
        self.started = time.monotonic()
        self.steps = dict(before.steps)
        self.done = set(before.done)
        self.gathered: dict[str, dict[int, SeedPart]] = {}  # by label, then seed
        self.contributed: set[int] = set()  # seeds that are in a checkpoint of this session
        self.given_up: set[int] = set()  # seeds whose numbers are no longer finite
        self.saving = threading.Lock()
        self.state: State = "running"
        self.record: Record | None = None

    def begin(self) -> None:
        """Every seed is ready: cut the table back to where they start, and say that the run is running."""
        config, before = self.config, self.before
        self.record = Record(self.folder, config.seeds, config.tensorboard, before.table_bytes)
        told = dict.fromkeys(config.seeds, 0)

        def is_counted(row: Row) -> bool:
            told[row.seed] += 1
            return told[row.seed] <= before.rows[row.seed]

        self.record.keep(is_counted)
        self._write_status()

    def rows(self, seed: int, rows: list[Row]) -> None:
        assert self.record is not None, "begin() comes first"
        self.record.write(rows)

    def progress(self, seed: int, step: int, return_: float | None) -> None:
        self.steps[seed] = step
        self.display.update(seed, min(step, self.config.steps), return_)

    def weights(self, seed: int, step: int, weights: dict[str, np.ndarray]) -> None:
        assert self.record is not None, "begin() comes first"
        for name, values in weights.items():
            self.record.histogram(step, name, values, seed)

    def saved(self, seed: int, label: str, part: SeedPart) -> None:
        """Once every seed that will has written its files for `label`, the checkpoint is complete."""
        with self.saving:
            self.gathered.setdefault(label, {})[seed] = part
            self._complete(label)

    def lost(self, seed: int) -> None:
        """Checkpoints do without this seed from now on: they keep what the newest one has of it."""
        with self.saving:
            self.given_up.add(seed)
            for label in list(self.gathered):
                self._complete(label)

    def _complete(self, label: str) -> None:
        assert self.record is not None, "begin() comes first"
        gathered = self.gathered[label]
        if any(self._is_awaited(other, label) for other in self.config.seeds if other not in gathered):
            return
        del self.gathered[label]
        self.record.sync()
        folder, parts = checkpoint.staging(self.folder, label), dict(gathered)
        before = checkpoint.list_checkpoints(self.folder)[-1:]
        for other in self.config.seeds:
            # Resumed further on, or lost: its newest state is in the newest checkpoint; if lost early, in none.
            if other not in gathered and before and other in checkpoint.read_manifest(before[0])["seeds"]:
                parts[other] = checkpoint.carry_over(before[0], other, folder)
        self.contributed |= set(gathered)
        # A seed that has written nothing yet will link to the checkpoint it was resumed from.
        writing = set(self.config.seeds) - self.before.done - self.given_up
        spare = None if self.contributed >= writing else self.before.checkpoint
        extra = {
            "table_bytes": self.record.length,
            "wall_seconds": self.wall_seconds,
            "differences": list(self.before.differences),
        }
        without_state = [other for other in self.config.seeds if other not in parts]
        checkpoint.complete(self.folder, label, parts, extra, self.config.keep_every, spare, without_state)
        self.steps |= {other: part.step for other, part in gathered.items()}
        self.done |= {other for other, part in gathered.items() if part.done}
        self._write_status()

    def _is_awaited(self, seed: int, label: str) -> bool:
        if seed in self.given_up:
            return False
        if label == LAST:
            return seed not in self.before.done
        return self.before.steps[seed] < int(label.removeprefix("step_"))

    @property
    def wall_seconds(self) -> float:
        """Time spent on the run, over all sessions."""
        return self.before.wall_seconds + time.monotonic() - self.started

    def finish(self, failure: SeedFailed | None) -> State:
        """Write the closing status: failed with an error, done if every seed reached the end, else stopped.

        A run that was refused before it began stays as it was. Raises OSError if the status cannot be written, unless
        the run has failed anyway.
        """
        self.state = "failed" if failure else "done" if self.done >= set(self.config.seeds) else "stopped"
        if failure and failure.kind == "refused" and self.record is None:
            return self.state
        with contextlib.suppress(OSError) if failure else contextlib.nullcontext():
            self.close()
        with contextlib.suppress(OSError) if failure else contextlib.nullcontext():
            checkpoint.drop_partial(self.folder)  # first, because on a full disk the status needs its room
            self._write_status(str(failure) if failure else None)
        return self.state

    def close(self) -> None:
        """Close the table."""
        if self.record is not None:
            self.record.close()

    def _write_status(self, error: str | None = None) -> None:
        pid = os.getpid() if self.state == "running" else None
        step, of = min(self.steps.values()), self.config.steps
        differences = list(self.before.differences) or None
        more = {"wall_seconds": self.wall_seconds, "differences": differences, "pid": pid}
        write_status(self.folder, self.state, step, of, error, **more)


def run_session(
    config: RunConfig, folder: Path, lock: RunLock, quiet: bool = False, before: Progressed | None = None
) -> State:
    """Train all seeds of a run whose folder holds its `config.json` and is locked. Returns "done" or "stopped".

    before: where a resumed run goes on. Raises SeedFailed after the status says so; checkpoints completed before stay.
    """
    before, alone = before or from_scratch(config), len(config.seed_groups) == 1
    if alone:  # even a run that is done is loaded, and so refused if its state does not fit
        before = dataclasses.replace(before, done=frozenset())
    session = Session(config, folder, quiet, before)
    failure: SeedFailed | None = SeedFailed("interrupted", "outside")
    try:
        with session.display, stop_on_signals() as stopping:
            if alone:
                _train_here(session, config.seed_groups[0], stopping)
            else:
                groups = [group for group in config.seed_groups if not before.done.issuperset(group)]
                _train_in_processes(session, groups, lock, stopping)
        session.close()
        failure = None
    except SeedFailed as error:
        failure = error
        raise
    except EXPECTED_FAILURES as error:  # of a seed in this process, or of the table and the manifests
        failure = SeedFailed(*explain(error))
        raise failure from error
    except Exception:
        failure = SeedFailed(traceback.format_exc(), "defect")
        raise
    finally:
        state = session.finish(failure)
    return state


def explain(error: BaseException) -> tuple[str, Kind]:
    """What to say of one of EXPECTED_FAILURES, and of which kind it is."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": '{error.filename}'" if error.filename else ""), "outside"
    sentence = str(error) or type(error).__name__
    if isinstance(error, CannotContinue | Damaged):
        return sentence, "refused"
    return sentence, "diverged" if isinstance(error, Diverged) else "outside"


def _train_here(session: Session, group: tuple[int, ...], stopping: threading.Event) -> None:
    training = Training(session.config, group, session.folder, session, session.before.state_of(group))
    session.begin()
    training.run(stopping.is_set)


class _Pipe:
    """A `Listener` that sends what it hears to the parent process; any thread may call it."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.sending = threading.Lock()

    def send(self, kind: str, *content: Any) -> None:
        with self.sending:
            self.connection.send((kind, content))

    def rows(self, seed: int, rows: list[Row]) -> None:
        self.send("rows", seed, rows)

    def progress(self, seed: int, step: int, return_: float | None) -> None:
        self.send("progress", seed, step, return_)

    def weights(self, seed: int, step: int, weights: dict[str, np.ndarray]) -> None:
        self.send("weights", seed, step, weights)

    def lost(self, seed: int) -> None:
        self.send("lost", seed)

    def saved(self, seed: int, label: str, part: SeedPart) -> None:
        self.send("saved", seed, label, part)


@dataclass(frozen=True)
class _Signals:
    """What the parent tells all seeds: `begin`, once everyone is ready, and `stop`."""

    begin: Any
    stop: Any


def _train_in_child(
    config: RunConfig,
    group: tuple[int, ...],
    folder: Path,
    resumed_from: Path | None,
    signals: _Signals,
    pipe: Connection,
    _lock: Any,  # held here too, for as long as this process may write into the folder
) -> None:
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    parent = _Pipe(pipe)
    try:
        training = Training(config, group, folder, parent, resumed_from)
        parent.send("ready", group)
        signals.begin.wait()
        training.run(signals.stop.is_set)
    except EXPECTED_FAILURES as error:
        parent.send("failed", *explain(error))
    except Exception:  # noqa: BLE001 - not swallowed: the parent raises it as a defect
        parent.send("failed", traceback.format_exc(), "defect")
    finally:
        pipe.close()


def end_with_parent() -> None:
    """From now on this process ends when its parent does, also after a kill -9."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train_in_processes(
    session: Session, groups: Sequence[tuple[int, ...]], lock: RunLock, stopping: threading.Event
) -> None:
    # A fresh interpreter for each group: a forked copy would inherit half of the threads of OpenMP or CUDA.
    context = multiprocessing.get_context("spawn")
    signals = _Signals(context.Event(), context.Event())
    config, before = session.config, session.before
    children: dict[Connection, tuple[tuple[int, ...], BaseProcess]] = {}
    try:
        for group in groups:
            receiver, sender = context.Pipe(duplex=False)
            arguments = (config, group, session.folder, before.state_of(group), signals, sender, lock)
            child = context.Process(target=_train_in_child, args=arguments)
            # Blocked in the child from its first moment: Ctrl-C would end it before it has come to ignore it.
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            try:
                child.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
            sender.close()
            children[receiver] = group, child
        if not children:
            session.begin()
        _listen(children, session, stopping.is_set, signals)
    finally:
        signals.stop.set()
        for _, child in children.values():
            if child.is_alive():
                child.kill()
            child.join()


def _listen(
    children: dict[Connection, tuple[tuple[int, ...], BaseProcess]],
    session: Session,
    stop_wanted: Callable[[], bool],
    signals: _Signals,
) -> None:
    """Pass on what the seeds report until all have closed their pipes.

    Raises SeedFailed for the first failure, which stops the others unless it is that of numbers that diverged.
    """
    open_pipes, ready = dict(children), set()
    failure: SeedFailed | None = None
    while open_pipes:
        if stop_wanted() or (failure and failure.kind != "diverged"):
            signals.stop.set()
        if failure and not signals.begin.is_set():
            break  # the others wait for a start that will not come
        for heard in wait(list(open_pipes), timeout=0.2):
            assert isinstance(heard, Connection)
            group, child = open_pipes[heard]
            try:
                kind, content = heard.recv()
            except EOFError:
                del open_pipes[heard]
                child.join()
                if child.exitcode:
                    seeds = ("seed " if len(group) == 1 else "seeds ") + ", ".join(map(str, group))
                    text = f"the process of {seeds} was killed (exit {child.exitcode})"
                    failure = _graver(failure, SeedFailed(text, "outside"))
                continue
            if kind == "failed":
                failure = _graver(failure, SeedFailed(*content))
            elif kind == "ready":
                ready.add(group)
                if len(ready) == len(children):
                    session.begin()
                    signals.begin.set()
            else:
                told = {"rows": session.rows, "progress": session.progress, "weights": session.weights}
                told |= {"lost": session.lost, "saved": session.saved}
                told[kind](*content)
    if failure:
        raise failure


def _graver(known: SeedFailed | None, new: SeedFailed) -> SeedFailed:
    """The first failure counts, but for one that did not stop the run."""
    return new if known is None or (known.kind == "diverged" and new.kind != "diverged") else known
