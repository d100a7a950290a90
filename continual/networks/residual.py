"""Blocks of layers with a way around them. Alone [B, ...], stacked [K, B, ...]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from plasticity.networks.stacked import stack


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)) (He et al. 2016)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.body, self.shortcut = body, shortcut

    @staticmethod
    def stacked(blocks: Sequence[nn.Module]) -> nn.Module:
        """K blocks as one."""
        same = cast(Sequence[Residual], blocks)
        return Residual(stack([block.body for block in same]), stack([block.shortcut for block in same]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class LinearBottleneck(nn.Module):
    """x + body(x), with no nonlinearity behind it (Sandler et al. 2018)."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    @staticmethod
    def stacked(blocks: Sequence[nn.Module]) -> nn.Module:
        """K blocks as one."""
        return LinearBottleneck(stack([block.body for block in cast(Sequence[LinearBottleneck], blocks)]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def basic_block(inputs: int, outputs: int, stride: int) -> Residual:
    """Two 3 x 3 convolutions with BatchNorm; a 1 x 1 convolution as the way around where shapes differ."""
    body = nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
    )  # fmt: skip
    if stride == 1 and inputs == outputs:
        return Residual(body, nn.Identity())
    return Residual(body, nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)))
