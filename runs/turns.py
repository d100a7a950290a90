"""Contestants that take turns, each in a process of its own, and what a turn cost.

A process lives for the whole command; it is sent a case, then turns, then the next case. Processor seconds are those of
its whole process tree, so that libraries which simulate in processes are charged for them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from runs.contestants import CONTESTANTS, Advance, Case, NotOffered

_BUILD_SECONDS = 600.0  # 256 processes of Gymnasium's, one after the other
_LATE_SECONDS = 120.0  # how much longer than asked a turn may take: a step of all rows, or a reset, in between
_END_SECONDS = 30.0


@dataclass(frozen=True)
class Turn:
    """What one turn did: environment steps (rows counted), seconds by the clock and of processors (None: not known)."""

    steps: int
    seconds: float
    cpu_seconds: float | None


class ContestantFailed(Exception):
    """A contestant cannot take part, or not go on; the message says why."""


def take_turns(
    playing: Mapping[str, Callable[[float], Turn]], rounds: int, seconds: float
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """The turns of each contestant, one a round, and why those that failed did, which have no turns.

    In every round each has one turn; the order changes from round to round, the same at every call.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in playing}
    failed: dict[str, str] = {}
    shuffle = random.Random(0)
    for _ in range(rounds):
        for name in shuffle.sample(list(turns), len(turns)):
            try:
                turns[name].append(playing[name](seconds))
            except ContestantFailed as error:
                failed[name] = str(error)
                del turns[name]
    return turns, failed


class Contender:
    """The process of one contestant, as a context. Whatever goes wrong in it is a ContestantFailed here.

    The process is started by the first case, so one that never takes part costs nothing, and again after a failure.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pipe: Connection | None = None
        self._process: Any = None

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop(_END_SECONDS)

    def open(self, case: Case) -> None:
        """Build the environments of a case. Raises ContestantFailed."""
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")  # simulators and PyTorch do not survive a fork
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(self._name, theirs))
            self._process.start()
            theirs.close()
        self._ask(case, _BUILD_SECONDS)

    def turn(self, seconds: float) -> Turn:
        """Run for about so many seconds. Raises ContestantFailed."""
        return self._ask(seconds, seconds + _LATE_SECONDS)

    def close_case(self) -> None:
        """Take the environments down; whoever cannot is stopped."""
        with contextlib.suppress(ContestantFailed):
            self._ask(None, _LATE_SECONDS)

    def _ask(self, question: Any, patience: float) -> Any:
        if self._pipe is None:
            raise ContestantFailed("its process has ended")
        try:
            self._pipe.send(question)
            answered = self._pipe.poll(patience)
            answer = self._pipe.recv() if answered else None
        except (EOFError, OSError):
            self._process.join(5.0)
            code = self._process.exitcode
            self._stop(0.0)
            raise ContestantFailed(f"its process ended with code {code}") from None
        if not answered:
            self._stop(0.0)
            raise ContestantFailed(f"no answer for {patience:.0f} seconds")
        if isinstance(answer, str):
            raise ContestantFailed(answer)
        return answer

    def _stop(self, patience: float) -> None:
        """Close the pipe, at which the process closes its environments and ends; then insist."""
        if self._pipe is None:
            return
        self._pipe.close()
        self._pipe = None
        self._process.join(patience)
        for insist in (self._process.terminate, self._process.kill):
            if self._process.exitcode is None:
                insist()
                self._process.join(5.0)


def serve(name: str, pipe: Connection) -> None:
    """The process of one contestant: takes a case, then turns until None; ends when the other end closes the pipe.

    Every question has one answer: None, a Turn, or what went wrong as a string, after which the case is closed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the command closes us
    silence = os.open(os.devnull, os.O_WRONLY)  # libraries greet and warn; what matters goes through the pipe
    for stream in (1, 2):
        os.dup2(silence, stream)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            case = pipe.recv()
            try:
                with CONTESTANTS[name].open(case) as advance:
                    pipe.send(None)
                    _take_turns_with(advance, pipe)
                pipe.send(None)
            except NotOffered as error:
                pipe.send(str(error))
            except (EOFError, BrokenPipeError):
                raise
            except Exception as error:  # noqa: BLE001  (of any library; the others go on)
                pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _take_turns_with(advance: Advance, pipe: Connection) -> None:
    while (seconds := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), tree_cpu_seconds()
        try:
            steps = advance(seconds)
        except (EOFError, BrokenPipeError) as error:  # not of our own pipe
            raise RuntimeError("one of its processes has ended") from error
        cpu = None if cpu is None else (tree_cpu_seconds() or 0.0) - cpu
        pipe.send(Turn(steps, time.perf_counter() - wall, cpu))


def tree_cpu_seconds() -> float | None:
    """Processor seconds that this process and its living children have used; None where the system does not tell."""
    children = multiprocessing.active_children()
    if children and sys.platform != "linux":
        return None
    # The clock of another process: clock_getcpuclockid(3) makes its number so.
    clocks = [(~child.pid << 3) | 2 for child in children if child.pid is not None]
    return time.process_time() + sum(time.clock_gettime(clock) for clock in clocks)
