"""Checkpoints of a run: `checkpoints/step_N/`, whole or not there at all.

    seed_K.pt                      everything that decides the future of seed K but the replay's rings
    seed_K_rings_R_00012.bin       chunk 12 of its ring R, see `runs.chunks`
    manifest.json                  length and SHA-256 of every file, of itself too, and `state_hash` over all seeds

A chunk that did not change since the checkpoint before is a hard link to it: a checkpoint costs what is new, each
folder is complete, and removing one never touches another. Files hold tensors and plain values only and are read with
`weights_only=True`: loading executes no code.

The order of operations; after each of them the process may die or the power fail:

    1  each seed gathers its files in the hidden folder `.LABEL.partial`: write and fsync, or link   (`SeedWriter`)
    2  the table of numbers is fsynced, so that it has every row which the manifest counts           (`Session`)
    3  the manifest is written: temporary name, fsync, rename; then the folder's names are fsynced   (`complete`)
    4  the folder gets its name, `step_N`, and `checkpoints/` is fsynced: from now on it counts
    5  checkpoints beyond the kept ones are renamed to `.step_N.removed`, then deleted

Before 4 the run has the checkpoints it had, after 4 it has the new one. N is the step of the slowest seed. If `step_N`
exists (stopped before the slowest seed took a step), step 4 first renames it to `.step_N.replaced`; `settle`, called
before a run is resumed, renames it back if nothing took its place, and deletes everything else that is hidden.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.replay import Rings
from envs.cores import available_cores
from runs import chunks
from runs.chunks import SavedRings
from runs.files import link_or_copy, read_json, sync, write_json
from runs.settings import made_by, read_config

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 2
KEPT = 2  # the newest complete checkpoints


# What `torch.load` raises for bytes that are no saved state, or one with more than tensors and plain values.
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, EOFError, AttributeError, TypeError)


class Damaged(ValueError):
    """A file of a checkpoint is missing or not what was written; the message names it."""


@dataclass(frozen=True)
class SeedPart:
    """What one seed has written for a checkpoint.

    rows: its rows in the table. done: nothing is left to do. digest: `state_hash`. files: name -> (SHA-256, bytes).
    """

    step: int
    rows: int
    done: bool
    digest: str
    files: dict[str, tuple[str, int]]


def staging(run: Path, label: str) -> Path:
    """The hidden folder in which the seeds of a run gather their files for one checkpoint; made if missing."""
    folder = run / FOLDER / f".{label}.partial"
    if not folder.parent.exists():
        folder.parent.mkdir(exist_ok=True)
        sync(run)
    folder.mkdir(exist_ok=True)
    return folder


def complete(
    run: Path,
    label: str,
    parts: Mapping[int, SeedPart],
    extra: Mapping[str, Any],
    keep_every: int | None = None,
    spare: Path | None = None,
    without_state: Sequence[int] = (),
) -> Path:
    """All seeds have written: steps 3 to 5 of the module's order. Returns the checkpoint.

    extra: plain values that the manifest also keeps. keep_every: the first checkpoint after each multiple of so many
    steps is never removed. spare: a checkpoint that is not removed now. without_state: seeds that have no part, because
    they have to begin again.
    """
    folder = staging(run, label)
    step = 0 if without_state else min(part.step for part in parts.values())
    before = [int(path.name.removeprefix("step_")) for path in list_checkpoints(run)]
    seeds = sorted(parts)
    manifest = {
        "format": FORMAT,
        "step": step,
        "seeds": seeds,
        "seeds_without_state": list(without_state),
        "seed_steps": {str(seed): parts[seed].step for seed in seeds},
        "seed_rows": {str(seed): parts[seed].rows for seed in seeds},
        "seed_done": {str(seed): parts[seed].done for seed in seeds},
        "seed_hashes": {str(seed): parts[seed].digest for seed in seeds},
        "state_hash": chunks.digest("".join(parts[seed].digest for seed in seeds).encode()),
        "permanent": keep_every is not None and step // keep_every > max(before, default=0) // keep_every,
        **extra,
        "files": {
            name: {"sha256": sha256, "bytes": size}
            for seed in seeds
            for name, (sha256, size) in parts[seed].files.items()
        },
    }
    write_json(folder / MANIFEST, manifest | {"manifest_sha256": _manifest_digest(manifest)})
    final = _give_name(folder, run / FOLDER / f"step_{step}", manifest["state_hash"])
    _prune(run, spare)
    return final


def _give_name(folder: Path, final: Path, state_hash: str) -> Path:
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        if read_manifest(final)["state_hash"] == state_hash:  # nothing happened since
            shutil.rmtree(folder)
            return final
        final.rename(replaced)
    folder.rename(final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def _prune(run: Path, spare: Path | None) -> None:
    for old in list_checkpoints(run)[:-KEPT]:
        with contextlib.suppress(ValueError):  # what cannot be read is left for its owner to look at
            if old != spare and not read_manifest(old)["permanent"]:
                removed = old.with_name(f".{old.name}.removed")
                old.rename(removed)
                shutil.rmtree(removed)


def carry_over(checkpoint: Path, seed: int, folder: Path) -> SeedPart:
    """Put what a whole checkpoint has of a seed into `folder` too, for a seed that has nothing newer."""
    manifest = read_manifest(checkpoint)
    files = {name: (entry["sha256"], entry["bytes"]) for name, entry in _files_of(manifest, seed).items()}
    for name in files:
        link_or_copy(checkpoint / name, folder / name)
    step, rows, done, digest = (
        manifest[name][str(seed)] for name in ("seed_steps", "seed_rows", "seed_done", "seed_hashes")
    )
    return SeedPart(step, rows, done, digest, files)


def settle(run: Path) -> None:
    """Finish or undo what a killed process left in the folder of checkpoints. No other process may use the run."""
    for replaced in (run / FOLDER).glob(".step_*.replaced"):
        final = replaced.with_name(replaced.name[1:].removesuffix(".replaced"))
        if not final.exists():
            replaced.rename(final)
    for pattern in (".*.partial", ".*.removed", ".*.replaced"):
        for folder in (run / FOLDER).glob(pattern):
            shutil.rmtree(folder)


def drop_partial(run: Path) -> None:
    """Remove what seeds had gathered for checkpoints that were never completed."""
    for folder in (run / FOLDER).glob(".*.partial"):
        shutil.rmtree(folder, ignore_errors=True)  # a second Ctrl-C may have left its writer at work


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it no longer counts. Returns its new name."""
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    if aside.exists():
        shutil.rmtree(aside)
    checkpoint.rename(aside)
    return aside


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; one that has lost its manifest since is among them."""
    names = [path.name.removeprefix("step_") for path in (run / FOLDER).glob("step_*")]
    steps = [int(name) for name in names if name.isdecimal()]
    return [run / FOLDER / f"step_{step}" for step in sorted(steps)]


def newest(run: Path) -> Path:
    """The newest complete checkpoint. Raises ValueError if the run has none."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ValueError(f"{run} has no complete checkpoint yet")
    return checkpoints[-1]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest. Raises Damaged if it is not the one that was written, ValueError for another format."""
    path = checkpoint / MANIFEST
    try:
        manifest = read_json(path)
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Damaged(str(error)) from error
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise Damaged(f"{path} is damaged: it is no manifest")
    if manifest.get("format", 1) != FORMAT:
        raise ValueError(
            f"{checkpoint} has format {manifest.get('format', 1)} and this Neoteny reads format {FORMAT}; "
            f"{_maker(checkpoint.parent.parent)}"
        )
    if manifest.pop("manifest_sha256", None) != _manifest_digest(manifest):
        raise Damaged(f"{path} is damaged: it is not what was written")
    return manifest


def _maker(run: Path) -> str:
    try:
        return made_by(read_config(run).get("environment"))
    except ValueError:
        return made_by(None)


def verify(checkpoint: Path) -> dict[str, Any]:
    """Read every file of a checkpoint. Returns its manifest; raises Damaged naming the first file that is not right."""
    manifest = read_manifest(checkpoint)
    with ThreadPoolExecutor(available_cores()) as pool:  # hashing and reading let other threads run
        list(pool.map(lambda name: len(_read_checked(checkpoint, manifest, name)), manifest["files"]))
    for seed in manifest["seeds"]:
        read_seed(checkpoint, seed)
    return manifest


def read_seed(checkpoint: Path, seed: int, with_rings: bool = True) -> dict[str, Any]:
    """One seed's state on the CPU; rings are `SavedRings`, read when they are used.

    with_rings: else they are as of a replay that is still empty, which is enough for an agent that only acts. Raises
    ValueError if the seed is not in it, Damaged if its file is not what the manifest says or cannot be read.
    """
    manifest = read_manifest(checkpoint)
    name = seed_file(seed)
    if seed not in manifest["seeds"]:
        raise ValueError(f"{checkpoint} has no seed {seed}; it has {', '.join(map(str, manifest['seeds']))}")
    content = _read_checked(checkpoint, manifest, name)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise Damaged(
            f"{checkpoint / name} holds something other than tensors and plain values and was not loaded"
        ) from error

    def expand(value: Any, ring: int) -> SavedRings:
        if not with_rings:
            return chunks.empty(value)
        names = [ring_file(seed, ring, chunk) for chunk in range(len(value["chunked_rings"]["digests"]))]
        return SavedRings(value, lambda chunk: _read_checked(checkpoint, manifest, names[chunk]))

    return replace_parts(state, chunks.is_description, expand)


def replace_parts(state: Any, wanted: Callable[[Any], bool], replacement: Callable[[Any, int], Any]) -> Any:
    """A nested state with `replacement(part, number)` in place of each part that is wanted, numbered as they come."""
    count = 0

    def walk(value: Any) -> Any:
        nonlocal count
        if wanted(value):
            count += 1
            return replacement(value, count - 1)
        if isinstance(value, Mapping):
            return {key: walk(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(walk(inner) for inner in value)
        return value

    return walk(state)


def state_hash(state: Any) -> str:
    """SHA-256 over a nested state of dicts, lists, tensors, rings and plain values, in a fixed order."""
    hasher = hashlib.sha256()
    _feed(hasher, state)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, Rings):
        _feed(hasher, chunks.describe_live(value))
    elif isinstance(value, SavedRings):
        _feed(hasher, value.description)
    elif isinstance(value, Mapping):
        hasher.update(b"{")
        for key in sorted(value, key=repr):
            hasher.update(repr(key).encode())
            _feed(hasher, value[key])
    elif isinstance(value, list | tuple):
        hasher.update(b"[")
        for item in value:
            _feed(hasher, item)
    elif isinstance(value, Tensor):
        content = value.detach().cpu().contiguous()
        hasher.update(f"{content.dtype}{list(content.shape)}".encode())
        if content.numel():
            hasher.update(content.reshape(-1).view(torch.uint8).numpy())
    else:
        hasher.update(repr(value).encode())


def seed_file(seed: int) -> str:
    """Name of the file with a seed's state."""
    return f"seed_{seed}.pt"


def ring_file(seed: int, ring: int, chunk: int) -> str:
    """Name of the file with one chunk of a seed's rings."""
    return f"seed_{seed}_rings_{ring}_{chunk:05}.bin"


def _files_of(manifest: Mapping[str, Any], seed: int) -> dict[str, Any]:
    own = (f"seed_{seed}.", f"seed_{seed}_")
    return {name: entry for name, entry in manifest["files"].items() if name.startswith(own)}


def _read_checked(checkpoint: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    path, entry = checkpoint / name, manifest["files"].get(name)
    if entry is None or os.sep in name:
        raise Damaged(f"{path} is damaged: the manifest does not list it")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    if len(content) != entry["bytes"]:
        raise Damaged(f"{path} is damaged: it has {len(content)} bytes, not {entry['bytes']}")
    if chunks.digest(content) != entry["sha256"]:
        raise Damaged(f"{path} is damaged: its checksum is not the one in {MANIFEST}")
    return content


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return chunks.digest(json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode())
