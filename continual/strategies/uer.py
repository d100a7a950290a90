"""UER: unbiased experience replay (Lin et al. 2023, arXiv:2309.04081).

    dot-product logit   o_c(z) = w_c·z = ‖w_c‖ ‖z‖ cos φ_c        norm factor times angle factor
    cosine logit        a_c(z) = cos φ_c / τ                       the angle factor alone

    L = mean over B of CE(a) + λ mean over M of CE(o)              B the new batch, M from the memory
    prediction: argmax over c of o_c

The bias of online replay sits in the angles; so new data is learned through the angle alone, and old data through norm
and angle. Only the abstract of the paper could be read: what it leaves open follows the same authors' sibling code,
with every choice as a setting (specs/uer-and-online-cl.md). Three settings of logits span the ablation: (dot, dot, dot)
is ER without bias, (cosine, cosine, cosine) cosine ER, (dot, cosine, dot) the reverse. Works with: task, class, domain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from continual.memory import Batch, Policy
from continual.strategies.er_ace import classes_of
from continual.strategies.replay import check_replay
from continual.strategy import Metrics, Setting, Strategy
from continual.streams import Task
from plasticity.networks.stacked import StackedLinear

Logits = Literal["dot", "cosine"]
_LEAST_NORM = 1e-6  # the siblings add as much to every norm


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the abstract says; the numbers are those of the sibling code (PCR, CVPR 2023)."""

    memory: int | None = None
    """samples kept; default: the benchmark's"""
    policy: Policy = "reservoir"
    """which samples: reservoir, class-balanced or ring"""
    replay_batch: int = 10
    """samples replayed in a step"""
    replay_weight: float = 1.0
    """λ, of the replay term"""
    memory_iterations: int = 1
    """steps on each batch of the stream, each with a draw of its own"""
    tau: float = 0.09
    """temperature of the cosine logits"""
    current_logits: Logits = "cosine"
    """new data is learned through: cosine (the angle alone) or dot"""
    replay_logits: Logits = "dot"
    """old data is replayed through: dot or cosine"""
    predict_logits: Logits = "dot"
    """predictions are made with: dot or cosine"""
    softmax_scope: Literal["all", "seen", "batch"] = "all"
    """outputs that compete in training: all, seen (classes so far), batch (for new data)"""

    def __post_init__(self) -> None:
        check_replay(self)
        if not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}")
        if self.replay_weight < 0 or self.memory_iterations < 1:
            raise ValueError("replay_weight must not be negative, memory_iterations at least 1")
        for name in ("current_logits", "replay_logits", "predict_logits"):
            if vars(self)[name] not in ("dot", "cosine"):
                raise ValueError(f"{name} must be dot or cosine, got '{vars(self)[name]}'")
        if self.softmax_scope not in ("all", "seen", "batch"):
            raise ValueError(f"softmax_scope must be all, seen or batch, got '{self.softmax_scope}'")


def dot_logits(features: Tensor, proxies: Tensor) -> Tensor:
    """o_c = w_c·z: features z [K, B, d], proxies w [K, C, d] -> [K, B, C]."""
    return torch.bmm(proxies, features.mT).mT


def cosine_logits(features: Tensor, proxies: Tensor, tau: float) -> Tensor:
    """a_c = cos(w_c, z) / τ, of the same shapes; a vector of length 0 has cosine 0 to all."""
    return dot_logits(_direction(features), _direction(proxies)) / tau


def _direction(vectors: Tensor) -> Tensor:
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(_LEAST_NORM)


class UER(Strategy):
    """Replay with unbiased logits."""

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting, head_bias=False, memory=config.memory, policy=config.policy)
        if type(self.network.head) is not StackedLinear:
            raise ValueError("'uer' reads the weights of its head, and an intervention put something else in its place")
        self.config = config

    def logits(self, features: Tensor, kind: Logits) -> Tensor:
        """[K, B, C] of features [K, B, d]; both kinds share the proxies."""
        proxies = self.network.head.weight
        return dot_logits(features, proxies) if kind == "dot" else cosine_logits(features, proxies, self.config.tau)

    def losses(self, batch: Batch, replay: Batch | None) -> list[Tensor]:
        """L_cur and, if there is something to replay, L_rep: [K] each."""
        config = self.config
        new, *old = self.network.features_of(batch.x, *([] if replay is None else [replay.x]))
        seen = None if config.softmax_scope == "all" else self.seen.unsqueeze(1)
        own = classes_of(batch.y, self.setting.outputs) if config.softmax_scope == "batch" else seen
        found = [self.cross_entropy(self.logits(new, config.current_logits), batch.y, own)]
        if replay is not None:
            found.append(self.cross_entropy(self.logits(old[0], config.replay_logits), replay.y, seen))
        return found

    def observe(self, batch: Batch, task: Task) -> Metrics:
        current, *replayed = [torch.zeros(0)]
        for _ in range(self.config.memory_iterations):
            replay = None if self.memory.empty else self.memory.sample(self.config.replay_batch)
            current, *replayed = self.losses(batch, replay)
            self.descend(current + self.config.replay_weight * replayed[0] if replayed else current)
        self.memory.insert(batch)
        metrics = {"loss/current": current.detach()}
        return metrics | ({"loss/replay": replayed[0].detach()} if replayed else {})

    def predict(self, x: Tensor, task: Task | None) -> Tensor:
        return self.logits(self.network.features(x), self.config.predict_logits)
