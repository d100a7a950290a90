"""Joint training: batches of all tasks at once, in one random order. The upper bound of one pass.

Each "task" is a part, as large as the task, of one pass (or several) over the shuffled data of all tasks, so that the
number of steps is that of the other strategies. Works with: task, class, domain.
"""

from __future__ import annotations

from dataclasses import dataclass

from continual.strategy import Setting, Strategy


@dataclass(frozen=True, kw_only=True)
class Config:
    """Joint training has no setting of its own."""


class Joint(Strategy):
    """Stochastic gradient descent on i.i.d. batches of all tasks."""

    trains_on = "all"

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting)
