"""The target network f(x, W): K networks without weights of their own, which come as one vector for each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from continual.networks.classifier import Classifier
from plasticity.networks.functional import unflatten

Statistics = dict[str, Tensor]


class Target:
    """A classifier of K members as a function of its weights [K, N], in the order of its layers, each row by row.

    size: N. The weights that the network was drawn with are given up.
    """

    def __init__(self, network: Classifier):
        self.network = network
        self.outputs = int(network.head.weight.shape[1])
        parameters = dict(network.named_parameters())
        self.shapes = {name: p.shape[1:] for name, p in parameters.items()}
        self.size = sum(shape.numel() for shape in self.shapes.values())
        self._output_of_weight = self._outputs_of_weights().to(network.head.weight.device)
        self._fresh_statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.new_zeros(()).expand_as(parameter)
        self._places = list(parameters.values())

    def _outputs_of_weights(self) -> Tensor:
        """The output that each weight of the head belongs to, [N]; C for all others."""
        places = [torch.full((shape.numel(),), self.outputs) for shape in self.shapes.values()]
        rows = torch.arange(self.outputs)
        for index, (name, shape) in enumerate(self.shapes.items()):
            if name.startswith("head."):
                places[index] = rows.repeat_interleave(shape.numel() // self.outputs)
        return torch.cat(places)

    def cut(self, weights: Tensor) -> dict[str, Tensor]:
        """One vector [K, N] as the tensors [K, *shape] of the network, by name."""
        return dict(zip(self.shapes, unflatten(weights, self._places), strict=True))

    def __call__(self, weights: Tensor, x: Tensor, statistics: Mapping[str, Tensor] | None = None) -> Tensor:
        """Outputs [K, B, C] of inputs [K, B, *shape]. statistics: of normalisations; None: the network's own, which a
        call in training mode moves."""
        return functional_call(self.network, {**self.cut(weights), **(statistics or {})}, (x,))

    def own_weights(self, outputs: Tensor) -> Tensor:
        """Q: which weights a task with these outputs, bool [..., C], uses: bool [..., N], all but other tasks' rows of
        the head."""
        return F.pad(outputs, (0, 1), value=True)[..., self._output_of_weight]

    def statistics(self) -> Statistics:
        """A copy of the running statistics of normalisations."""
        return {name: buffer.clone() for name, buffer in self.network.named_buffers()}

    def reset_statistics(self) -> None:
        """Begin them anew."""
        for name, buffer in self.network.named_buffers():
            buffer.copy_(self._fresh_statistics[name])
