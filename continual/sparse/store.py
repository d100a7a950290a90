"""One dense network that belongs to many tasks: the weights that each has trained are its own for ever.

Later tasks may use them, none changes them. A task is its mask, eight weights in a byte, and what it has beside
weights: biases, statistics of batch normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from continual.sparse.masks import packed, unpacked


class SubnetworkStore:
    """values: weights [K, *shape] by layer. tasks: their masks, by layer, in the order of learning.

    extras: of each task what else it has, [K, ...] by name. owned: bool by layer, the union of all masks.
    """

    def __init__(self, initial: Mapping[str, Tensor]):
        self.values = {name: value.detach().clone() for name, value in initial.items()}
        self.owned = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in self.values.items()}
        self.tasks: list[dict[str, Tensor]] = []  # packed, uint8 [K, ⌈N / 8⌉]
        self.extras: list[dict[str, Tensor]] = []
        self._shown: tuple[int, dict[str, Tensor]] | None = None

    @torch.no_grad()
    def claim(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> None:
        """The next task is learned: of its weights those that no one owns become its own."""
        for name, mask in masks.items():
            self.values[name] = torch.where(mask & ~self.owned[name], weights[name].detach(), self.values[name])
            self.owned[name] = self.owned[name] | mask
        self.tasks.append({name: packed(mask.flatten(1)) for name, mask in masks.items()})
        self.extras.append({name: value.detach().clone() for name, value in extras.items()})

    def mask(self, task: int, name: str) -> Tensor:
        """Of a layer and a task, bool [K, *shape]."""
        like = self.values[name]
        return unpacked(self.tasks[task][name], like[0].numel()).view_as(like)

    def subnetwork(self, task: int) -> dict[str, Tensor]:
        """What the network of a task computes with, by name of parameter or buffer. Weights beyond its mask are 0."""
        if self._shown is None or self._shown[0] != task:
            weights = {name: value * self.mask(task, name) for name, value in self.values.items()}
            self._shown = task, weights | self.extras[task]
        return self._shown[1]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"values": self.values, "tasks": self.tasks, "extras": self.extras}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`. Raises ValueError if it is of another network."""
        for name, value in self.values.items():
            if name not in state["values"] or state["values"][name].shape != value.shape:
                raise ValueError(f"the saved weights of '{name}' do not fit this network")
        device = next(iter(self.values.values())).device
        self.values = {name: state["values"][name].to(device) for name in self.values}
        self.tasks, self.extras = (_moved(state[part], device) for part in ("tasks", "extras"))
        self._shown = None
        for name, value in self.values.items():
            owned = torch.zeros_like(value, dtype=torch.bool)
            for task in range(len(self.tasks)):
                owned |= self.mask(task, name)
            self.owned[name] = owned


def _moved(tasks: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
    return [{name: value.to(device) for name, value in task.items()} for task in tasks]
