"""Self-normalised resets (Farias & Jozefiak 2025, arXiv:2410.20098, algorithm 1).

A unit fires in a step if it is positive for any sample. It is reset once it has been silent for longer than all but a
fraction η of its own past silences: the next silence of that length would be that rare if nothing had changed.

Lengths of past silences are kept as a histogram for each unit, in bins that grow by a quarter octave, so that memory
does not grow with time; thresholds are read off it, rounded up to the end of a bin. A unit without enough past for such
a fraction is reset after `longest` silent steps (ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.interventions.redo import unit_rows, unit_values
from plasticity.interventions.regularisers import copy_values
from plasticity.interventions.scope import between
from plasticity.networks.redraw import fresh_parameters, redraw_units, redrawable
from plasticity.optimisers.proposing import at_least

BINS_PER_OCTAVE = 4


@dataclass
class SNR(Intervention):
    """Resets units that have become silent, measured by their own past. For nonlinearities that can be exactly 0."""

    rejection: float = 0.02
    """η; 0.01 to 0.05 are usual"""
    longest: int = 1000
    """silent steps after which any unit is reset"""
    every: int = 10
    """steps between two looks at who is to be reset; silences are counted at every step"""

    needs_activations = True

    def __post_init__(self) -> None:
        between("rejection of snr", self.rejection, 1e-9, 1)
        at_least("longest of snr", self.longest, 1)
        at_least("every of snr", self.every, 1)

    def begin(self, learner: Learner) -> None:
        self.layers = redrawable(learner, "snr")
        smooth = [x for x in self.layers if x.nonlinearity not in ("relu", "relu6", "crelu")]
        if smooth:
            raise ValueError(
                f"snr counts steps in which a unit is not positive, which says nothing of '{smooth[0].nonlinearity}'; "
                "it needs relu"
            )
        self.silence = {x.name: torch.zeros_like(unit_rows(learner, x), dtype=torch.int64) for x in self.layers}
        bins = length_bin(self.longest) + 2
        self.history = {n: torch.zeros(*s.shape, bins, device=s.device) for n, s in self.silence.items()}

    @torch.no_grad()
    def after_step(self, learner: Learner, batch: Batch) -> None:
        for layer in self.layers:
            fired = (unit_values(batch.activations[layer.name], layer) > 0).any(3).any(1)
            record_silences(self.silence[layer.name], self.history[layer.name], fired)
        if learner.steps % self.every == 0:
            self._reset(learner)

    def _reset(self, learner: Learner) -> None:
        fresh = fresh_parameters(learner)
        for layer in self.layers:
            silence = self.silence[layer.name]
            mask = silence > silence_thresholds(self.history[layer.name], self.rejection, self.longest)
            redraw_units(learner, layer, mask, fresh)
            silence.masked_fill_(mask, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"silence": self.silence, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_values(self.silence, state["silence"])
        copy_values(self.history, state["history"])


def length_bin(length: int) -> int:
    """The bin of a silence of `length` steps: lengths below 2^(b / 4) - 1 are in bins below b."""
    return math.floor(BINS_PER_OCTAVE * math.log2(length + 1))


def record_silences(silence: Tensor, history: Tensor, fired: Tensor) -> None:
    """Silences [K, H] grow by a step, or end where `fired` and are counted in the histograms [K, H, bins]."""
    bins = ((silence + 1).to(torch.float64).log2_().mul_(BINS_PER_OCTAVE)).long().clamp_(max=history.shape[2] - 1)
    history.scatter_add_(2, bins.unsqueeze(2), fired.unsqueeze(2).to(history.dtype))
    silence.add_(1).masked_fill_(fired, 0)


def silence_thresholds(history: Tensor, rejection: float, longest: int) -> Tensor:
    """The longest silence [K, H] that is not yet too rare: at least 1 - η of a unit's past silences are no longer.

    It is `longest` at most, and where fewer than 1 / η silences are known.
    """
    known = history.sum(2, keepdim=True)
    common = history.cumsum(2) < (1 - rejection) * known
    bins = torch.arange(1, history.shape[2] + 1, device=history.device, dtype=torch.float64)
    ends = (2 ** (bins / BINS_PER_OCTAVE)).ceil() - 2  # the largest whole length in each bin
    threshold = ends[common.sum(2).clamp_max(history.shape[2] - 1)].clamp(max=longest)
    return torch.where(known.squeeze(2) * rejection < 1, longest, threshold)
