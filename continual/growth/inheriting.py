"""Parameter inheriting with momentum, PIM: a grown model keeps what the old one knew, and leaves its local minimum.

    θ_new[inherited] = m θ_inherited + (1 - m) θ_rand         θ_rand: as a new model of the new architecture begins

Only the name and the aim of PIM could be read in the paper's abstract. The formula is a reading from memory; the other
one, to inherit running averages of the weights (AutoProg, Li et al. 2022, arXiv:2203.14509), is `Averages`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from continual.growth.slots import SlotMap, Slots
from plasticity.population import copy_state_

FreshParameter = Callable[[str, Sequence[int]], Tensor]  # of a name and a shape
EXCLUDED = ("positions",)  # parts of names; what has fewer than two axes is always excluded


@torch.no_grad()
def mix_(
    model: nn.Module,
    slots: SlotMap,
    momentum: float,
    fresh: FreshParameter,
    excluded: Sequence[str] = EXCLUDED,
    rescale: bool = False,
) -> None:
    """Mix what was inherited with new random numbers, in place. momentum: m, 1 leaves the model bit for bit as it is.

    excluded: parameters whose name has one of these parts rest. rescale: divide by sqrt(m² + (1 - m)²), which keeps the
    variance of independent numbers of equal variance. Raises ValueError for a momentum outside [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"the momentum of inheriting must be in [0, 1], got {momentum}")
    if momentum == 1:
        return
    divisor = math.hypot(momentum, 1 - momentum) if rescale else 1.0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or any(part in name for part in excluded) or slots[name].source is None:
            continue
        random = fresh(name, parameter.shape).to(parameter.device, parameter.dtype)
        mixed = (momentum * parameter + (1 - momentum) * random) / divisor
        parameter.copy_(torch.where(slots[name].inherited, mixed, parameter))


def seed_of(name: str) -> int:
    """A number for a parameter, so that candidates of a search draw the same for what they share."""
    return zlib.crc32(name.encode())


class Averages:
    """Exponential moving averages of a model's parameters, one copy for each decay."""

    def __init__(self, model: nn.Module, decays: Sequence[float], copies: Sequence[Mapping[str, Tensor]] = ()):
        """copies: to continue with, one for each decay; none: the parameters as they are."""
        if not decays or not all(0 <= decay < 1 for decay in decays):
            raise ValueError(f"decays of averages must be in [0, 1), got {tuple(decays)}")
        self.decays = tuple(decays)
        self._online = [p.detach() for p in model.parameters()]
        self._names = [name for name, _ in model.named_parameters()]
        begun = copies or [dict(zip(self._names, self._online, strict=True))] * len(decays)
        self._copies = [[values[name].clone() for name in self._names] for values in begun]

    @torch.no_grad()
    def update(self) -> None:
        """Towards the parameters as they are now."""
        for decay, copy in zip(self.decays, self._copies, strict=True):
            torch._foreach_lerp_(copy, self._online, 1 - decay)

    def values(self, which: int = 0) -> dict[str, Tensor]:
        """The copy of one decay, by name; not to be changed."""
        return dict(zip(self._names, self._copies[which], strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The copies."""
        return {"copies": self._copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is of another model."""
        copy_state_(self._copies, state["copies"], "averages")


@torch.no_grad()
def fill_copies_(model: nn.Module, slots: SlotMap, others: Sequence[Mapping[str, Tensor]]) -> None:
    """Let repeated numbers differ: the i-th copy of an old number becomes that of `others`[i mod len], in place.

    others: the values of models that were grown in the same way from other averages.
    """
    for name, parameter in model.named_parameters():
        if slots[name].source is None:
            continue
        rank = _copy_rank(slots[name]).to(parameter.device)
        for index, other in enumerate(others):
            chosen = (rank > 0) & ((rank - 1) % len(others) == index)
            parameter.copy_(torch.where(chosen, other[name], parameter))


def _copy_rank(slots: Slots) -> Tensor:
    """How often a number's old places came before along its axes; 0: it is the original, or new."""
    rank = torch.zeros((), dtype=torch.int64)
    for places in slots.places:
        rank = rank.to(places.device).unsqueeze(-1) + _occurrences(places)
    return torch.where(slots.inherited, rank, 0)


def _occurrences(places: Tensor) -> Tensor:
    """How often each entry of [n] came before in it."""
    found, order = places.sort(stable=True)
    index = torch.arange(len(places), device=places.device)
    begins = torch.cat([torch.ones_like(found[:1], dtype=torch.bool), found[1:] != found[:-1]])
    first = torch.where(begins, index, 0).cummax(0).values
    return torch.empty_like(index).index_copy(0, order, index - first)
