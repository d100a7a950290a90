"""What the strategies that replay check of their settings."""

from __future__ import annotations

from typing import Protocol

from continual.memory import POLICIES


class ReplaySettings(Protocol):
    """The settings that every strategy with a memory has."""

    @property
    def memory(self) -> int | None: ...

    @property
    def policy(self) -> str: ...

    @property
    def replay_batch(self) -> int: ...


def check_replay(config: ReplaySettings) -> None:
    """Raises ValueError for a memory or batch that cannot be."""
    if config.policy not in POLICIES:
        raise ValueError(f"unknown policy '{config.policy}', it is one of {', '.join(POLICIES)}")
    if config.memory is not None and config.memory < 0:
        raise ValueError(f"memory must not be negative, got {config.memory}")
    if config.replay_batch < 1:
        raise ValueError(f"replay_batch must be at least 1, got {config.replay_batch}")
