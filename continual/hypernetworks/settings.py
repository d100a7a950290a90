"""The settings that all hypernetworks have."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from continual.hypernetworks.generators import Generator, parameter_count, sized_chunks

Regulariser = Literal["output", "fisher", "none"]
_CHOICES = {
    "regulariser": ("output", "fisher", "none"),
    "targets": ("stored", "recomputed"),
    "fisher": ("per-task", "online"),
    "fisher_norm": ("mean", "none"),
    "new_embedding": ("drawn", "copied"),
}


@dataclass(frozen=True, kw_only=True)
class Settings(ABC):
    """Sources in specs/rnn-hypernetworks.md: [H] the code of HNET, [L] that of the paper's authors, [E] ours.

    Raises ValueError for what cannot be.
    """

    task_embedding: int = 32
    """numbers in the embedding of a task [H, for CIFAR]"""
    chunk_embedding: int = 32
    """numbers in that of a chunk [H, for CIFAR]"""
    chunk: int | None = None
    """weights made in one step; default: the most that --compression leaves room for"""
    compression: float = 1.0
    """where the chunk is not given: parameters for each weight of the target network, at most [H]"""
    head_scale: float = 0.3
    """of the last layer's first values, beside PyTorch's; 1: [L] [E]"""
    regulariser: Regulariser = "output"
    """on weights made for earlier tasks: output (HNET), fisher (weighted by importance) or none"""
    beta: float = 0.1
    """its weight [H, for permuted MNIST]"""
    head_anchor: float = 0.0
    """weight of the squared distance of the head from where the last task left it; 0: none"""
    lookahead: bool = False
    """the regulariser looks at parameters one step further; on: [H]"""
    regularised_tasks: int | None = None
    """earlier tasks drawn for the regulariser in a step; default: all"""
    targets: Literal["stored", "recomputed"] = "stored"
    """what the regulariser holds to: weights kept, or made from parameters kept"""
    fisher: Literal["per-task", "online"] = "per-task"
    """importance: of each task alone, or summed over tasks [L]"""
    fisher_norm: Literal["mean", "none"] = "mean"
    """importance divided by its mean, or as it is [L]"""
    fisher_samples: int = 200
    """of a task, at its end, that its importance is estimated from"""
    new_embedding: Literal["drawn", "copied"] = "drawn"
    """a task's embedding begins standard normal, or as the last task's"""
    rate_drops: tuple[float, ...] = ()
    """parts of each task after which the learning rate changes"""
    rate_factors: tuple[float, ...] = ()
    """what it then is, for each of these, times its first value"""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if vars(self)[name] not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got '{vars(self)[name]}'")
        for name in ("task_embedding", "chunk_embedding", "chunk", "regularised_tasks", "fisher_samples"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("compression", "head_scale"):
            if not 0 < vars(self)[name] < math.inf:
                raise ValueError(f"{name} must be a positive number, got {vars(self)[name]}")
        for name in ("beta", "head_anchor"):
            if not 0 <= vars(self)[name] < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {vars(self)[name]}")
        inside = all(0 < drop < 1 for drop in self.rate_drops)
        if not inside or any(a >= b for a, b in itertools.pairwise(self.rate_drops)):
            raise ValueError(f"rate_drops must rise between 0 and 1, got {self.rate_drops}")
        if len(self.rate_factors) != len(self.rate_drops) or min(self.rate_factors, default=1) <= 0:
            raise ValueError(f"rate_factors must be a positive number for each of rate_drops, got {self.rate_factors}")

    @abstractmethod
    def generator(self, weights: int, tasks: int) -> Generator:
        """Makes the `weights` of a target network, for so many tasks."""

    def sized(self, make: Callable[[int], Generator], weights: int, tasks: int) -> Generator:
        """What `make` gives for the size of chunk that these settings want."""

        def count(chunk: int) -> int:
            return parameter_count(make(chunk)) + tasks * self.task_embedding

        return make(sized_chunks(weights, count, self.compression * weights, self.chunk))
