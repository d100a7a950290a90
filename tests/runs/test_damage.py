"""Checkpoints that are damaged or made by someone with bad intentions, file after file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.replay import Replay
from runs import checkpoint, chunks
from runs.cli import main
from runs.config import RunConfig
from runs.resume import find_start
from tests.runs.same_run import assert_same

TRAIN = ["train", "td3", "--env", "gym/Pendulum-v1", "--steps", "60", "--hidden", "8", "--warmup-steps", "10"]
TRAIN += ["--batch-size", "4", "--eval-episodes", "1", "--seeds", "1", "--quiet", "--no-tensorboard"]
TRAIN += ["--checkpoint-every", "30"]
CHUNK_BYTES = 600


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run that is through, with checkpoints of several chunks at 30 and 60."""
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", CHUNK_BYTES)
        assert main([*TRAIN, "--out", str(out), "--name", "run"]) == 0
    files = sorted(path.name for path in (out / "run" / "checkpoints" / "step_60").iterdir())
    assert files == ["manifest.json", "seed_0.pt", *(f"seed_0_rings_0_{index:05}.bin" for index in range(4))]
    return out / "run"


@pytest.fixture
def run(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "first byte": lambda path: flip(path, 0),
    "middle": lambda path: flip(path, 0.5),
    "last byte": lambda path: flip(path, 1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
@pytest.mark.parametrize("file", ["manifest.json", "seed_0.pt", "seed_0_rings_0_00000.bin", "seed_0_rings_0_00003.bin"])
def test_each_damaged_file_is_named_and_the_checkpoint_before_is_used(run, file, damage, capsys):
    newest = checkpoint.newest(run)
    damage(newest / file)
    found = find_start(run, RunConfig.load(run))
    assert found.checkpoint == run / "checkpoints" / "step_30"
    said = capsys.readouterr().err
    assert str(newest / file) in said
    assert "step_60 is now damaged_step_60" in said
    assert said.count("\n") == 1
    assert not newest.exists()


def test_a_run_goes_on_to_the_same_end_from_the_checkpoint_before(made, run, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK_BYTES)
    (checkpoint.newest(run) / "manifest.json").unlink()
    (run / "status.json").unlink()
    assert main(["resume", str(run), "--quiet"]) == 0
    assert_same(run, made)


def test_a_run_goes_on_from_rings_with_more_fields(made, tmp_path, monkeypatch):
    """As those of an earlier version have; none of their chunks is shared."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK_BYTES)
    own = Replay._rings
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "_rings", lambda self, seed: own(self, seed) | {"ended": own(self, seed)["terminated"]})
        assert main([*TRAIN, "--out", str(tmp_path), "--name", "run"]) == 0
    run = tmp_path / "run"
    (checkpoint.newest(run) / "manifest.json").unlink()
    (run / "status.json").unlink()
    assert main(["resume", str(run), "--quiet"]) == 0
    assert_same(run, made)


class Payload:
    """What a pickle does when it is loaded carelessly."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def save_with_pickle(path: Path, state: dict[str, Any]) -> None:
    path.write_bytes(pickle.dumps(state))


def save_in_the_old_format(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_in_the_new_format(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [save_with_pickle, save_in_the_old_format, save_in_the_new_format])
@pytest.mark.parametrize("command", [["resume"], ["evaluate"], ["watch"]], ids=lambda words: words[0])
def test_a_checkpoint_with_a_payload_executes_nothing(run, save, command, tmp_path, capsys):
    """Its checksums are right, so nothing but the loader stands between the payload and the shell."""
    target = tmp_path / "executed"
    for folder in checkpoint.list_checkpoints(run):
        state = torch.load(folder / "seed_0.pt", weights_only=True)
        save(folder / "seed_0.pt", {**state, "agent": Payload(target)})
        content, manifest = (folder / "seed_0.pt").read_bytes(), checkpoint.read_manifest(folder)
        manifest["files"]["seed_0.pt"] = {"sha256": chunks.digest(content), "bytes": len(content)}
        signed = manifest | {"manifest_sha256": checkpoint._manifest_digest(manifest)}
        (folder / "manifest.json").write_text(json.dumps(signed))
    (run / "status.json").unlink()
    assert main([*command, str(run)]) == 2
    said = capsys.readouterr().err
    assert "holds something other than tensors and plain values and was not loaded" in said
    assert said.count("\n") == 1
    assert not target.exists()
    pickle.loads(pickle.dumps(Payload(target)))  # the payload is a live one
    assert target.exists()


@pytest.mark.parametrize("name", ["../../../stolen", "/etc/passwd"])
def test_a_manifest_cannot_point_out_of_its_folder(run, name, capsys):
    for folder in checkpoint.list_checkpoints(run):
        manifest = checkpoint.read_manifest(folder)
        manifest["files"][name] = {"sha256": "0", "bytes": 0}
        signed = manifest | {"manifest_sha256": checkpoint._manifest_digest(manifest)}
        (folder / "manifest.json").write_text(json.dumps(signed))
    (run / "status.json").unlink()
    assert main(["resume", str(run)]) == 2
    assert "the manifest does not list it" in capsys.readouterr().err
