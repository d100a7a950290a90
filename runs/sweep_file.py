"""The TOML file of `neoteny sweep`: which trials it stands for. Lists are expanded, all else is as it stands there."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from runs.errors import UsageError, nearest
from runs.sweep_kinds import KINDS, SweepKind

SHIPPED = Path(__file__).parent / "sweeps"  # files that come with the package
LONGEST_NAME = 200  # file systems allow 255 bytes, the log has an ending


@dataclass(frozen=True)
class Trial:
    """One run folder: an agent in an environment or on data, or a strategy on a benchmark, with options and seeds."""

    name: str
    who: str
    where: str
    options: dict[str, Any]
    kind: SweepKind = KINDS["train"]

    @property
    def columns(self) -> dict[str, str]:
        """Who learns where, in the words of the file."""
        return {self.kind.who: self.who, self.kind.where: self.where}

    @property
    def flags(self) -> list[str]:
        """What follows `neoteny train AGENT`, or another command and who learns, without the folder."""
        flags = [f"--{self.kind.where}", self.where]
        for option, value in self.options.items():
            flags += _flag(option, value)
        return flags


def read_trials(path: Path) -> list[Trial]:
    """All trials of a sweep file, in its order. Raises UsageError, one sentence naming the file, for what is wrong."""
    path = shipped(path)
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"cannot read '{path}': {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not TOML: {error}") from error
    try:
        trials = list(_trials(document))
        _check_names(trials)
    except ValueError as error:  # also of the catalogue and of the environments
        raise UsageError(f"'{path}': {error}") from error
    return trials


def shipped(path: Path) -> Path:
    """The file of this name that comes with the package, if there is no file at `path` itself."""
    own = SHIPPED / f"{path}.toml"
    return own if not path.exists() and own.is_file() else path


def _trials(document: Mapping[str, Any]) -> Iterator[Trial]:
    kind = _kind(document)
    who, where = kind.whos, kind.wheres
    keys = (who, where, *kind.shorthands, "options", kind.who, kind.where, "run")
    for key in document:
        if key not in keys:
            raise UsageError(f"unknown key '{key}'.{nearest(key, keys)}")
    places: list[tuple[str, str, dict[str, Any]]] = [
        (agent, env, {}) for agent in _names(document, who, where) for env in _names(document, where, who)
    ]
    places += [_explicit(run, kind) for run in _runs(document)]
    if not places:
        raise UsageError(f"it stands for no trial; it needs `{who}` and `{where}`, or a [[run]]")
    for agent, env, _ in places:
        kind.check(agent, env)
    agent_tables = _tables(document, kind.who, who, {agent for agent, _, _ in places})
    env_tables = _tables(document, kind.where, where, {env for _, env, _ in places})
    common = {key: document[key] for key in kind.shorthands if key in document} | _table(document, "options")
    for agent, env, own in places:
        merged = common | agent_tables.get(agent, {}) | env_tables.get(env, {}) | own
        yield from _expand(kind, agent, env, {"threads": 1} | merged, own)


def _kind(document: Mapping[str, Any]) -> SweepKind:
    """Of the command with words of its own that the file uses: strategies and benchmarks, or datasets; else train."""
    common, runs = KINDS["train"], _runs(document)
    for kind in KINDS.values():
        own = {kind.who, kind.whos, kind.where, kind.wheres} - {common.who, common.whos, common.where, common.wheres}
        if own & set(document) or any(own & set(run) for run in runs):
            return kind
    return common


def _names(document: Mapping[str, Any], key: str, other: str) -> list[str]:
    """A list of names; without [[run]], both keys have to be there."""
    names = document.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"`{key}` must be a list of names, got {names!r}")
    if not names and document.get(other):
        raise UsageError(f"it has `{other}`, but no `{key}`")
    return names


def _runs(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    runs = document.get("run", [])
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise UsageError("an explicit trial starts with [[run]], in two pairs of brackets")
    return runs


def _explicit(run: Mapping[str, Any], kind: SweepKind) -> tuple[str, str, dict[str, Any]]:
    names = (kind.who, kind.where)
    for key in names:
        if not isinstance(run.get(key), str):
            raise UsageError(f"a [[run]] needs `{key}`, one name")
    return run[kind.who], run[kind.where], _plain_names({key: run[key] for key in run if key not in names})


def _tables(document: Mapping[str, Any], key: str, names: str, used: set[str]) -> dict[str, dict[str, Any]]:
    """[agent.NAME] or [env."ID"]: the options of each. names: the key of their list, in which each must be."""
    tables = document.get(key, {})
    if not isinstance(tables, dict):
        raise UsageError(f"`{key}` holds tables, as in [{key}.NAME]; the list of names is `{names}`")
    for name in tables:
        if name not in used:
            raise UsageError(f"no trial has the {key} of [{key}.{name}].{nearest(name, used)}")
    return {name: _table(tables, name) for name in tables}


def _table(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        raise UsageError(f"`{key}` must be a table of options, got {table!r}")
    return _plain_names(table)


def _plain_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the flags have them are understood too: learning-rate for learning_rate."""
    return {option.replace("-", "_"): value for option, value in options.items()}


