"""Atomic files: old or new, never half; damaged JSON is named."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs.files import read_json, replacing, write_atomically, write_json


def test_a_reader_in_another_process_never_sees_half_a_file(tmp_path: Path):
    """A writer alternates two contents of 2 MB; every read in between must be wholly one of them."""
    path, size = tmp_path / "state", 2_000_000
    write_atomically(path, b"a" * size)
    code = (
        "import sys; from runs.files import write_atomically\n"
        f"for i in range(60): write_atomically(sys.argv[1], (b'a' if i % 2 else b'b') * {size})"
    )
    room = str(Path(__file__).resolve().parents[2])
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], env={**os.environ, "PYTHONPATH": room})
    seen = set()
    deadline = time.monotonic() + 60
    while writer.poll() is None and time.monotonic() < deadline:
        content = path.read_bytes()
        assert len(content) == size
        assert content.count(content[:1]) == size
        seen.add(content[:1])
    assert writer.wait(timeout=60) == 0
    assert seen == {b"a", b"b"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "state"
    write_atomically(path, "old")

    def stop_half_way() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_name_appears_only_when_the_block_ends(tmp_path: Path):
    path = tmp_path / "state"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename across file systems would not be atomic
    assert path.read_text() == "whole"


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path):
    write_atomically(tmp_path / "state", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_text_is_utf8_and_bytes_are_as_given(tmp_path: Path):
    write_atomically(tmp_path / "text", "θ\n")
    write_atomically(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == b"\xce\xb8\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"


def test_json_round_trip(tmp_path: Path):
    value = {"steps": 50_000, "seeds": [0, 1], "rate": 1e-3, "name": "θ", "none": None}
    write_json(tmp_path / "config.json", value)
    assert read_json(tmp_path / "config.json") == value


@pytest.mark.parametrize("content", [b'{"steps": 5', b"", b'{"rate": NaN}', b"\xff\xfe{}"])
def test_a_damaged_file_is_named_in_one_sentence(tmp_path: Path, content: bytes):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="config.json is damaged") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_nan_is_refused_before_anything_is_written(tmp_path: Path):
    write_json(tmp_path / "config.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "config.json", {"a": float("nan")})
    assert read_json(tmp_path / "config.json") == {"a": 1}


def test_missing_files_and_folders_are_not_found(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        write_atomically(tmp_path / "none" / "file", "x")
