"""Everything that defines a run: `config.json`, complete, so that the file alone starts the same run again."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs.catalogue import config_from_json, config_to_json
from runs.files import write_json
from runs.groups import ARM, GROUP
from runs.settings import CONFIG, made_by, read_config, read_fields

OFFLINE = "offline"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. All counts are environment steps (one agent action in one environment).

    Raises ValueError, one sentence, for a count out of range.
    """

    agent: str
    env: str | tuple[str, ...]
    """one environment, or several that are learnt one after the other"""
    env_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """settings of the environment, as `envs.make` takes them"""
    steps: int
    seeds: tuple[int, ...]
    num_envs: int
    eval_every: int
    eval_episodes: int
    eval_tasks: str = "all"
    """of a sequence: "all" at every evaluation, or the "current" one but at the start and where a task ends"""
    replay_at_switch: str = "keep"
    """whether transitions of the task before are there for the next: keep or clear"""
    reference: dict[str, float] = dataclasses.field(default_factory=dict)
    """by environment, the mean return over as many steps as a task lasts when it is learnt from scratch"""
    checkpoint_every: int
    keep_every: int | None = None
    """the first checkpoint after each multiple of so many steps stays for good"""
    log_every: int
    device: str
    threads: int
    compiled: bool
    overlap: bool = False
    bf16: bool = False
    cuda_graphs: bool = False
    tensorboard: bool
    diagnostics_every: int | None = None
    """steps between measurements of the networks' plasticity"""
    value_error: bool = False
    """at every evaluation, what the critics expect of each episode against what it returned"""
    histograms: bool = False
    """of the weights at every evaluation, in TensorBoard alone"""
    film: bool = False
    """of one episode when the run is done"""
    preset: str | None
    agent_config: Any
    data: dict[str, Any] | None = None
    """of offline runs and what goes on from them: where the transitions are, as `runs.datasets.source.DataSource`"""
    initial: str | None = None
    """the checkpoint of an offline run from which each seed goes on online"""
    interventions: str = "none"
    """what keeps the networks able to learn, as `plasticity.registry` reads it"""
    lr_schedule: str = "constant"
    lr_warmup: int = 0
    lr_end: float = 0.0
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    """where it ran: commit, machine, versions, the runner's own description"""
    seed_groups: tuple[tuple[int, ...], ...] = ()
    """seeds that train as one population, each group in a process of its own; by default every seed is alone"""

    def __post_init__(self) -> None:
        counts = ("steps", "num_envs", "eval_every", "eval_episodes", "checkpoint_every", "keep_every", "log_every")
        for name in (*counts, "diagnostics_every"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, choices in (("eval_tasks", ("all", "current")), ("replay_at_switch", ("keep", "clear"))):
            if vars(self)[name] not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {vars(self)[name]}")
        if not self.seeds:
            raise ValueError("a run needs at least one seed")
        if min(self.seeds) < 0:
            raise ValueError(f"seed must not be negative, got {min(self.seeds)}")
        if not self.seed_groups:
            object.__setattr__(self, "seed_groups", tuple((seed,) for seed in self.seeds))
        if sorted(itertools.chain(*self.seed_groups)) != sorted(self.seeds):
            raise ValueError(f"seed_groups must hold each of the seeds {list(self.seeds)} once, got {self.seed_groups}")

    @property
    def place(self) -> str:
        """The environments, for a message."""
        return self.env if isinstance(self.env, str) else " -> ".join(self.env)

    @property
    def is_offline(self) -> bool:
        """Whether a step is a gradient step on fixed data, and no environment is stepped but to evaluate."""
        return self.data is not None and self.initial is None

    @property
    def command(self) -> str:
        """Which command makes such a run."""
        return OFFLINE if self.is_offline else "train"

    def save(self, folder: Path) -> None:
        """Write `config.json` into the run's folder."""
        values = dict(vars(self))
        agent_config = config_to_json(self.agent_config)
        write_json(folder / CONFIG, {"command": self.command, **values, "agent_config": agent_config})

    @classmethod
    def load(cls, folder: Path) -> RunConfig:
        """Read a run's `config.json`. What older versions did not know yet has its default.

        Raises ValueError, one sentence, for what is no run, not of `neoteny train`, or has a setting that is missing,
        unknown here, or no such value.
        """
        values, path = read_config(folder), folder / CONFIG
        if (command := values.pop("command")) not in ("train", OFFLINE):
            command = GROUP if command == ARM else command
            raise ValueError(
                f"'{folder}' was made by `neoteny {command}`; this works on runs of `neoteny train` and "
                f"`neoteny {OFFLINE}`"
            )
        values, maker = read_fields(cls, values, path, agent_config=dict), made_by(values.get("environment"))
        try:
            agent_config = config_from_json(values["agent"], values["agent_config"])
            groups = tuple(tuple(group) for group in values.get("seed_groups", ()))
            env = values["env"] if isinstance(values["env"], str) else tuple(values["env"])
            return cls(**values | {"env": env, "agent_config": agent_config, "seed_groups": groups})
        except ValueError as error:
            raise ValueError(f"cannot use '{path}': {str(error).rstrip('.')}; {maker}") from error
        except (TypeError, AttributeError) as error:  # a hyper-parameter of another kind
            raise ValueError(f"'{path}' is damaged: {error}") from error
