"""Operators on weights keep what a network computes, and say where each number comes from."""

import pytest
import torch
from torch import nn

from continual.growth.axes import (
    Axis,
    Grown,
    duplicated,
    grown,
    linear_draw,
    padded,
    rounded,
    tiled,
    tiled_read,
    unread,
)
from continual.growth.depth import insert_block, zeroed_copy
from continual.growth.slots import SlotMap, Slots


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(shape):
    return random(*shape, seed=9)


def hidden(x, first, bias, second):
    return torch.relu(x @ first.T + bias) @ second.T


def widened(axes: Grown):
    first, bias, second = random(5, 3), random(5, seed=1), random(2, 5, seed=2)
    new_first, slots = grown("first", first, (axes.written, None), draw)
    new_bias, _ = grown("bias", bias, (axes.written,), draw)
    new_second, _ = grown("second", second, (None, axes.read), draw)
    x = random(7, 3, seed=3)
    return (
        hidden(x, first, bias, second),
        hidden(x, new_first, new_bias, new_second),
        (first, new_first, new_second, slots),
    )


@pytest.mark.parametrize("way", ["unread", "equal", "random", "padded"])
def test_a_hidden_layer_is_widened_and_computes_the_same(way):
    generator = torch.Generator().manual_seed(1)
    copies = duplicated(5, 8, generator, way) if way in ("equal", "random") else None
    before, after, (first, new_first, new_second, slots) = widened(
        copies or {"unread": unread, "padded": padded}[way](5, 8)
    )
    # A padded neuron is 0 only without its bias, which is padded too.
    torch.testing.assert_close(after, before, atol=1e-13, rtol=0)
    assert new_first.shape == (8, 3)
    kept = slots.inherited
    assert torch.equal(new_first[kept], first.flatten()[slots.index[kept]])
    assert bool(kept.all()) == (copies is not None)
    if way == "equal":
        counts = torch.bincount(copies.written.places, minlength=5)
        torch.testing.assert_close(new_second[:, :5] * counts[:5], random(2, 5, seed=2))
    if way == "unread":
        assert not new_second[:, 5:].any()
        assert new_first[5:].any()


@pytest.mark.parametrize("shares", ["equal", "random"])
def test_a_tiled_axis_is_read_in_shares(shares):
    weight, x = random(4, 6), random(9, 6, seed=1)
    axis = tiled_read(6, 3, torch.Generator().manual_seed(2), shares)
    new, _ = grown("weight", weight, (None, axis), draw)
    torch.testing.assert_close(x.repeat(1, 3) @ new.T, x @ weight.T)
    assert torch.equal(x.repeat(1, 3), grown("x", x, (None, tiled(6, 3)), draw)[0])
    assert (axis.scale.unique().numel() == 1) == (shares == "equal")


def test_slots_of_two_growths_in_turn():
    weight = random(4, 6)
    first, a = grown("old", weight, (unread(4, 5).written, None), draw)
    second, b = grown("w", first, (None, duplicated(6, 8, torch.Generator().manual_seed(0)).written), draw)
    both = SlotMap({"w": a}).then(SlotMap({"w": b, "n": Slots.new(second)}))
    assert both["w"].source == "old"
    kept = both["w"].inherited
    assert kept.shape == (5, 8)
    assert not kept[4].any()
    assert torch.equal(second[kept], weight.flatten()[both["w"].index[kept]])
    assert both["n"].source is None
    assert not both["n"].inherited.any()
    filled = torch.zeros(5, 8, dtype=torch.float64)
    both["w"].fill_(filled, weight)
    assert torch.equal(filled, torch.where(kept, second, 0.0))
    assert Slots.same("old", weight).whole
    assert not a.whole


class Block(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3)
        for index, parameter in enumerate(self.parameters()):
            parameter.data = random(*parameter.shape, seed=10 * seed + index)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_block_is_inserted_that_changes_nothing(position):
    residual = ("down.weight", "down.bias")
    blocks, x = nn.ModuleList([Block(1), Block(2)]), random(5, 3, seed=7)
    origin = max(position - 1, 0)
    stack, slots = insert_block(blocks, position, zeroed_copy(blocks[origin], residual), origin, residual)
    before, after = x, x
    for block in blocks:
        before = block(before)
    for block in stack:
        after = block(after)
    assert torch.equal(before, after)
    assert slots[f"{position}.up.weight"].source == f"{origin}.up.weight"
    assert slots[f"{position}.down.weight"].source is None
    assert list(slots) == [name for name, _ in stack.named_parameters()]
    old = {p.data_ptr() for p in blocks.parameters()}
    assert not old & {p.data_ptr() for p in stack.parameters()}
    with pytest.raises(ValueError, match="no position 4"):
        insert_block(blocks, 4, Block(3), None, residual)


def test_axes_only_grow_and_sizes_are_rounded():
    for make in (unread, padded):
        with pytest.raises(ValueError, match="only grows"):
            make(5, 4)
    with pytest.raises(ValueError, match="at least once"):
        tiled(4, 0)
    assert [rounded(128, 1.5), rounded(8, 1.1), rounded(12, 1.0)] == [192, 16, 16]
    bound = linear_draw(torch.Generator().manual_seed(0), 16)((1000,)).abs().max()
    assert 0.2 < bound <= 0.25
    copied, slots = grown("w", random(2, 2), (None, None), draw)
    assert slots.whole
    assert Axis.of(torch.arange(2)).scale.tolist() == [1, 1]
