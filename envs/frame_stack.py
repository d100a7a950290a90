"""Observations that are stacks of the newest frames, built on the device from single frames.

A simulator hands over one frame a step; the older ones are already on the device. For a stack of four this is a quarter
of the bytes to upload.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from envs.runner import Step

# A step uses up to two buffers, and what it returned has to survive the next two steps.
_BUFFERS = 6


def channels_first(frame: Tensor) -> Tensor:
    """Frames [N, C, H, W], of ALE's [N, 1, H, W] or, in colour, [N, 1, H, W, 3]; a view."""
    return frame if frame.ndim == 4 else frame.squeeze(1).permute(0, 3, 1, 2)


class FrameStack:
    """The stacks of N rows, uint8 [N, depth * C, H, W]: oldest frame first, zeros before an episode.

    Frames come as `channels_first` takes them. Nothing here waits for the device or reads a value back.
    """

    def __init__(self, num_envs: int, depth: int, frame_shape: tuple[int, int, int], device: torch.device) -> None:
        self._channels = frame_shape[0]
        shape = (num_envs, depth * frame_shape[0], *frame_shape[1:])
        buffers = [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)]
        self._buffers = itertools.cycle(buffers)
        self.newest = next(self._buffers)

    def start(self, frame: Tensor) -> Tensor:
        """The stacks of episodes that begin with `frame` in every row."""
        self.newest = next(self._buffers).zero_()
        self.newest[:, -self._channels :] = channels_first(frame)
        return self.newest

    def follow(self, step: Step, any_over: bool) -> Step:
        """The Step of stacks for a Step of single frames.

        Rows that terminated or were truncated get a new stack in `obs`; the others' frames in `obs` and `final_obs` are
        the same. any_over says, on the host, whether there is one.
        """
        final_obs = obs = self._pushed(channels_first(step.final_obs))
        if any_over:
            obs = self._begun(channels_first(step.obs), step.terminated | step.truncated)
        return Step(
            obs=obs,
            final_obs=final_obs,
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
            episode_return=step.episode_return,
            episode_length=step.episode_length,
            episode_ended=step.episode_ended,
        )

    def restore(self, stacks: Tensor) -> None:
        """Continue from `stacks`, once taken from `newest`."""
        self.newest = next(self._buffers).copy_(stacks)

    def _pushed(self, frame: Tensor) -> Tensor:
        older, self.newest = self.newest, next(self._buffers)
        self.newest[:, : -self._channels] = older[:, self._channels :]
        self.newest[:, -self._channels :] = frame
        return self.newest

    def _begun(self, frame: Tensor, rows: Tensor) -> Tensor:
        older, self.newest = self.newest, next(self._buffers)
        kept = ~rows[:, None, None, None]
        torch.mul(older[:, : -self._channels], kept, out=self.newest[:, : -self._channels])
        self.newest[:, -self._channels :] = frame
        return self.newest
