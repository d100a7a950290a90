"""`neoteny plasticity`: interventions side by side on one problem, each a population of all seeds in one process.

OUT/NAME/config.json names the arms; OUT/NAME/ARM/ is the run of each. An arm is an intervention, or several at once;
the same where nothing changes ("-stationary"); or the anchor `fresh`, whose network is drawn anew for each task.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from envs.cores import available_cores
from plasticity import registry
from runs import compute
from runs.config import CONFIG
from runs.errors import UsageError
from runs.files import read_json, write_json
from runs.folders import describe_machine, new_run_folder
from runs.lock import RunLock
from runs.options import PlasticityOptions, ResumeOptions, parse
from runs.plasticity_arm import ArmConfig, build, resolve_problem, train_arm
from runs.plasticity_summary import print_table, summarise_arms
from runs.progress import Progress
from runs.record import STATUS, State, write_status
from runs.session import EXPECTED_FAILURES, end_with_parent
from runs.stopping import stop_on_signals

COMMAND = "plasticity"
EXAMPLE = "neoteny plasticity --problem permuted-digits --preset small --with none,l2-init,redo,nap"
FRESH = "fresh"


def plasticity_command(arguments: Sequence[str]) -> int:
    """Run `neoteny plasticity ARGUMENTS`. Returns the exit code; raises UsageError before anything is written."""
    options = parse(PlasticityOptions, arguments, "neoteny plasticity", EXAMPLE)
    try:
        arms = prepare(options)
    except ValueError as error:  # also of the rooms below, whose messages are written for users
        raise UsageError(str(error)) from error

    def save(folder: Path) -> None:
        write_json(folder / CONFIG, {"command": COMMAND, "arms": [arm.name for arm in arms], "jobs": options.jobs})

    folder = new_run_folder(options.out, options.name, options.problem, save)
    for arm in arms:
        (folder / arm.name).mkdir()
        arm.save(folder / arm.name)
    if not options.quiet:
        print(f"{folder}: {len(arms)} arms on {options.problem}, {options.seeds} seeds each", file=sys.stderr)
    return _run(folder, arms, options.jobs, options.quiet, options.json)


def resume_plasticity(options: ResumeOptions) -> int:
    """Continue all arms of a run that are not done. Returns the exit code; raises UsageError if it cannot go on."""
    try:
        config = read_json(options.run / CONFIG)
        arms = [ArmConfig.load(options.run / name) for name in config["arms"]]
        jobs = int(config["jobs"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"cannot read '{options.run}': {error}") from error
    return _run(options.run, arms, jobs, options.quiet, options.json)


def arm_folders(group: Path) -> list[Path]:
    """The run folders of all arms below a run of `neoteny plasticity`; empty for any other folder."""
    try:
        config = read_json(group / CONFIG)
    except (OSError, ValueError):
        return []
    if not isinstance(config, dict) or config.get("command") != COMMAND:
        return []
    return [group / name for name in config["arms"] if (group / name / CONFIG).is_file()]


def prepare(options: PlasticityOptions) -> list[ArmConfig]:
    """All arms of a run, each built once to see that it fits. Raises ValueError, one sentence."""
    if options.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {options.seeds}")
    for flag in ("threads", "jobs", "seed", "checkpoint_every", "diagnostics_every"):
        value, least = vars(options)[flag], 1 if flag in ("threads", "diagnostics_every") else 0
        if value is not None and not value >= least:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least {least}, got {value}")
    chosen = registry.arms(options.with_)
    if options.fresh and FRESH not in chosen:
        chosen.append(FRESH)
    problem = resolve_problem(options.problem, options.preset, _overrides(options, {}))
    overrides = _overrides(options, {"tasks": _tasks(options, problem.steps)})
    common: dict[str, Any] = {
        "problem": options.problem,
        "preset": options.preset,
        "overrides": overrides,
        "seeds": tuple(range(options.seed, options.seed + options.seeds)),
        "device": compute.resolve_device(options.device).type,
        "threads": options.threads,
        "compiled": options.compile,
        "diagnostics_every": options.diagnostics_every,
        "curvature": options.curvature,
        "checkpoint_every": options.checkpoint_every,
        "data": None if options.data is None else str(options.data),
        "tensorboard": options.tensorboard,
        "environment": describe_machine(),
    }
    twins = [False, True] if options.stationary else [False]
    arms = [
        ArmConfig(intervention=intervention, stationary=twin, **common)
        for twin in twins
        for intervention in dict.fromkeys(chosen)
        if not (twin and intervention == FRESH)
    ]
    for arm in arms[: len(set(chosen))]:  # twins have the same networks
        build(arm)
    return arms


def _overrides(options: PlasticityOptions, more: dict[str, Any]) -> dict[str, Any]:
    given = {
        "steps": options.steps_per_task,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "optimizer": options.optimizer,
        "hidden": list(options.hidden) or None,
        **more,
    }
    return {name: value for name, value in given.items() if value is not None}


def _tasks(options: PlasticityOptions, steps_per_task: int) -> int | None:
    if options.steps is None:
        return options.tasks
    if options.tasks is not None:
        raise UsageError("--steps and --tasks say the same thing; give one of them")
    if options.steps < 1:
        raise UsageError(f"--steps must be at least 1, got {options.steps}")
    return math.ceil(options.steps / steps_per_task)


def _run(folder: Path, arms: Sequence[ArmConfig], jobs: int, quiet: bool, as_json: bool) -> int:
    with RunLock(folder) as lock, stop_on_signals() as stopping:
        problem = arms[0].resolved()
        jobs = jobs or (1 if arms[0].device == "cuda" else max(1, available_cores() // arms[0].threads))
        display = Progress(problem.tasks * problem.steps, range(len(arms)), quiet)
        with display:
            failures = _train(folder, arms, jobs, stopping.is_set, display, lock)
    done = sum(_is_done(folder / arm.name) for arm in arms)
    state: State = "failed" if failures else "done" if done == len(arms) else "stopped"
    write_status(folder, state, done, len(arms), next(iter(failures.values()), None))
    for name, failure in failures.items():
        print(f"neoteny: {folder / name} failed: {failure}", file=sys.stderr)
    if failures:
        return 1
    summary = summarise_arms(folder, arms)
    if as_json:
        print(json.dumps(summary))
    if not quiet:
        print_table(summary, sys.stderr)
        if state == "stopped":
            print(f"stopped early; continue with: neoteny resume {folder}", file=sys.stderr)
        print(f"next: neoteny report {folder}", file=sys.stderr)
    return 0 if state == "done" else 3


def _train(
    folder: Path,
    arms: Sequence[ArmConfig],
    jobs: int,
    stop_wanted: Callable[[], bool],
    display: Progress,
    lock: RunLock,
) -> dict[str, str]:
    """Train the arms, `jobs` at a time, each in a fresh process. Returns what went wrong, by arm."""
    context = multiprocessing.get_context("spawn")
    stop, numbers = context.Event(), context.SimpleQueue()
    todo = [index for index, arm in enumerate(arms) if not _is_done(folder / arm.name)]
    workers: dict[Connection, BaseProcess] = {}
    working: dict[Connection, int] = {}  # the arm that each worker has begun
    failures: dict[str, str] = {}
    for number in [*todo, *[None] * min(jobs, len(todo))]:  # None: nothing left
        numbers.put(number)
    try:
        for _ in range(min(jobs, len(todo))):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(arms, folder, numbers, sender, stop, lock))
            worker.start()
            sender.close()
            workers[receiver] = worker
        while workers:
            if stop_wanted():
                stop.set()
            for heard in wait(list(workers), timeout=0.2):
                assert isinstance(heard, Connection)
                try:
                    index, content = heard.recv()
                except EOFError:
                    worker = workers.pop(heard)
                    worker.join()
                    if worker.exitcode and heard in working:
                        failures[arms[working[heard]].name] = f"its process was killed (exit {worker.exitcode})"
                    continue
                working[heard] = index
                if isinstance(content, str):
                    failures[arms[index].name] = content
                else:
                    display.update(index, content)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.join()
    return failures


def _is_done(folder: Path) -> bool:
    try:
        return read_json(folder / STATUS)["state"] == "done"
    except (OSError, ValueError, LookupError):
        return False


def _work(arms: Sequence[ArmConfig], folder: Path, numbers: Any, pipe: Connection, stop: Any, _lock: Any) -> None:
    """Train one arm after another, as their numbers come, until there are none or `stop` is set."""
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    while (index := numbers.get()) is not None and not stop.is_set():
        own = folder / arms[index].name
        try:
            train_arm(arms[index], own, lambda steps, index=index: pipe.send((index, steps)), stop.is_set)
        except EXPECTED_FAILURES as error:
            failure = str(error)
        except Exception:  # noqa: BLE001 - not swallowed: the parent prints it
            failure = traceback.format_exc()
        else:
            continue
        with contextlib.suppress(OSError):
            write_status(own, "failed", 0, 1, failure)
        pipe.send((index, failure))
    pipe.close()
