"""One trial of a sweep: a process of its own, `python -m runs.trial PARENT train …` or `… resume RUN`.

It is in a session of its own, so that Ctrl-C at the terminal reaches the sweep alone, which decides; and it ends, with
a checkpoint, when the process that started it ends, also after a kill -9.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from runs.cli import main as neoteny

CHECKOUT = Path(__file__).parents[1]
PATIENCE = 60.0  # seconds that the trial of a killed worker is given to write its checkpoint
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start `neoteny ARGUMENTS`; what it prints goes to the end of `log`."""
    command = [sys.executable, "-m", "runs.trial", str(os.getpid()), *arguments]
    search = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as output:
        output.write(f"$ neoteny {shlex.join(arguments)}\n".encode())
        output.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # PyTorch gets the run's own number of threads; no other library takes cores that the sweep has not counted.
            env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": search},
        )


def main(arguments: Sequence[str]) -> int:
    """The trial itself. Returns the exit code of the command."""
    _end_with_parent(int(arguments[0]))
    if arguments[1] == "resume":
        _wait_until_free(Path(arguments[2]))
    return neoteny(arguments[1:])


def _end_with_parent(parent: int) -> None:
    """From now on the end of the parent is a SIGTERM here. Only Linux can; elsewhere a stray trial runs to its end."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the line above
        sys.exit(3)


def _wait_until_free(run: Path) -> None:
    """Until no process holds the run's lock (`runs/lock.py`); after PATIENCE, resuming says who does."""
    with (run / "config.json").open("rb") as config:
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            try:
                fcntl.flock(config, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.2)
            else:
                return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
