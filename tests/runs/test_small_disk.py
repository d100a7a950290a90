"""A real file system that is full, then read-only; needs the right to mount one, in a namespace of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.runs.fault_server import ROOT

UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]


def may_mount(folder: str) -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("disk")
    if not may_mount(str(folder)):
        pytest.skip("may not mount a file system here")
    command = [*UNSHARE, sys.executable, "-m", "tests.runs.small_disk", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_full_disk_stops_the_run_with_a_checkpoint(told):
    code, said = told["full"]
    assert code == 3
    assert "No space left on device" in said
    assert "next: neoteny resume" in said
    assert "Traceback" not in said
    assert told["state when full"] == "failed"


def test_what_was_half_written_is_gone_and_with_room_the_run_ends_the_same(told):
    assert told["resumed while full"][0] in (2, 3)
    assert "Traceback" not in told["resumed while full"][1]
    assert told["left behind"] == []
    assert told["resumed"][0] == told["undisturbed"][0] == 0
    assert told["hashes"][0] == told["hashes"][1]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("resume, read-only", "it is read-only"),
        ("train, read-only", "Read-only file system"),
        ("report, read-only", "Read-only file system; choose another folder with --out"),
        ("watch, read-only", "Read-only file system; choose another file with --out"),
    ],
)
def test_on_a_read_only_disk_one_sentence_says_so(told, what, sentence):
    code, said = told[what]
    assert code == 2
    assert sentence in said
    assert said.count("\n") == 1


def test_a_read_only_run_can_be_evaluated_and_reported_elsewhere(told):
    assert told["evaluate, read-only"][0] == 0
    assert told["report elsewhere"][0] == 0
