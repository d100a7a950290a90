"""The settings of a run as plain values, whichever command made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runs.files import read_json

CONFIG = "config.json"
# Where and when a run was made, not how.
_NOT_SETTINGS = ("command", "environment")


def read_config(folder: Path) -> dict[str, Any]:
    """A run's `config.json` as plain values, whichever command made it.

    Raises ValueError, one sentence, if `folder` is not that of a run or the file cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"'{folder}' is not the folder of a run: it has no {CONFIG}")
    try:
        values = read_json(path)
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror}") from error
    if not isinstance(values, dict) or not isinstance(values.get("command"), str):
        raise ValueError(f"'{path}' is not that of a run: it names no command")
    return values


def made_by(environment: Any) -> str:
    """Which Neoteny can read what this one cannot. environment: of `RunConfig`, or whatever stands in its place."""
    found = environment if isinstance(environment, Mapping) else {}
    versions, commit = found.get("versions"), found.get("commit")
    told = [f"version {versions['neoteny']}"] if isinstance(versions, Mapping) and versions.get("neoteny") else []
    told += [f"commit {commit[:10]} (git checkout {commit[:10]})"] if isinstance(commit, str) else []
    return f"use the Neoteny that made the run{': ' if told else ', which it does not name'}{', '.join(told)}"


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json` with nested names joined by dots: {"agent_config.discount": 0.99, …}."""
    return dict(_flat({name: value for name, value in config.items() if name not in _NOT_SETTINGS}, ""))


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value
