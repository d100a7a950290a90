"""How the axes of weights grow, such that what the network computes stays as it is.

A hidden axis is written by one weight (its rows) and read by another (its columns). Growing it takes one `Axis` for
each, made together; `grown` applies them. Where new places are read with zeros, or copies are read in shares, the
function stays. Sources: Net2Net (Chen, Goodfellow & Shlens 2016, arXiv:1511.05641) for copies; the others are of the
specification of this house (specs/growclip-and-growth.md, A.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from continual.growth.slots import Slots

Draw = Callable[[tuple[int, ...]], Tensor]  # numbers of a shape, as a fresh network begins with
Shares = Literal["equal", "random"]


@dataclass(frozen=True)
class Axis:
    """One axis of one weight, from n places to n'.

    places: int64 [n'], the old place of each, -1 where it is new. scale: float64 [n'], the factor on what is inherited.
    drawn: float64 [n'], the factor on what is drawn for a new place; 0: it begins at zero.
    """

    places: Tensor
    scale: Tensor
    drawn: Tensor

    @classmethod
    def of(cls, places: Tensor, scale: Tensor | float = 1.0, drawn: Tensor | float = 1.0) -> Axis:
        """With one factor for all places, or one for each."""
        like = torch.ones(len(places), dtype=torch.float64, device=places.device)
        return cls(places, like * scale, like * drawn)


@dataclass(frozen=True)
class Grown:
    """Two sides of an axis: of the weight that writes it, and of a weight that reads it."""

    written: Axis
    read: Axis


def unread(old: int, new: int) -> Grown:
    """New places at the end: drawn where they are written, read with zeros."""
    _check(old, new)
    places = _kept(old, new)
    return Grown(Axis.of(places), Axis.of(places, drawn=0.0))


def duplicated(old: int, new: int, generator: torch.Generator, shares: Shares = "equal") -> Grown:
    """New places are copies of old ones, drawn at random (Net2WiderNet); what reads them shares out its weight.

    shares: "equal": 1 / how many copies there are. "random": positive ones of sum 1, so that copies learn differently.
    """
    _check(old, new)
    device = generator.device
    copied = torch.randint(old, (new - old,), generator=generator, device=device)
    places = torch.cat([torch.arange(old, device=device), copied])
    weight = torch.ones(new, dtype=torch.float64, device=device)
    if shares == "random":
        weight = 0.1 + torch.rand(new, generator=generator, dtype=torch.float64, device=device)
    total = torch.zeros(old, dtype=torch.float64, device=device).index_add(0, places, weight)
    return Grown(Axis.of(places), Axis.of(places, scale=weight / total[places]))


def tiled(old: int, times: int) -> Axis:
    """The axis repeated, for a weight that writes it, or a norm's."""
    if times < 1:
        raise ValueError(f"an axis is tiled at least once, got {times}")
    return Axis.of(torch.arange(old).repeat(times))


def tiled_read(old: int, times: int, generator: torch.Generator, shares: Shares = "random") -> Axis:
    """The axis repeated, for a weight that reads it: copy k with share λ_k, Σ λ = 1."""
    share = torch.full((times,), 1 / times, dtype=torch.float64)
    if shares == "random" and times > 1:
        share = 0.1 + torch.rand(times, generator=generator, dtype=torch.float64, device=generator.device)
        share = share / share.sum()
    return replace(tiled(old, times), scale=share.repeat_interleave(old))


def padded(old: int, new: int) -> Grown:
    """New places are written with zeros, and read with what is drawn."""
    _check(old, new)
    places = _kept(old, new)
    return Grown(Axis.of(places, drawn=0.0), Axis.of(places))


def grown(name: str, old: Tensor, axes: Sequence[Axis | None], draw: Draw) -> tuple[Tensor, Slots]:
    """A weight with its axes grown, and its slots. axes: one for each of `old`; None: that axis stays.

    name: of the old parameter, for the slots. draw: called only if anything is drawn. The result shares no memory.
    """
    if all(axis is None for axis in axes):
        return old.clone(), Slots.same(name, old)
    places = tuple(
        torch.arange(n, device=old.device) if axis is None else axis.places.to(old.device)
        for n, axis in zip(old.shape, axes, strict=True)
    )
    new = old
    for position, axis in enumerate(axes):
        if axis is not None:
            new = new.index_select(position, places[position].clamp_min(0))
            if bool((axis.scale != 1).any()):
                new = new * _along(axis.scale, position, new)
    for position, axis in enumerate(axes):
        if axis is not None and bool((axis.places < 0).any()):
            _begin_(new, axes, position, draw)
    return new, Slots(name, places, tuple(old.shape))


def _begin_(new: Tensor, axes: Sequence[Axis | None], position: int, draw: Draw) -> None:
    """Give the new places of one axis what they begin with, in place."""
    axis = axes[position]
    assert axis is not None
    rows = (axis.places < 0).nonzero().squeeze(1)
    shape = tuple(len(rows) if p == position else n for p, n in enumerate(new.shape))
    begun = torch.zeros(shape, device=new.device, dtype=new.dtype)
    if bool(axis.drawn[rows].any()):
        begun += draw(shape).to(begun)
        begun *= _along(axis.drawn[rows], position, begun)
        for p, other in enumerate(axes):
            if other is not None and p != position:
                begun *= _along(torch.where(other.places < 0, other.drawn, 1.0), p, begun)
    new.index_copy_(position, rows.to(new.device), begun)


def _along(factors: Tensor, position: int, tensor: Tensor) -> Tensor:
    """Of one axis of a tensor, to be multiplied with it."""
    return factors.to(tensor).view([-1 if p == position else 1 for p in range(tensor.dim())])


def linear_draw(generator: torch.Generator, inputs: int) -> Draw:
    """U(-1/sqrt(inputs), 1/sqrt(inputs)): what torch's linear and convolution layers begin with, weight and bias."""
    bound = 1 / math.sqrt(inputs)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device=generator.device).uniform_(-bound, bound, generator=generator)

    return draw


def rounded(size: int, factor: float, multiple: int = 8) -> int:
    """`size` times a factor, to the nearest multiple, but larger than it was."""
    return max(math.floor(size * factor / multiple + 0.5), size // multiple + 1) * multiple


def _kept(old: int, new: int) -> Tensor:
    return torch.cat([torch.arange(old), torch.full((new - old,), -1)])


def _check(old: int, new: int) -> None:
    if new < old:
        raise ValueError(f"an axis only grows, from {old} it cannot become {new}")
