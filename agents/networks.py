"""Network layers that several agents use, and their initialisation from an explicit generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StackedLinear(nn.Module):
    """K linear layers side by side: [K, B, in] (or [B, in], the same input for all) -> [K, B, out].

    One batched product instead of K small ones; twin critics today, a population of seeds tomorrow.
    """

    def __init__(self, count: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(count, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.expand(self.weight.shape[0], -1, -1), self.weight)

    def select(self, index: int, x: Tensor) -> Tensor:
        """Only layer `index`: [B, in] -> [B, out]."""
        return torch.addmm(self.bias[index], x, self.weight[index])


class StackedLayerNorm(nn.Module):
    """K layer normalisations side by side, over the last axis of [K, B, D] (Ba et al. 2016)."""

    def __init__(self, count: int, features: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(count, 1, features))
        self.offset = nn.Parameter(torch.zeros(count, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.scale + self.offset

    def select(self, index: int, x: Tensor) -> Tensor:
        """Only normalisation `index`: [B, D] -> [B, D]."""
        return F.layer_norm(x, x.shape[-1:]) * self.scale[index] + self.offset[index]


class Critics(nn.Module):
    """K independent action-value networks Q_k(s, a): multilayer perceptrons with ReLU, evaluated together."""

    def __init__(self, count: int, observations: int, actions: int, hidden: Sequence[int], layer_norm: bool):
        super().__init__()
        self.count = count
        sizes = [observations + actions, *hidden]
        self.layers = nn.ModuleList(StackedLinear(count, i, o) for i, o in zip(sizes[:-1], hidden, strict=True))
        # One output each: a dot product takes half the time of a matrix product here.
        self.head = StackedLinear(count, hidden[-1], 1)
        self.norms = nn.ModuleList(StackedLayerNorm(count, size) if layer_norm else nn.Identity() for size in hidden)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [B, O], action [B, A] -> values [K, B]."""
        x = torch.cat([obs, action], 1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu_(norm(layer(x)))
        return torch.linalg.vecdot(x, self.head.weight.mT) + self.head.bias.squeeze(2)

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        """Only Q_1: obs [B, O], action [B, A] -> values [B]."""
        x = torch.cat([obs, action], 1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer.select(0, x)  # type: ignore[operator]
            x = F.relu_(norm.select(0, x) if isinstance(norm, StackedLayerNorm) else x)
        return torch.linalg.vecdot(x, self.head.weight[0].squeeze(1)) + self.head.bias[0, 0]


def mlp(inputs: int, hidden: Sequence[int], outputs: int, layer_norm: bool) -> nn.Sequential:
    """Linear, [LayerNorm,] ReLU for each hidden size, and a linear head: [B, inputs] -> [B, outputs]."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), *([nn.LayerNorm(size)] if layer_norm else []), nn.ReLU(inplace=True)]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class DeterministicActor(nn.Module):
    """Policy a = tanh(f(s)): obs [B, O] -> action [B, A] in [-1, 1]."""

    def __init__(self, observations: int, actions: int, hidden: Sequence[int], layer_norm: bool):
        super().__init__()
        self.net = mlp(observations, hidden, actions, layer_norm)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).tanh()


class NatureCNN(nn.Module):
    """The convolutional encoder of Mnih et al. 2015: uint8 [B, C, 84, 84] -> features [B, 512].

    Bytes are scaled to [0, 1] here, on the device, so that they travel and rest as bytes.
    """

    features = 512

    def __init__(self, shape: tuple[int, ...], layer_norm: bool):
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 36:
            raise ValueError(f"the Nature CNN needs images [channels, >= 36, >= 36], got {list(shape)}")
        channels, height, width = shape
        layers: list[nn.Module] = []
        for out, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            norm = [nn.LayerNorm([out, height, width])] if layer_norm else []
            layers += [nn.Conv2d(channels, out, kernel, stride), *norm, nn.ReLU(inplace=True)]
            channels = out
        flat = channels * height * width
        norm = [nn.LayerNorm(self.features)] if layer_norm else []
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, self.features), *norm, nn.ReLU(inplace=True))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Tensor:
        # channels_last convolutions take 1.2 x less time on CPU (specs/training-speed.md, section 2)
        return self.net((image.float() / 255).contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def initialise_(net: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights anew from `generator`: uniform in ± 1 / √fan_in, weights and biases (PyTorch's default law).

    The draw happens on the generator's device in the order of `net.modules()`. Normalisations keep scale 1, offset 0.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
        elif isinstance(module, StackedLinear):
            bound = 1 / math.sqrt(module.weight.shape[1])
        else:
            continue
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                parameter.uniform_(-bound, bound, generator=generator)
