"""Dark experience replay (Buzzega et al. 2020, arXiv:2004.07211): remember what the network said, not only the label.

    DER     L = CE over B + α mean over M of ‖outputs now - outputs when inserted‖² / C             eq. 5
    DER++   L = DER's + β CE over M', a second draw                                                 eq. 6

`derpp` is this file with β above 0. Outputs are remembered as they were before the step on their batch, of the images
without their augmented copies. Works with: task, class, domain.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from continual.memory import Batch, Policy
from continual.strategies.replay import check_replay
from continual.strategy import Metrics, Setting, Strategy
from continual.streams import Task


@dataclass(frozen=True, kw_only=True)
class Config:
    """α of DER: table 6 of the paper has 0.3 to 1 for class-incremental data. Ours: the middle."""

    memory: int | None = None
    """samples kept; default: the benchmark's"""
    policy: Policy = "reservoir"
    """which samples: reservoir, class-balanced or ring"""
    replay_batch: int = 10
    """samples replayed in a step, by each term"""
    alpha: float = 0.5
    """weight of the remembered outputs"""
    beta: float = 0.0
    """weight of the labels of the second draw; 0: none"""

    def __post_init__(self) -> None:
        check_replay(self)
        if self.alpha < 0 or self.beta < 0:
            raise ValueError(f"alpha and beta must not be negative, got {self.alpha} and {self.beta}")


def output_distance(now: Tensor, then: Tensor) -> Tensor:
    """Mean squared difference of outputs [K, B, C], [K]."""
    return (now - then).square().flatten(1).mean(1)


class DER(Strategy):
    """Replay of outputs, and of labels where β is above 0."""

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting, memory=config.memory, policy=config.policy)
        self.config = config

    def observe(self, batch: Batch, task: Task) -> Metrics:
        draws = [] if self.memory.empty else [self.memory.sample(self.config.replay_batch)]
        draws += [self.memory.sample(self.config.replay_batch)] if draws and self.config.beta else []
        new, *old = self.network.outputs_of(batch.x, *(draw.x for draw in draws))
        terms = {"loss/current": self.cross_entropy(new, batch.y)}
        if draws:
            then, count = draws[0].kept["outputs"], draws[0].images.shape[1]
            terms["loss/outputs"] = self.config.alpha * output_distance(old[0][:, :count], then)
        if len(draws) > 1:
            terms["loss/replay"] = self.config.beta * self.cross_entropy(old[1], draws[1].y)
        self.descend(sum(terms.values(), start=terms["loss/current"].new_zeros(())))
        self.memory.insert(batch, outputs=new[:, : batch.images.shape[1]])
        return {name: term.detach() for name, term in terms.items()}
