"""Experience replay (Chaudhry et al. 2019, arXiv:1902.10486): learn the new batch and one from the memory together.

    L = mean over B of CE + λ mean over M of CE

B is the batch of the stream, M is drawn from the memory before B is offered to it, so from the second batch of the
first task on. Each mean is over its own batch, as in the sibling code of UER's authors (specs/uer-and-online-cl.md,
1.2); in a network with batch normalisation the two pass one after the other. Works with: task, class, domain.
"""

from __future__ import annotations

from dataclasses import dataclass

from continual.memory import Batch, Policy
from continual.strategies.replay import check_replay
from continual.strategy import Labelled, Metrics, Setting, Strategy
from continual.streams import Task


@dataclass(frozen=True, kw_only=True)
class Config:
    """Defaults: the online protocol of the sibling code."""

    memory: int | None = None
    """samples kept; default: the benchmark's"""
    policy: Policy = "reservoir"
    """which samples: reservoir, class-balanced or ring"""
    replay_batch: int = 10
    """samples replayed in a step"""
    replay_weight: float = 1.0
    """λ, of the replay term"""
    head_bias: bool = True
    """the head has a bias"""

    def __post_init__(self) -> None:
        check_replay(self)


class ER(Strategy):
    """Replay by cross-entropy."""

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting, config.head_bias, config.memory, config.policy)
        self.config = config

    def observe(self, batch: Batch, task: Task) -> Metrics:
        if self.memory.empty:
            metrics = super().observe(batch, task)
        else:
            replay = self.memory.sample(self.config.replay_batch)
            old = Labelled(replay.x, replay.y, self.config.replay_weight)
            current, replayed = self.learn(Labelled(batch.x, batch.y), old)
            metrics = {"loss/current": current, "loss/replay": replayed}
        self.memory.insert(batch)
        return metrics
