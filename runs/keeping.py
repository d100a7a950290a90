"""From a run's configuration to what keeps its agent able to learn."""

from __future__ import annotations

from agents.plastic import Plasticity
from plasticity.intervention import Intervention
from plasticity.nap import needs_annealing
from plasticity.registry import make
from plasticity.schedules import Constant, Cosine, Linear, Schedule
from runs.config import RunConfig


def plasticity_of(config: RunConfig, task_steps: int | None = None) -> Plasticity:
    """For one agent. task_steps: from task to task. Raises ValueError if an intervention or schedule cannot be had."""
    _made(config)
    return Plasticity(lambda: _made(config), _schedule(config, task_steps), task_steps)


def advice(config: RunConfig) -> str | None:
    """What to tell the user about this choice, once; all agents here learn from values."""
    if config.lr_schedule == "constant" and any(needs_annealing(intervention) for intervention in _made(config)):
        return (
            "NaP holds the effective learning rate, which value-based agents rely on to decay: "
            "performance may drop; try --lr-schedule linear"
        )
    return None


def _made(config: RunConfig) -> list[Intervention]:
    return make(config.interventions)


def _schedule(config: RunConfig, task_steps: int | None) -> Schedule:
    if config.lr_schedule == "constant":
        return Constant()
    if config.lr_schedule == "linear":
        return Linear(config.steps, config.lr_end)
    if config.lr_schedule == "cosine":
        return Cosine(config.steps, config.lr_warmup, end=config.lr_end)
    if task_steps is None:
        raise ValueError(
            f"--lr-schedule cosine-restart begins again where the task changes, and {config.place} has no tasks of so "
            "many steps; use cosine"
        )
    return Cosine(task_steps, config.lr_warmup, end=config.lr_end, restart=True)
