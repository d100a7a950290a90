"""The networks of published plasticity experiments, and their initialisation from an explicit generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import nn

from plasticity.networks.tracing import is_normaliser

Law = Literal["kaiming", "torch"]


def mlp(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear and ReLU for each hidden size, and a linear head: [B, *shape] -> [B, outputs]."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod(shape)
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def _convolutional(
    shape: Sequence[int], kernels: Sequence[tuple[int, int]], hidden: Sequence[int], outputs: int, relu: bool = True
) -> nn.Sequential:
    """Convolution [, ReLU], 2 x 2 pooling for each (channels, kernel), then as `mlp`."""
    channels, *size = shape
    layers: list[nn.Module] = []
    for out, kernel in kernels:
        layers += [nn.Conv2d(channels, out, kernel), *([nn.ReLU()] if relu else []), nn.MaxPool2d(2)]
        channels, size = out, [(side - kernel + 1) // 2 for side in size]
        if min(size) < 1:
            raise ValueError(f"images of {list(shape)} are too small for this convolutional network")
    return nn.Sequential(*layers, *mlp([channels, *size], hidden, outputs))


def cnn_l2_init(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Two convolutions of 16 channels and 5 x 5 (Kumar et al. 2023, arXiv:2308.11958); theirs has hidden (100, 100)."""
    return _convolutional(shape, ((16, 5), (16, 5)), hidden, outputs)


def cnn_imagenet(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Convolutions 32 of 5 x 5, 64 and 128 of 3 x 3 (Dohare et al. 2024, Nature 632); theirs has hidden (128, 128)."""
    return _convolutional(shape, ((32, 5), (64, 3), (128, 3)), hidden, outputs)


def lenet(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Convolutions 6 and 16 of 5 x 5 without nonlinearity, as in UPGD's code (arXiv:2404.00781); hidden (120, 84)."""
    return _convolutional(shape, ((6, 5), (16, 5)), hidden, outputs, relu=False)


Builder = Callable[[Sequence[int], Sequence[int], int], nn.Module]
ARCHITECTURES: dict[str, Builder] = {
    "mlp": mlp,
    "cnn-l2-init": cnn_l2_init,
    "cnn-imagenet": cnn_imagenet,
    "lenet": lenet,
}


@torch.no_grad()
def draw_(network: nn.Module, law: Law, generator: torch.Generator) -> nn.Module:
    """Draw all weights anew, in the order of `network.modules()`. Returns the network.

    "kaiming": weights uniform in ± √(6 / fan_in) (He et al. 2015), in ± √(3 / fan_in) in the last layer, biases 0.
    "torch": weights and biases uniform in ± 1 / √fan_in, PyTorch's own law. Normalisations begin as the identity, and a
    layer of one's own draws its parameters in `draw_own_`. Raises ValueError for a parameter of another kind of layer.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            gain = 1.0 if law == "torch" else math.sqrt(3.0 if module is layers[-1] else 6.0)
            module.weight.uniform_(-gain / math.sqrt(fan_in), gain / math.sqrt(fan_in), generator=generator)
            if module.bias is not None:
                bound = 1 / math.sqrt(fan_in) if law == "torch" else 0.0
                module.bias.uniform_(-bound, bound, generator=generator)
        elif is_normaliser(module) and hasattr(module, "reset_parameters"):
            cast(nn.LayerNorm, module).reset_parameters()  # constants: nothing is drawn
        elif (draw_own_ := getattr(module, "draw_own_", None)) is not None:
            draw_own_(generator)
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(f"no law of initialisation is known for the parameters of {type(module).__name__}")
    return network
