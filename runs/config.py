"""Everything that defines a run: `config.json`, complete, so that the file alone starts the same run again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from runs.catalogue import config_from_json, config_to_json
from runs.files import write_json
from runs.settings import CONFIG, made_by, read_config


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
    overlap: bool = False
    bf16: bool = False
    tensorboard: bool
    histograms: bool = False
    """of the weights at every evaluation, in TensorBoard alone"""
    preset: str | None
    agent_config: Any
    interventions: str = "none"
    """what keeps the networks able to learn, as `plasticity.registry` reads it"""
    lr_schedule: str = "constant"
    lr_warmup: int = 0
    lr_end: float = 0.0
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
        """Read a run's `config.json`. What older versions did not know yet has its default.

        Raises ValueError, one sentence, for what is no run, not of `neoteny train`, or has a setting that is missing,
        unknown here, or no such value.
        """
        values, path = read_config(folder), folder / CONFIG
        if (command := values.pop("command")) != "train":
            raise ValueError(f"'{folder}' was made by `neoteny {command}`; this works on runs of `neoteny train`")
        maker = made_by(values.get("environment"))
        kinds = get_type_hints(cls)
        for name, value in values.items():
            if name not in kinds:
                raise ValueError(f"'{path}' has the setting '{name}', which this Neoteny does not know; {maker}")
            if not _is_of_kind(value, dict if name == "agent_config" else kinds[name]):
                raise ValueError(f"'{path}' is damaged: {name} cannot be {value!r}")
        for field in dataclasses.fields(cls):
            if field.name not in values and not _has_default(field):
                raise ValueError(f"'{path}' has no setting '{field.name}'; {maker}")
        try:
            values["agent_config"] = config_from_json(values["agent"], values["agent_config"])
            values["seeds"] = tuple(values["seeds"])
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"cannot use '{path}': {str(error).rstrip('.')}; {maker}") from error
        except (TypeError, AttributeError) as error:  # a hyper-parameter of another kind
            raise ValueError(f"'{path}' is damaged: {error}") from error


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a value of JSON can be that of a field of `RunConfig`."""
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(_is_of_kind(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is_of_kind(item, get_args(kind)[0]) for item in value)
    kind = get_origin(kind) or kind
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
