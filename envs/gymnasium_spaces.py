"""Which Gymnasium spaces a runner takes, and how their elements become rows of a tensor and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from torch import Tensor

from envs.runner import ActionSpec, ContinuousActionSpec, DiscreteActionSpec, ObservationSpec

Encode = Callable[[Any], Any]
Decode = Callable[[Tensor], list[Any]]


def observations(env_id: str, space: Space) -> tuple[ObservationSpec, Encode]:
    """The spec of an observation, and the function from an observation to what is assigned to its row.

    Box: a float32 vector, flattened if it has more axes; uint8 with two or more axes is an image and stays as it is.
    Discrete: one-hot float32. Raises ValueError for another space.
    """
    if isinstance(space, Discrete):
        return ObservationSpec((int(space.n),)), _one_hot(int(space.n), int(space.start))
    if not isinstance(space, Box):
        raise ValueError(f"{env_id} observes a {type(space).__name__} space; only Box and Discrete are supported")
    if space.dtype == np.uint8 and len(space.shape) > 1:
        return ObservationSpec(space.shape, torch.uint8), _same
    size = int(np.prod(space.shape))
    return ObservationSpec((size,)), _same if len(space.shape) == 1 else np.ravel


def actions(env_id: str, space: Space, num_envs: int) -> tuple[ActionSpec, Decode]:
    """The spec of an action, and the function from a tensor of N actions to a list of what the environments take.

    Discrete: int64 [N], counted from 0 whatever the space's `start`. Box of floats: float32 [N, A], A its flat size.
    Raises ValueError for another space, and for a Box without finite bounds.
    """
    if isinstance(space, Discrete):
        return DiscreteActionSpec(int(space.n)), _discrete(num_envs, int(space.start))
    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        kind = f"{type(space).__name__}({space.dtype})"
        raise ValueError(f"{env_id} takes actions in a {kind} space; only Discrete and Box of floats are supported")
    if not space.is_bounded():
        raise ValueError(f"{env_id} takes actions in a Box without finite bounds, which is not supported")
    low, high = (np.asarray(bound, np.float32).ravel() for bound in (space.low, space.high))
    return ContinuousActionSpec(low, high), _continuous(num_envs, space)


def _same(observation: Any) -> Any:
    return observation


def _one_hot(count: int, start: int) -> Encode:
    def encode(observation: Any) -> np.ndarray:
        row = np.zeros(count, np.float32)
        row[int(observation) - start] = 1.0
        return row

    return encode


def _discrete(num_envs: int, start: int) -> Decode:
    shape = torch.Size((num_envs,))

    def decode(action: Tensor) -> list[int]:
        if action.shape != shape or action.dtype != torch.int64:
            raise ValueError(f"actions must be int64 [{num_envs}], got {action.dtype} {list(action.shape)}")
        values = action.tolist()
        return [value + start for value in values] if start else values

    return decode


def _continuous(num_envs: int, space: Box) -> Decode:
    size = int(np.prod(space.shape))
    shape, dtype, is_vector = torch.Size((num_envs, size)), space.dtype, len(space.shape) == 1

    def decode(action: Tensor) -> list[np.ndarray]:
        if action.shape != shape or not action.is_floating_point():
            raise ValueError(f"actions must be float32 [{num_envs}, {size}], got {action.dtype} {list(action.shape)}")
        # astype copies: the caller may reuse its tensor, and the rows are kept for an exact resume.
        values = action.numpy() if action.is_cpu and not action.requires_grad else action.numpy(force=True)
        rows = values.astype(dtype)
        return list(rows if is_vector else rows.reshape(num_envs, *space.shape))

    return decode
