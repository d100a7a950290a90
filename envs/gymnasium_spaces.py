"""Which Gymnasium spaces a runner takes, and how their elements become rows of a tensor and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from torch import Tensor

from envs.actions import check_action, check_bounds, check_choice
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


def actions(env_id: str, space: Space, num_envs: int, device: torch.device) -> tuple[ActionSpec, Decode]:
    """The spec of an action, and the function from a tensor of N actions to a list of what the environments take.

    Discrete: int64 [N], counted from 0 whatever the space's `start`. Box of floats: float32 [N, A], A its flat size.
    Raises ValueError for another space, and for a Box without finite bounds. The function raises ValueError for actions
    of another kind, that are not finite, or out of bounds, for which it looks at a Box every 256th time.
    """
    if isinstance(space, Discrete):
        discrete = DiscreteActionSpec(int(space.n))
        return discrete, _discrete(discrete, int(space.start), num_envs, device)
    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        kind = f"{type(space).__name__}({space.dtype})"
        raise ValueError(f"{env_id} takes actions in a {kind} space; only Discrete and Box of floats are supported")
    if not space.is_bounded():
        raise ValueError(f"{env_id} takes actions in a Box without finite bounds, which is not supported")
    low, high = (np.asarray(bound, np.float32).ravel() for bound in (space.low, space.high))
    spec = ContinuousActionSpec(low, high)
    return spec, _continuous(spec, space, num_envs, device)


def _same(observation: Any) -> Any:
    return observation


def _one_hot(count: int, start: int) -> Encode:
    def encode(observation: Any) -> np.ndarray:
        row = np.zeros(count, np.float32)
        row[int(observation) - start] = 1.0
        return row

    return encode


def _discrete(spec: DiscreteActionSpec, start: int, num_envs: int, device: torch.device) -> Decode:
    def decode(action: Tensor) -> list[int]:
        check_action(action, spec, num_envs, device)
        values = action.tolist()
        if min(values) < 0 or max(values) >= spec.count:
            check_choice(action, spec)
        return [value + start for value in values] if start else values

    return decode


def _continuous(spec: ContinuousActionSpec, space: Box, num_envs: int, device: torch.device) -> Decode:
    times = itertools.count()

    def decode(action: Tensor) -> list[np.ndarray]:
        check_action(action, spec, num_envs, device)
        # astype copies: the caller may reuse its tensor, and the rows are kept for an exact resume.
        given = action.float() if action.dtype == torch.bfloat16 else action
        on_host = given.is_cpu and not given.requires_grad
        values = (given.numpy() if on_host else given.numpy(force=True)).astype(space.dtype)
        # A sum of squares is finite only if every entry is. Bounds cost more to look at, so that is done now and then.
        if not math.isfinite(np.vdot(values, values)) or next(times) % 256 == 0:
            check_bounds(values.reshape(num_envs, -1), spec)
        return list(values.reshape(num_envs, *space.shape))

    return decode
