"""Where the trials of a sweep run: as processes of this machine, or as tasks of Ray.

Both start a `neoteny` command, say later how it ended, and can ask all of them to stop with a checkpoint.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from envs.cores import available_cores
from runs import trial
from runs.errors import UsageError

KILLED = -9  # the exit code of a trial whose worker vanished
REFUSED = 2
STOP_FILE = ".stop"


class Engine(Protocol):
    """Runs commands side by side. cores: how many cores those that run at the same time may take together."""

    cores: int

    def start(self, name: str, arguments: Sequence[str], log: Path, cores: int) -> None:
        """Start `neoteny ARGUMENTS`, on `cores` cores."""
        ...

    def finished(self) -> list[tuple[str, int]]:
        """Names and exit codes of what ended since the last call; a negative code is a signal."""
        ...

    def stop(self) -> None:
        """Ask everything that runs to save a checkpoint and end; `finished` then tells when it has."""
        ...

    def close(self) -> None:
        """End what still runs, at once."""
        ...


class LocalEngine:
    """Processes of this machine. cores: 0 for all that this process may use."""

    def __init__(self, cores: int = 0):
        self.cores = cores or available_cores()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, arguments: Sequence[str], log: Path, cores: int) -> None:
        self._processes[name] = trial.start(arguments, log)

    def finished(self) -> list[tuple[str, int]]:
        ended = [(name, process.poll()) for name, process in self._processes.items()]
        found = [(name, code) for name, code in ended if code is not None]
        for name, _ in found:
            del self._processes[name]
        return found

    def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._processes.clear()


class RayEngine:
    """Ray tasks: on the cluster of $RAY_ADDRESS, else on workers that it starts here.

    folder: of the sweep; every node has to see it under the same path, for the runs and for the file that stops them.
    cores: 0 for all of the cluster. gpus: of each trial, also a fraction. Raises UsageError if
    the cluster cannot be reached.
    """

    def __init__(self, folder: Path, cores: int = 0, gpus: float = 0.0):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray, self._gpus = ray, gpus
        self._tasks: dict[Any, tuple[str, Path]] = {}
        self._stop_file = folder / STOP_FILE
        self._stop_file.unlink(missing_ok=True)
        here: dict[str, Any] = {}
        if not os.environ.get("RAY_ADDRESS"):
            # num_gpus is left to Ray, which counts them.
            here = {"num_cpus": cores or available_cores(), "include_dashboard": False, "address": "local"}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **here)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(f"cannot reach the Ray cluster of $RAY_ADDRESS: {str(error).splitlines()[0]}") from error
        total = int(ray.cluster_resources().get("CPU", 0))
        self.cores = min(cores, total) if cores else total
        # A task that no single node can hold would wait for ever.
        self._largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1)

    def start(self, name: str, arguments: Sequence[str], log: Path, cores: int) -> None:
        # Ray does not repeat a task by itself: whoever calls us counts the attempts, and resumes instead of repeating.
        settings = {"num_cpus": min(cores, self._largest), "num_gpus": self._gpus, "max_retries": 0, "name": name}
        task = self._ray.remote(run_trial).options(**settings)
        self._tasks[task.remote(list(arguments), log, self._stop_file)] = name, log

    def finished(self) -> list[tuple[str, int]]:
        if not self._tasks:
            return []
        ended, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        return [self._exit_code(task) for task in ended]

    def _exit_code(self, task: Any) -> tuple[str, int]:
        name, log = self._tasks.pop(task)
        try:
            return name, self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:  # raised by our function, so the next try would do the same
            _append(log, f"neoteny: the worker could not start the trial: {error.cause or error}")
            return name, REFUSED
        except self._ray.exceptions.RayError as error:
            _append(log, f"neoteny: the worker is gone: {type(error).__name__}")
            return name, KILLED

    def stop(self) -> None:
        self._stop_file.touch()

    def close(self) -> None:
        self._ray.shutdown()  # ends the workers, and with each its trial
        self._stop_file.unlink(missing_ok=True)


def run_trial(arguments: Sequence[str], log: Path, stop_file: Path) -> int:
    """Run one trial to its end in a worker of Ray, or until `stop_file` appears. Returns its exit code."""
    process = trial.start(arguments, log)
    asked = False
    try:
        while (code := process.poll()) is None:
            time.sleep(0.2)
            if not asked and stop_file.exists():
                process.terminate()
                asked = True
    finally:
        process.terminate()  # does nothing once it has ended
    return code


def _append(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line + "\n")
