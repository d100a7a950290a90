"""The settings of a run as plain values, whichever command made it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from runs.files import read_json

CONFIG = "config.json"
# Where and when a run was made, not how; and `seed_groups` follow from the seeds and the machine.
_NOT_SETTINGS = ("command", "environment", "seed_groups")


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


def read_fields(cls: type, values: Mapping[str, Any], path: Path, **kinds: type) -> dict[str, Any]:
    """The values of a `config.json`, without "command", as those of the fields of a dataclass.

    path: of the file, for the messages. kinds: of fields that JSON has as something else than the dataclass has. Fields
    with a default may be missing. Raises ValueError, one sentence, for a setting that is missing, unknown here, or no
    such value.
    """
    maker, wanted = made_by(values.get("environment")), get_type_hints(cls) | kinds
    for name, value in values.items():
        if name not in wanted:
            raise ValueError(f"'{path}' has the setting '{name}', which this Neoteny does not know; {maker}")
        if not _is_of_kind(value, wanted[name]):
            raise ValueError(f"'{path}' is damaged: {name} cannot be {value!r}")
    for field in dataclasses.fields(cls):
        if field.name not in values and not _has_default(field):
            raise ValueError(f"'{path}' has no setting '{field.name}'; {maker}")
    return {name: tuple(value) if get_origin(wanted[name]) is tuple else value for name, value in values.items()}


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


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a value of JSON can be that of a field of this type."""
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(_is_of_kind(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is_of_kind(item, get_args(kind)[0]) for item in value)
    kind = get_origin(kind) or kind
    if kind is float:
        kind = (int, float)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
