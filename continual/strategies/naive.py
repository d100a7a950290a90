"""Fine-tuning: learn what comes, keep nothing. The lower bound. Works with: task, class, domain."""

from __future__ import annotations

from dataclasses import dataclass

from continual.strategy import Setting, Strategy


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tuning has no setting of its own."""


class Naive(Strategy):
    """Stochastic gradient descent on the batches of the stream."""

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting)
