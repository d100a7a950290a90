"""The part of a dense network that the present task trains, and the normalisation that goes with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from continual.sparse.masks import packed, unpacked
from plasticity.networks.stacked import StackedBatchNorm, StackedConv2d, StackedLinear

Network = TypeVar("Network", bound=nn.Module)
Layers = Mapping[str, Tensor]
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def prunable(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights [K, *shape] of all linear and convolutional layers by name; biases and normalisations stay dense."""
    for name, module in network.named_modules():
        if isinstance(module, StackedLinear | StackedConv2d):
            yield f"{name}.weight" if name else "weight", module.weight


def plain_batch_norm(network: Network, tracked: bool) -> Network:
    """Take gain and offset from every batch normalisation, and running statistics too unless `tracked`.

    Without them a batch is normalised by itself, in tests as well. Returns the network.
    """
    for module in network.modules():
        if isinstance(module, StackedBatchNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            for part in ("weight", "bias", *(() if tracked else _STATISTICS)):
                setattr(module, part, None)
    return network


def reset_statistics_(network: nn.Module) -> None:
    """Running statistics of batch normalisation begin anew."""
    for module in network.modules():
        if isinstance(module, StackedBatchNorm) and module.running_mean is not None:
            for part in _STATISTICS:
                cast(Tensor, getattr(module, part)).fill_(part == "running_var")


class Subnetwork:
    """By layer, [K, *shape]: masks, the active weights; fired, those that were active at some time in this task.

    values, owned: weights of earlier tasks, and which they are; those stay as they are. free: 1 where no one owns a
    weight, else 0. hides_grown: an owned weight that is grown acts as 0, not with its value.
    """

    def __init__(self, masks: Layers, values: Layers, owned: Layers, hides_grown: bool):
        self.masks, self.fired = dict(masks), dict(masks)
        self._hides_grown = hides_grown
        self._owned = dict(owned)
        self._values = {name: values[name] * mask for name, mask in owned.items()}
        self._hidden = {name: torch.zeros_like(mask) for name, mask in masks.items()} if hides_grown else {}
        self.free = {name: (~mask).to(values[name].dtype) for name, mask in owned.items()}
        self._derive()

    def _derive(self) -> None:
        self._trained, self._fixed = {}, {}
        for name, mask in self.masks.items():
            seen = mask & ~self._hidden[name] if self._hides_grown else mask
            self._trained[name] = self.free[name] * mask
            self._fixed[name] = self._values[name] * seen

    @torch.no_grad()
    def settle_(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Inactive weights are 0 and owned ones what they were, exactly, whatever an optimiser did."""
        own: list[Tensor] = [weights[name] for name in self.masks]
        torch._foreach_mul_(own, list(self._trained.values()))
        torch._foreach_add_(own, list(self._fixed.values()))

    @torch.no_grad()
    def move_(self, left: Layers, come: Layers, weights: Mapping[str, nn.Parameter]) -> None:
        """The topology changes. left: active weights that stay; come: new ones, which begin at 0 unless owned."""
        for name, new in come.items():
            self.masks[name] = left[name] | new
            self.fired[name] = self.fired[name] | new
            weights[name].masked_fill_(new, 0)
            if self._hides_grown:
                self._hidden[name] = self._hidden[name] | (new & self._owned[name])
        self._derive()
        self.settle_(weights)

    def state_dict(self) -> dict[str, Any]:
        """Masks, eight weights in a byte."""
        parts = {"masks": self.masks, "fired": self.fired, "hidden": self._hidden}
        return {part: {name: packed(m.flatten(1)) for name, m in masks.items()} for part, masks in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""

        def read(part: str) -> dict[str, Tensor]:
            masks = {name: (self._owned[name], bits) for name, bits in state[part].items()}
            return {n: unpacked(bits.to(m.device), m[0].numel()).view_as(m) for n, (m, bits) in masks.items()}

        self.masks, self.fired, self._hidden = read("masks"), read("fired"), read("hidden")
        self._derive()
