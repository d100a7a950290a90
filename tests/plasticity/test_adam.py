"""Our Adam against torch's, and its state."""

from __future__ import annotations

import pytest
import torch

from plasticity.adam import Adam


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), ())]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) * 10.0 ** -(step % 5) for p in parameters()]


def test_equals_torch_bit_for_bit():
    ours, theirs = parameters(), parameters()
    adam = Adam(ours, 3e-3, betas=(0.8, 0.99), epsilon=1e-5)
    reference = torch.optim.Adam(theirs, lr=3e-3, betas=(0.8, 0.99), eps=1e-5, fused=True)
    for step in range(50):
        adam.step(gradients(step))
        for p, g in zip(theirs, gradients(step), strict=True):
            p.grad = g
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_first_step_is_the_learning_rate_against_the_sign():
    """m̂ / (√v̂ + ε) = sign(g) at t = 1 (algorithm 1)."""
    p = torch.tensor([1.0, 1.0, 1.0])
    Adam([p], 0.1).step([torch.tensor([2.0, -0.5, 0.0])])
    assert p.tolist() == pytest.approx([0.9, 1.1, 1.0], abs=1e-6)


def test_gradients_in_another_memory_layout_are_read_right():
    """Autograd hands out transposed gradients where a weight was used transposed."""
    ours, theirs = parameters()[:1], parameters()[:1]
    adam, reference = Adam(ours, 1e-2), Adam(theirs, 1e-2)
    for step in range(3):
        gradient = gradients(step)[0]
        adam.step([gradient.mT.contiguous().mT])
        reference.step([gradient])
    assert torch.equal(ours[0], theirs[0])


def test_restored_state_continues_exactly():
    ours, other = parameters(), parameters()
    adam, fresh = Adam(ours, 1e-2), Adam(other, 1e-2)
    for step in range(10):
        adam.step(gradients(step))
    for target, source in zip(other, ours, strict=True):
        target.copy_(source)
    fresh.load_state_dict(adam.state_dict())
    for step in range(10, 20):
        adam.step(gradients(step))
        fresh.step(gradients(step))
    for a, b in zip(ours, other, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="'exp_avg' does not fit"):
        Adam(parameters()[:2], 1e-2).load_state_dict(adam.state_dict())
