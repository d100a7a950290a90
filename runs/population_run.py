"""The run of a population that trains in one process: its table, its checkpoints, its status.

A checkpoint holds the whole population under the first seed. What is trained is anything with a `state_dict` that
decides its future.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from runs import checkpoint
from runs.checkpoint import Damaged, SeedPart
from runs.checkpoint_writer import CheckpointWriter
from runs.record import TABLE, Record, Row, State, write_status
from runs.recovery import newest_whole
from runs.settings import made_by
from runs.training import MISFITS, CannotContinue, one_line


class Trained(Protocol):
    """What has a state: tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def restore(trained: Trained, folder: Path, seeds: Sequence[int], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Put what is trained where the newest whole checkpoint of the run left it. Returns that one's manifest, or {}.

    environment: of the run's config, to say who made it. Damaged checkpoints that are newer are set aside. Raises
    ValueError, one sentence, if it cannot go on here.
    """

    def load(saved: Path) -> dict[str, Any]:
        manifest = checkpoint.verify(saved)
        length = (folder / TABLE).stat().st_size if (folder / TABLE).is_file() else 0
        if length < manifest["table_bytes"]:
            raise Damaged(
                f"{folder / TABLE} has lost rows: {length} of {manifest['table_bytes']} bytes at {saved.name}"
            )
        try:
            trained.load_state_dict(checkpoint.read_seed(saved, seeds[0]))
        except Damaged:
            raise
        except MISFITS as error:
            maker = made_by(environment)
            raise CannotContinue(f"{saved} does not fit this installation: {one_line(error)}; {maker}") from error
        return manifest

    return newest_whole(folder, load) or {}


class PopulationRun:
    """The record of a population while it trains. before: the manifest of where it goes on, or {}."""

    def __init__(
        self,
        folder: Path,
        seeds: Sequence[int],
        trained: Trained,
        tensorboard: bool,
        before: Mapping[str, Any],
        differences: Sequence[str],
    ):
        self.folder, self.seeds, self.trained, self.differences = folder, tuple(seeds), trained, list(differences)
        self.is_new = not before
        self._started = self._saved_at = time.monotonic()
        self._seconds_before = before.get("wall_seconds", 0.0)
        self.record = Record(folder, seeds, tensorboard, before.get("table_bytes", 0))
        self._writer = CheckpointWriter(folder, self.seeds[0], self._complete)

    @property
    def wall_seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    @property
    def seconds_since_saved(self) -> float:
        return time.monotonic() - self._saved_at

    def write(self, steps: int, metrics: Mapping[str, Tensor], task: int | None = None) -> None:
        """Record numbers of all seeds, [K] by name."""
        columns = {name: values.tolist() for name, values in metrics.items()}
        self.record.write(
            Row(steps, name, value, seed, task)
            for name, values in columns.items()
            for seed, value in zip(self.seeds, values, strict=True)
        )

    def save(self, steps: int, done: bool) -> None:
        """A checkpoint of the whole population. It is complete when this returns."""
        self._writer.save(f"step_{steps}", steps, 0, done, self.trained.state_dict())
        self._writer.wait()
        self._saved_at = time.monotonic()

    def save_if_new(self, steps: int, done: bool) -> None:
        """The same, if the newest checkpoint is of another step."""
        newest = checkpoint.list_checkpoints(self.folder)[-1:]
        if not newest or newest[0].name != f"step_{steps}":
            self.save(steps, done)

    def _complete(self, label: str, part: SeedPart) -> None:
        self.record.sync()
        extra = {"table_bytes": self.record.length, "wall_seconds": self.wall_seconds}
        extra["differences"] = self.differences
        checkpoint.complete(self.folder, label, {self.seeds[0]: part}, extra)

    def write_status(self, state: State, steps: int, of: int, **more: Any) -> None:
        """Where the run stands."""
        told = {"wall_seconds": self.wall_seconds, "differences": self.differences or None, **more}
        write_status(self.folder, state, steps, of, None, **told)

    def close(self) -> None:
        self._writer.close()
        self.record.close()
