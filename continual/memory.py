"""What a learner keeps of the past: a fixed number of samples of each member, on the device.

Samples are kept as they are stored (uint8 pixels, not augmented), with their labels and whatever else a strategy wants
to remember of them. Which are kept is the policy's: reservoir, class-balanced, or ring. Inserting a batch and drawing
one take the same time however many tasks there were; nothing passes to the host.

Random numbers are drawn ahead, a block at a time, so that a step costs no more calls for ten members than for one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from continual.inputs import Inputs
from plasticity.population import RandomStream, copy_state_

Policy = Literal["reservoir", "class-balanced", "ring"]
POLICIES: tuple[Policy, ...] = ("reservoir", "class-balanced", "ring")
_BLOCK = 64  # steps for which is decided at a time what is replayed and where new samples go
_AHEAD = 1024  # numbers drawn at a time, at least


@dataclass(frozen=True)
class Batch:
    """Samples of K members.

    images [K, B, *shape], labels [K, B]: as stored. x [K, B', *shape], y [K, B']: what to learn from, scaled and
    augmented; B' = B, or 2 B where each image comes with an augmented copy. kept: what else a strategy had remembered
    of these samples, [K, B, ...] by name.
    """

    images: Tensor
    labels: Tensor
    x: Tensor
    y: Tensor
    kept: Mapping[str, Tensor]


class Numbers:
    """The random numbers of a memory, drawn for many calls at once."""

    def __init__(self, random: RandomStream):
        self._random = random
        self._block = torch.zeros(*random.lead, 0, dtype=torch.float64, device=random.device)
        self._sets = torch.zeros(*random.lead, 0, 0, dtype=torch.int64, device=random.device)

    def take(self, count: int) -> Tensor:
        """The next `count` uniform numbers in [0, 1) of each member, float64 [K, count]."""
        if self._block.shape[1] < count:
            self._block = self._random.uniform(max(count, _AHEAD), dtype=torch.float64)
        taken, self._block = self._block[:, :count], self._block[:, count:]
        return taken

    def subset(self, count: int, filled: int, lasting: bool) -> Tensor:
        """Different whole numbers below `filled`, int64 [K, count]. lasting: `filled` will not change any more."""
        if not lasting:
            return distinct(self.take(count), filled)
        if self._sets.shape[1] == 0 or self._sets.shape[2] != count:
            self._sets = distinct(self.take(_BLOCK * count).unflatten(1, (_BLOCK, count)), filled)
        first, self._sets = self._sets[:, 0], self._sets[:, 1:]
        return first

    def state_dict(self) -> dict[str, Any]:
        """Generators, and what is left of the blocks."""
        states = [generator.get_state() for generator in self._random.generators]
        return {"generators": states, "block": self._block.clone(), "sets": self._sets.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same numbers."""
        for generator, saved in zip(self._random.generators, state["generators"], strict=True):
            generator.set_state(saved)
        self._block, self._sets = (state[name].to(self._random.device) for name in ("block", "sets"))


def distinct(numbers: Tensor, filled: Tensor | int) -> Tensor:
    """Different whole numbers below `filled`, every set of them equally likely (Floyd's algorithm).

    numbers uniform [..., m], filled: at least m, or one for each [...] -> int64 [..., m].
    """
    count = numbers.shape[-1]
    chosen: list[Tensor] = []
    for index in range(count):
        top = filled - count + index
        drawn = (numbers[..., index] * (top + 1)).long()
        if chosen:
            taken = (torch.stack(chosen, -1) == drawn.unsqueeze(-1)).any(-1)
            drawn = torch.where(taken, top, drawn)
        chosen.append(drawn)
    return torch.stack(chosen, -1)


