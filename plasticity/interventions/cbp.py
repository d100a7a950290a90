"""Continual backpropagation (Dohare et al. 2024, Nature 632, algorithm 1; arXiv:2306.13812).

After each step, for each unit i of a layer with incoming weights W, outgoing weights V, age a and activation h:

    mean       f <- η f + (1 - η) E h,    f̂ = f / (1 - η^a)
    utility    u <- η u + (1 - η) y,      û = u / (1 - η^a)
               y = mean |V_i| E |h_i|                     contribution
                   mean |V_i| E |h_i - f̂_i|               zero_contribution
                   zero_contribution / mean |W_i|         adaptable_contribution
    count      c <- c + ρ × units with a > m;  n = ⌊c⌋,  c <- c - n
    replace    the n units with a > m of smallest û: next bias += V_i f̂_i, W_i drawn anew, bias 0, V_i 0, a = u = f = 0

Ranked by û: by u, which grows with age, newborns would be replaced again and again. How many units are old enough
follows from how many were replaced when, so the count is kept on the host in exact fractions and never read from the
device; it is the same for all members. Units are output channels of a convolution; behind it V_i has a column for each
position that is read. The released code zeroes f before it compensates, so in effect never does: `compensate=False`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.interventions.redo import unit_rows, unit_values
from plasticity.interventions.regularisers import copy_values
from plasticity.interventions.scope import between
from plasticity.networks.redraw import fresh_parameters, reader_inputs, redraw_units, redrawable, unit_parameters
from plasticity.networks.structure import Hidden, Reader
from plasticity.optimisers.proposing import at_least, fraction

Utility = Literal["contribution", "zero_contribution", "adaptable_contribution", "weight", "adaptation", "random"]
_UTILITIES = ("contribution", "zero_contribution", "adaptable_contribution", "weight", "adaptation", "random")


@dataclass
class CBP(Intervention):
    """Replaces a few of the least useful units all the time. Layers of a residual sum and heads are left alone."""

    rate: float = 1e-4
    """ρ, replacements for each unit that is old enough, in each step; 1e-4 to 1e-6 (MNIST), 1e-5 (CIFAR), 1e-4 (RL)"""
    decay: float = 0.99
    """η, of utility and mean activation"""
    maturity: int = 100
    """m, steps that a unit is spared for; 1000 (ResNet), 10 000 (RL)"""
    utility: Utility = "contribution"
    """weight: mean |V|; adaptation: 1 / mean |W|; random: a draw, the control"""
    compensate: bool = True
    """whether the next layer's bias takes over the mean contribution of replaced units"""

    needs_activations = True

    def __post_init__(self) -> None:
        between("rate of cbp", self.rate, 0, 1)
        fraction("decay of cbp", self.decay)
        at_least("maturity of cbp", self.maturity, 0)
        if self.utility not in _UTILITIES:
            raise ValueError(f"utility of cbp must be one of {', '.join(_UTILITIES)}, got {self.utility}")

    def begin(self, learner: Learner) -> None:
        self.layers = redrawable(learner, "cbp")
        self.schedules = {layer.name: Schedule(layer.units, self.maturity, self.rate) for layer in self.layers}
        self.units = {layer.name: _Units(learner, layer) for layer in self.layers}
        self.rows = FreshRows()

    @torch.no_grad()
    def after_step(self, learner: Learner, batch: Batch) -> None:
        chosen: dict[str, Tensor] = {}
        for layer in self.layers:
            self._judge(learner, layer, unit_values(batch.activations[layer.name], layer))
            count = self.schedules[layer.name].advance()
            if count:
                chosen[layer.name] = self._least_useful(learner, layer, count)
        for layer in self.layers:
            if layer.name in chosen:
                self._replace(learner, layer, chosen[layer.name])

    def _judge(self, learner: Learner, layer: Hidden, h: Tensor) -> None:
        """Age, mean activation and utility take in one step. h: [K, copies, H, samples]."""
        own = self.units[layer.name]
        own.age += 1
        own.mean.lerp_(h.mean(3), 1 - self.decay)
        outgoing, incoming = outgoing_magnitude(learner, layer), incoming_magnitude(learner, layer)
        if self.utility == "contribution":
            y = outgoing * h.abs().mean((1, 3))
        elif self.utility in ("zero_contribution", "adaptable_contribution"):
            mean = own.mean / own.bias_correction(self.decay).unsqueeze(1)
            y = outgoing * (h - mean.unsqueeze(3)).abs().mean((1, 3))
            y = y / incoming if self.utility == "adaptable_contribution" else y
        else:
            y = 1 / incoming if self.utility == "adaptation" else outgoing
        own.utility.lerp_(y, 1 - self.decay)

    def _least_useful(self, learner: Learner, layer: Hidden, count: int) -> Tensor:
        """Indices [K, count] of the units to replace; they start at age 0."""
        own = self.units[layer.name]
        worth = own.utility / own.bias_correction(self.decay)
        if self.utility == "random":
            draws = [torch.empty_like(worth[0]).uniform_(generator=g) for g in learner.generators]
            worth = torch.stack(draws)
        return least_useful(worth, own.age, self.maturity, count)

    def _replace(self, learner: Learner, layer: Hidden, chosen: Tensor) -> None:
        own = self.units[layer.name]
        if self.compensate:
            mean = own.mean / own.bias_correction(self.decay).unsqueeze(1)
            for reader in layer.readers:
                compensate(learner, layer, reader, chosen, mean)
        redraw_units(learner, layer, chosen, self.rows.take(learner, layer, chosen.shape[1]))
        own.utility.scatter_(1, chosen, 0.0)
        own.age.scatter_(1, chosen, 0)
        own.mean.scatter_(2, chosen.unsqueeze(1).expand(-1, own.mean.shape[1], -1), 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "units": {name: own.tensors() for name, own in self.units.items()},
            "schedules": {name: schedule.state_dict() for name, schedule in self.schedules.items()},
            "rows": self.rows.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["units"].keys() != self.units.keys():
            raise ValueError("the saved state of cbp belongs to a network with other layers")
        for name, own in self.units.items():
            copy_values(own.tensors(), state["units"][name])
            self.schedules[name].load_state_dict(state["schedules"][name])
        self.rows.load_state_dict(state["rows"])


class _Units:
    """Statistics of the units of a layer. age [K, H] steps; utility [K, H]; mean activation [K, copies, H]."""

    def __init__(self, learner: Learner, layer: Hidden):
        row = unit_rows(learner, layer)
        copies = layer.readers[0].copies
        self.age = torch.zeros_like(row, dtype=torch.int64)
        self.utility = torch.zeros_like(row)
        self.mean = torch.zeros_like(row).unsqueeze(1).repeat(1, copies, 1)

    def bias_correction(self, decay: float) -> Tensor:
        """1 - η^a, [K, H]."""
        return 1 - decay ** self.age.to(self.utility.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {"age": self.age, "utility": self.utility, "mean": self.mean}


class Schedule:
    """How many units of a layer are to be replaced after each step, reckoned on the host alone."""

    def __init__(self, units: int, maturity: int, rate: float):
        self.maturity, self.rate = maturity, Fraction(str(rate))
        self.step, self.eligible, self.carry = 0, 0, Fraction(0)
        self.born = deque([(0, units)])  # (step, how many units of that age), those not yet old enough

    def advance(self) -> int:
        """One step passes; returns how many units to replace now."""
        self.step += 1
        while self.born and self.step - self.born[0][0] > self.maturity:
            self.eligible += self.born.popleft()[1]
        self.carry += self.rate * self.eligible
        count = min(int(self.carry), self.eligible)
        self.carry -= count
        self.eligible -= count
        if count:
            self.born.append((self.step, count))
        return count

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        carry = [self.carry.numerator, self.carry.denominator]
        return {"step": self.step, "eligible": self.eligible, "carry": carry, "born": [list(b) for b in self.born]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.step, self.eligible, self.carry = state["step"], state["eligible"], Fraction(*state["carry"])
        self.born = deque((step, count) for step, count in state["born"])


class FreshRows:
    """New units in stock: the rows of a newly drawn network, each used once, so that a draw serves a whole layer."""

    def __init__(self) -> None:
        self.stock: dict[str, dict[str, Tensor]] = {}
        self.used: dict[str, int] = {}

    def take(self, learner: Learner, layer: Hidden, count: int) -> dict[str, Tensor]:
        """The next `count` rows [K, count, ...] of each of the layer's `unit_parameters`."""
        names = unit_parameters(learner, layer)
        if layer.name not in self.stock or self.used[layer.name] + count > layer.units:
            fresh = fresh_parameters(learner)
            self.stock[layer.name] = {name: fresh[name] for name in names}
            self.used[layer.name] = 0
        start = self.used[layer.name]
        self.used[layer.name] = start + count
        return {name: self.stock[layer.name][name][:, start : start + count] for name in names}

    def state_dict(self) -> dict[str, Any]:
        """The stock and how much of it is used."""
        return {"stock": self.stock, "used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.stock = {layer: dict(rows) for layer, rows in state["stock"].items()}
        self.used = dict(state["used"])


def least_useful(worth: Tensor, age: Tensor, maturity: int, count: int) -> Tensor:
    """Indices [K, count] of the units of smallest worth [K, H] among those with age [K, H] > maturity."""
    return worth.masked_fill(age <= maturity, torch.inf).topk(count, largest=False).indices


def outgoing_magnitude(learner: Learner, layer: Hidden) -> Tensor:
    """The mean of |V_i| over all that read unit i: [K, H]."""
    sums, size = 0, 0
    for reader in layer.readers:
        columns = unit_columns(learner.parameter(reader.weight), layer, reader)
        sums = sums + columns.abs().sum((1, 3))
        size += columns.shape[1] * columns.shape[3]
    assert isinstance(sums, Tensor)
    return sums / size


def incoming_magnitude(learner: Learner, layer: Hidden) -> Tensor:
    """The mean of |W_i|: [K, H]."""
    return torch.cat([learner.parameter(name).flatten(2) for name in layer.weights], 2).abs().mean(2)


def unit_columns(weight: Tensor, layer: Hidden, reader: Reader) -> Tensor:
    """A reader's weight [K, out, in, ...] as [K, copies out, H, positions kernel]: what it has for each unit."""
    members, out = weight.shape[:2]
    width = layer.units * reader.inputs_per_unit * reader.copies
    columns = weight[:, :, reader.offset : reader.offset + width]
    return columns.reshape(members, out * reader.copies, layer.units, -1)


def compensate(learner: Learner, layer: Hidden, reader: Reader, chosen: Tensor, mean: Tensor) -> None:
    """The reader's bias takes over V_i f̂_i of the chosen units [K, n]; mean: f̂ [K, copies, H]. Without bias, nothing.

    Behind a convolution's border, where padding is read instead of the unit, this is too much.
    """
    if reader.bias is None:
        return
    weight = learner.parameter(reader.weight)
    places = reader_inputs(reader, layer.units, chosen, weight.shape[2])
    columns = weight.flatten(3).sum(3) if weight.dim() > 3 else weight
    columns = columns.gather(2, places.unsqueeze(1).expand(-1, weight.shape[1], -1))
    f = mean.gather(2, chosen.unsqueeze(1).expand(-1, mean.shape[1], -1)).mT  # [K, n, copies]
    f = f.unsqueeze(2).expand(-1, -1, reader.inputs_per_unit, -1).flatten(1)
    learner.parameter(reader.bias).add_(torch.linalg.vecdot(columns, f.unsqueeze(1)))
