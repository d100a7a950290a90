"""From stored images to what a network sees: scaled to [0, 1], and augmented, in batches on the device.

Pixels are divided by the value of a fully bright one; nothing else is normalised. Augmentation works on whole batches
of a population at once; every member draws from a generator of its own.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from plasticity.population import RandomStream

Augmentation = Literal["none", "crop-flip", "doubled"]
AUGMENTATIONS = ("none", "crop-flip", "doubled")
_PADDING = 4  # pixels of crop-flip
_DRAWS = 16  # random numbers for each image, more than are used
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Inputs:
    """What a strategy learns from. levels: the value of a fully bright pixel. random: draws augmentations.

    augmentation: none; crop-flip (padded by 4 pixels, cropped back, mirrored half of the time, as for offline training
    on CIFAR); or doubled: each image beside a strongly augmented copy, as the authors of UER do in their sibling code
    (specs/uer-and-online-cl.md, section 1.6). Raises ValueError for another one.
    """

    def __init__(self, levels: int, augmentation: Augmentation = "none", random: RandomStream | None = None):
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"unknown augmentation '{augmentation}', it is one of {', '.join(AUGMENTATIONS)}")
        if augmentation != "none" and random is None:
            raise ValueError("an augmentation needs a stream of random numbers")
        self.levels, self.augmentation, self.random = levels, augmentation, random

    def scaled(self, images: Tensor) -> Tensor:
        """Stored images as the network sees them; those that are float already are left alone."""
        return images if images.is_floating_point() else images.float().mul_(1 / self.levels)

    def train(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images [K, B, ...], labels [K, B] -> inputs [K, B', ...] and labels [K, B'], B' = 2 B if doubled."""
        x = self.scaled(images)
        if self.augmentation == "none" or self.random is None:
            return x, labels
        draws = self.random.uniform(images.shape[1], _DRAWS).flatten(0, 1)
        shape = x.shape
        if self.augmentation == "crop-flip":
            return crop_and_flip(x.flatten(0, 1), draws).view(shape), labels
        copies = strongly_augmented(x.flatten(0, 1), draws).view(shape)
        return torch.cat([x, copies], 1), torch.cat([labels, labels], 1)


def crop_and_flip(x: Tensor, draws: Tensor) -> Tensor:
    """Shift by up to 4 pixels (black comes in), mirror half of them. x [N, C, H, W], draws [N, >= 3] in [0, 1)."""
    height, width = x.shape[2:]
    steps = torch.floor(draws[:, :2] * (2 * _PADDING + 1)) - _PADDING
    mirrored = torch.where(draws[:, 2] < 0.5, -1.0, 1.0)
    shift = steps * torch.tensor([2 / width, 2 / height], device=x.device)
    return _resampled(x, mirrored, torch.ones_like(mirrored), shift)


def strongly_augmented(x: Tensor, draws: Tensor) -> Tensor:
    """Crop of area in [0.2, 1] back to full size, mirror with p 0.5, colour jitter (0.4, 0.4, 0.4, 0.1) with p 0.8,
    greyscale with p 0.2. x [N, C, H, W] in [0, 1], draws [N, >= 12] in [0, 1).

    Jitter is in a fixed order: brightness, contrast, saturation, hue. Images of one channel have no colour to change.
    """
    area = 0.2 + 0.8 * draws[:, 0]
    aspect = torch.exp((2 * draws[:, 1] - 1) * math.log(4 / 3))
    across, down = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    shift = (2 * draws[:, 2:4] - 1) * (1 - torch.stack([across, down], 1))
    mirrored = torch.where(draws[:, 4] < 0.5, -across, across)
    x = _resampled(x, mirrored, down, shift, outside="border")
    jittered = _jittered(x, draws[:, 5:9])
    x = torch.where((draws[:, 9] < 0.8).view(-1, 1, 1, 1), jittered, x)
    if x.shape[1] != 3:
        return x
    return torch.where((draws[:, 10] < 0.2).view(-1, 1, 1, 1), _grey(x).expand_as(x), x)


def rotated(x: Tensor, degrees: Tensor) -> Tensor:
    """Images turned anticlockwise about their centre; black comes in. x [N, C, H, W], degrees [N]."""
    angle = torch.deg2rad(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # Where each pixel of the result comes from, so turned the other way; the y axis points down.
    rows = [torch.stack(row, 1) for row in ((cos, -sin, zero), (sin, cos, zero))]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _resampled(x: Tensor, across: Tensor, down: Tensor, shift: Tensor, outside: str = "zeros") -> Tensor:
    """A window of each image, scaled back: half-sizes across (negative: mirrored) and down, centre `shift` [N, 2]."""
    zero = torch.zeros_like(across)
    rows = (torch.stack([across, zero, shift[:, 0]], 1), torch.stack([zero, down, shift[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1).to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode=outside, align_corners=False)


def _jittered(x: Tensor, draws: Tensor) -> Tensor:
    """Brightness, contrast and saturation times a number in [0.6, 1.4], hue turned by up to a tenth of the circle."""
    factors = (0.6 + 0.8 * draws[:, :3]).to(x.dtype).view(-1, 3, 1, 1, 1)
    x = (x * factors[:, 0]).clamp(0, 1)
    x = torch.lerp(_grey(x).mean((2, 3), keepdim=True), x, factors[:, 1]).clamp(0, 1)
    if x.shape[1] != 3:
        return x
    x = torch.lerp(_grey(x).expand_as(x), x, factors[:, 2]).clamp(0, 1)
    return _hue_turned(x, (0.2 * draws[:, 3] - 0.1).to(x.dtype))


def _grey(x: Tensor) -> Tensor:
    """Brightness [N, 1, H, W]."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(_GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _hue_turned(x: Tensor, turns: Tensor) -> Tensor:
    """Colours turned about the grey axis by a part of the circle, brightness kept: a rotation in YIQ. turns [N]."""
    to_yiq = x.new_tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    angle = 2 * math.pi * turns
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rows = ((one, zero, zero), (zero, cos, -sin), (zero, sin, cos))
    turn = torch.stack([torch.stack(row, 1) for row in rows], 1)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return torch.einsum("nij,njhw->nihw", matrix, x).clamp(0, 1)
