"""The networks of dynamic sparse training (specs/dynamic-sparse-training.md, sections 9 and 14).

Biases only where they are named; `continual.strategies.dst` takes gain and offset from BatchNorm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from continual.networks.residual import LinearBottleneck, basic_block

# MobileNetV2, table 2: expansion, channels, repetitions, stride of the first.
_BOTTLENECKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions between two poolings


def mlp_bn(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear without bias, BatchNorm and ReLU for each hidden size, and a linear head."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod(shape)
    for size in hidden:
        layers += [nn.Linear(inputs, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def cnn_bn(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """3 x 3 convolution, BatchNorm, ReLU, 2 x 2 pooling for all sizes but the last, then a hidden layer of that size.

    Raises ValueError for too few sizes, or images that are too small for them.
    """
    *channels, width = tuple(hidden) or (16, 32, 64, 64)
    sides = [side >> len(channels) for side in shape[1:]]
    if not channels or min(sides, default=0) < 1:
        raise ValueError(f"images of {list(shape)} are too small for a network of sizes {list(hidden)}")
    layers: list[nn.Module] = []
    inputs = shape[0]
    for size in channels:
        layers += [nn.Conv2d(inputs, size, 3, padding=1, bias=False), nn.BatchNorm2d(size), nn.ReLU(), nn.MaxPool2d(2)]
        inputs = size
    dense = [nn.Linear(inputs * math.prod(sides), width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *dense, nn.Linear(width, outputs))


def lenet5(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Convolutions 6 and 16 of 5 x 5 with ReLU and pooling, hidden (120, 84), no biases. For images of 28 x 28."""
    sides = [((side - 4) // 2 - 4) // 2 for side in shape[1:]]
    if min(sides) < 1:
        raise ValueError(f"images of {list(shape)} are too small for LeNet-5")
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], 6, 5, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    ]  # fmt: skip
    inputs = 16 * math.prod(sides)
    for size in tuple(hidden) or (120, 84):
        layers += [nn.Linear(inputs, size, bias=False), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def resnet18(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """ResNet-18 with a 7 x 7 stem of stride 2 and no pooling behind it; hidden: channels, if others than 64 to 512.

    11 218 112 weights for three colours and 100 outputs without bias.
    """
    sizes = _sizes(hidden, (64, 128, 256, 512))
    stem = [nn.Conv2d(shape[0], sizes[0], 7, 2, 3, bias=False), nn.BatchNorm2d(sizes[0]), nn.ReLU()]
    blocks: list[nn.Module] = []
    channels = sizes[0]
    for index, size in enumerate(sizes):
        blocks += [basic_block(channels, size, 2 if index else 1), basic_block(size, size, 1)]
        channels = size
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


def vgg_like(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """VGG-16's convolutions, which have biases, with BatchNorm, and a hidden layer; for images of 32 x 32 or more.

    hidden: channels of the five stages and the width of the layer behind them, if others than 64 to 512.
    """
    if min(shape[1:]) < 32:
        raise ValueError(f"images of {list(shape)} are too small for the VGG-like network, it needs 32 x 32")
    *sizes, width = _sizes(hidden, (*(size for size, _ in _VGG), 512))
    layers: list[nn.Module] = []
    channels = shape[0]
    for size, (_, repetitions) in zip(sizes, _VGG, strict=True):
        for _ in range(repetitions):
            layers += [nn.Conv2d(channels, size, 3, padding=1), nn.BatchNorm2d(size), nn.ReLU()]
            channels = size
        layers.append(nn.MaxPool2d(2))
    inputs = channels * math.prod(side // 32 for side in shape[1:])
    dense = [nn.Linear(inputs, width), nn.ReLU(), nn.BatchNorm1d(width)]
    return nn.Sequential(*layers, nn.Flatten(), *dense, nn.Linear(width, outputs))


def mobilenet_v2(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381, table 2) with a stem of stride 2.

    hidden: channels of the stem, of the seven stages and of the last convolution, if others.
    """
    stem, *sizes, width = _sizes(hidden, (32, *(size for _, size, _, _ in _BOTTLENECKS), 1280))
    layers: list[nn.Module] = _convolution(shape[0], stem, 3, 2)
    channels = stem
    for size, (expansion, _, repetitions, stride) in zip(sizes, _BOTTLENECKS, strict=True):
        for index in range(repetitions):
            layers.append(_bottleneck(channels, size, expansion, stride if index == 0 else 1))
            channels = size
    layers += _convolution(channels, width, 1, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))


def _sizes(hidden: Sequence[int], published: Sequence[int]) -> tuple[int, ...]:
    """Those of the user, or the published ones. Raises ValueError for another number of them."""
    if hidden and len(hidden) != len(published):
        raise ValueError(f"this network has {len(published)} sizes ({list(published)}), got {len(hidden)}")
    return tuple(hidden or published)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU6()]


def _bottleneck(inputs: int, outputs: int, expansion: int, stride: int) -> nn.Module:
    inner = inputs * expansion
    layers = [] if expansion == 1 else _convolution(inputs, inner, 1, 1)
    layers += _convolution(inner, inner, 3, stride, groups=inner)
    body = nn.Sequential(*layers, nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
    return LinearBottleneck(body) if stride == 1 and inputs == outputs else body
