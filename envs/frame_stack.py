"""Observations that are stacks of the newest frames, built on the device from single frames.

A simulator hands over one frame a step; the older ones are already on the device. For a stack of four this is a quarter
of the bytes to upload.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from envs.runner import Step


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A stack [N, depth * C, H, W], and views: all but its newest frame, the newest, all but the oldest."""

    stack: Tensor
    older: Tensor
    newest: Tensor
    newer: Tensor


class FrameStack:
    """The stacks of N rows, uint8 [N, depth * C, H, W]: oldest frame first, zeros before an episode.

    For each step `make_room`, which needs no new frame and may run while the simulator works, then `follow`. What
    `start` and `follow` return stays valid for two more steps. Nothing here waits for the device or reads a value back.
    """

    def __init__(self, num_envs: int, depth: int, frame_shape: tuple[int, ...], device: torch.device) -> None:
        channels = frame_shape[0]  # C of [C, H, W]
        shape = (num_envs, depth * channels, *frame_shape[1:])

        def ring() -> Iterator[_Buffer]:
            stacks = [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(3)]
            return itertools.cycle([_Buffer(s, s[:, :-channels], s[:, -channels:], s[:, channels:]) for s in stacks])

        self._pushed, self._begun = ring(), ring()  # apart, because few steps need the second: less memory is touched
        self._now = self._coming = next(self._pushed)

    @property
    def now(self) -> Tensor:
        """The stacks that the last call returned as `obs`."""
        return self._now.stack

    def start(self, frame: Tensor) -> Tensor:
        """The stacks of episodes that begin with `frame` [N, C, H, W] in every row."""
        self._now = next(self._pushed)
        self._now.older.zero_()
        self._now.newest.copy_(frame)
        return self._now.stack

    def restore(self, stacks: Tensor) -> None:
        """Continue from what `now` once was."""
        self._now = next(self._pushed)
        self._now.stack.copy_(stacks)

    def make_room(self) -> None:
        """Move the frames of the present stacks by one."""
        self._coming = next(self._pushed)
        self._coming.older.copy_(self._now.newer)

    def follow(self, first: Tensor, last: Tensor, fields: dict[str, Tensor], any_over: bool) -> Step:
        """The Step to which an action led: its newest frames `last` [N, C, H, W], its fields but obs and final_obs.

        Rows that terminated or were truncated get a new stack in `obs`, of their frame in `first`; for other rows that
        is the one in `last`. any_over says, on the host, whether there is such a row.
        """
        successor = self._now = self._coming
        successor.newest.copy_(last)
        if any_over:
            going_on = ~(fields["terminated"] | fields["truncated"])[:, None, None, None]
            self._now = next(self._begun)
            torch.mul(successor.older, going_on, out=self._now.older)
            self._now.newest.copy_(first)
        return Step(obs=self._now.stack, final_obs=successor.stack, **fields)
