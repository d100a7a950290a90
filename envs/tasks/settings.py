"""Settings of a task as they come from outside: brought to the type of their field, or refused in one sentence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

# Annotations of fields, which say more than their types do.
Count = int  # at least 1
Scale = float  # not negative
Range = tuple[float, float]  # the lower bound first; bounds may be infinite
Duration = float  # seconds, positive, may be infinite


def _number(value: Any) -> float:
    if value in ("inf", "-inf"):  # as text in the record of a run, because JSON has no infinity
        return float(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError
    return float(value)


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def _flag(value: Any) -> bool:
    _require(isinstance(value, bool))
    return value


def _count(value: Any) -> int:
    _require(isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1)
    return int(value)


def _finite(value: Any) -> float:
    _require(math.isfinite(_number(value)))
    return float(value)


def _scale(value: Any) -> float:
    _require(_finite(value) >= 0.0)
    return float(value)


def _range(value: Any) -> Range:
    low, high = (_number(bound) for bound in value)
    _require(low <= high)
    return low, high


def _duration(value: Any) -> float:
    _require(_number(value) > 0.0)
    return float(value)


def _whole(value: Any) -> int:
    _require(isinstance(value, Integral) and not isinstance(value, bool))
    return int(value)


def _text(value: Any) -> str:
    _require(isinstance(value, str))
    return value


def _body(value: Any) -> int | str:
    return value if isinstance(value, str) else 0 if _number(value) == 0 else _count(value)


KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bool": ("True or False", _flag),
    "Count": ("a whole number of at least 1", _count),
    "float": ("a finite number", _finite),
    "float | None": ("a finite number or null", lambda value: None if value is None else _finite(value)),
    "int": ("a whole number", _whole),
    "Duration": ("a positive number of seconds", _duration),
    "Scale": ("a finite number that is not negative", _scale),
    "Range": ("two numbers, the lower first", _range),
    "str": ("a string", _text),
    "int | str": ("the number or the name of a body", _body),
}


def settle(task: Any) -> None:
    """Convert the fields of a frozen dataclass to what their annotations name, in its `__post_init__`.

    Raises ValueError for one that cannot be. A list of two numbers is a range, for example, because the record of a run
    brings ranges back as lists. The dataclass's module must import `annotations` from __future__, which keeps them as
    written.
    """
    for field in dataclasses.fields(task):
        value = getattr(task, field.name)
        meaning, convert = KINDS[str(field.type)]
        try:
            object.__setattr__(task, field.name, convert(value))
        except (TypeError, ValueError):
            raise ValueError(f"{field.name} must be {meaning}, got {value!r}") from None
