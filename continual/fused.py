"""Layers and losses of a population as one node of autograd each: the same numbers, a fraction of the bookkeeping.

For small networks and batches, autograd's own work on a dozen nodes costs more than the arithmetic in them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plasticity.networks.stacked import StackedFlatten, StackedLinear


def relu_layers(network: Any) -> list[StackedLinear] | None:
    """The layers of a stacked `nn.Sequential` of linear layers with biases, each with a ReLU behind it; else None."""
    if not isinstance(network, nn.Sequential):
        return None
    modules = [module for module in network if not isinstance(module, StackedFlatten)]
    linear, activations = modules[::2], modules[1::2]
    if not linear or len(linear) != len(activations) or not all(type(a) is nn.ReLU for a in activations):
        return None
    found = [layer for layer in linear if type(layer) is StackedLinear and layer.bias is not None]
    return found if len(found) == len(linear) else None


def apply_relu_layers(x: Tensor, layers: list[StackedLinear]) -> Tensor:
    """x [K, B, ...] -> [K, B, H] of the last layer."""
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    return _ReluLayers.apply(x.flatten(2), *parameters)  # type: ignore[return-value]


class _ReluLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        inputs = [x]
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            inputs.append(torch.baddbmm(bias.unsqueeze(1), inputs[-1], weight.mT).relu_())
        ctx.save_for_backward(*inputs, *parameters[::2])
        return inputs[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (delta,) = gradients
        layers = len(ctx.saved_tensors) // 2
        inputs, weights = ctx.saved_tensors[: layers + 1], ctx.saved_tensors[layers + 1 :]
        found: list[Tensor | None] = []
        for index in reversed(range(layers)):
            delta = torch.ops.aten.threshold_backward(delta, inputs[index + 1], 0)
            found = [torch.bmm(delta.mT, inputs[index]), delta.sum(1), *found]
            if index or ctx.needs_input_grad[0]:
                delta = torch.bmm(delta, weights[index])
        return (delta if ctx.needs_input_grad[0] else None, *found)


def mean_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of each member, over its batch: outputs [K, B, C], labels [K, B] -> [K]."""
    return _MeanCrossEntropy.apply(outputs, labels)  # type: ignore[return-value]


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, labels: Tensor) -> Tensor:
        chances = torch.log_softmax(outputs, 2)
        own = labels.unsqueeze(2)
        ctx.save_for_backward(chances, own)
        return chances.gather(2, own).mean((1, 2)).neg_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        chances, own = ctx.saved_tensors
        weight = (gradients[0] / own.shape[1]).view(-1, 1, 1)
        found = chances.exp().scatter_add_(2, own, chances.new_full((1, 1, 1), -1.0).expand(own.shape))
        return found.mul_(weight), None
