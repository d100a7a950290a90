"""Stacks of frames against plain lists, and that nothing on a GPU waits for the host."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from envs.frame_stack import FrameStack

CPU = torch.device("cpu")


def fields_of(terminated: torch.Tensor, truncated: torch.Tensor) -> dict[str, torch.Tensor]:
    """All fields of a Step but the observations."""
    number = torch.zeros(len(terminated), device=terminated.device)
    flags = {"terminated": terminated, "truncated": truncated, "episode_ended": terminated | truncated}
    return {**flags, "reward": number, "episode_return": number, "episode_length": number.long()}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    depth=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    # For each row of each step: goes on, terminated, truncated, both.
    script=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=12),
)
def test_stacks_are_the_frames_since_the_last_end(depth, channels, script):
    stack, number = FrameStack(3, depth, (channels, 2, 2), CPU), 0

    def frames() -> torch.Tensor:
        nonlocal number
        number += 1
        rows = torch.arange(3 * channels).view(3, channels, 1, 1)
        return (20 * number + rows).to(torch.uint8).expand(3, channels, 2, 2).clone()

    def stacked(history: list[list[torch.Tensor]]) -> torch.Tensor:
        empty = [torch.zeros(channels, 2, 2, dtype=torch.uint8)] * depth
        return torch.stack([torch.cat((empty + shown)[-depth:]) for shown in history])

    first = frames()
    history = [[first[row]] for row in range(3)]
    assert torch.equal(stack.start(first), stacked(history))
    handed_out: list[tuple[torch.Tensor, torch.Tensor]] = []
    for kinds in script:
        kind = torch.tensor(kinds)
        terminated, truncated = kind % 2 == 1, kind >= 2
        last = frames()
        first = torch.where((kind > 0)[:, None, None, None], frames(), last)
        stack.make_room()
        step = stack.follow(first, last, fields_of(terminated, truncated), any_over=any(kinds))
        for row in range(3):
            history[row].append(last[row])
        assert torch.equal(step.final_obs, stacked(history))
        for row in range(3):
            if kinds[row]:
                history[row] = [first[row]]
        assert torch.equal(step.obs, stacked(history))
        assert torch.equal(stack.now, step.obs)
        for returned, copy in handed_out[-4:]:  # the two tensors of each of the last two steps
            assert torch.equal(returned, copy)
        handed_out += [(step.obs, step.obs.clone()), (step.final_obs, step.final_obs.clone())]


def test_a_restored_stack_goes_on():
    one, other = FrameStack(2, 4, (1, 3, 3), CPU), FrameStack(2, 4, (1, 3, 3), CPU)
    never = torch.zeros(2, dtype=torch.bool)
    one.start(torch.full((2, 1, 3, 3), 7, dtype=torch.uint8))
    other.restore(one.now.clone())
    frame = torch.full((2, 1, 3, 3), 9, dtype=torch.uint8)
    for stack in (one, other):
        stack.make_room()
    left, right = (stack.follow(frame, frame, fields_of(never, never), False) for stack in (one, other))
    assert torch.equal(left.obs, right.obs)
    assert left.obs[0, :, 0, 0].tolist() == [0, 0, 7, 9]


class OneDevice(TorchDispatchMode):
    """Refuses every operation that touches, or makes, a tensor elsewhere."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, torch.Tensor) or value.device == self.device, (func, value.device)
        return result


@pytest.mark.parametrize("channels", [1, 3])
def test_on_a_gpu_nothing_leaves_the_device_and_nothing_waits(channels):
    """Traced without a GPU: fake tensors refuse to be read on the host, and to meet those of another device."""
    device = torch.device("cuda", 0)
    with FakeTensorMode():
        frame = torch.empty(4, channels, 84, 84, dtype=torch.uint8, device=device)
        flags = torch.empty(4, dtype=torch.bool, device=device)
        stack = FrameStack(4, 4, (channels, 84, 84), device)
        with OneDevice(device):
            stack.start(frame)
            for any_over in (False, True):
                stack.make_room()
                step = stack.follow(frame, frame, fields_of(flags, flags), any_over)
            assert step.obs.shape == step.final_obs.shape == (4, 4 * channels, 84, 84)
            stack.restore(step.obs)
        with pytest.raises(AssertionError), OneDevice(device):  # the check can fail
            stack.start(frame.cpu())
