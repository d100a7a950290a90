"""One intervention on one problem, all seeds as one population: a run folder of its own.

`OUT/NAME/ARM/` is a run like any other (table, status, checkpoints), so it can be reported and compared like one. Its
checkpoints hold the whole population under the first seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plasticity import registry
from plasticity.harness import TaskResult, Trial
from plasticity.measures.diagnostics import Diagnostics
from plasticity.problems.published import PROBLEMS, SMALL, Problem
from runs import compute
from runs.errors import nearest
from runs.files import write_json
from runs.groups import ARM, GROUP, STATIONARY
from runs.population_run import PopulationRun, restore
from runs.record import State
from runs.recovery import add_differences
from runs.settings import CONFIG, read_config, read_fields

_SLICE = 200  # steps between two looks at whether to stop
MEASURED = 20  # times in a run, unless told otherwise


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """All that defines an arm: its `config.json`. overrides: fields of the problem that differ from its preset."""

    problem: str
    intervention: str
    stationary: bool
    preset: str | None
    overrides: dict[str, Any]
    seeds: tuple[int, ...]
    device: str
    threads: int
    compiled: bool
    diagnostics_every: int | None
    curvature: bool
    checkpoint_every: float
    data: str | None
    tensorboard: bool
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.intervention}-{STATIONARY}" if self.stationary else self.intervention

    def resolved(self) -> Problem:
        """The problem with all its settings. Raises ValueError for an unknown name or a bad value."""
        problem = resolve_problem(self.problem, self.preset, self.overrides)
        return problem.stationary() if self.stationary else problem

    def save(self, folder: Path) -> None:
        """Write `config.json`; "place" and "settings" are for readers and follow from the rest."""
        place = f"{self.problem}, {STATIONARY}" if self.stationary else self.problem
        derived = {"place": place, "settings": dataclasses.asdict(self.resolved())}
        write_json(folder / CONFIG, {"command": ARM, **dataclasses.asdict(self), **derived})

    @classmethod
    def load(cls, folder: Path) -> ArmConfig:
        """Read it back. Raises ValueError, one sentence, naming what is wrong with the file."""
        values = read_config(folder)
        if (command := values.pop("command")) != ARM:
            raise ValueError(f"'{folder}' was made by `neoteny {command}`, not as an arm of `neoteny {GROUP}`")
        own = {name: value for name, value in values.items() if name not in ("place", "settings")}
        return cls(**read_fields(cls, own, folder / CONFIG))


def resolve_problem(name: str, preset: str | None, overrides: Mapping[str, Any]) -> Problem:
    """A problem by name with what a preset and the user change. Raises ValueError, one sentence."""
    if name not in PROBLEMS:
        raise ValueError(f"unknown problem '{name}'.{nearest(name, PROBLEMS)}")
    if preset not in (None, "small"):
        raise ValueError(f"'{name}' has no preset '{preset}'.{nearest(preset or '', ['small'])}")
    changed = {**(SMALL[name] if preset else {}), **overrides}
    if "hidden" in changed:
        changed["hidden"] = tuple(changed["hidden"])
    return dataclasses.replace(PROBLEMS[name], **changed)


def build(config: ArmConfig) -> Trial:
    """The trial of an arm, at its first step. Raises ValueError for what does not fit together."""
    problem = config.resolved()
    total = problem.tasks * problem.steps
    return Trial(
        problem,
        registry.make(config.intervention),
        config.seeds,
        torch.device(config.device),
        None if config.data is None else Path(config.data),
        config.compiled,
        Diagnostics(config.diagnostics_every or max(1, total // MEASURED), curvature=config.curvature),
        max(1, problem.tasks // MEASURED),
    )


def open_arm(config: ArmConfig, folder: Path) -> tuple[Trial, dict[str, Any]]:
    """The trial where its newest whole checkpoint left it, and that one's manifest; without any, at its first step, {}.

    Damaged checkpoints that are newer are set aside. Raises ValueError, one sentence, if it cannot go on here.
    """
    trial = build(config)
    return trial, restore(trial, folder, config.seeds, config.environment)


def train_arm(
    config: ArmConfig,
    folder: Path,
    tell: Callable[[int], None],
    stop_wanted: Callable[[], bool],
    differences: Sequence[str] = (),
) -> State:
    """Train an arm from its newest checkpoint, or from the start, to its end, or until it should stop.

    tell: called with the steps taken. differences: what of this place is not as the arm's config has it. Raises OSError
    for a full disk, ValueError if it cannot go on here.
    """
    compute.set_up(torch.device(config.device), config.threads)
    trial, before = open_arm(config, folder)
    known = add_differences(before.get("differences", ()), differences, trial.learner.steps)
    with contextlib.closing(_Session(config, folder, trial, before, known)) as session:
        while not trial.done and not stop_wanted():
            session.take(trial.advance(_SLICE))
            tell(trial.learner.steps)
        return session.finish()


class _Session:
    """The record of one arm while it trains. before: the manifest of where it goes on."""

    def __init__(
        self, config: ArmConfig, folder: Path, trial: Trial, before: Mapping[str, Any], differences: Sequence[str]
    ):
        self.config, self.trial = config, trial
        self.run = PopulationRun(folder, config.seeds, trial, config.tensorboard, before, differences)
        self._write_status("running")

    def take(self, result: TaskResult | None) -> None:
        """Record what was measured since the last call, and save now and then."""
        for steps, found in self.trial.measurements:
            self.run.write(steps, found)
        self.trial.measurements.clear()
        if result is not None:
            named = {name if "/" in name else f"plasticity/{name}": v for name, v in result.metrics.items()}
            self.run.write(result.steps, named)
        if self.trial.done:
            self._write_costs()
        if self.trial.done or self.run.seconds_since_saved > self.config.checkpoint_every:
            self.run.save(self.trial.learner.steps, self.trial.done)
            self._write_status("running")

    def _write_costs(self) -> None:
        steps, members = self.trial.learner.steps, len(self.config.seeds)
        costs = {
            "speed/seconds_per_step": self.run.wall_seconds / steps / members,
            "plasticity/parameters": self.trial.parameter_count,
        }
        self.run.write(
            steps, {name: torch.full((members,), value, dtype=torch.float64) for name, value in costs.items()}
        )

    def finish(self) -> State:
        """Save if anything happened since the last checkpoint, and write the closing status."""
        state: State = "done" if self.trial.done else "stopped"
        self.run.save_if_new(self.trial.learner.steps, self.trial.done)
        self._write_status(state)
        return state

    def close(self) -> None:
        self.run.close()

    def _write_status(self, state: State) -> None:
        problem = self.trial.problem
        self.run.write_status(state, self.trial.learner.steps, problem.tasks * problem.steps)
