"""Continual learning with hypernetworks (von Oswald, Henning, Sacramento & Grewe, ICLR 2020, arXiv:1906.00695): HNET.

As `hypernet`, but that a small network makes each chunk for itself from the embeddings of task and chunk; the baseline
that the LSTM is to beat. Works with: task, class, domain.
"""

from __future__ import annotations

from dataclasses import dataclass

from continual.hypernetworks.generators import ACTIVATIONS, Activation, ChunkedGenerator, Generator
from continual.hypernetworks.settings import Settings
from continual.strategies.hypernet import Hypernet as ChunkedHypernet

__all__ = ["ChunkedHypernet", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """The small network's own settings; those of the paper's experiments are presets."""

    layers: tuple[int, ...] = (32,)
    """sizes of the generator's hidden layers"""
    activation: Activation = "relu"
    """of them: relu or elu"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.layers, default=1) < 1:
            raise ValueError(f"layers must list sizes of at least 1, got {self.layers}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got '{self.activation}'")

    def generator(self, weights: int, tasks: int) -> Generator:
        sizes = self.layers, self.activation, self.task_embedding, self.chunk_embedding, self.head_scale
        return self.sized(lambda chunk: ChunkedGenerator(weights, chunk, *sizes), weights, tasks)
