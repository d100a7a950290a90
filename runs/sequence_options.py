"""What the flags of `neoteny train` say of a sequence of tasks, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envs import Runner
from envs.sequence import SequenceRunner, sequence_of
from runs import statistics
from runs.config import RunConfig
from runs.errors import UsageError
from runs.options import TrainOptions
from runs.results import Run, read_runs

EXAMPLE = "neoteny train td3 --env dmc/cartpole-balance dmc/cartpole-swingup --switch-every 25000"


def check_switching(options: TrainOptions) -> None:
    """Raises UsageError for several environments without a time to switch, or one with it."""
    first = " ".join(options.env)
    several = len(options.env) > 1 or first.startswith("sequence/")
    given = [name for name in ("switch_every", "switch_episodes") if vars(options)[name] is not None]
    if len(given) > 1:
        raise UsageError("--switch-every counts steps and --switch-episodes episodes; give one of the two")
    for name in given:
        if vars(options)[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {vars(options)[name]}")
    if len(options.env) > 1 and not given:
        raise UsageError(f"several environments need --switch-every or --switch-episodes, for example: {EXAMPLE}")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    only = (*given, *(n for n in ("eval_tasks", "replay_at_switch", "reference") if vars(options)[n] != defaults[n]))
    if not several and only:
        flag = only[0].replace("_", "-")
        raise UsageError(f"--{flag} is for a sequence of tasks, and {first} is one, for example: {EXAMPLE}")


def finish_sequence(config: RunConfig, options: TrainOptions, runner: Runner) -> RunConfig:
    """The config of a run on `runner`, with what a sequence of tasks adds to it.

    Raises UsageError for a run that ends before its second task, or references that say nothing of its tasks.
    """
    sequence = sequence_of(runner)
    if sequence is None:
        return config
    every = sequence.switch_every
    if every is not None and config.steps <= every:
        raise UsageError(
            f"the run ends after {config.steps} steps, before its second task begins at {every}; give more --steps or "
            "a smaller --switch-every"
        )
    if not options.reference:
        return config
    return dataclasses.replace(config, reference=_reference(options.reference, sequence))


def require_clearable(config: RunConfig, agent: Any) -> None:
    """Raises UsageError if the replay of an agent is to be cleared and cannot be."""
    if config.replay_at_switch == "clear" and not hasattr(getattr(agent, "replay", None), "clear"):
        raise UsageError(f"--replay-at-switch clear needs an agent with a replay, and '{config.agent}' has none")


def _reference(folders: Sequence[Path], sequence: SequenceRunner) -> dict[str, float]:
    """By environment, the mean over steps of the return in evaluation, over the first steps and all seeds."""
    if sequence.switch_every is None:
        raise UsageError("--reference needs tasks of equal length, so --switch-every")
    changed = next((task for task in sequence.tasks if task.model), None)
    if changed is not None:
        raise UsageError(f"--reference knows no run on {changed}, whose model is changed")
    wanted = {task.env_id for task in sequence.tasks}
    found: dict[str, float] = {}
    for run in _runs(folders):
        env_id = str(run.config.get("env"))
        if env_id not in wanted:
            raise UsageError(f"the reference '{run.path}' is of {env_id}, which is no task of this sequence")
        found[env_id] = _mean_return(run, sequence.switch_every)
    missing = sorted(wanted - found.keys())
    if missing:
        raise UsageError(f"--reference needs a run on every task; there is none on {missing[0]}")
    return found


def _runs(folders: Sequence[Path]) -> list[Run]:
    try:
        return read_runs(folders)
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot read a reference: {error}") from error


def _mean_return(run: Run, steps: int) -> float:
    curves = statistics.seed_curves(run.metrics.get("eval/return", []), "eval/return")
    areas = statistics.area_under_curve(curves, steps).values()
    known = [area for area in areas if area is not None]
    if not known or len(known) < len(areas):
        raise UsageError(f"not every seed of the reference '{run.path}' was evaluated over the {steps} steps of a task")
    return sum(known) / len(known)
