"""The losses of a population, one number a member, and what is measured on a batch before it is learned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def member_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of each member: [K].

    Cross-entropy for targets [K, B] int64, squared error for targets [K, B, out] of real numbers; outputs [K, B, out].
    """
    if targets.is_floating_point():
        return (outputs - targets).square().flatten(1).mean(1)
    losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def member_scores(outputs: Tensor, targets: Tensor) -> Tensor:
    """Accuracy of each member, or its mean squared error where targets are real numbers: [K].

    Targets of -1 do not count; a member without any other has NaN.
    """
    if targets.is_floating_point():
        return (outputs - targets).square().flatten(1).mean(1)
    counted = targets >= 0
    return ((outputs.argmax(2) == targets) & counted).sum(1) / counted.sum(1)


def majority_share(targets: Tensor, classes: int) -> Tensor:
    """The accuracy of always saying the commonest label: [K] of targets [K, B]."""
    counts = targets.new_zeros(len(targets), classes).scatter_add_(1, targets, torch.ones_like(targets))
    return counts.amax(1) / targets.shape[1]


def output_gradient(outputs: Tensor, targets: Tensor) -> Tensor:
    """The gradient of `member_losses`, summed over members, with respect to outputs: [K, B, out]."""
    if targets.is_floating_point():
        return (outputs - targets) * (2 / outputs[0].numel())
    gradient = torch.softmax(outputs, 2)
    gradient.scatter_add_(2, targets.unsqueeze(2), gradient.new_full((1, 1, 1), -1.0).expand(*targets.shape, 1))
    return gradient.mul_(1 / targets.shape[1])
