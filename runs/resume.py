"""`neoteny resume`: find the last good checkpoint of a run, cut its table back to it, and let it go on.

On the CPU, with the same packages and machine, what comes out is bit for bit what an undisturbed run would have given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import envs
from runs import checkpoint
from runs.checkpoint import Damaged
from runs.config import RunConfig
from runs.errors import UsageError
from runs.lock import RunLock
from runs.options import ResumeOptions
from runs.record import TABLE, read_status, read_table
from runs.recovery import add_differences, differences, newest_whole, other_threads, require_device, warn_of
from runs.seed_groups import described, in_step
from runs.session import Progressed, from_scratch, run_session
from runs.settings import CONFIG
from runs.train import choose_groups, conclude, describe_environment, print_summary


def resume_run(options: ResumeOptions) -> int:
    """Run `neoteny resume`. Returns the exit code; raises UsageError, with the run as it was, if it cannot go on."""
    folder = options.run
    try:
        config = RunConfig.load(folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        with RunLock(folder) as lock:
            status = read_status(folder)
            if status.get("state") == "done":
                if not options.quiet:
                    print(f"{folder} is done: {config.steps} steps of {len(config.seeds)} seeds", file=sys.stderr)
                print_summary(folder, "done", options.quiet, options.json)
                return 0
            if not os.access(folder, os.W_OK):
                raise UsageError(f"cannot write to '{folder}': it is read-only")
            config, new_differences = _fit(config, options)
            before = find_start(folder, config, float(status.get("wall_seconds", 0.0)))
            groups = in_step(config.seed_groups, before.steps, before.done | before.without_state)
            if groups != config.seed_groups:
                new_differences.append(f"seeds that were one population are at different steps: {described(groups)}")
                config = dataclasses.replace(config, seed_groups=groups)
            step = min(before.steps.values())
            warn_of(new_differences)
            known = add_differences(before.differences, new_differences, step)
            before = dataclasses.replace(before, differences=known)
            if not options.quiet:
                origin = before.checkpoint.name if before.checkpoint else "the start, it has no checkpoint yet"
                print(f"{folder}: {config.agent} on {config.place}, from {origin}", file=sys.stderr)
            return conclude(
                folder,
                lambda: run_session(config, folder, lock, options.quiet, before),
                options.quiet,
                options.json,
            )
    except OSError as error:
        raise UsageError(f"cannot resume '{folder}': {error.strerror or error}") from error


def find_start(folder: Path, config: RunConfig, wall_seconds: float = 0.0) -> Progressed:
    """The newest checkpoint of which every file is as it was written; newer ones that are not are set aside.

    wall_seconds: time spent so far, if more than the checkpoint says. Without any checkpoint, step 0. Raises UsageError
    if there are only damaged ones, or the table has lost what a checkpoint counts.
    """
    before = newest_whole(folder, lambda candidate: _progressed(folder, config, candidate)) or from_scratch(config)
    return dataclasses.replace(before, wall_seconds=max(before.wall_seconds, wall_seconds))


def _progressed(folder: Path, config: RunConfig, candidate: Path) -> Progressed:
    manifest = checkpoint.verify(candidate)
    without_state = manifest.get("seeds_without_state", [])
    if sorted([*manifest["seeds"], *without_state]) != sorted(config.seeds):
        raise ValueError(f"{candidate} has the seeds {manifest['seeds']}, {CONFIG} {sorted(config.seeds)}")
    rows = {seed: manifest["seed_rows"].get(str(seed), 0) for seed in config.seeds}
    try:
        in_table = Counter(row.seed for row in read_table(folder, manifest["table_bytes"]))
    except FileNotFoundError:
        in_table = Counter()
    for seed, count in rows.items():
        if (found := in_table[seed]) < count:
            raise Damaged(f"{folder / TABLE} has lost rows: {found} of the {count} of seed {seed} at {candidate.name}")
    return Progressed(
        checkpoint=candidate,
        steps={seed: manifest["seed_steps"].get(str(seed), 0) for seed in config.seeds},
        rows=rows,
        done=frozenset(seed for seed in config.seeds if manifest["seed_done"].get(str(seed), False)),
        without_state=frozenset(without_state),
        table_bytes=manifest["table_bytes"],
        wall_seconds=manifest["wall_seconds"],
        differences=tuple(manifest["differences"]),
    )


def _fit(config: RunConfig, options: ResumeOptions) -> tuple[RunConfig, list[str]]:
    """The config as it can run here, and each thing that may change the last digits, with what to do about it.

    Raises UsageError for what cannot go on here at all.
    """
    require_device(config.device)
    found = other_threads(config.threads, options.threads)
    try:
        with contextlib.closing(envs.make(config.env, **config.env_settings)) as runner:
            here = describe_environment(runner)
            groups = config.seed_groups
            if options.seeds_as is not None:
                groups = choose_groups(config, options.seeds_as, runner)
    except ValueError as error:
        raise UsageError(str(error)) from error
    require_environment(config.environment, here)
    if groups != config.seed_groups:
        was = described(config.seed_groups)
        found.append(f"seeds train otherwise, {described(groups)} instead of {was}; leave --seeds-as away")
    config = dataclasses.replace(config, threads=options.threads or config.threads, seed_groups=groups)
    return config, [*differences(config.environment, here), *found]


def require_environment(then: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise UsageError if the environment itself is another one than that of the run, both as `describe_environment`
    tells them.
    """
    runner_here = json.loads(json.dumps(here["runner"]))  # as config.json has it
    for name, value in then.get("runner", {}).items():
        if name not in ("settings", "versions") and runner_here.get(name) != value:
            raise UsageError(f"the environment of the run has {name} {value}, here it has {runner_here.get(name)}")
    for name, value in then.get("runner", {}).get("settings", {}).items():
        if name in runner_here["settings"] and runner_here["settings"][name] != value:
            raise UsageError(
                f"the environment of the run has the setting {name} = {value}, here {runner_here['settings'][name]}"
            )
