"""The settings of a run as one flat table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Where and when a run was made, not how.
_NOT_SETTINGS = ("command", "environment")


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json` with nested names joined by dots: {"agent_config.discount": 0.99, …}."""
    return dict(_flat({name: value for name, value in config.items() if name not in _NOT_SETTINGS}, ""))


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value
