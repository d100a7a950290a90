"""How much a growth rule wants each weight of a layer, from what the optimiser knows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from continual.sparse.rules import Growth
from continual.sparse.subnetwork import Layers, Subnetwork
from plasticity.adam import Adam
from plasticity.sgd import SGD

_EPSILON = 1e-8  # of the authors' quotient of Adam's moments


class GrowthScore:
    """By "momentum", the optimiser's smoothed direction, else the gradient of the last batch; magnitudes.

    The velocity of SGD is cut back to the mask at every step, so for growth there is an average without masks beside
    it. place: of each layer's weight among the parameters of the optimiser.
    """

    def __init__(self, growth: Growth, optimizer: Adam | SGD, place: Mapping[str, int], weights: Layers):
        self._growth, self._optimizer, self._place = growth, optimizer, dict(place)
        own = weights if growth == "momentum" and isinstance(optimizer, SGD) else {}
        self.averages = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in own.items()}

    @torch.no_grad()
    def follow_(self, gradients: Layers, subnetwork: Subnetwork) -> None:
        """After each step. gradients: by layer, those of owned weights included, which do not count."""
        optimizer = self._optimizer
        if not isinstance(optimizer, SGD) or not optimizer.momentum:
            return
        for name, average in self.averages.items():
            average.mul_(optimizer.momentum).add_(gradients[name] * subnetwork.free[name])
        for name, mask in subnetwork.masks.items():
            optimizer.velocity[self._place[name]].mul_(mask)

    def wanted(self, name: str, gradient: Tensor) -> Tensor:
        """[K, *shape] of a layer, not negative."""
        optimizer, at = self._optimizer, self._place[name]
        if self._growth != "momentum":
            return gradient.abs()
        if isinstance(optimizer, SGD):
            return self.averages[name].abs()
        return (optimizer.exp_avg[at] / (optimizer.exp_avg_sq[at].sqrt() + _EPSILON)).abs()
