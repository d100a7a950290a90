"""`neoteny plasticity`: interventions side by side on one problem, each a population of all seeds in one process.

OUT/NAME/config.json names the arms; OUT/NAME/ARM/ is the run of each. An arm is an intervention, or several at once;
the same where nothing changes ("-stationary"); or the anchor `fresh`, whose network is drawn anew for each task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
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
from runs.checkpoint import list_checkpoints
from runs.errors import UsageError
from runs.files import write_json
from runs.folders import describe_machine, new_run_folder
from runs.groups import FRESH, GROUP, arm_names
from runs.lock import RunLock
from runs.options import PlasticityOptions, ResumeOptions
from runs.plasticity_arm import ArmConfig, build, open_arm, resolve_problem, train_arm
from runs.plasticity_summary import print_table, summarise_arms
from runs.progress import Progress
from runs.record import STATUS, State, read_status, write_status
from runs.recovery import differences, other_threads, require_device, warn_of
from runs.session import EXPECTED_FAILURES, Kind, end_with_parent, explain
from runs.settings import CONFIG, read_config
from runs.stopping import stop_on_signals


def plasticity_command(options: PlasticityOptions) -> int:
    """Run `neoteny plasticity`. Returns the exit code; raises UsageError before anything is written."""
    try:
        arms = prepare(options)
    except ValueError as error:  # also of the rooms below, whose messages are written for users
        raise UsageError(str(error)) from error

    def save(folder: Path) -> None:
        for arm in arms:
            (folder / arm.name).mkdir()
            arm.save(folder / arm.name)
        write_json(folder / CONFIG, {"command": GROUP, "arms": [arm.name for arm in arms], "jobs": options.jobs})

    folder = new_run_folder(options.out, options.name, options.problem, save)
    if not options.quiet:
        print(f"{folder}: {len(arms)} arms on {options.problem}, {options.seeds} seeds each", file=sys.stderr)
    with RunLock(folder) as lock:
        return _run(folder, arms, lock, options.jobs, options.quiet, options.json)


def resume_plasticity(options: ResumeOptions) -> int:
    """Continue all arms of a run that are not done. Returns the exit code; raises UsageError if it cannot go on."""
    folder = options.run
    try:
        arms = [ArmConfig.load(folder / name) for name in arm_names(folder)]
        jobs = int(read_config(folder).get("jobs", 0))
        with RunLock(folder) as lock:
            left = [arm for arm in arms if not _is_done(folder / arm.name)]
            if not options.quiet:
                state = f"{len(left)} of {len(arms)} arms to go on with" if left else f"is done, all {len(arms)} arms"
                print(f"{folder}: {state}", file=sys.stderr)
            if not left:
                _print_summary(folder, arms, "done", options.quiet, options.json)
                return 0
            if not os.access(folder, os.W_OK):
                raise UsageError(f"cannot write to '{folder}': it is read-only")
            require_device(arms[0].device)
            found = other_threads(arms[0].threads, options.threads)
            found = [*differences(arms[0].environment, describe_machine()), *found]
            arms = [dataclasses.replace(arm, threads=options.threads or arm.threads) for arm in arms]
            for arm in left:  # before anything is written
                open_arm(arm, folder / arm.name)
            warn_of(found)
            return _run(folder, arms, lock, jobs, options.quiet, options.json, found)
    except OSError as error:
        raise UsageError(f"cannot resume '{folder}': {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


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
        "data": None if options.data is None else str(options.data.absolute()),
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


def _run(
    folder: Path,
    arms: Sequence[ArmConfig],
    lock: RunLock,
    jobs: int,
    quiet: bool,
    as_json: bool,
    differences: Sequence[str] = (),
) -> int:
    """Train all arms that are not done and say what came out. differences: of this place from that of the run."""
    problem, total = arms[0].resolved(), len(arms)
    jobs = jobs or (1 if arms[0].device == "cuda" else max(1, available_cores() // arms[0].threads))
    before = {index: read_status(folder / arm.name).get("step", 0) for index, arm in enumerate(arms)}
    with stop_on_signals() as stopping:
        with contextlib.suppress(OSError):  # on a full disk; the arms will say so
            write_status(folder, "running", _count_done(folder, arms), total, pid=os.getpid())
        with Progress(problem.tasks * problem.steps, range(total), quiet, before) as display:
            failures = _train(folder, arms, differences, jobs, stopping.is_set, display, lock)
    done = _count_done(folder, arms)
    state: State = "failed" if failures else "done" if done == total else "stopped"
    try:
        write_status(folder, state, done, total, next((sentence for sentence, _ in failures.values()), None))
    except OSError as error:
        failures[STATUS] = explain(error)
    for name, (sentence, _) in failures.items():
        print(f"neoteny: {folder / name} failed: {sentence}", file=sys.stderr)
    if not failures:
        _print_summary(folder, arms, state, quiet, as_json)
        return 0 if state == "done" else 3
    if any(kind != "outside" for _, kind in failures.values()):
        return 1
    print(f"next: neoteny resume {folder}", file=sys.stderr)
    return 3 if any(list_checkpoints(folder / arm.name) for arm in arms) else 1


def _print_summary(folder: Path, arms: Sequence[ArmConfig], state: State, quiet: bool, as_json: bool) -> None:
    summary = summarise_arms(folder, arms)
    if as_json:
        print(json.dumps(summary))
    if not quiet:
        print_table(summary, sys.stderr)
        if state == "stopped":
            print(f"stopped early; continue with: neoteny resume {folder}", file=sys.stderr)
        print(f"next: neoteny report {folder}", file=sys.stderr)


def _train(
    folder: Path,
    arms: Sequence[ArmConfig],
    differences: Sequence[str],
    jobs: int,
    stop_wanted: Callable[[], bool],
    display: Progress,
    lock: RunLock,
) -> dict[str, tuple[str, Kind]]:
    """Train the arms, `jobs` at a time, each in a fresh process. Returns what went wrong, by arm."""
    context = multiprocessing.get_context("spawn")
    stop, numbers = context.Event(), context.SimpleQueue()
    todo = [index for index, arm in enumerate(arms) if not _is_done(folder / arm.name)]
    workers: dict[Connection, BaseProcess] = {}
    working: dict[Connection, int] = {}  # the arm that each worker has begun
    failures: dict[str, tuple[str, Kind]] = {}
    for number in [*todo, *[None] * min(jobs, len(todo))]:  # None: nothing left
        numbers.put(number)
    try:
        for _ in range(min(jobs, len(todo))):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(arms, folder, differences, numbers, sender, stop, lock))
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
                        killed = f"its process was killed (exit {worker.exitcode})"
                        failures[arms[working[heard]].name] = killed, "outside"
                    continue
                working[heard] = index
                if isinstance(content, tuple):
                    failures[arms[index].name] = content
                else:
                    display.update(index, content)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.join()
    return failures


def _is_done(folder: Path) -> bool:
    return read_status(folder).get("state") == "done"


def _count_done(folder: Path, arms: Sequence[ArmConfig]) -> int:
    return sum(_is_done(folder / arm.name) for arm in arms)


def _work(
    arms: Sequence[ArmConfig],
    folder: Path,
    differences: Sequence[str],
    numbers: Any,
    pipe: Connection,
    stop: Any,
    _lock: Any,  # held here too, for as long as this process may write into the folder
) -> None:
    """Train one arm after another, as their numbers come, until there are none or `stop` is set."""
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    while (index := numbers.get()) is not None and not stop.is_set():
        own = folder / arms[index].name
        pipe.send((index, 0))
        try:
            train_arm(arms[index], own, lambda steps, index=index: pipe.send((index, steps)), stop.is_set, differences)
        except EXPECTED_FAILURES as error:
            failure = explain(error)
        except Exception:  # noqa: BLE001 - not swallowed: the parent prints it
            failure = traceback.format_exc(), "defect"
        else:
            continue
        with contextlib.suppress(OSError):
            write_status(own, "failed", 0, 1, failure[0])
        pipe.send((index, failure))
    pipe.close()
