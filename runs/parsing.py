"""From a command line to typed options, and from options to a page of help."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from runs.errors import UsageError, nearest

Options = TypeVar("Options")


def parse(options: type[Options], arguments: Sequence[str], prog: str, example: str) -> Options:
    """Read flags into one options dataclass. Exits with code 0 for --help.

    Raises UsageError for a flag that does not exist or a value that does not parse.
    """
    return _parse(options, None, [options], arguments, prog, example)


def parse_with_agent(
    options: type[Options],
    config: Any,
    arguments: Sequence[str],
    prog: str,
    example: str,
    others: Mapping[str, type],
    preset: Mapping[str, Any] | None = None,
) -> tuple[Options, Any]:
    """The same with every hyper-parameter of an agent as a flag of its own; `config` holds the defaults.

    others: hyper-parameters of all agents, so that a flag of another one is named as such. preset: other defaults of
    the options.
    """
    both = Annotated[
        tuple[
            Annotated[options, tyro.conf.arg(name="run")],
            Annotated[type(config), tyro.conf.arg(name="hyper-parameters")],
        ],
        tyro.conf.OmitArgPrefixes,
    ]
    required = {f.name: tyro.MISSING for f in dataclasses.fields(options) if _default(f) == "required"}  # type: ignore[arg-type]
    default = (options(**required, **(preset or {})), config)
    return _parse(both, default, [options, type(config)], arguments, prog, example, others)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the page of a command is wanted instead of its work."""
    return "-h" in arguments or "--help" in arguments


def given_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of `flag` on a command line that is not parsed yet, None if it is not there."""
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def given_values(arguments: Sequence[str], flag: str) -> list[str]:
    """All values behind `flag` on a command line that is not parsed yet."""
    first = given_value(arguments, flag)
    if first is None or flag not in arguments:
        return [] if first is None else [first]
    behind = arguments[arguments.index(flag) + 1 :]
    return list(itertools.takewhile(lambda word: not word.startswith("--"), behind))


def _parse(
    target: Any,
    default: Any,
    classes: Sequence[type],
    arguments: Sequence[str],
    prog: str,
    example: str,
    others: Mapping[str, type] | None = None,
) -> Any:
    if asks_for_help(arguments):
        print(help_page(classes, [None] * len(classes), prog, example), end="")
        raise SystemExit(0)
    _check_flags(classes, arguments, prog, others or {})
    keywords = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(target, prog=prog, args=list(arguments), **keywords)
    except SystemExit:
        sentence = _one_sentence(complaint.getvalue())
        if sentence.startswith("Missing from"):
            sentence = f"`{prog}` needs {' and '.join(_missing(classes, arguments))}, for example: {example}"
        raise UsageError(sentence) from None


def _missing(classes: Sequence[type], arguments: Sequence[str]) -> list[str]:
    """What has no default and is not on the command line, as the help page names it."""
    required = [(cls, f.name) for cls in classes for f in dataclasses.fields(cls) if _default(f) == "required"]
    names = [name.upper() if _is_positional(cls, name) else _flag(name) for cls, name in required]
    return [name for name in names if given_value(arguments, name) is None]


def help_page(classes: Sequence[type], defaults: Sequence[Any], prog: str, example: str) -> str:
    """One line for each flag: name, default, meaning. tyro's own page takes two screens for an agent."""
    positional = [f.name.upper() for cls in classes for f in dataclasses.fields(cls) if _is_positional(cls, f.name)]
    lines = [f"usage: {' '.join([prog, *positional])} [options]", "", (classes[0].__doc__ or "").strip(), ""]
    for cls, values in zip(classes, defaults, strict=True):
        meanings = _field_docstrings(cls)
        for field in dataclasses.fields(cls):
            flag = field.name.upper() if _is_positional(cls, field.name) else _flag(field.name)
            default = _default(field) if values is None else vars(values)[field.name]
            lines.append(f"  {flag:<20} {_shown(default):<10} {meanings.get(field.name, '')}".rstrip())
        lines.append("")
    return "\n".join([*lines, f"Example: {example}", ""])


def _flag(name: str) -> str:
    """--with for the field `with_`, whose own name Python keeps for itself."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def _is_positional(cls: type, name: str) -> bool:
    return tyro.conf.Positional in getattr(_hints(cls)[name], "__metadata__", ())


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _default(field: dataclasses.Field[Any]) -> Any:
    return "required" if field.default is dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)


def _field_docstrings(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, as one line, those of its parents too."""
    found: dict[str, str] = {}
    for parent in (p for p in cls.__bases__ if dataclasses.is_dataclass(p)):
        found |= _field_docstrings(parent)
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(doc.value.value).split())
    return found


def _one_sentence(box: str) -> str:
    """What tyro complains of, without its frame, title and hint."""
    lines = [line.strip(" │╭╮╰╯─-") for line in box.splitlines()]
    rules = [number for number, line in enumerate(lines) if not line]
    start = next(number for number in range(len(lines)) if lines[number]) + 1
    end = next((number for number in rules if number > start + 1), len(lines))
    return re.sub(r"^Error parsing \S+: ", "", " ".join(filter(None, lines[start:end])))


def _flag_types(cls: type) -> dict[str, Any]:
    """{"--replay-capacity": int, …} of the fields that are flags."""
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if not _is_positional(cls, field.name)]
    return {_flag(name): hints[name] for name in names}


def _check_flags(classes: Sequence[type], arguments: Sequence[str], prog: str, others: Mapping[str, type]) -> None:
    """tyro would answer with a page; a mistyped flag or number gets one sentence instead."""
    types = {flag: kind for cls in classes for flag, kind in _flag_types(cls).items()}
    positional = any(_is_positional(cls, field.name) for cls in classes for field in dataclasses.fields(cls))
    if arguments and not arguments[0].startswith("-") and not positional:
        raise UsageError(f"`{prog}` does not know what to do with '{arguments[0]}'")
    known = {*types, *(f"--no-{flag[2:]}" for flag, kind in types.items() if kind is bool)}
    lists: set[str] = set()
    for index, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        flag, has_value, value = argument.partition("=")
        flag = flag.replace("_", "-")
        if flag not in known:
            owners = [name for name, cls in others.items() if flag.replace("--no-", "--", 1) in _flag_types(cls)]
            where = f" It is an option of {', '.join(owners)}; `{prog} --help` lists those of this agent."
            raise UsageError(f"`{prog}` has no flag '{flag}'.{where if owners else nearest(flag, known)}")
        if get_origin(types.get(flag)) is tuple:
            if flag in lists:  # argparse would forget the first values
                raise UsageError(f"flag '{flag}' is given twice; write all its values behind one")
            lists.add(flag)
        if types.get(flag) in (None, bool):
            continue
        if not has_value:
            value = arguments[index + 1] if index + 1 < len(arguments) else "--"
            if value.startswith("--"):
                raise UsageError(f"flag '{flag}' needs a value")
        _check_number(flag, value, types[flag])
        if get_origin(types[flag]) is tuple:
            for further in itertools.takewhile(lambda word: not word.startswith("--"), arguments[index + 2 :]):
                _check_number(flag, further, types[flag])


def _check_number(flag: str, value: str, kind: Any) -> None:
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    if get_origin(kind) is not None and type(None) in get_args(kind):
        if value == "None":
            return
        kind = next(inner for inner in get_args(kind) if inner is not type(None))
    if kind not in (int, float):
        return
    try:
        kind(value)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(f"flag '{flag}' needs {wanted}, got '{value}'") from None
