"""One seed's side of a checkpoint: copy what changed, then write it while training goes on."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.replay import Rings
from runs import checkpoint, chunks
from runs.checkpoint import SeedPart, replace_parts, ring_file, seed_file
from runs.chunks import Layout, SavedRings
from runs.files import link_or_copy, write_new


@dataclass(frozen=True)
class _Written:
    """What the last checkpoint of this seed holds of one replay. folder: where its files are until it is complete."""

    layout: Layout
    head: Tensor
    digests: list[str]
    folder: Path


@dataclass(frozen=True)
class _Snapshot:
    """Copies of the chunks that changed, by number; the others are in the files of `before`."""

    layout: Layout
    head: Tensor
    changed: dict[int, np.ndarray]
    before: _Written | None


class CheckpointWriter:
    """Writes the states of one seed, one at a time, in a thread.

    run, seed: whose they are. saved: called from that thread with the label and what was written. Memory: what changed
    since the last checkpoint, until it is written.
    """

    def __init__(self, run: Path, seed: int, saved: Callable[[str, SeedPart], None]):
        self.run, self.seed, self.saved = run, seed, saved
        self._written: dict[int, _Written] = {}  # of each ring
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def resume_from(self, folder: Path, state: Any) -> None:
        """The next checkpoint shares the chunks of this one. state: what `checkpoint.read_seed` gave."""

        def remember(rings: SavedRings, number: int) -> None:
            self._written[number] = _Written(rings.layout, rings.head.clone(), list(rings.digests), folder)

        replace_parts(state, lambda value: isinstance(value, SavedRings), remember)

    def save(self, label: str, step: int, rows: int, done: bool, state: Mapping[str, Any]) -> None:
        """Copy the state and return; `saved` is called when it is written. Waits first for the one before.

        step, rows, done: as in `SeedPart`.

        Raises what went wrong with the one before, an OSError.
        """
        self.wait()
        snapshots: list[_Snapshot] = []

        def copy(part: Any, number: int) -> Any:
            if isinstance(part, Tensor):
                return part.detach().to("cpu", copy=True)
            snapshots.append(_take(part, self._written.get(len(snapshots))))
            return snapshots[-1]

        copied = replace_parts(dict(state), lambda part: isinstance(part, Tensor | Rings), copy)
        self._thread = threading.Thread(target=self._work, args=(label, step, rows, done, copied), daemon=True)
        self._thread.start()

    def raise_if_failed(self) -> None:
        """Raise what went wrong with the last checkpoint, if anything has so far."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when the last checkpoint is written, or raise what went wrong with it."""
        self.close()
        self.raise_if_failed()

    def close(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, label: str, step: int, rows: int, done: bool, state: Any) -> None:
        try:
            digest, files = self._write(label, state)
            self.saved(label, SeedPart(step, rows, done, digest, files))
        except Exception as error:  # noqa: BLE001 - not swallowed: the training thread raises it
            self._error = error

    def _write(self, label: str, state: Any) -> tuple[str, dict[str, tuple[str, int]]]:
        """Write the files of one checkpoint. Returns the state's hash, and length and SHA-256 of each file."""
        folder = checkpoint.staging(self.run, label)
        files: dict[str, tuple[str, int]] = {}
        written: dict[int, _Written] = {}

        def write_rings(snapshot: _Snapshot, number: int) -> dict[str, Any]:
            digests = []
            for index, (start, stop) in enumerate(snapshot.layout.spans(_filled(snapshot))):
                name = ring_file(self.seed, number, index)
                digests.append(_write_chunk(snapshot, index, folder, name))
                files[name] = digests[-1], snapshot.layout.nbytes(stop - start)
            written[number] = _Written(snapshot.layout, snapshot.head, digests, folder)
            return chunks.describe(snapshot.layout, snapshot.head, digests)

        described = replace_parts(state, lambda part: isinstance(part, _Snapshot), write_rings)
        content = io.BytesIO()
        torch.save(described, content)
        write_new(folder / seed_file(self.seed), content.getvalue())
        files[seed_file(self.seed)] = chunks.digest(content.getvalue()), len(content.getvalue())
        self._written = written
        return checkpoint.state_hash(described), files


def _take(rings: Rings, before: _Written | None) -> _Snapshot:
    layout, head = Layout.of(rings), rings.head.cpu()
    if before is not None and before.layout != layout:
        before = None  # of a run that began with an earlier version of this code
    spans = layout.spans(rings.filled)
    changed = chunks.changed_chunks(layout, head, None if before is None else before.head)
    return _Snapshot(layout, head, {i: layout.copy(rings, *spans[i]) for i in sorted(changed)}, before)


def _filled(snapshot: _Snapshot) -> int:
    return min(int(snapshot.head.max()) + 1, snapshot.layout.slots)


def _write_chunk(snapshot: _Snapshot, index: int, folder: Path, name: str) -> str:
    """Write a chunk that changed, link one that did not. Returns its SHA-256."""
    known = snapshot.before.digests[index : index + 1] if snapshot.before else []
    if index in snapshot.changed:
        content = snapshot.changed.pop(index)  # memory shrinks as the files grow
        digest = chunks.digest(content.data)
        if [digest] != known:
            write_new(folder / name, content.data)
            return digest
    assert snapshot.before is not None
    # Once complete, it is the newest: no newer one can be without this seed.
    for source in (snapshot.before.folder, *checkpoint.list_checkpoints(folder.parent.parent)[-1:]):
        try:
            link_or_copy(source / name, folder / name)
        except FileNotFoundError:
            continue
        return known[0]
    raise FileNotFoundError(f"{snapshot.before.folder / name} is missing: something removed it while training")
