"""Which number of a grown model comes from which number of the model before.

Every operator moves whole rows and columns, so a parameter's sources are a list of places for each of its axes, not one
entry for each of its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slots:
    """The sources of one parameter of the new model.

    source: the old parameter's name; None: all of this parameter is new. places: for each axis of the new parameter
    int64 [n'], the old place along that axis, -1 where there is none. shape: of the old parameter.
    A number is inherited if it has an old place along every axis.
    """

    source: str | None
    places: tuple[Tensor, ...]
    shape: tuple[int, ...]

    @classmethod
    def same(cls, name: str, tensor: Tensor) -> Slots:
        """All of a parameter of that name and shape, number by number."""
        return cls(name, tuple(torch.arange(n, device=tensor.device) for n in tensor.shape), tuple(tensor.shape))

    @classmethod
    def new(cls, tensor: Tensor) -> Slots:
        """Nothing is inherited by a parameter of that shape."""
        return cls(None, tuple(torch.full((n,), -1, device=tensor.device) for n in tensor.shape), tuple(tensor.shape))

    @property
    def inherited(self) -> Tensor:
        """bool, of the new parameter's shape."""
        found = torch.ones((), dtype=torch.bool) if self.source is not None else torch.zeros((), dtype=torch.bool)
        for places in self.places:
            found = found.to(places.device).unsqueeze(-1) & (places >= 0)
        return found

    @property
    def index(self) -> Tensor:
        """int64, of the new parameter's shape: where in the flattened old parameter each number is from, else -1."""
        flat = torch.zeros((), dtype=torch.int64)
        for places, length in zip(self.places, self.shape, strict=True):
            flat = flat.to(places.device).unsqueeze(-1) * length + places.clamp_min(0)
        return torch.where(self.inherited, flat, -1)

    @property
    def whole(self) -> bool:
        """The parameter is the old one, every number in its place."""
        shape = tuple(len(places) for places in self.places)
        same = (bool((places == torch.arange(len(places), device=places.device)).all()) for places in self.places)
        return self.source is not None and shape == self.shape and all(same)

    def gather(self, old: Tensor) -> Tensor:
        """The old numbers in the new shape; where nothing is inherited they mean nothing."""
        for axis, places in enumerate(self.places):
            old = old.index_select(axis, places.clamp_min(0).to(old.device))
        return old

    def fill_(self, new: Tensor, old: Tensor) -> None:
        """Copy the inherited numbers of the old parameter into the new one, in place; the others stay."""
        if self.source is not None:
            new.copy_(torch.where(self.inherited.to(new.device), self.gather(old), new))


class SlotMap(dict[str, Slots]):
    """The slots of each parameter of a grown model, by its name."""

    @classmethod
    def same(cls, parameters: Iterable[tuple[str, Tensor]]) -> SlotMap:
        """Of a model that is as it was."""
        return cls({name: Slots.same(name, tensor) for name, tensor in parameters})

    def then(self, later: SlotMap) -> SlotMap:
        """Of two growths, this one first."""
        return SlotMap({name: self._through(slots) for name, slots in later.items()})

    def _through(self, later: Slots) -> Slots:
        if later.source is None:
            return later
        first = self[later.source]
        pairs = zip(first.places, later.places, strict=True)
        places = tuple(torch.where(b >= 0, a[b.clamp_min(0)], -1) for a, b in pairs)
        return Slots(first.source, places, first.shape)


def parameters_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, under its first name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
