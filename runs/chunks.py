"""The rings of a replay as chunks of fixed slots, so that a checkpoint writes what changed and shares the rest.

Chunk i covers slots [i B, (i + 1) B) of every environment; B is a power of two chosen from the shapes alone. So the
bytes of a chunk, and with them its SHA-256, depend on what the ring holds and not on when checkpoints were made. A
chunk is plain bytes: the tensors [N, B, ...] one after another, wide numbers first. The last one ends where the ring is
filled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.replay import Rings

CHUNK_BYTES = 4 << 20  # a checkpoint writes up to two chunks that it would not need to; more files cost more syncs


@dataclass(frozen=True)
class Layout:
    """How the rings of one replay are cut. fields: (name, dtype, shape [N, ...] of one slot), wide numbers first."""

    slots: int
    chunk_slots: int
    fields: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, rings: Rings) -> Layout:
        """The layout of live rings."""
        shapes = {name: (ring.shape[0], *ring.shape[2:]) for name, ring in rings.tensors.items()}
        widths = {name: ring.dtype.itemsize for name, ring in rings.tensors.items()}
        slot_bytes = sum(widths[name] * math.prod(shape) for name, shape in shapes.items())
        order = sorted(shapes, key=lambda name: (-widths[name], name))
        fields = tuple((name, str(rings.tensors[name].dtype).removeprefix("torch."), shapes[name]) for name in order)
        return cls(
            slots=next(iter(rings.tensors.values())).shape[1],
            chunk_slots=1 << max(0, (CHUNK_BYTES // slot_bytes).bit_length() - 1),
            fields=fields,
        )

    def spans(self, filled: int) -> list[tuple[int, int]]:
        """First and last (excluded) slot of every chunk of a ring with `filled` slots."""
        return [(at, min(at + self.chunk_slots, filled)) for at in range(0, filled, self.chunk_slots)]

    def nbytes(self, slots: int) -> int:
        """Bytes of a chunk of so many slots."""
        return sum(math.prod(shape) * slots * getattr(torch, dtype).itemsize for _, dtype, shape in self.fields)

    def tensors(self, buffer: np.ndarray, slots: int) -> dict[str, Tensor]:
        """A chunk's bytes as tensors [N, slots, ...] that share them. Raises ValueError for another number of bytes."""
        if buffer.nbytes != self.nbytes(slots):
            raise ValueError(f"a chunk of {slots} slots has {self.nbytes(slots)} bytes, not {buffer.nbytes}")
        found, at = {}, 0
        for name, dtype, (rows, *rest) in self.fields:
            kind = getattr(torch, dtype)
            end = at + rows * slots * math.prod(rest) * kind.itemsize
            found[name] = torch.from_numpy(buffer[at:end]).view(kind).view(rows, slots, *rest)
            at = end
        return found

    def copy(self, rings: Rings, start: int, stop: int) -> np.ndarray:
        """The bytes of the slots from `start` to `stop`, uint8, in host memory."""
        buffer = np.empty(self.nbytes(stop - start), np.uint8)
        for name, target in self.tensors(buffer, stop - start).items():
            target.copy_(rings.tensors[name][:, start:stop])
        return buffer


def changed_chunks(layout: Layout, head: Tensor, since: Tensor | None) -> set[int]:
    """Indices of the chunks in which a slot was written while the heads went from `since` to `head`, both int64 [N].

    All filled ones if `since` is None.
    """
    filled = min(int(head.max()) + 1, layout.slots)
    if since is None:
        return set(range(len(layout.spans(filled))))
    changed: set[int] = set()
    for before, now in zip(since.tolist(), head.tolist(), strict=True):
        if now - before + 1 >= layout.slots:
            return set(range(len(layout.spans(filled))))
        first, last = before % layout.slots, now % layout.slots
        for start, end in ((first, last),) if first <= last else ((first, layout.slots - 1), (0, last)):
            changed.update(range(start // layout.chunk_slots, end // layout.chunk_slots + 1))
    # An episode may just have ended: then the slot at the head is not in use yet.
    return changed & set(range(len(layout.spans(filled))))


def describe(layout: Layout, head: Tensor, digests: Iterable[str]) -> dict[str, Any]:
    """What stands for the rings in a saved state: plain values, and the SHA-256 of each chunk in order."""
    fields = [[name, dtype, list(shape)] for name, dtype, shape in layout.fields]
    layout_values = {"slots": layout.slots, "chunk_slots": layout.chunk_slots, "fields": fields}
    return {"chunked_rings": {**layout_values, "head": head, "digests": list(digests)}}


def is_description(value: Any) -> bool:
    """Whether a part of a saved state stands for rings."""
    return isinstance(value, Mapping) and set(value) == {"chunked_rings"}


def describe_live(rings: Rings) -> dict[str, Any]:
    """`describe` of rings in memory; reads all of them."""
    layout = Layout.of(rings)
    digests = (digest(layout.copy(rings, *span).data) for span in layout.spans(rings.filled))
    return describe(layout, rings.head.cpu(), digests)


def digest(content: bytes | memoryview) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def empty(description: Mapping[str, Any]) -> SavedRings:
    """Rings of the same kind that hold nothing."""
    values = description["chunked_rings"]
    nothing = {**values, "head": torch.full_like(values["head"], -1), "digests": []}
    return SavedRings({"chunked_rings": nothing}, lambda chunk: b"")


@dataclass(frozen=True)
class SavedRings:
    """Rings in a checkpoint, read chunk by chunk. read: the checked bytes of chunk i."""

    description: Mapping[str, Any]
    read: Callable[[int], bytes]

    @property
    def layout(self) -> Layout:
        """How they are cut."""
        values = self.description["chunked_rings"]
        fields = tuple((name, dtype, tuple(shape)) for name, dtype, shape in values["fields"])
        return Layout(values["slots"], values["chunk_slots"], fields)

    @property
    def head(self) -> Tensor:
        """int64 [N], see `agents.replay.Rings`."""
        return self.description["chunked_rings"]["head"]

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each chunk."""
        return self.description["chunked_rings"]["digests"]

    @property
    def filled(self) -> int:
        """Slots that hold anything."""
        return min(int(self.head.max()) + 1, self.layout.slots)

    def pieces(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(first slot, tensors [N, some slots, ...]), chunk after chunk, so that memory holds one at a time."""
        layout = self.layout
        for index, (start, stop) in enumerate(layout.spans(self.filled)):
            content = np.frombuffer(bytearray(self.read(index)), np.uint8)
            yield start, layout.tensors(content, stop - start)
