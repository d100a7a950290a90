"""The one place where units and tensors of a network in training are drawn anew (spec 3.4).

Whatever belongs to them follows: the optimiser's state of those parts is cleared, initial values, averages and targets
in `Learner.copies` take the new values, and parameters stay the same objects. The radii of NaP stay: the next
projection brings a tensor back to its norm (spec 1.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plasticity.adam import Adam
from plasticity.intervention import Learner
from plasticity.networks.structure import Hidden, Reader
from plasticity.sgd import SGD

# Entries of an optimiser's state that hold values of the parameter, not statistics of its gradients.
REFERENCES = ("reference",)


def fresh_parameters(learner: Learner) -> dict[str, Tensor]:
    """The parameters of newly initialised networks, each from its own generator, in the axes of `Learner.parameter`."""
    return parameters_of(learner, fresh_networks(learner))


def fresh_networks(learner: Learner) -> list[nn.Module]:
    """Newly initialised networks, one for each member (for its `twins` together) from its own generator."""
    return [learner.fresh(generator) for generator in learner.generators[:: learner.twins]]


def parameters_of(learner: Learner, networks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The parameters of networks that `learner.fresh` has drawn, in the axes of `Learner.parameter`."""
    found: dict[str, list[Tensor]] = {}
    axes = {name: learner.parameter(name).dim() for name, _ in networks[0].named_parameters()}
    for network in networks:
        for name, p in network.named_parameters():
            own = p.dim() - (axes[name] - 1)  # axes of members: none but for twins
            found.setdefault(name, []).append(learner.by_member(name, p.detach(), own))
    return {name: torch.cat(parts) for name, parts in found.items()}


def redrawable(learner: Learner, intervention: str) -> tuple[Hidden, ...]:
    """The layers whose units can be replaced without changing what else reads them.

    Not those whose units also enter a residual sum as they are. Raises ValueError if no layer is left, or if a layer
    reads units in groups.
    """
    layers = tuple(layer for layer in learner.structure.hidden if layer.readers and not layer.residual)
    if not layers:
        raise ValueError(f"'{intervention}' finds no hidden units that it could replace in this network")
    for layer in layers:
        for reader in layer.readers:
            inputs = learner.parameter(reader.weight).shape[2]
            if reader.offset + layer.units * reader.inputs_per_unit * reader.copies > inputs:
                raise ValueError(
                    f"'{intervention}' cannot tell which inputs of '{reader.weight}' read the units of '{layer.name}': "
                    f"it has {inputs} for {layer.units} units (a grouped convolution?)"
                )
    return layers


def unit_parameters(learner: Learner, layer: Hidden) -> list[str]:
    """Parameters with a row for each unit that is drawn with it: incoming weights, the normaliser's gain and offset."""
    names = [*layer.weights, *(name for name in (layer.gain, layer.offset) if name is not None)]
    return [name for name in names if learner.parameter(name).shape[1] == layer.units]


@torch.no_grad()
def redraw_units(learner: Learner, layer: Hidden, units: Tensor, fresh: Mapping[str, Tensor]) -> None:
    """New incoming weights, biases 0 and outgoing weights 0 for some units of each member.

    units: mask [K, H], or indices [K, n]. fresh: for each of `unit_parameters`, [K, H, ...] with a mask (the rows of
    the mask are used), [K, n, ...] with indices.
    """
    for name in unit_parameters(learner, layer):
        _write(learner, name, 1, units, fresh[name])
    for name in layer.biases:
        _write(learner, name, 1, units, 0.0)
    for reader in layer.readers:
        width = learner.parameter(reader.weight).shape[2]
        _write(learner, reader.weight, 2, reader_inputs(reader, layer.units, units, width), 0.0)


@torch.no_grad()
def redraw_tensors(learner: Learner, fresh: Mapping[str, Tensor]) -> None:
    """Whole parameters become `fresh` [K, *shape], and their optimiser state is as before the first step."""
    for name, values in fresh.items():
        for tensor in _holders(learner, name):
            tensor.copy_(values)
    clear_moments(learner, fresh)
    clear_step_counts(learner, fresh)


