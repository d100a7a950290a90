"""ReDo: recycling dormant neurons (Sokar et al. 2023, arXiv:2302.12902, algorithm 1).

    score     s_i = E |h_i| / mean_k E |h_k|                          eq. 1, by layer
    dormant   s_i <= τ, every F updates
    reset     incoming weights drawn anew by the layer's own initialiser, bias 0, outgoing weights 0

Adam's moments of both go to 0, as in the authors' code. With `reset_steps` its step count too, as in a PyTorch port
(timoklein/redo). There is one count a tensor, so the bias correction of the whole layer starts again at each event,
whether units were dormant or not, and with it its rate falls to 0.15 to 0.3 of the set one for a hundred steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.interventions.regularisers import copy_values
from plasticity.networks.redraw import clear_step_counts, fresh_parameters, redraw_units, redrawable
from plasticity.networks.structure import Hidden
from plasticity.optimisers.proposing import at_least


@dataclass
class ReDo(Intervention):
    """Resets units that are nearly silent. Layers of a residual sum and heads are left alone."""

    threshold: float = 0.025
    """τ; 0.1 is the aggressive setting"""
    every: int = 1000
    """F, optimiser steps between two resets"""
    samples: int = 64
    """activations are averaged over at least so many of the last training samples"""
    reset_steps: bool = False
    """whether Adam's step count of the touched tensors starts again"""

    needs_activations = True

    def __post_init__(self) -> None:
        at_least("threshold of redo", self.threshold, 0)
        at_least("every of redo", self.every, 1)
        at_least("samples of redo", self.samples, 1)

    def begin(self, learner: Learner) -> None:
        self.layers = redrawable(learner, "redo")
        self.activity = {layer.name: torch.zeros_like(unit_rows(learner, layer)) for layer in self.layers}

    @torch.no_grad()
    def after_step(self, learner: Learner, batch: Batch) -> None:
        remaining = -learner.steps % self.every
        batch_size = batch.activations[self.layers[0].name].shape[1]
        if remaining >= -(-self.samples // batch_size):
            return
        for layer in self.layers:
            self.activity[layer.name] += mean_magnitude(batch.activations[layer.name], layer)
        if remaining == 0:
            self._recycle(learner)

    def _recycle(self, learner: Learner) -> None:
        masks = {layer.name: dormancy(self.activity[layer.name]) <= self.threshold for layer in self.layers}
        fresh = fresh_parameters(learner)
        for layer in self.layers:
            redraw_units(learner, layer, masks[layer.name], fresh)
            self.activity[layer.name].zero_()
        if self.reset_steps:
            clear_step_counts(learner, sorted({name for layer in self.layers for name in touched(layer)}))

    def state_dict(self) -> dict[str, Any]:
        return {"activity": self.activity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_values(self.activity, state["activity"])


def unit_rows(learner: Learner, layer: Hidden) -> Tensor:
    """A tensor [K, H] with one number a unit (an incoming weight), for its type and device."""
    return learner.parameter(layer.weights[0]).flatten(2)[:, :, 0]


def unit_values(activation: Tensor, layer: Hidden) -> Tensor:
    """[K, B, copies H, ...] (or [K, B, tokens, copies H]) as [K, copies, H, samples], over the batch and positions."""
    copies = layer.readers[0].copies
    axis = 2 if activation.shape[2] == copies * layer.units else -1
    return activation.movedim(axis, 1).reshape(activation.shape[0], copies, layer.units, -1)


def mean_magnitude(activation: Tensor, layer: Hidden) -> Tensor:
    """E |h| of each unit over batch, positions and its copies: [K, H]."""
    return unit_values(activation, layer).abs().mean((1, 3))


def dormancy(magnitude: Tensor) -> Tensor:
    """s_i = E |h_i| / mean_k E |h_k| of [K, H] (eq. 1); 0 in a layer that is silent altogether."""
    return magnitude / magnitude.mean(1, keepdim=True).clamp_min(torch.finfo(magnitude.dtype).tiny)


def touched(layer: Hidden) -> list[str]:
    """Parameters that a reset of units of the layer writes to."""
    return [*layer.weights, *layer.biases, *(reader.weight for reader in layer.readers)]