class Chooser(Protocol):
    """A policy. It owns counts, not samples; slot `capacity` stands for: not kept."""

    def slots(self, labels: Tensor, numbers: Numbers) -> Tensor:
        """Where the samples with these labels [K, B] go, [K, B]: each to a slot of its own, or none."""
        ...

    def drawn(self, count: int, numbers: Numbers) -> Tensor:
        """Filled slots [K, m] to be replayed, different ones, m = count or as many as there are."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Reservoir:
    """Every sample of the stream is kept with the same probability (Vitter 1985, algorithm R), exactly.

    Sample number n, from 1, goes to slot n - 1 while there is room, then to a slot drawn from 0 .. n - 1, if it exists.
    """

    def __init__(self, capacity: int, members: int, device: torch.device):
        self.capacity, self.device, self.seen = capacity, device, 0
        self._coming = torch.zeros(members, 0, 0, dtype=torch.int64, device=device)  # slots of the next batches

    def slots(self, labels: Tensor, numbers: Numbers) -> Tensor:
        batch = labels.shape[1]
        if self.seen + batch <= self.capacity:
            slots = torch.arange(self.seen, self.seen + batch, device=self.device).expand(len(labels), -1)
        elif self.seen < self.capacity:
            slots = self._decided(1, batch, numbers)[:, 0]
        else:
            if self._coming.shape[1] == 0 or self._coming.shape[2] != batch:
                self._coming = self._decided(_BLOCK, batch, numbers)
            slots, self._coming = self._coming[:, 0], self._coming[:, 1:]
        self.seen += batch
        return slots

    def _decided(self, steps: int, batch: int, numbers: Numbers) -> Tensor:
        """Slots of the next batches, [K, steps, batch]."""
        number = torch.arange(self.seen + 1, self.seen + steps * batch + 1, device=self.device).view(steps, batch)
        uniform = numbers.take(steps * batch).unflatten(1, (steps, batch))
        drawn = (uniform * number).long().clamp_(max=self.capacity)
        return _last_stays(torch.where(number <= self.capacity, number - 1, drawn), self.capacity)

    def drawn(self, count: int, numbers: Numbers) -> Tensor:
        filled = min(self.seen, self.capacity)
        return numbers.subset(min(count, filled), filled, lasting=filled == self.capacity)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "coming": self._coming.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self._coming = state["seen"], state["coming"].to(self.device)


class ClassBalanced:
    """Classes as equal as the stream allows (Chrysakis & Moens 2020, algorithm 1).

    A sample of a class that was never the largest takes the place of one of the largest class. Of a class that was, it
    takes the place of one of its own, with probability kept / seen of that class: a reservoir within the class.
    """

    def __init__(self, capacity: int, members: int, classes: int, device: torch.device):
        self.capacity, self.filled = capacity, 0
        self.seen = torch.zeros(members, classes, dtype=torch.int64, device=device)
        self.full = torch.zeros(members, classes, dtype=torch.bool, device=device)
        self.labels = torch.full((members, capacity), -1, dtype=torch.int64, device=device)

    def slots(self, labels: Tensor, numbers: Numbers) -> Tensor:
        drawn = numbers.take(2 * labels.shape[1])
        columns = labels.split(1, 1)
        slots = torch.cat([self._slot(y, drawn[:, 2 * i : 2 * i + 2]) for i, y in enumerate(columns)], 1)
        return _last_stays(slots, self.capacity)

    def _slot(self, label: Tensor, numbers: Tensor) -> Tensor:
        """Of one sample of each member, label [K, 1], numbers [K, 2] -> [K, 1]."""
        self.seen.scatter_add_(1, label, torch.ones_like(label))
        if self.filled < self.capacity:
            slot = torch.full_like(label, self.filled)
            self.filled += 1
        else:
            kept = torch.zeros_like(self.seen).scatter_add_(1, self.labels, torch.ones_like(self.labels))
            largest = kept.argmax(1, keepdim=True)
            self.full.scatter_(1, largest, True)
            within = self.full.gather(1, label)
            victim = torch.where(within, label, largest)
            rank = (numbers[:, :1] * kept.gather(1, victim)).long()
            of_victim = self.labels == victim
            place = (of_victim & (of_victim.cumsum(1) == rank + 1)).byte().argmax(1, keepdim=True)
            accepted = ~within | (numbers[:, 1:] * self.seen.gather(1, label) < kept.gather(1, label))
            slot = torch.where(accepted, place, self.capacity)
        stays = slot < self.capacity
        own = slot.clamp(max=self.capacity - 1)
        self.labels.scatter_(1, own, torch.where(stays, label, self.labels.gather(1, own)))
        return slot

    def drawn(self, count: int, numbers: Numbers) -> Tensor:
        return numbers.subset(min(count, self.filled), self.filled, lasting=self.filled == self.capacity)

    def state_dict(self) -> dict[str, Any]:
        return {"filled": self.filled, "seen": self.seen, "full": self.full, "labels": self.labels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.filled = state["filled"]
        own = {name: value for name, value in self.state_dict().items() if name != "filled"}
        copy_state_(own, {name: state[name] for name in own}, "class-balanced memory")


class Ring:
    """The last samples of each class, as many of each (Lopez-Paz & Ranzato 2017; Chaudhry et al. 2019).

    Where fewer are kept than are asked for, some come twice.
    """

    def __init__(self, capacity: int, members: int, classes: int, device: torch.device):
        self.capacity, self.quota = capacity, capacity // classes
        self.seen = torch.zeros(members, classes, dtype=torch.int64, device=device)

    def slots(self, labels: Tensor, numbers: Numbers) -> Tensor:
        earlier = _later(labels.shape[1], labels.device).T
        same = labels.unsqueeze(2) == labels.unsqueeze(1)  # [K, B, B]
        number = self.seen.gather(1, labels) + (same & earlier).sum(2)
        self.seen.scatter_add_(1, labels, torch.ones_like(labels))
        return _last_stays(labels * self.quota + number % self.quota, self.capacity)

    def drawn(self, count: int, numbers: Numbers) -> Tensor:
        kept = self.seen.clamp(max=self.quota)
        filled = kept.sum(1)
        few = torch.arange(count, device=kept.device) % filled.unsqueeze(1)
        rank = torch.where((filled < count).unsqueeze(1), few, distinct(numbers.take(count), filled))
        # From the rank among all kept samples to class and place within it.
        ends = kept.cumsum(1)
        label = torch.searchsorted(ends, rank, right=True)
        return label * self.quota + rank - (ends - kept).gather(1, label)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        copy_state_({"seen": self.seen}, dict(state), "ring memory")


class Memory:
    """Up to `capacity` samples of each member. inputs: how a drawn sample becomes what is learned from.

    Raises ValueError for a capacity that is negative, or smaller than the classes where each has its part of it.
    """

    def __init__(self, capacity: int, policy: Policy, members: int, classes: int, inputs: Inputs, random: RandomStream):
        if policy not in POLICIES:
            raise ValueError(f"unknown memory policy '{policy}', it is one of {', '.join(POLICIES)}")
        if capacity < 0:
            raise ValueError(f"memory must not be negative, got {capacity}")
        if policy != "reservoir" and capacity < classes:
            raise ValueError(f"a {policy} memory of {capacity} is smaller than the {classes} classes it is shared by")
        self.capacity, self.inputs, self._numbers = capacity, inputs, Numbers(random)
        device = random.device
        self.chooser: Chooser = (
            Reservoir(capacity, members, device)
            if policy == "reservoir"
            else (ClassBalanced if policy == "class-balanced" else Ring)(capacity, members, classes, device)
        )
        self.inserted = 0  # samples offered so far
        self._columns: dict[str, Tensor] = {}  # [K * (capacity + 1), ...]; the last row of a member is of no use
        self._base = (torch.arange(members, device=device) * (capacity + 1)).unsqueeze(1)

    @property
    def empty(self) -> bool:
        return self.inserted == 0 or self.capacity == 0

    @property
    def columns(self) -> dict[str, Tensor]:
        """What is kept, by name, [K, capacity, ...]; slots that nothing was put into have 0."""
        members = len(self._base)
        return {name: c.view(members, self.capacity + 1, *c.shape[1:])[:, :-1] for name, c in self._columns.items()}

    def insert(self, batch: Batch, **kept: Tensor) -> None:
        """Offer the samples of a batch, as stored. kept: [K, B, ...] what to remember beside each."""
        offered = {"images": batch.images, "labels": batch.labels, **kept}
        if not self._columns:
            rows = len(self._base) * (self.capacity + 1)
            self._columns = {name: v.new_zeros(rows, *v.shape[2:]) for name, v in offered.items()}
        self.inserted += batch.labels.shape[1]
        if self.capacity == 0:
            return
        rows = (self.chooser.slots(batch.labels, self._numbers) + self._base).flatten()
        for name, value in offered.items():
            self._columns[name].index_copy_(0, rows, value.detach().flatten(0, 1))

    def sample(self, count: int) -> Batch:
        """Different samples of each member, uniformly; as many as there are, if fewer. Not to be asked when empty."""
        rows = (self.chooser.drawn(count, self._numbers) + self._base).flatten()
        found = {n: c.index_select(0, rows).unflatten(0, (len(self._base), -1)) for n, c in self._columns.items()}
        images, labels = found.pop("images"), found.pop("labels")
        return Batch(images, labels, *self.inputs.train(images, labels), found)

    @property
    def nbytes(self) -> int:
        """Memory of one member's samples, when it is full."""
        return sum(column.nbytes for column in self._columns.values()) // max(1, len(self._base))

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes."""
        return {
            "columns": self.columns,
            "chooser": self.chooser.state_dict(),
            "numbers": self._numbers.state_dict(),
            "inserted": self.inserted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly. Raises ValueError if the saved memory has another size."""
        self._columns = {}
        for name, saved in state["columns"].items():
            if saved.shape[:2] != (len(self._base), self.capacity):
                raise ValueError(
                    f"the saved memory is {list(saved.shape[:2])}, here it is {[len(self._base), self.capacity]}"
                )
            column = saved.new_zeros(len(self._base), self.capacity + 1, *saved.shape[2:]).to(self._base.device)
            column[:, :-1] = saved
            self._columns[name] = column.flatten(0, 1)
        self.chooser.load_state_dict(state["chooser"])
        self._numbers.load_state_dict(state["numbers"])
        self.inserted = state["inserted"]


@functools.cache
def _later(size: int, device: torch.device) -> Tensor:
    """Which places of a row are behind which, [size, size]."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def _last_stays(slots: Tensor, nowhere: int) -> Tensor:
    """[..., B] with `nowhere` in place of every slot that comes again later in the row."""
    again = ((slots.unsqueeze(-1) == slots.unsqueeze(-2)) & _later(slots.shape[-1], slots.device)).any(-1)
    return torch.where(again, nowhere, slots)
