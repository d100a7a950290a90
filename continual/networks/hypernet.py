"""The target networks of hypernetworks for small images (specs/rnn-hypernetworks.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continual.networks.residual import Residual
from plasticity.population import RandomStream


class ZeroPaddedShortcut(nn.Module):
    """Every other pixel, and channels of zeros: option A of He et al. 2016. [..., C, H, W] -> [..., C', H', W']."""

    def __init__(self, more_channels: int):
        super().__init__()
        self.more_channels = more_channels

    @staticmethod
    def stacked(shortcuts: Sequence[nn.Module]) -> nn.Module:
        """K of them as one."""
        return shortcuts[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[..., ::2, ::2], (0, 0, 0, 0, 0, self.more_channels))


class Dropout(nn.Module):
    """Zeros with probability `rate`, in training. Each member draws from its own generator, which is part of its state.

    [B, ...], or stacked [K, B, ...]. `draw_from` gives it the generator.
    """

    random: RandomStream

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def draw_from(self, source: torch.Generator) -> None:
        """Draw from a generator of its own, whose seed is drawn from `source`."""
        seed = torch.randint(2**62, (), generator=source, device=source.device)
        self.random = RandomStream(torch.Generator(source.device).manual_seed(int(seed)))

    @staticmethod
    def stacked(layers: Sequence[nn.Module]) -> nn.Module:
        """K of them as one."""
        same = cast(Sequence[Dropout], layers)
        whole = Dropout(same[0].rate)
        whole.random = RandomStream([layer.random.generators[0] for layer in same])
        return whole

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = self.random.uniform(*x.shape[len(self.random.lead) :]) >= self.rate
        return x * kept / (1 - self.rate)

    def get_extra_state(self) -> Tensor:
        return torch.stack([generator.get_state() for generator in self.random.generators])

    def set_extra_state(self, state: Tensor) -> None:
        for generator, saved in zip(self.random.generators, state, strict=True):
            generator.set_state(saved.clone())  # a view of one row would be read from the first row on


def resnet32(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """ResNet of 3 x 5 blocks for small images, shortcuts without parameters (He et al. 2016, section 4.2), convolutions
    with biases (von Oswald et al. 2020). 468 540 parameters for 3 x 32 x 32 and 60 outputs. hidden: stem and stages, if
    not 16, 16, 32, 64.
    """
    stem, *stages = tuple(hidden) or (16, 16, 32, 64)
    layers: list[nn.Module] = [nn.Conv2d(shape[0], stem, 3, 1, 1), nn.BatchNorm2d(stem), nn.ReLU()]
    channels = stem
    for index, size in enumerate(stages):
        for block in range(5):
            layers.append(_plain_block(channels, size, 2 if index and not block else 1))
            channels = size
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


def _plain_block(inputs: int, outputs: int, stride: int) -> Residual:
    if outputs < inputs or (stride == 1 and outputs != inputs):
        raise ValueError("stages of resnet32 must not become narrower, and the first must be as wide as the stem")
    body = nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs),
    )  # fmt: skip
    return Residual(body, nn.Identity() if stride == 1 else ZeroPaddedShortcut(outputs - inputs))


def zenkenet(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """The CNN of Zenke et al. 2017 (arXiv:1703.04200): 32, 32, pool, 64, 64, pool, 512, with dropout of 0.25 and 0.5.

    1 276 508 parameters for 3 x 32 x 32 and 60 outputs. hidden: the two widths and that of the layer behind, if others.
    """
    widths = tuple(hidden) or (32, 64, 512)
    if len(widths) != 3:
        raise ValueError(f"hidden of zenkenet must be two widths and the size of a layer, got {widths}")
    layers: list[nn.Module] = []
    channels, side = shape[0], shape[-1]
    for size in widths[:2]:
        layers += [nn.Conv2d(channels, size, 3, 1, 1), nn.ReLU(), nn.Conv2d(size, size, 3), nn.ReLU()]
        layers += [nn.MaxPool2d(2), Dropout(0.25)]
        channels, side = size, (side - 2) // 2
    if side < 1 or shape[-2] != shape[-1]:
        raise ValueError(f"images of {list(shape)} are too small, or not square, for zenkenet")
    behind = [nn.Flatten(), nn.Linear(channels * side * side, widths[2]), nn.ReLU(), Dropout(0.5)]
    return nn.Sequential(*layers, *behind, nn.Linear(widths[2], outputs))
