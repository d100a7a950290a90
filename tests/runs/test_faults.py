"""Runs that are killed, stopped and starved at every operation that changes their files, and must not notice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import checkpoint
from runs.files import read_json
from tests.runs.fault_server import Ended, FaultServer
from tests.runs.same_run import assert_same

# A ring of 40 slots that wraps, in chunks of 8; checkpoints at 30, 60, 90, 120.
TINY = ["td3", "--env", "gym/Pendulum-v1", "--steps", "120", "--seeds", "1", "--warmup-steps", "10", "--hidden", "8"]
TINY += ["--batch-size", "4", "--replay-capacity", "40", "--eval-every", "50", "--eval-episodes", "1"]
TINY += ["--checkpoint-every", "30", "--env-set", "max_episode_steps=35", "--quiet", "--no-tensorboard"]
CHUNKS = {"chunk_bytes": 300}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[FaultServer]:
    server = FaultServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def train(server: FaultServer, run: Path, **fault) -> Ended:
    return server.run("train", *TINY, "--out", run.parent, "--name", run.name, **CHUNKS, **fault)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> tuple[Path, int]:
    """The run that nothing disturbed, and how many operations it took."""
    run = tmp_path_factory.mktemp("whole") / "run"
    ended = train(server, run)
    assert ended.code == 0, ended.err
    return run, ended.operations


def test_killed_anywhere_and_resumed_is_the_same_run(server, whole, tmp_path):
    """kill -9 before every fifth operation that changes a file; the cycle of a checkpoint has another length."""
    undisturbed, operations = whole
    outcomes = []
    for number in range(1, operations, 5):
        run = tmp_path / str(number)
        assert train(server, run, kill_at=number).code == -signal.SIGKILL
        if not (run / "config.json").exists():
            continue  # there is no run yet, and `train` says so
        ended = server.run("resume", run, "--quiet", **CHUNKS)
        assert ended.code == 0, (number, ended.err)
        assert_same(run, undisturbed)
        assert not list((run / "checkpoints").glob(".*"))
        outcomes.append(number)
    assert len(outcomes) > 20


def test_killed_while_resuming_too(server, whole, tmp_path):
    """Run, kill, resume, kill, resume ... until it is through: each life is a few operations longer than the last."""
    undisturbed, _ = whole
    run, lives = tmp_path / "run", 1
    assert train(server, run, kill_at=25).code == -signal.SIGKILL
    while (ended := server.run("resume", run, "--quiet", kill_at=12 + 5 * lives, **CHUNKS)).code != 0:
        assert ended.code == -signal.SIGKILL, ended.err
        lives += 1
    assert lives >= 3
    assert_same(run, undisturbed)


def test_full_disk_stops_the_run_and_leaves_it_whole(server, whole, tmp_path):
    """From every eleventh operation on, nothing can be written any more."""
    undisturbed, operations = whole
    codes = set()
    for number in range(6, operations, 11):
        run = tmp_path / str(number)
        ended = train(server, run, full_from=number)
        codes.add(ended.code)
        if ended.code == 2:  # there is no run yet
            assert not run.exists()
            continue
        has_checkpoint = bool(checkpoint.list_checkpoints(run))
        assert ended.code == (3 if has_checkpoint else 1), (number, ended.err)
        assert "No space left on device" in ended.err
        assert "Traceback" not in ended.err
        assert f"neoteny resume {run}" in ended.err
        assert server.run("resume", run, "--quiet", **CHUNKS).code == 0
        assert_same(run, undisturbed)
    assert codes == {1, 2, 3}


def test_a_file_that_may_not_grow_is_like_a_full_disk(server, tmp_path):
    """The kernel's own refusal, in the middle of a write: the table reaches 4 kB, or a checkpoint does."""
    run = tmp_path / "run"
    ended = train(server, run, file_limit=4_000)
    assert ended.code in (1, 3)
    assert "File too large" in ended.err
    assert "Traceback" not in ended.err
    assert read_json(run / "status.json")["state"] == "failed"
    assert server.run("resume", run, "--quiet", **CHUNKS).code == 0
    assert read_json(run / "status.json")["state"] == "done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_between_checkpoints_and_resumed_is_the_same_run(server, whole, tmp_path, number):
    """The table too, in order: numbers that were not due yet at the stop are told when they are."""
    undisturbed, _ = whole
    run = tmp_path / "run"
    ended = train(server, run, signals={37: number})
    assert (ended.code, ended.err) == (3, "")
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step_30", "step_37"]
    assert server.run("resume", run, "--quiet", **CHUNKS, signals={38: number, 99: number}).code == 3
    assert server.run("resume", run, "--quiet", **CHUNKS).code == 0
    assert_same(run, undisturbed)
