"""`neoteny sweep`: many runs from one file, as many at a time as there are cores; started again, it goes on.

The folders of the trials are the truth about what is done. `sweep.json` repeats it for readers; nothing depends on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runs.engines import Engine, LocalEngine, RayEngine
from runs.errors import UsageError, nearest
from runs.files import write_json
from runs.options import SweepOptions
from runs.record import read_status
from runs.settings import CONFIG
from runs.stopping import stop_on_signals
from runs.sweep_display import STATES, SweepDisplay
from runs.sweep_file import Trial, read_trials
from runs.sweep_results import final_score, write_results
from runs.train import summarise_run

SWEEP = "sweep.json"
ENGINES = ("local", "ray")
DONE, DEFECT, REFUSED = 0, 1, 2

JobState = Literal["waiting", "running", "done", "stopped", "failed"]


@dataclass
class Job:
    """A trial on its way. seeds: how many. cores: that it takes. attempts: how often this sweep has started it."""

    trial: Trial
    folder: Path
    seeds: int
    cores: int
    steps: int
    state: JobState = "waiting"
    attempts: int = 0
    error: str | None = None

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def score(self) -> str:
        """The metric that is told of it."""
        return self.trial.kind.score(self.trial.who)

    @property
    def command(self) -> list[str]:
        """The arguments of `neoteny` that start this trial."""
        place = ["--out", str(self.folder.parent), "--name", self.folder.name]
        return [self.trial.kind.command, self.trial.who, *self.trial.flags, *place]


def run_sweep(options: SweepOptions, arguments: Sequence[str]) -> int:
    """Run `neoteny sweep ARGUMENTS`. Returns the exit code; raises UsageError before anything is started."""
    folder = _sweep_folder(options)
    jobs = [_prepare_job(trial, folder, options.file) for trial in read_trials(options.file)]
    if options.dry_run:
        for job in jobs:
            print(shlex.join(["neoteny", *job.command]))
        seeds, steps = sum(job.seeds for job in jobs), sum(job.seeds * job.steps for job in jobs)
        done = f", {count} of the trials done already" if (count := _count_done(jobs)) else ""
        print(f"{len(jobs)} trials, {seeds} seeds, {steps:,} steps{done}", file=sys.stderr)
        return 0
    with _hold(folder):
        stopped = _run(jobs, folder, options)
        results = write_results(folder, [job.trial for job in jobs])
    _conclude(jobs, results, options, arguments)
    return 3 if stopped else 1 if any(job.state == "failed" for job in jobs) else 0


def _sweep_folder(options: SweepOptions) -> Path:
    name = options.file.stem if options.name is None else options.name
    if Path(name).name != name or name in ("", ".", ".."):
        raise UsageError(f"--name must be a plain folder name, got '{name}'")
    if options.engine not in ENGINES:
        raise UsageError(f"unknown engine '{options.engine}'.{nearest(options.engine, ENGINES)}")
    for flag in ("cores", "retries", "gpus"):
        if not vars(options)[flag] >= 0:
            raise UsageError(f"--{flag} must be 0 or more, got {vars(options)[flag]}")
    if options.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray, which is not installed: pip install 'neoteny[sweep]'")
    if options.gpus and options.engine != "ray":
        raise UsageError("--gpus is for --engine ray; here, every trial sees all GPUs")
    return (options.out / name).absolute()


def _prepare_job(trial: Trial, folder: Path, file: Path) -> Job:
    """Everything that starting a trial would complain of, found before any is started."""
    try:
        found = trial.kind.prepare(trial.who, trial.flags)
    except ValueError as error:
        raise UsageError(f"'{file}', trial {trial.name}: {error}") from error
    job = Job(trial, folder / trial.name, found.seeds, found.cores, found.steps)
    if _is_run(job.folder):
        _require_same(job, found.settings, file)
        job.state = "done" if read_status(job.folder).get("state") == "done" else "waiting"
    return job


def _is_run(folder: Path) -> bool:
    """Whether a run was started there. Raises UsageError if something else is in the way."""
    if (folder / CONFIG).is_file():
        return True
    if folder.exists() and not (folder.is_dir() and all(path.suffix == ".part" for path in folder.iterdir())):
        raise UsageError(f"'{folder}' is in the way of a trial, and it is not a run; move it or choose another --name")
    return False


def _require_same(job: Job, settings: Mapping[str, Any], file: Path) -> None:
    """Raises UsageError if the run in the job's folder is not what the sweep's file now says of it."""
    try:
        there = job.trial.kind.saved(job.folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    for name, value in settings.items():
        if there.get(name) != value:
            raise UsageError(
                f"'{job.folder}' has {name} {there.get(name)}, '{file}' now says {value}; remove that folder or choose "
                "another --name"
            )


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Make the sweep's folder and lock it: two sweeps at a time would start every trial twice."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"cannot write to '{folder}': {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(f"another sweep is at work in '{folder}'; wait for it, or choose another --name") from None
    except OSError:
        pass  # some shared file systems cannot lock a folder; the locks of the runs still hold
    try:
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing came of it


def _run(jobs: Sequence[Job], folder: Path, options: SweepOptions) -> bool:
    """Run every job that is not done. Returns whether it was stopped before the last one ended."""
    if all(job.state == "done" for job in jobs):
        return False
    engine = LocalEngine(options.cores) if options.engine == "local" else RayEngine(folder, options.cores, options.gpus)

    def keep() -> None:
        listed = [_listed(job) for job in jobs]
        write_json(folder / SWEEP, {"file": str(options.file), "engine": options.engine, "trials": listed})

    try:
        with SweepDisplay(jobs, options.quiet) as display, stop_on_signals() as stopping:
            display.say(f"{folder}: {len(jobs)} trials, {_count_done(jobs)} done, {engine.cores} cores")
            keep()
            run_jobs(jobs, engine, options.retries, stopping.is_set, display, keep)
    finally:
        engine.close()
    return stopping.is_set() and any(job.state in ("waiting", "stopped") for job in jobs)


def run_jobs(
    jobs: Sequence[Job],
    engine: Engine,
    retries: int,
    stopping: Callable[[], bool],
    display: SweepDisplay,
    keep: Callable[[], None],
) -> None:
    """Start the jobs in order as cores become free, resume those that die, until all have ended or have stopped.

    keep: called after every change of a job. Jobs end in the state "done", "failed", "stopped" or, not started before
    the stop, "waiting".
    """
    by_name = {job.trial.name: job for job in jobs}
    asked = False
    while True:
        for name, code in engine.finished():
            display.say(_ended(by_name[name], code, retries, asked))
            keep()
        if stopping() and not asked:
            asked = True
            display.say("stopping: the trials save their checkpoints; Ctrl-C again kills them")
            engine.stop()
        running = [job for job in jobs if job.state == "running"]
        waiting = [] if asked else [job for job in jobs if job.state == "waiting"]
        if not running and not waiting:
            return
        if waiting and _fits(waiting[0], running, engine.cores):
            display.say(_start(waiting[0], engine))
            keep()
            continue
        display.tick()
        time.sleep(0.1)


def _fits(job: Job, running: Sequence[Job], cores: int) -> bool:
    """A trial that wants more cores than there are runs alone; its seeds then share them."""
    return not running or sum(other.cores for other in running) + job.cores <= cores


def _start(job: Job, engine: Engine) -> str:
    """Start or resume a job. Returns a sentence that says so."""
    resumed = _is_run(job.folder)
    if not resumed and job.folder.exists():
        shutil.rmtree(job.folder)  # killed before it was a run
    command = ["resume", str(job.folder)] if resumed else job.command
    job.state, job.attempts = "running", job.attempts + 1
    engine.start(job.trial.name, command, job.log, min(job.cores, engine.cores))
    return f"{job.trial.name}: {'resumed' if resumed else 'started'}"


def _ended(job: Job, code: int, retries: int, stopping: bool) -> str:
    """Decide what becomes of a job that ended. Returns a sentence that says so.

    A killed trial is resumed. So is one that failed, once: if it fails the same way again, it would for ever.
    """
    name = job.trial.name
    if code == DONE:
        job.state, job.error = "done", None
        found = final_score(job.folder, job.score)
        return f"{name}: done" if found is None else f"{name}: done, {job.score} {found[0]:.4g} over {found[1]} seeds"
    if stopping:
        job.state = "stopped"
        return f"{name}: stopped"
    reason = f"killed by signal {-code}" if code < 0 else read_status(job.folder).get("error") or _last_line(job.log)
    repeats = code == DEFECT and reason == job.error
    job.error = reason
    if code == REFUSED or repeats or job.attempts > retries:
        job.state = "failed"
        return f"{name}: failed, see {job.log}: {_in_one_line(reason)}"
    job.state = "waiting"
    return f"{name}: {_in_one_line(reason)}; to be resumed, try {job.attempts + 1} of {retries + 1}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "no reason known")


def _in_one_line(reason: str) -> str:
    """Of a traceback, what was raised."""
    return reason.strip().split("\n")[-1]


def _listed(job: Job) -> dict[str, Any]:
    trial = {"name": job.trial.name, **job.trial.columns, "options": job.trial.options}
    command = shlex.join(["neoteny", *job.command])
    return trial | {"command": command, "state": job.state, "attempts": job.attempts, "error": job.error}


def _count_done(jobs: Sequence[Job]) -> int:
    return sum(job.state == "done" for job in jobs)


def _conclude(jobs: Sequence[Job], results: Path, options: SweepOptions, arguments: Sequence[str]) -> None:
    if options.json:
        trials = {job.trial.name: _summary(job) for job in jobs}
        print(json.dumps({"sweep": str(results.parent), "results": str(results), "trials": trials}))
    if options.quiet:
        return
    counts = [f"{count} {state}" for state in STATES if (count := sum(job.state == state for job in jobs))]
    print(f"{', '.join(counts)}; last values of all metrics: {results}", file=sys.stderr)
    if _count_done(jobs) < len(jobs):
        print(f"go on with: {shlex.join(['neoteny', 'sweep', *arguments])}", file=sys.stderr)
    print(f"next: neoteny report {shlex.quote(str(results.parent))}/*/", file=sys.stderr)


def _summary(job: Job) -> dict[str, Any]:
    summary = {"state": job.state, "run": str(job.folder), "metrics": {}, "error": job.error}
    with contextlib.suppress(FileNotFoundError):  # not started
        summary |= summarise_run(job.folder)
    return summary
