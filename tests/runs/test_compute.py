"""Arithmetic that a run chooses: bfloat16 products in gradient steps, the direct route for products of a few rows."""

from __future__ import annotations

import contextlib

import pytest
import torch

from runs.compute import bfloat16_products, require_bfloat16, small_products
from tests.agents.fakes import CPU, REPLAYING
from tests.agents.test_agents import build, live, parameters


def train(name: str, rounds: int, per_round: int, bf16: bool) -> list[torch.Tensor]:
    """Parameters after `rounds` calls of `update` worth `per_round` gradient steps each, all on the same replay."""
    agent = build(name)
    live(agent, 8)
    for _ in range(rounds):
        with bfloat16_products(CPU, bf16):
            for _ in range(per_round):
                agent._update_once()
    return parameters(agent)


@pytest.mark.parametrize("name", REPLAYING)
def test_bfloat16_updates_move_float32_parameters_nearly_as_float32_does(name):
    exact, rounded = (train(name, 1, 1, bf16) for bf16 in (False, True))
    start = train(name, 0, 0, False)
    moved = torch.cat([(a - b).flatten() for a, b in zip(exact, start, strict=True)])
    moved_rounded = torch.cat([(a - b).flatten() for a, b in zip(rounded, start, strict=True)])
    assert {p.dtype for p in rounded} == {torch.float32}
    assert not torch.equal(moved, moved_rounded)
    assert torch.cosine_similarity(moved, moved_rounded, dim=0) > 0.8


@pytest.mark.parametrize("name", REPLAYING)
def test_bfloat16_updates_see_the_weights_that_the_update_before_them_left(name):
    together, apart = train(name, 1, 4, True), train(name, 4, 1, True)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_bfloat16_is_refused_where_it_is_emulated(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="--bf16 needs a cpu device that multiplies in bfloat16"):
        require_bfloat16(CPU)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ValueError, match="--bf16 needs a cuda device"):
        require_bfloat16(torch.device("cuda"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    require_bfloat16(CPU)


@pytest.mark.parametrize(("rows", "inside"), [(1, "highest"), (64, "medium")])
def test_the_direct_route_is_left_again(rows, inside):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with contextlib.suppress(KeyError), small_products(rows):
            assert torch.get_float32_matmul_precision() == inside
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
