"""Whether actions are of the kind that a runner takes; the reason in one sentence if not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.runner import ActionSpec, ContinuousActionSpec, DiscreteActionSpec

SLACK = 1e-3  # of the range, for the rounding of policies that squash and scale


def check_action(action: Any, spec: ActionSpec, num_envs: int, device: torch.device) -> None:
    """Raise ValueError unless `action` is a tensor on `device` of the type and shape of `spec`. Looks at no value."""
    if not isinstance(action, Tensor):
        raise ValueError(f"action must be a tensor, got {type(action).__name__}")
    if action.device.type != device.type or device.index not in (None, action.device.index):
        raise ValueError(f"action must be on {device}, it is on {action.device}")
    if isinstance(spec, DiscreteActionSpec):
        wanted, shape, fits = "int64", [num_envs], action.dtype == torch.int64
    else:
        wanted, shape, fits = "floating-point", [num_envs, spec.size], action.is_floating_point()
    if not fits or list(action.shape) != shape:
        raise ValueError(f"action must be {wanted} {shape}, got {action.dtype} {list(action.shape)}")


def check_choice(action: Tensor, spec: DiscreteActionSpec) -> None:
    """Raise ValueError, naming the row, unless all actions int64 [N] are among those of `spec`. Waits for a device."""
    for row, number in enumerate(action.tolist()):
        if not 0 <= number < spec.count:
            raise ValueError(f"row {row}: action {number} is not one of 0 to {spec.count - 1}")


def check_bounds(values: np.ndarray, spec: ContinuousActionSpec) -> None:
    """Raise an error that names row and column unless all actions [N, A] are numbers within the bounds of `spec`.

    FloatingPointError for NaN, ValueError for what is out of bounds.
    """
    low, high = spec.low, spec.high
    slack = SLACK * (high - low)
    allowed = (values >= low - slack) & (values <= high + slack)  # False for NaN
    for row, column in np.argwhere(~allowed):
        value = values[row, column]
        if np.isnan(value):
            raise FloatingPointError(f"row {row}: action [{column}] is NaN")
        bounds = f"[{low[column]:g}, {high[column]:g}]"
        raise ValueError(f"row {row}: action [{column}] is {value:g}, outside of {bounds}")
