"""`neoteny resume`: find the last good checkpoint of a run, cut its table back to it, and let it go on.

On the CPU, with the same packages and machine, what comes out is bit for bit what an undisturbed run would have given.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import envs
from runs import checkpoint, compute
from runs.checkpoint import Damaged
from runs.config import RunConfig
from runs.errors import UsageError
from runs.lock import RunLock
from runs.options import ResumeOptions
from runs.record import TABLE, read_status, read_table
from runs.session import Progressed, from_scratch, run_session
from runs.settings import CONFIG
from runs.train import conclude, describe_environment, print_summary


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
            config, new_differences = _fit(config, options.threads)
            before = find_start(folder, config, float(status.get("wall_seconds", 0.0)))
            step = min(before.steps.values())
            for difference in new_differences:
                print(f"neoteny: not bit for bit the same run from here on: {difference}", file=sys.stderr)
            known = (*before.differences, *(f"from step {step} on: {difference}" for difference in new_differences))
            before = dataclasses.replace(before, differences=tuple(dict.fromkeys(known)))
            if not options.quiet:
                origin = before.checkpoint.name if before.checkpoint else "the start, it has no checkpoint yet"
                print(f"{folder}: {config.agent} on {config.env}, from {origin}", file=sys.stderr)
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
    checkpoint.settle(folder)
    candidates, damaged = checkpoint.list_checkpoints(folder)[::-1], []
    for candidate in candidates:
        try:
            before = _progressed(folder, config, candidate)
        except Damaged as error:
            damaged.append((candidate, error))
            continue
        except ValueError as error:
            raise UsageError(str(error)) from error
        for other, error in damaged:
            aside = checkpoint.set_aside(other)
            print(f"neoteny: {error}; {other.name} is now {aside.name}, not used and not needed", file=sys.stderr)
        return dataclasses.replace(before, wall_seconds=max(before.wall_seconds, wall_seconds))
    if damaged:
        raise UsageError(
            f"no checkpoint of '{folder}' is whole: {damaged[0][1]}; to start again from step 0, remove "
            f"'{folder / checkpoint.FOLDER}' and resume"
        )
    return dataclasses.replace(from_scratch(config), wall_seconds=wall_seconds)


def _progressed(folder: Path, config: RunConfig, candidate: Path) -> Progressed:
    manifest = checkpoint.verify(candidate)
    if manifest["seeds"] != sorted(config.seeds):
        raise ValueError(f"{candidate} has the seeds {manifest['seeds']}, {CONFIG} {sorted(config.seeds)}")
    rows = {seed: manifest["seed_rows"][str(seed)] for seed in config.seeds}
    try:
        in_table = Counter(row.seed for row in read_table(folder, manifest["table_bytes"]))
    except FileNotFoundError:
        in_table = Counter()
    for seed, count in rows.items():
        if (found := in_table[seed]) < count:
            raise Damaged(f"{folder / TABLE} has lost rows: {found} of the {count} of seed {seed} at {candidate.name}")
    return Progressed(
        checkpoint=candidate,
        steps={seed: manifest["seed_steps"][str(seed)] for seed in config.seeds},
        rows=rows,
        done=frozenset(seed for seed in config.seeds if manifest["seed_done"][str(seed)]),
        table_bytes=manifest["table_bytes"],
        wall_seconds=manifest["wall_seconds"],
        differences=tuple(manifest["differences"]),
    )


def _fit(config: RunConfig, threads: int | None) -> tuple[RunConfig, list[str]]:
    """The config as it can run here, and each thing that may change the last digits, with what to do about it.

    Raises UsageError for what cannot go on here at all.
    """
    if config.device == "cuda" and compute.resolve_device("auto").type != "cuda":
        raise UsageError("the run was trained on a GPU and PyTorch sees none here; resume it on a machine with one")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    try:
        runner = envs.make(config.env, **config.env_settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    here = describe_environment(runner)
    runner.close()
    found = differences(config.environment, here)
    if threads is not None and threads != config.threads:
        found.append(f"{threads} threads instead of {config.threads}; leave --threads away")
        config = dataclasses.replace(config, threads=threads)
    return config, found


def differences(then: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What of the place where a run was made differs here, as `describe_environment` tells it.

    Raises UsageError if the environment itself is another one.
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
    found = []
    for name, version in then.get("versions", {}).items():
        now = here["versions"].get(name)
        if name != "python" and now is not None and now != version:
            way = "" if version == "not installed" else f"; for {version}: pip install '{name}=={version}'"
            found.append(f"{name} {now} instead of {version}{way}")
    old, now = then.get("commit"), here["commit"]
    if old and now and old != now:
        found.append(f"Neoteny at commit {now[:10]} instead of {old[:10]}; for that: git checkout {old[:10]}")
    if then.get("machine") not in (None, here["machine"]):
        found.append(f"another machine, {here['machine']} instead of {then['machine']}")
    return found
