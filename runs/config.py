"""Everything that defines a run: `config.json`, complete, so that the file alone starts the same run again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs.catalogue import config_from_json, config_to_json
from runs.files import read_json, write_json

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. All counts are environment steps (one agent action in one environment).

    Raises ValueError, one sentence, for a count out of range.
    """

    agent: str
    env: str
    env_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """settings of the environment, as `envs.make` takes them"""
    steps: int
    seeds: tuple[int, ...]
    num_envs: int
    eval_every: int
    eval_episodes: int
    checkpoint_every: int
    keep_every: int | None = None
    """the first checkpoint after each multiple of so many steps stays for good"""
    log_every: int
    device: str
    threads: int
    compiled: bool
    overlap: bool
    bf16: bool
    tensorboard: bool
    preset: str | None
    agent_config: Any
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    """where it ran: commit, machine, versions, the runner's own description"""

    def __post_init__(self) -> None:
        for name in ("steps", "num_envs", "eval_every", "eval_episodes", "checkpoint_every", "keep_every", "log_every"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.seeds:
            raise ValueError("a run needs at least one seed")
        if min(self.seeds) < 0:
            raise ValueError(f"seed must not be negative, got {min(self.seeds)}")

    def save(self, folder: Path) -> None:
        """Write `config.json` into the run's folder."""
        values = dict(vars(self))
        agent_config = config_to_json(self.agent_config)
        write_json(folder / CONFIG, {"command": "train", **values, "agent_config": agent_config})

    @classmethod
    def load(cls, folder: Path) -> RunConfig:
        """Read a run's `config.json`. Raises FileNotFoundError, or ValueError naming what is wrong with the file."""
        values = read_json(folder / CONFIG)
        values.pop("command")
        values["agent_config"] = config_from_json(values["agent"], values["agent_config"])
        values["seeds"] = tuple(values["seeds"])
        return cls(**values)
