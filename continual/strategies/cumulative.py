"""Cumulative training: each task is learned together with all data of the tasks before it, from where the network is.

It keeps everything and its tasks grow longer: an upper bound, not a continual learner. Works with: task, class, domain.
"""

from __future__ import annotations

from dataclasses import dataclass

from continual.strategy import Setting, Strategy


@dataclass(frozen=True, kw_only=True)
class Config:
    """Cumulative training has no setting of its own."""


class Cumulative(Strategy):
    """Stochastic gradient descent on shuffled batches of all tasks so far."""

    trains_on = "seen"

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting)
