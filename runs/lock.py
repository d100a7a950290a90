"""One process at a time works on a run: an advisory lock on its `config.json`, which nothing ever replaces.

The kernel drops the lock when the last process that holds it ends, however it ends, so none is ever stale. Processes
that train single seeds hold it too: they may outlive a killed parent by moments, in which they could still write.
"""

from __future__ import annotations

import fcntl
import os
import time
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from runs.errors import UsageError
from runs.record import read_status
from runs.settings import CONFIG

PATIENCE = 10.0  # seconds that the seeds of a killed run are given to end


class RunLock:
    """Holds the lock of the run in `folder` until it is closed; a context manager.

    Handed to a child process as an argument, the child holds it too. Raises UsageError, naming the process, if another
    one works on the run.
    """

    def __init__(self, folder: Path):
        self.handle = os.open(folder / CONFIG, os.O_RDONLY)
        give_up = time.monotonic() + PATIENCE
        try:
            while not _try_lock(self.handle):
                pid = _worker(folder)
                if time.monotonic() > give_up or (pid is not None and _is_alive(pid)):
                    who = "another process" if pid is None else f"process {pid}"
                    raise UsageError(f"{who} is at work on '{folder}'; wait for it, or stop it with Ctrl-C or kill")
                time.sleep(0.05)
        except BaseException:
            os.close(self.handle)
            raise

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)

    def __reduce__(self) -> tuple[Any, ...]:
        return _hold, (DupFd(self.handle),)


def _hold(duplicate: Any) -> int:
    return duplicate.detach()


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _worker(folder: Path) -> int | None:
    """The process that says in `status.json` that it works on the run."""
    pid = read_status(folder).get("pid")
    return pid if isinstance(pid, int) and pid > 0 else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
