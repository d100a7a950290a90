"""Runs `neoteny` in new processes, many and fast, and breaks them on demand.

A server process imports everything once and computes nothing; each request is served by a fork of it. So a test may
kill a hundred runs without paying for a hundred imports of torch.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Everything by which the files of a run change, but for the writing itself.
OPERATIONS = ("fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir", "ftruncate")
NEEDS_ROOM = ("fsync", "replace", "link", "mkdir")


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (minus the signal that killed it), what it said, how many OPERATIONS it did."""

    code: int
    out: str
    err: str
    operations: int


class FaultServer:
    """The test's side."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.runs.fault_server"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *arguments: str | Path, **fault: Any) -> Ended:
        """Run `neoteny ARGUMENTS` to its end.

        kill_at: SIGKILL before operation number so many. full_from: from that operation on the disk is full.
        signals: {step: number}, sent to itself when the agent has taken so many steps. chunk_bytes: instead of
        `runs.chunks.CHUNK_BYTES`. file_limit: the largest size of a file, in bytes.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"arguments": [str(argument) for argument in arguments], "folder": str(self.folder), **fault}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def serve() -> None:
    """The server's side: one request a line, one answer a line."""
    import envs.atari
    import envs.gymnasium_vector
    import envs.mujoco_batch
    import runs.cli
    import runs.resume
    import runs.train  # noqa: F401

    envs.gymnasium_vector._distributions()  # as slow as an import
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        paths = {name: folder / f"{name}.txt" for name in ("out", "err", "operations")}
        for path in paths.values():
            path.write_text("")
        child = os.fork()
        if child == 0:
            _be_the_run(request, paths)
        _, status = os.waitpid(child, 0)
        texts = {name: path.read_text() for name, path in paths.items()}
        answer = {**texts, "operations": len(texts["operations"]), "code": os.waitstatus_to_exitcode(status)}
        print(json.dumps(answer), file=answers, flush=True)


def _be_the_run(request: dict[str, Any], paths: dict[str, Path]) -> None:
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(paths[name], os.O_WRONLY), number)
        from runs import chunks
        from runs.cli import main

        chunks.CHUNK_BYTES = request.get("chunk_bytes", chunks.CHUNK_BYTES)
        _count_operations(request, os.open(paths["operations"], os.O_WRONLY))
        _send_signals({int(step): number for step, number in request.get("signals", {}).items()})
        if "file_limit" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
        code = main(request["arguments"])
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:  # noqa: BLE001 - a defect: its traceback is what the test will see
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_operations(request: dict[str, Any], counter: int) -> None:
    done = 0

    def counted(name: str, true: Any) -> Any:
        def operation(*arguments: Any, **keywords: Any) -> Any:
            nonlocal done
            done += 1
            if done == request.get("kill_at"):
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(counter, b".")
            if name in NEEDS_ROOM and done >= request.get("full_from", sys.maxsize):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return true(*arguments, **keywords)

        return operation

    for name in OPERATIONS:
        setattr(os, name, counted(name, getattr(os, name)))


def _send_signals(signals: dict[int, int]) -> None:
    from runs.training import Training

    advance = Training.advance

    def advance_and_send(self: Training) -> None:
        advance(self)
        if self.agent.steps in signals:
            os.kill(os.getpid(), signals[self.agent.steps])

    Training.advance = advance_and_send


if __name__ == "__main__":
    serve()
