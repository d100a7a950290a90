"""Growing a stack of residual blocks: a new block that changes nothing, at any position."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from continual.growth.slots import SlotMap, Slots


def insert_block(
    blocks: nn.ModuleList, position: int, block: nn.Module, copied_from: int | None, residual: Sequence[str]
) -> tuple[nn.ModuleList, SlotMap]:
    """The stack with one more block before `position`, and the slots of all of its parameters, named within it.

    block: the new one, of its final weights. copied_from: of which old block its weights are, but for those of
    `residual`, the names of parameters within the block that write to the stream; None: it inherits nothing. The
    result shares no memory with `blocks`. Raises ValueError for a position that is not in the stack.
    """
    if not 0 <= position <= len(blocks):
        raise ValueError(f"a stack of {len(blocks)} blocks has no position {position}, it is 0 to {len(blocks)}")
    old = [copy.deepcopy(member) for member in blocks]
    origins = [*range(position), copied_from, *range(position, len(blocks))]
    stack = nn.ModuleList([*old[:position], block, *old[position:]])
    slots = SlotMap()
    for index, (origin, member) in enumerate(zip(origins, stack, strict=True)):
        for name, parameter in member.named_parameters():
            new = origin is None or (index == position and name in residual)
            found = Slots.new(parameter) if new else Slots.same(f"{origin}.{name}", parameter)
            slots[f"{index}.{name}"] = found
    return stack, slots


@torch.no_grad()
def zeroed_copy(block: nn.Module, residual: Sequence[str]) -> nn.Module:
    """A copy of a residual block that adds nothing to the stream: parameters `residual`, which write to it, are 0."""
    copied = copy.deepcopy(block)
    for name in residual:
        copied.get_parameter(name).zero_()
    return copied
