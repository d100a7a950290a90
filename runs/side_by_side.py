"""The environments of several seeds as one runner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.population import of_seed
from envs import Runner, Step
from envs.sequence import sequence_of
from plasticity.population import Axes


class SideBySide:
    """Steps the runners of a population together; their tensors have the axis of seeds in front, [*S, N, ...].

    Each seed keeps a runner of its own, so its episodes are what they are alone, its state is saved in the same way,
    and what breaks one does not stop the others: a seed whose numbers are no longer finite is kept in `errors` and
    rests. A seed at rest is not stepped; its rows are zeros. lead: () for one seed, else (S,).
    """

    def __init__(self, runners: Sequence[Runner], lead: Axes):
        self.runners, self.lead = list(runners), lead
        self.errors: dict[int, FloatingPointError] = {}  # by the index of the seed
        self.resting: set[int] = set()
        self._nothing: Step | None = None
        self._one_task = torch.zeros(1, dtype=torch.int64, device=self.runners[0].device)

    @property
    def first_working(self) -> Runner:
        """The runner of the first seed that is not at rest, or the first one."""
        return next((r for index, r in enumerate(self.runners) if index not in self.resting), self.runners[0])

    @property
    def task_rows(self) -> Tensor:
        """The task of each row's present episode, int64 [*S, N]; a single 0 where there is but one task."""
        found = [own.task_rows for own in map(sequence_of, self.runners) if own is not None]
        return self._together(found) if found else self._one_task

    def reset(self) -> Tensor:
        """Start new episodes everywhere. Returns obs [*S, N, *obs_shape]."""
        return self._together([runner.reset() for runner in self.runners])

    def send(self, action: Tensor) -> None:
        """Hand over actions [*S, N, ...]; call `recv` next."""
        for index, runner in enumerate(self.runners):
            own = of_seed(action, index, self.lead)
            self._try(index, lambda runner=runner, own=own: runner.send(own))

    def recv(self) -> Step:
        """What the actions led to, [*S, N, ...]."""
        steps = [self._try(index, runner.recv) for index, runner in enumerate(self.runners)]
        found = [self._zeros() if step is None else step for step in steps]
        if not self.lead:
            return found[0]
        names = [field.name for field in dataclasses.fields(Step)]
        return Step(**{name: self._together([getattr(step, name) for step in found]) for name in names})

    def step(self, action: Tensor) -> Step:
        """`send`, then `recv`."""
        self.send(action)
        return self.recv()

    def rest(self, index: int) -> None:
        """Leave the environments of one seed alone from now on."""
        self.resting.add(index)

    def close(self) -> None:
        """Close all of them."""
        for runner in self.runners:
            runner.close()

    def _try(self, index: int, call: Callable[[], Any]) -> Any:
        if index in self.resting:
            return None
        try:
            return call()
        except FloatingPointError as error:
            self.errors[index] = error
            self.rest(index)
            return None

    def _together(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)) if self.lead else tensors[0]

    def _zeros(self) -> Step:
        """The step of a seed at rest."""
        if self._nothing is None:
            runner = self.runners[0]
            rows, device = runner.num_envs, runner.device
            spec = runner.observation_spec
            obs = torch.zeros(rows, *spec.shape, dtype=spec.dtype, device=device)
            reward, no = torch.zeros(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
            self._nothing = Step(obs, reward, no, no, obs, reward, no.long(), no)
        return self._nothing
