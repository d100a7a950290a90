"""ER-ACE (Caccia et al. 2022, arXiv:2104.05025): new classes do not push old ones away.

    L = CE over B, softmax over the classes of B only (over all outputs in the first task) + CE over M, over all outputs

Differs from Mammoth's and the authors' code: an ordinary linear head, where they use a cosine head of scale 10. Works
with: task, class, domain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from continual.memory import Batch, Policy
from continual.strategies.replay import check_replay
from continual.strategy import Labelled, Metrics, Setting, Strategy
from continual.streams import Task


@dataclass(frozen=True, kw_only=True)
class Config:
    """As `er.Config`."""

    memory: int | None = None
    """samples kept; default: the benchmark's"""
    policy: Policy = "reservoir"
    """which samples: reservoir, class-balanced or ring"""
    replay_batch: int = 10
    """samples replayed in a step"""

    def __post_init__(self) -> None:
        check_replay(self)


def classes_of(labels: Tensor, outputs: int) -> Tensor:
    """Which classes a batch has: labels [K, B] -> bool [K, 1, C]."""
    present = torch.zeros(len(labels), outputs, dtype=torch.bool, device=labels.device)
    return present.scatter_(1, labels, True).unsqueeze(1)


class ERACE(Strategy):
    """Replay with an asymmetric cross-entropy."""

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting, memory=config.memory, policy=config.policy)
        self.config = config

    def observe(self, batch: Batch, task: Task) -> Metrics:
        if self.memory.empty:
            metrics = super().observe(batch, task)
        else:
            replay = self.memory.sample(self.config.replay_batch)
            allowed = classes_of(batch.y, self.setting.outputs) if task.index else None
            new = Labelled(batch.x, batch.y, allowed=allowed)
            current, replayed = self.learn(new, Labelled(replay.x, replay.y))
            metrics = {"loss/current": current, "loss/replay": replayed}
        self.memory.insert(batch)
        return metrics
