"""Running means without gradients end in zero and not in numbers that a processor is slow on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from plasticity.adam import Adam
from plasticity.denormals import denormals_as_zero
from plasticity.optimisers.adamp import AdamP
from plasticity.optimisers.sgdp import SGDP
from plasticity.sgd import SGD

pytestmark = pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor has no such mode")
SMALLEST = torch.finfo(torch.float32).tiny


def flushes() -> bool:
    return bool(torch.tensor(1e-38) * 0.1 == 0)


def ours(optimizer: Adam | SGD) -> Callable[[Tensor], None]:
    return lambda gradient: optimizer.step([gradient])


def of_torchs_kind(optimizer: torch.optim.Optimizer, p: Tensor) -> Callable[[Tensor], None]:
    def step(gradient: Tensor) -> None:
        p.grad = gradient
        optimizer.step()

    return step


def adam(p: Tensor) -> tuple[Callable[[Tensor], None], Callable[[], Tensor]]:
    optimizer = Adam([p], 0.1)
    return ours(optimizer), lambda: optimizer.exp_avg[0]


def sgd(p: Tensor) -> tuple[Callable[[Tensor], None], Callable[[], Tensor]]:
    optimizer = SGD([p], 0.1, momentum=0.9)
    return ours(optimizer), lambda: optimizer.velocity[0]


def adamp(p: Tensor) -> tuple[Callable[[Tensor], None], Callable[[], Tensor]]:
    optimizer = AdamP([p], 0.1, delta=0.0)
    return of_torchs_kind(optimizer, p), lambda: optimizer.state[p]["exp_avg"]


def sgdp(p: Tensor) -> tuple[Callable[[Tensor], None], Callable[[], Tensor]]:
    optimizer = SGDP([p], 0.1, 0.9, delta=0.0)
    return of_torchs_kind(optimizer, p), lambda: optimizer.state[p]["momentum_buffer"]


@pytest.mark.parametrize("make", [adam, sgd, adamp, sgdp])
def test_a_moment_without_gradients_ends_in_zero(make):
    step, moment = make(torch.ones(1))
    values: Sequence[float] = []
    for count in range(880):
        step(torch.full((1,), float(count == 0)))
        values = [*values, float(moment())]
    assert 0 < 0.1 * 0.9**879 < SMALLEST  # what the smallest of them would be
    assert values[-1] == 0
    assert all(value == 0 or value >= SMALLEST for value in values)
    assert not flushes()  # elsewhere, such numbers are what they were


def test_whoever_wants_the_mode_anyway_keeps_it():
    torch.set_flush_denormal(True)
    try:
        with denormals_as_zero():
            assert flushes()
        assert flushes()
    finally:
        torch.set_flush_denormal(False)
    with pytest.raises(RuntimeError), denormals_as_zero():
        raise RuntimeError
    assert not flushes()
