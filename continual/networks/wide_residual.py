"""Networks of the experiments on growth: wide residual networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from plasticity.networks.stacked import stack


class WideBlock(nn.Module):
    """BatchNorm, ReLU, 3 x 3, ReLU, 3 x 3, and a way around, 1 x 1 behind the first ReLU where shapes differ.

    Zagoruyko & Komodakis 2016 (arXiv:1605.07146), without the second BatchNorm, as MixtureGrowth's code has it.
    [B, C, H, W], stacked [K, B, C, H, W].
    """

    def __init__(self, norm: nn.Module, first: nn.Module, second: nn.Module, shortcut: nn.Module | None):
        super().__init__()
        self.norm, self.first, self.second, self.shortcut = norm, first, second, shortcut

    @staticmethod
    def stacked(blocks: Sequence[nn.Module]) -> nn.Module:
        """K blocks as one."""
        same = cast(Sequence[WideBlock], blocks)
        norm, first, second = (stack([getattr(b, name) for b in same]) for name in ("norm", "first", "second"))
        shortcuts = [block.shortcut for block in same if block.shortcut is not None]
        return WideBlock(norm, first, second, stack(shortcuts) if shortcuts else None)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(x))
        around = x if self.shortcut is None else self.shortcut(h)
        return self.second(torch.relu(self.first(h))) + around


def wide_block(inputs: int, outputs: int, stride: int) -> WideBlock:
    """A block from `inputs` channels to `outputs`."""
    first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
    same = stride == 1 and inputs == outputs
    around = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return WideBlock(nn.BatchNorm2d(inputs), first, second, around)


def _wide_resnet(
    shape: Sequence[int], hidden: Sequence[int], outputs: int, blocks: int, published: tuple[int, ...]
) -> nn.Sequential:
    sizes = tuple(hidden) or published
    if len(sizes) != 4:
        raise ValueError(f"hidden of a wide ResNet must be the stem and three widths, got {list(sizes)}")
    stem, *stages = sizes
    layers: list[nn.Module] = [nn.Conv2d(shape[0], stem, 3, 1, 1, bias=False)]
    channels = stem
    for index, size in enumerate(stages):
        for block in range(blocks):
            layers.append(wide_block(channels, size, 2 if index and not block else 1))
            channels = size
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, outputs))


def wrn10(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """WRN-10: a block in each of three stages. hidden: stem and stages, if others than 8, 8, 16, 32."""
    return _wide_resnet(shape, hidden, outputs, 1, (8, 8, 16, 32))


def wrn28(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """WRN-28: four blocks in each of three stages. hidden: stem and stages, if not those of WRN-28-10, 16, 160, 320,
    640. 36.5 million weights."""
    return _wide_resnet(shape, hidden, outputs, 4, (16, 160, 320, 640))