def _expand(
    kind: SweepKind, who: str, where: str, options: Mapping[str, Any], own: Mapping[str, Any]
) -> Iterator[Trial]:
    """One trial for each combination. What was given as a list or by a [[run]] is part of a trial's name."""
    kinds = _option_kinds(kind, who)
    axes = {option: _alternatives(kind, who, option, value, kinds) for option, value in options.items()}
    named = sorted(option for option, value in options.items() if option in own or axes[option] != [value])
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        parts = [who, _text(where), *(f"{option}={_text(chosen[option])}" for option in named)]
        yield Trial("-".join(parts), who, where, chosen, kind)


def _option_kinds(kind: SweepKind, who: str) -> dict[str, Any]:
    """Every option of the command that a sweep may set, with its type."""
    kinds = get_type_hints(kind.options(who)) | get_type_hints(kind.config(who))
    return {option.rstrip("_"): hint for option, hint in kinds.items() if option not in kind.settled}


def _alternatives(kind: SweepKind, who: str, option: str, value: Any, kinds: Mapping[str, Any]) -> list[Any]:
    """The values that an option takes. An option that is itself a list, as `hidden`, needs a list of lists."""
    if option in kind.settled:
        raise UsageError(f"the sweep sets '{option}' of each trial itself")
    if option not in kinds:
        raise UsageError(f"'{who}' has no option '{option}'.{nearest(option, kinds)}")
    is_tuple = get_origin(kinds[option]) is tuple
    is_grid = isinstance(value, list) and (not is_tuple or any(isinstance(item, list) for item in value))
    values = value if is_grid else [value]
    if is_grid and option in ("seeds", "seed"):
        raise UsageError("`seeds` is how many and `seed` the first of them, for all trials alike; neither is a list")
    if not values or [] in values:
        raise UsageError(f"the list of '{option}' is empty")
    for item in values:
        _check_value(option, item, kinds[option], is_tuple)
    return values


def _check_value(option: str, value: Any, kind: Any, is_tuple: bool) -> None:
    """Numbers are checked where the command line checks them; here, what would not reach it as it was meant."""
    if is_tuple != isinstance(value, list):
        wanted = "a list, in a list of lists for several" if is_tuple else "one value, or a list of them"
        raise UsageError(f"'{option}' needs {wanted}, got {value!r}")
    if (kind is bool) != isinstance(value, bool):
        wanted = "true or false" if kind is bool else "no true or false"
        raise UsageError(f"'{option}' takes {wanted}, got {value!r}")
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, bool | int | float | str):
            raise UsageError(f"'{option}' needs a number, a word, true or false, got {item!r}")
    if option == "threads" and value == 0:
        raise UsageError("'threads' must be at least 1 in a sweep, which counts the cores that its trials take")


def _check_names(trials: list[Trial]) -> None:
    seen: set[str] = set()
    for trial in trials:
        if trial.name in seen:
            raise UsageError(f"two trials would have the folder '{trial.name}'; take one of them away")
        if len(trial.name.encode()) > LONGEST_NAME:
            raise UsageError(
                f"the folder '{trial.name}' would have more than {LONGEST_NAME} characters; spread its options over "
                "several sweeps, or give those that never change as single values"
            )
        seen.add(trial.name)


def _text(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "x".join(map(_text, value))
    return re.sub(r"[^\w.+-]", "-", str(value))


def _flag(option: str, value: Any) -> list[str]:
    name = option.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}", str(value)]
