"""The episodes of a run's training environments that ended, as they are told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from envs import Step

Episode = tuple[int, float, float, int]


class Episodes:
    """The episodes that ended since the last look, kept on the device so that no step waits for it.

    known: (step, return, length, task) for each seed, those fetched from the device but not drained yet.
    """

    def __init__(self, known: Sequence[Sequence[Episode]] = ((),)) -> None:
        self.known = [list(own) for own in known]
        self.steps: list[int] = []
        self.ended: list[tuple[Tensor, ...]] = []

    def add(self, step: Step, at: int, task: Tensor) -> None:
        """Remember what ended in `step`, which brought the count of environment steps to `at`. task: as `task_rows`."""
        self.steps.append(at)
        ended = step.episode_ended.clone()
        self.ended.append((ended, step.episode_return.clone(), step.episode_length.clone(), task.expand(ended.shape)))

    def fetch(self, index: int = 0) -> list[Episode]:
        """(step, return, length, task) of every ended episode of one seed, oldest first."""
        if self.ended:
            columns = (torch.stack(column).cpu() for column in zip(*self.ended, strict=True))
            ended, *values = (column.view(len(column), len(self.known), -1) for column in columns)  # [T, S, N]
            returns, lengths, tasks = values
            for t, s, n in ended.nonzero().tolist():
                episode = float(returns[t, s, n]), float(lengths[t, s, n]), int(tasks[t, s, n])
                self.known[s].append((self.steps[t], *episode))
            self.steps, self.ended = [], []
        return self.known[index]

    def drain(self, index: int = 0) -> list[Episode]:
        """The same, and forget them."""
        found, self.known[index] = self.fetch(index), []
        return found
