"""Nonlinearities that keep units able to learn, which torch does not have.

Each module names itself in `nonlinearity` and says in `copies` how many outputs it makes of each unit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CReLU(nn.Module):
    """[relu(x), relu(-x)] (Shang et al. 2016, arXiv:1603.05201): [B, H, ...] -> [B, 2 H, ...].

    dim: the axis of units.
    """

    nonlinearity, copies = "crelu", 2

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], self.dim).relu_()

    @staticmethod
    def stacked(layers: Sequence[nn.Module]) -> nn.Module:
        """Of K layers, for [K, B, H, ...]."""
        return CReLU(_behind_members(cast(CReLU, layers[0]).dim))


class Fourier(nn.Module):
    """[sin x, cos x] (Lewandowski et al. 2024, arXiv:2410.20634): [B, H, ...] -> [B, 2 H, ...].

    dim: the axis of units.
    """

    nonlinearity, copies = "fourier", 2

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.sin(), x.cos()], self.dim)

    @staticmethod
    def stacked(layers: Sequence[nn.Module]) -> nn.Module:
        """Of K layers, for [K, B, H, ...]."""
        return Fourier(_behind_members(cast(Fourier, layers[0]).dim))


class SmoothLeakyReLU(nn.Module):
    """a x + (1 - a) x sigmoid(c x / p): slope a far below zero, 1 far above, smooth between."""

    nonlinearity, copies = "smooth_leaky_relu", 1

    def __init__(self, slope: float = 0.1, sharpness: float = 5.0, width: float = 3.0):
        super().__init__()
        self.slope, self.sharpness, self.width = slope, sharpness, width

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + (1 - self.slope) * x * F.sigmoid(x * (self.sharpness / self.width))

    @staticmethod
    def stacked(layers: Sequence[nn.Module]) -> nn.Module:
        """Of K layers: it acts on each number alone."""
        return copy.deepcopy(layers[0])


def _behind_members(dim: int) -> int:
    """The same axis when one for members has been put in front."""
    return dim + 1 if dim >= 0 else dim
