"""Resets of whole layers, and of the optimiser, at task boundaries or every so many steps.

    reset, reset-head, reset-last   the layers are drawn anew       Nikishin et al. 2022, arXiv:2205.07802
    reset-optimizer                 moments and step counts are 0   Asadi et al. 2023, arXiv:2306.17833
    adam-rel                        step counts alone are 0         Ellis et al. 2024, arXiv:2412.17113

Parameters stay the same tensors, so the optimiser goes on training them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.interventions.scope import bias_of
from plasticity.networks.redraw import (
    clear_moments,
    clear_step_counts,
    fresh_networks,
    parameters_of,
    redraw_tensors,
)
from plasticity.optimisers.proposing import at_least


@dataclass
class Reset(Intervention):
    """Draws the network, its heads or its last layers anew, and the optimiser state of what it draws.

    The whole network: the upper anchor `fresh`.
    """

    part: Literal["all", "head", "last"] = "all"
    layers: int = 1
    """of part last: how many layers, heads counted as one"""
    every: int = 0
    """steps between two resets; 0: at task boundaries"""

    def __post_init__(self) -> None:
        if self.part not in ("all", "head", "last"):
            raise ValueError(f"part of reset must be all, head or last, got {self.part}")
        at_least("layers of reset", self.layers, 1)
        at_least("every of reset", self.every, 0)
        self.uses_boundaries = self.every == 0

    def begin(self, learner: Learner) -> None:
        if self.part == "all":
            self.names = [name for name, _ in learner.network.named_parameters()]
        else:
            self.names = last_layers(learner, 1 if self.part == "head" else self.layers)

    def after_step(self, learner: Learner, batch: Batch) -> None:
        if self.every and learner.steps % self.every == 0:
            self._reset(learner)

    def at_boundary(self, learner: Learner) -> None:
        if not self.every:
            self._reset(learner)

    @torch.no_grad()
    def _reset(self, learner: Learner) -> None:
        networks = fresh_networks(learner)
        fresh = parameters_of(learner, networks)
        redraw_tensors(learner, {name: fresh[name] for name in self.names})
        if self.part == "all":
            buffers = [dict(network.named_buffers()) for network in networks]
            for name, buffer in learner.network.named_buffers():
                one = buffers[0][name]
                buffer.copy_(one if buffer.dim() == one.dim() else torch.stack([own[name] for own in buffers]))


@dataclass
class ResetOptimizer(Intervention):
    """The optimiser forgets moments and step counts. Alone it does not restore plasticity (spec 8.1)."""

    every: int = 0
    """steps between two resets; 0: at task boundaries"""
    only_steps: bool = False
    """step counts alone: Adam on local time (adam-rel)"""

    def __post_init__(self) -> None:
        at_least("every of reset-optimizer", self.every, 0)
        self.uses_boundaries = self.every == 0

    def after_step(self, learner: Learner, batch: Batch) -> None:
        if self.every and learner.steps % self.every == 0:
            self._reset(learner)

    def at_boundary(self, learner: Learner) -> None:
        if not self.every:
            self._reset(learner)

    def _reset(self, learner: Learner) -> None:
        names = [name for name, _ in learner.network.named_parameters()]
        clear_step_counts(learner, names)
        if not self.only_steps:
            clear_moments(learner, names)


def last_layers(learner: Learner, count: int) -> list[str]:
    """Parameters of the heads and of `count` - 1 hidden layers in front. Raises ValueError if there are not so many."""
    structure = learner.structure
    if count - 1 > len(structure.hidden):
        raise ValueError(f"reset-last cannot reset {count} layers of a network that has {len(structure.hidden) + 1}")
    names = [name for weight in structure.heads for name in (weight, bias_of(learner.network, weight))]
    for layer in structure.hidden[len(structure.hidden) - (count - 1) :]:
        names += [*layer.weights, *layer.biases, layer.gain, layer.offset]
    return list(dict.fromkeys(name for name in names if name is not None))
