"""Episodes of many rows as tensors on a device, without a word to the host: what surrounds the physics of a step.

Every function here is a fixed sequence of tensor operations on tensors that stay where they are. None reads a value,
indexes with a mask or makes a tensor from host memory, so that a function can be recorded as a CUDA graph, and its
launch returns before the work is done. What would be a branch on the host is a selection over all rows: every row has
its next first state ready (`starts`), and where an episode ends it takes the place of the present one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from envs.actions import SLACK
from envs.row_random import RowRandom
from envs.runner import Step
from envs.tasks.task import Task

STATE_FIELDS = {"time", "qpos", "qvel", "act", "ctrl", "qacc_warmstart"}
LIFTS = 8  # looks for contacts; robots are lifted by up to 2.56 m
HUGE = 1e10  # mjMAXVAL: positions and velocities beyond it count as diverged, as in the C engine
NO_ROW = torch.iinfo(torch.int64).max


class Episodes:
    """The present episode of each of N rows, and the beginning of its next one.

    physics: what the task reads, tensors [N, ...] that the simulator writes. state: those by name that decide the
    future of a row, model fields of its own among them; the rest follows from them. limits: lower and upper bounds of
    actions, [A] each. defaults: `qpos` and the task's expanded model fields, without the axis N.
    """

    def __init__(
        self,
        task: Task,
        physics: SimpleNamespace,
        state: Mapping[str, Tensor],
        limits: tuple[Tensor, Tensor],
        defaults: SimpleNamespace,
        random: RowRandom,
        horizon: int,
    ):
        self.task, self.physics, self.state = task, physics, dict(state)
        self._staged: Any = task  # a ControlTask where one of its stages is used
        self.random, self.horizon, self._defaults = random, horizon, defaults
        self._low, self._high = limits
        device, rows = physics.qpos.device, physics.qpos.shape[0]
        self._rows = torch.arange(rows, device=device)
        self.starts = {name: values.clone() for name, values in self.state.items()}
        self._aside = {name: torch.zeros_like(values) for name, values in self.state.items()}
        self._original: dict[str, Tensor] = {}
        self._unfinished = torch.zeros(rows, dtype=torch.bool, device=device)
        self._touching_below, self._free_from = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        progress, observed = task.progress(torch, physics), torch.cat(task.observe(torch, physics), 1)
        _, terminated = task.outcome(torch, physics, None if progress is None else progress * 0.0)  # type: ignore[arg-type]
        self.may_terminate = terminated is not None
        self.obs, self.start_obs = torch.zeros_like(observed), torch.zeros_like(observed)
        self.progress = None if progress is None else torch.zeros_like(progress)
        self.start_progress = None if progress is None else torch.zeros_like(progress)
        self.returns = torch.zeros(rows, dtype=torch.float64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.begun = torch.zeros(rows, dtype=torch.int64, device=device)  # episodes of each row so far
        self.diverged = torch.zeros((), dtype=torch.int64, device=device)
        self.first_wrong_action = torch.full((), NO_ROW, device=device)  # NaN, infinite or out of bounds
        self.first_not_finite = torch.full((), NO_ROW, device=device)  # observation or reward of a healthy simulation

    def add(self, name: str, values: Tensor) -> None:
        """A model field of its own for each row from now on, [N, ...], with the same start as present value."""
        self.state[name], self.starts[name] = values, values.clone()
        self._aside[name] = torch.zeros_like(values)
        self._original[name] = values[0].clone()

    def forget_changes(self) -> None:
        """Give model fields of `add` their original values again."""
        for name, original in self._original.items():
            self.state[name].copy_(original.expand_as(self.state[name]))
            self.starts[name].copy_(self.state[name])

    def kept(self) -> dict[str, Tensor]:
        """Everything that a resume needs, by name: live tensors."""
        names = ("obs", "start_obs", "progress", "start_progress", "returns", "lengths", "begun", "diverged")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        present = {f"state.{name}": tensor for name, tensor in self.state.items()}
        coming = {f"start.{name}": tensor for name, tensor in self.starts.items()}
        return {**values, "keys": self.random.keys, **present, **coming}

    def make_step(self) -> Step:
        """Memory for what a step hands out."""
        return Step(
            **{name: torch.zeros_like(self.obs) for name in ("obs", "final_obs")},
            **{name: self.obs.new_zeros(len(self.obs)) for name in ("reward", "episode_return")},
            **{name: torch.zeros_like(self._unfinished) for name in ("terminated", "truncated", "episode_ended")},
            episode_length=torch.zeros_like(self.lengths),
        )

    # --- a step

    def take(self, action: Tensor) -> None:
        """Hand actions [N, A] to the simulator, and remember the first row with one that is not allowed."""
        slack = SLACK * (self._high - self._low)
        allowed = ((action >= self._low - slack) & (action <= self._high + slack)).all(1)  # False for NaN
        self._note(self.first_wrong_action, ~allowed)
        self.physics.ctrl.copy_(action)

    def conclude(self, step: Step) -> None:
        """Write what the step led to into `step`, and replace the episodes that ended by their successors."""
        task, physics = self.task, self.physics
        progress = task.progress(torch, physics)
        moved = None if progress is None or self.progress is None else progress - self.progress
        reward, terminated = task.outcome(torch, physics, moved)  # type: ignore[arg-type]
        obs = torch.cat(task.observe(torch, physics), 1)
        healthy = _bounded(physics.qpos) & _bounded(physics.qvel)
        finite = obs.isfinite().all(1) & reward.isfinite()
        self._note(self.first_not_finite, healthy & ~finite)
        good = healthy & finite
        self.diverged += (~good).sum()
        self.lengths += 1
        self.returns += torch.where(good, reward, 0.0)
        step.reward.copy_(torch.where(good, reward, 0.0))
        step.terminated.copy_(torch.zeros_like(good) if terminated is None else terminated & good)
        step.truncated.copy_((self.lengths >= self.horizon) | ~good)
        ended = step.terminated | step.truncated
        step.episode_ended.copy_(ended)
        step.episode_return.copy_(torch.where(ended, self.returns, 0.0))
        step.episode_length.copy_(torch.where(ended, self.lengths, 0))
        step.final_obs.copy_(torch.where(good[:, None], obs, self.obs))
        step.obs.copy_(_chosen(ended, self.start_obs, step.final_obs))
        if progress is not None and self.progress is not None and self.start_progress is not None:
            self.progress.copy_(torch.where(ended, self.start_progress, progress))
        self._begin(ended)
        self.obs.copy_(step.obs)

    def begin_all(self) -> None:
        """Begin the prepared episode in every row."""
        everywhere = torch.ones_like(self._unfinished)
        self.obs.copy_(self.start_obs)
        if self.progress is not None and self.start_progress is not None:
            self.progress.copy_(self.start_progress)
        self._begin(everywhere)

    def _begin(self, rows: Tensor) -> None:
        for name, values in self.state.items():
            values.copy_(_chosen(rows, self.starts[name], values))
        self.returns.copy_(torch.where(rows, 0.0, self.returns))
        self.lengths.copy_(torch.where(rows, 0, self.lengths))
        self.begun += rows

    def _note(self, first: Tensor, rows: Tensor) -> None:
        """Lower `first` to the first of `rows` (bool [N]) unless an earlier step has noted one."""
        found = torch.where(rows, self._rows, NO_ROW).amin()
        first.copy_(torch.where(first == NO_ROW, found, first))

    # --- the beginning of every row's next episode, in the simulator's own memory

    def set_aside(self) -> None:
        """Put the present state by, and the default state, with each row's own model, into the simulator."""
        for name, values in self.state.items():
            self._aside[name].copy_(values)
            if name in self._model_fields:
                values.copy_(self.starts[name])
            else:
                values.zero_()
        self.physics.qpos.copy_(self._defaults.qpos.expand_as(self.physics.qpos))
        self.random.begin(self.begun + 1)  # stream 0 is that of `construct`

    @property
    def _model_fields(self) -> set[str]:
        return self.state.keys() - STATE_FIELDS

    def construct(self) -> None:
        """Draw what belongs to a row for good."""
        self.random.begin(torch.zeros_like(self.begun))
        drawn = self.task.construction(torch, self.random, self._defaults)
        for name, values in drawn.items():
            self.state[name].copy_(values)
            self.starts[name].copy_(values)

    def draw(self) -> None:
        """The first state of each row's next episode."""
        fields = self.task.start(torch, self.random, self._defaults)
        self._write(fields, torch.ones_like(self._unfinished))

    def draw_again(self) -> None:
        """Once more where the pose has contacts (`physics.ncon`)."""
        current = SimpleNamespace(qpos=self.physics.qpos.clone(), qvel=self.physics.qvel.clone())
        fields = self._staged.restart(torch, self.random, self._defaults, current)
        self._write(fields, self.physics.ncon > 0)

    def _write(self, fields: dict[str, Any], rows: Tensor) -> None:
        unfinished = fields.pop("unfinished", None)
        self._unfinished.copy_(torch.zeros_like(rows) if unfinished is None else unfinished & rows)
        for name, values in fields.items():
            self.state[name].copy_(_chosen(rows, values, self.state[name]))

    def finish(self) -> None:
        """What needs positions, of the rows that were drawn unfinished."""
        for name, values in self._staged.finish(torch, self.physics).items():
            self.state[name].copy_(_chosen(self._unfinished, values, self.state[name]))

    def begin_lift(self) -> None:
        """Try half of the greatest height, as the first step of a bisection."""
        self._touching_below.zero_()
        self._free_from.fill_(2**LIFTS)
        self._try_height()

    def judge_lift(self) -> None:
        """After a look for contacts at the present height: try the middle of those that are left.

        After `LIFTS` looks it is the least multiple of a centimetre without a contact. (What is in the ground at one
        height is so at every lower one; the reference goes up from 0 in steps of a centimetre.)
        """
        height, touching = self._height, self.physics.ncon > 0
        self._touching_below.copy_(torch.where(touching, height + 1, self._touching_below))
        self._free_from.copy_(torch.where(touching, self._free_from, height))
        self._try_height()

    @property
    def _height(self) -> Tensor:
        """In centimetres, int64 [N]."""
        return (self._touching_below + self._free_from) // 2

    def _try_height(self) -> None:
        self.physics.qpos[:, 2] = 0.01 * self._height

    def after_lift(self) -> None:
        """What is drawn once the pose is above the ground."""
        current = SimpleNamespace(qpos=self.physics.qpos.clone(), qvel=self.physics.qvel.clone())
        for name, values in self._staged.after_lift(torch, self.random, current).items():
            self.state[name].copy_(values)

    def restart_clock(self) -> None:
        self.state["time"].zero_()

    def collect(self) -> None:
        """Keep what the simulator now holds as the next beginning, and give it the present state back."""
        if self.task.contact_forces:
            self.physics.cfrc_ext.zero_()  # as in the first observation of the reference
        self.start_obs.copy_(torch.cat(self.task.observe(torch, self.physics), 1))
        progress = self.task.progress(torch, self.physics)
        if progress is not None and self.start_progress is not None:
            self.start_progress.copy_(progress)
        for name, values in self.state.items():
            self.starts[name].copy_(values)
            values.copy_(self._aside[name])


def _bounded(x: Tensor) -> Tensor:
    """[N], whether every entry of [N, k] is a number of reasonable size."""
    return (x.abs() < HUGE).all(1)


def _chosen(rows: Tensor, there: Tensor, elsewhere: Tensor) -> Tensor:
    """[N, ...] with `there` where `rows` [N] is true."""
    return torch.where(rows.view(-1, *[1] * (elsewhere.dim() - 1)), there, elsewhere)