@torch.no_grad()
def clear_moments(learner: Learner, names: Iterator[str] | Sequence[str] | Mapping[str, Any]) -> None:
    """The optimiser forgets all that it has gathered about these parameters, but for the number of steps."""
    for name in names:
        parameter = _optimized(learner, name)
        for state, is_reference in _state(learner.optimizer, parameter):
            if state.dim():
                state.copy_(parameter) if is_reference else state.zero_()


@torch.no_grad()
def clear_step_counts(learner: Learner, names: Iterator[str] | Sequence[str] | Mapping[str, Any]) -> None:
    """The optimiser's step count of these parameters, which corrects the bias of its running means, starts again."""
    for name in names:
        for state, _ in _state(learner.optimizer, _optimized(learner, name)):
            if not state.dim():
                state.masked_fill_(state.isfinite(), 0)  # an infinite count is of an optimiser that corrects nothing


def reader_inputs(reader: Reader, unit_count: int, units: Tensor, width: int) -> Tensor:
    """Where a layer with `width` inputs reads the units.

    Mask [K, H] -> mask [K, width]; indices [K, n] -> indices [K, n * inputs_per_unit * copies], unit by unit.
    """
    per_unit, copies = reader.inputs_per_unit, reader.copies
    if units.dtype == torch.bool:
        inputs = units.repeat_interleave(per_unit, 1).repeat(1, copies)
        return F.pad(inputs, (reader.offset, width - reader.offset - inputs.shape[1]))
    position = torch.arange(per_unit, device=units.device).unsqueeze(1)
    copy = torch.arange(copies, device=units.device) * (unit_count * per_unit)
    return (reader.offset + units[:, :, None, None] * per_unit + position + copy).flatten(1)


def _write(learner: Learner, name: str, axis: int, places: Tensor, values: Tensor | float) -> None:
    """Values for places along `axis` of [K, *shape] in the parameter and its copies; 0 in its optimiser state."""
    for tensor in _holders(learner, name):
        _put(tensor, axis, places, values)
    parameter, size = _optimized(learner, name), learner.parameter(name).shape[axis]
    for state, is_reference in _state(learner.optimizer, parameter):
        if name in learner.optimized:
            tensor = state
        elif state.shape == parameter.shape:
            tensor = learner.by_member(name, state)
        else:
            has_members = learner.members is not None or state.dim() > parameter.dim()
            tensor = state if has_members else state.unsqueeze(0)
        if tensor.dim() > axis and tensor.shape[axis] == size:
            _put(tensor, axis, places, values if is_reference else 0.0)


def _put(tensor: Tensor, axis: int, places: Tensor, values: Tensor | float) -> None:
    shape = (places.shape[0], *[1] * (axis - 1), places.shape[1], *[1] * (tensor.dim() - axis - 1))
    places = places.view(shape)
    if places.dtype == torch.bool:
        tensor.copy_(torch.where(places, values, tensor))
        return
    places = places.expand(*tensor.shape[:axis], shape[axis], *tensor.shape[axis + 1 :])
    if isinstance(values, Tensor):
        tensor.scatter_(axis, places, values)
    else:
        tensor.scatter_(axis, places, values)


def _optimized(learner: Learner, name: str) -> Tensor:
    """What the optimiser knows the parameter as."""
    return learner.optimized.get(name, learner.network.get_parameter(name))


def _holders(learner: Learner, name: str) -> list[Tensor]:
    return [learner.parameter(name), *(copies[name] for copies in learner.copies if name in copies)]


def _state(optimizer: Any, parameter: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """Tensors that the optimiser, or one that it drives, keeps for a parameter, and whether each holds its values."""
    if isinstance(optimizer, Adam | SGD):
        index = next((i for i, own in enumerate(optimizer.parameters) if own is parameter), None)
        if index is not None:
            yield from ((states[index], False) for states in optimizer.state_dict().values() if states)
        return
    for key, state in optimizer.state.get(parameter, {}).items():
        if isinstance(state, Tensor):
            yield state, key in REFERENCES
    if hasattr(optimizer, "base"):
        yield from _state(optimizer.base, parameter)
