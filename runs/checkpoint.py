"""Checkpoints of a run: `checkpoints/step_N/` with one file a seed and a manifest, whole or not there at all.

Seeds write their files into a hidden folder beside it; when all are there, the manifest is written and the folder gets
its name. Files hold tensors and plain values only and are read with `weights_only=True`: loading executes no code.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runs.files import read_json, replacing, sync, write_json

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
KEPT = 2  # the newest complete checkpoints


def staging(run: Path, label: str) -> Path:
    """The hidden folder in which the seeds of a run gather their files for one checkpoint; made if missing."""
    folder = run / FOLDER / f".{label}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_seed(folder: Path, seed: int, state: Mapping[str, Any]) -> str:
    """Write one seed's state durably into `folder`. Returns the hash over everything that decides its future."""
    with replacing(folder / _seed_file(seed)) as temporary:
        torch.save(dict(state), temporary)
    return state_hash(state)


def complete(run: Path, label: str, step: int, hashes: Mapping[int, str], extra: Mapping[str, Any]) -> Path:
    """All seeds have written: add the manifest, name the folder `step_N`, drop checkpoints beyond the last two.

    hashes: what `write_seed` returned, by seed. extra: plain values that the manifest also keeps.
    """
    folder, final = staging(run, label), run / FOLDER / f"step_{step}"
    files = {_seed_file(seed): _file_hash(folder / _seed_file(seed)) for seed in sorted(hashes)}
    together = hashlib.sha256("".join(hashes[seed] for seed in sorted(hashes)).encode()).hexdigest()
    manifest = {"step": step, "seeds": sorted(hashes), "files": files, "state_hash": together, **extra}
    write_json(folder / MANIFEST, manifest)
    if final.exists():  # stopped exactly where a periodic checkpoint had just been made
        shutil.rmtree(final)
    folder.rename(final)
    sync(final.parent)
    for old in list_checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)
    return final


def drop_partial(run: Path) -> None:
    """Remove what seeds had gathered for checkpoints that were never completed."""
    for folder in (run / FOLDER).glob(".*.partial"):
        shutil.rmtree(folder)


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    steps = [
        int(path.name.removeprefix("step_")) for path in (run / FOLDER).glob("step_*") if (path / MANIFEST).exists()
    ]
    return [run / FOLDER / f"step_{step}" for step in sorted(steps)]


def newest(run: Path) -> Path:
    """The newest complete checkpoint. Raises ValueError if the run has none."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ValueError(f"{run} has no complete checkpoint yet")
    return checkpoints[-1]


def read_seed(checkpoint: Path, seed: int, device: torch.device) -> dict[str, Any]:
    """One seed's state. Raises ValueError if the seed is not in it, or its file is not what the manifest says."""
    manifest = read_json(checkpoint / MANIFEST)
    name = _seed_file(seed)
    if name not in manifest["files"]:
        raise ValueError(f"{checkpoint} has no seed {seed}; it has {', '.join(map(str, manifest['seeds']))}")
    if not (checkpoint / name).exists() or _file_hash(checkpoint / name) != manifest["files"][name]:
        raise ValueError(f"{checkpoint / name} is damaged: its checksum is not the one in {MANIFEST}")
    return torch.load(checkpoint / name, map_location=device, weights_only=True)


def state_hash(state: Any) -> str:
    """SHA-256 over a nested state of dicts, lists, tensors and plain values, in a fixed order."""
    digest = hashlib.sha256()
    _feed(digest, state)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        digest.update(b"{")
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(b"[")
        for item in value:
            _feed(digest, item)
    elif isinstance(value, Tensor):
        content = value.detach().cpu().contiguous()
        digest.update(f"{content.dtype}{list(content.shape)}".encode())
        digest.update(np.ascontiguousarray(content.numpy().reshape(-1)))
    else:
        digest.update(repr(value).encode())


def _seed_file(seed: int) -> str:
    return f"seed_{seed}.pt"


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
