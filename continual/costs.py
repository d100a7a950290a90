"""What a strategy takes: operations of a step, and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from continual.learner import Learner

_WARM_UP = 2  # steps, after which there is something to replay


def costs(learner: Learner) -> dict[str, float]:
    """Of one member: trained parameters, floating-point operations of a step, bytes of all state and of the memory.

    Operations are those of matrix products and convolutions, forward and backward, counted in the third step. The
    learner is used up: three steps further, with a memory that holds little yet but has its full size. Of one that does
    not learn in steps, parameters only.
    """
    learner.evaluate_every = None
    parameters = {"cost/parameters": float(learner.strategy.parameter_count)}
    if not learner.strategy.learns_in_steps:
        return parameters
    steps = min(task.steps for task in learner.tasks)
    for _ in range(min(_WARM_UP, steps - 1)):
        learner.advance(1)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _products_added}) as counter:
        learner.learn(1)
    held = sum(tensor.nbytes for tensor in _tensors(learner.strategy.state_dict()))
    return {
        **parameters,
        "cost/flops_per_step": counter.get_total_flops() / learner.members,
        "cost/state_bytes": held / learner.members,
        "cost/memory_bytes": float(learner.strategy.memory.nbytes),
    }


def _products_added(own: Sequence[int], first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    """Of `baddbmm_`, which the counter knows only out of place; [K, n, p] from [K, n, m] and [K, m, p]."""
    return 2 * math.prod(first) * second[-1]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
