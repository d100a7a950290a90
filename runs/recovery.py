"""What everything that is resumed begins with: the newest checkpoint that is whole, and what differs from before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from runs import checkpoint, compute
from runs.checkpoint import Damaged
from runs.errors import UsageError

Start = TypeVar("Start")


def newest_whole(run: Path, read: Callable[[Path], Start]) -> Start | None:
    """What `read` makes of the newest checkpoint for which it does not raise Damaged; None for a run without any.

    Newer ones are set aside, which stderr tells. Raises UsageError, with all of them left as they are, if there are
    only damaged ones or `read` raises ValueError.
    """
    checkpoint.settle(run)
    damaged = []
    for candidate in checkpoint.list_checkpoints(run)[::-1]:
        try:
            start = read(candidate)
        except Damaged as error:
            damaged.append((candidate, error))
            continue
        except ValueError as error:
            raise UsageError(str(error)) from error
        for other, error in damaged:
            aside = checkpoint.set_aside(other)
            print(f"neoteny: {error}; {other.name} is now {aside.name}, not used and not needed", file=sys.stderr)
        return start
    if damaged:
        raise UsageError(
            f"no checkpoint of '{run}' is whole: {damaged[0][1]}; to start again from step 0, remove "
            f"'{run / checkpoint.FOLDER}' and resume"
        )
    return None


def require_device(device: str) -> None:
    """Raise UsageError if the run was trained on a GPU and there is none here."""
    if device == "cuda" and compute.resolve_device("auto").type != "cuda":
        raise UsageError("the run was trained on a GPU and PyTorch sees none here; resume it on a machine with one")


def differences(then: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What of the versions, commit and machine that made a run is another one here, with what to do about it.

    Both as `folders.describe_machine` tells them.
    """
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


def other_threads(before: int, now: int | None) -> list[str]:
    """The difference that `--threads` makes, if it was given and makes one. Raises UsageError for less than 1."""
    if now is not None and now < 1:
        raise UsageError(f"--threads must be at least 1, got {now}")
    return [] if now in (None, before) else [f"{now} threads instead of {before}; leave --threads away"]


def warn_of(found: Iterable[str]) -> None:
    """Say on stderr what may change the last digits."""
    for difference in found:
        print(f"neoteny: not bit for bit the same run from here on: {difference}", file=sys.stderr)


def add_differences(known: Iterable[str], found: Iterable[str], step: int) -> tuple[str, ...]:
    """For the run's record: what differed before, and what does from `step` on."""
    return tuple(dict.fromkeys((*known, *(f"from step {step} on: {difference}" for difference in found))))
