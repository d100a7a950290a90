"""Gradients of a stacked multilayer perceptron by hand: the same numbers as autograd, without its graph.

For small networks autograd's bookkeeping costs more than the arithmetic. Ten members of 784-100-100-100-10 take a third
of the time with a batch of 1, and plain SGD then never writes a weight gradient at all, which is an outer product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from plasticity.networks.stacked import StackedFlatten, StackedLayerNorm, StackedLinear
from plasticity.problems.losses import output_gradient


@dataclass
class _Layer:
    weight: Tensor
    bias: Tensor | None
    epsilon: float | None  # of a layer normalisation behind it, None without
    activation: str | None  # name of the ReLU behind it, None behind the head
    weight_gradient: Tensor | None = None  # what `gradients` writes into, once it was asked for


@dataclass(frozen=True)
class Passed:
    """What a forward pass leaves behind: outputs [K, B, out], activations [K, B, H, ...] by name of the nonlinearity.

    inputs, normalised: of each layer, [K, B, in], normalised values and their deviations; autograd keeps its own.
    """

    outputs: Tensor
    activations: dict[str, Tensor]
    inputs: list[Tensor] = field(default_factory=list)
    normalised: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)


class MLPGradients:
    """Forward and backward pass of one network, whose parameters it shares."""

    def __init__(self, layers: Sequence[_Layer]):
        self._layers = list(layers)
        self.parameters = [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]
        self._names = [layer.activation for layer in layers if layer.activation is not None]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Passed:
        """x [K, B, ...] -> outputs [K, B, out] and what `gradients` needs."""
        h = x.flatten(2)
        inputs, normalised = [h], []
        for layer in self._layers:
            h = torch.bmm(h, layer.weight.mT)
            if layer.bias is not None:  # apart: baddbmm copies it first, 1.6 x the time of a product of one row
                h.add_(layer.bias.unsqueeze(1))
            if layer.epsilon is not None:
                variance, mean = torch.var_mean(h, 2, correction=0, keepdim=True)
                deviation = variance.add_(layer.epsilon).sqrt_()
                h = h.sub_(mean).div_(deviation)
                normalised.append((h, deviation))
            else:
                normalised.append(None)
            if layer.activation is not None:
                h = h.relu() if layer.epsilon is not None else h.relu_()
                inputs.append(h)
        return Passed(h, dict(zip(self._names, inputs[1:], strict=True)), inputs, normalised)

    @torch.no_grad()
    def gradients(self, passed: Passed, targets: Tensor) -> list[Tensor]:
        """Of the members' losses, one tensor a parameter in their order. The next call writes over them."""
        found: list[Tensor] = []
        for layer, inputs, delta in self._backward(passed, output_gradient(passed.outputs, targets)):
            if layer.weight_gradient is None:
                layer.weight_gradient = torch.empty_like(layer.weight)
            torch.bmm(delta.mT, inputs, out=layer.weight_gradient)
            found = [layer.weight_gradient, *([] if layer.bias is None else [delta.sum(1)]), *found]
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """x [K, B, ...] -> outputs [K, B, out], of which any loss may be differentiated, once."""
        return _Pass.apply(self, x, *self.parameters)  # type: ignore[return-value]

    def pulled_back(self, passed: Passed, gradient: Tensor) -> list[Tensor]:
        """Of a loss with this gradient with respect to the outputs, [K, B, out]: one new tensor a parameter."""
        found: list[Tensor] = []
        for layer, inputs, delta in self._backward(passed, gradient):
            found = [torch.bmm(delta.mT, inputs), *([] if layer.bias is None else [delta.sum(1)]), *found]
        return found

    def descend(self, passed: Passed, targets: Tensor, learning_rate: float) -> None:
        """One step of plain gradient descent on the members' losses, in place."""
        self.descend_along(passed, output_gradient(passed.outputs, targets), learning_rate)

    @torch.no_grad()
    def descend_along(self, passed: Passed, gradient: Tensor, learning_rate: float) -> None:
        """The same of a loss with this gradient with respect to the outputs, [K, B, out]."""
        for layer, inputs, delta in self._backward(passed, gradient):
            layer.weight.baddbmm_(delta.mT, inputs, alpha=-learning_rate)
            if layer.bias is not None:
                layer.bias.add_(delta.sum(1), alpha=-learning_rate)

    def _backward(self, passed: Passed, delta: Tensor) -> Iterator[tuple[_Layer, Tensor, Tensor]]:
        """From the last layer to the first: the layer, its inputs and the gradient of what it gives, [K, B, out].

        delta: that of the outputs. A layer may be changed once it was handed out: its weights have been read.
        """
        for index in reversed(range(len(self._layers))):
            layer, inputs = self._layers[index], passed.inputs[index]
            before = torch.bmm(delta, layer.weight) if index else delta
            yield layer, inputs, delta
            if index:
                delta = torch.ops.aten.threshold_backward(before, inputs, 0)
                normalised = passed.normalised[index - 1]
                if normalised is not None:
                    delta = _through_layer_norm(delta, *normalised)


def _through_layer_norm(gradient: Tensor, normalised: Tensor, deviation: Tensor) -> Tensor:
    """The gradient with respect to z of y = (z - mean z) / deviation, from that of y; all [K, B, H]."""
    radial = (gradient * normalised).mean(2, keepdim=True)
    return gradient.sub(gradient.mean(2, keepdim=True)).addcmul_(normalised, radial, value=-1).div_(deviation)


class _Pass(torch.autograd.Function):
    """The network as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, by_hand: MLPGradients, x: Tensor, *parameters: Tensor) -> Tensor:
        passed = by_hand.forward(x)
        # Not the outputs, which are to lead here: the circle would keep all of it alive.
        ctx.by_hand, ctx.passed = by_hand, replace(passed, outputs=passed.outputs.new_empty(0))
        return passed.outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.by_hand.pulled_back(ctx.passed, gradients[0])


def mlp_gradients(network: nn.Module) -> MLPGradients | None:
    """By hand for a stacked `nn.Sequential` of linear layers with ReLU, normalised without gain or not; else None."""
    return gradients_through(network.named_children()) if isinstance(network, nn.Sequential) else None


def gradients_through(layers: Iterable[tuple[str, nn.Module]]) -> MLPGradients | None:
    """The same of stacked layers by name, one behind the other."""
    children = [(name, child) for name, child in layers if not isinstance(child, StackedFlatten)]
    found: list[_Layer] = []
    while children:
        _, linear = children.pop(0)
        if type(linear) is not StackedLinear or not linear.weight.requires_grad:
            return None
        epsilon: float | None = None
        activation: str | None = None
        if children and isinstance(norm := children[0][1], StackedLayerNorm):
            if norm.weight is not None or norm.bias is not None or len(norm.normalized_shape) != 1:
                return None
            epsilon = norm.eps
            del children[0]
        if children:
            activation, relu = children.pop(0)
            if not isinstance(relu, nn.ReLU):
                return None
        elif epsilon is not None:
            return None
        found.append(_Layer(linear.weight, linear.bias, epsilon, activation))
    return MLPGradients(found) if found and found[-1].activation is None else None
