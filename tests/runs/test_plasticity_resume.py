"""A run of `neoteny plasticity` that was cut off: how it goes on, and the one sentence where it cannot."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runs import files
from runs.checkpoint import list_checkpoints, read_manifest
from runs.cli import main
from runs.files import read_json, write_json
from runs.lock import RunLock
from runs.options import PlasticityOptions
from runs.plasticity import prepare
from runs.plasticity_arm import train_arm
from runs.record import read_status, write_status
from tests.runs.same_run import final_hash

TOY = ["plasticity", "--problem", "random-label-digits", "--tasks", "3", "--steps-per-task", "20", "--seeds", "2"]
TOY += ["--no-fresh", "--no-stationary"]


def make(group: Path, looks: int) -> Path:
    """Arms `none`, at its end, and `l2-init`, stopped when it looked so often whether it should."""
    arms = prepare(
        PlasticityOptions(
            problem="random-label-digits", with_="none,l2-init", tasks=3, steps_per_task=20, seeds=2, fresh=False,
            stationary=False, checkpoint_every=0.0,
        )
    )  # fmt: skip
    for arm in arms:
        folder = group / arm.name
        folder.mkdir(parents=True)
        arm.save(folder)
        left = iter([False] * (looks if arm.name == "l2-init" else 9) + [True] * 9)
        train_arm(arm, folder, lambda steps: None, lambda left=left: next(left))
    write_json(group / "config.json", {"command": "plasticity", "arms": [arm.name for arm in arms], "jobs": 1})
    return group


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "run", looks=9)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("stopped") / "run", looks=2)


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def apply(run: Path) -> None:
        values = read_json(run / file)
        change(values)
        (run / file).write_text(json.dumps(values))

    return apply


def test_what_differs_is_named_kept_in_the_record_and_changes_nothing_else(run, whole, capsys):
    edit("none/config.json", lambda c: c["environment"].update(commit="a" * 40))(run)
    edit("none/config.json", lambda c: c["environment"]["versions"].update(torch="2.13.0"))(run)
    assert list_checkpoints(run / "l2-init")[-1].name == "step_40"
    assert main(["resume", str(run), "--threads", "2", "--quiet"]) == 0
    said = capsys.readouterr().err
    assert "not bit for bit the same run from here on: torch 2.14" in said
    assert "instead of 2.13.0; for 2.13.0: pip install 'torch==2.13.0'" in said
    assert f"instead of {'a' * 10}; for that: git checkout {'a' * 10}" in said
    kept = read_status(run / "l2-init")["differences"]
    assert kept[-1] == "from step 40 on: 2 threads instead of 1; leave --threads away"
    assert read_manifest(list_checkpoints(run / "l2-init")[-1])["differences"] == kept
    assert len(kept) == len(said.splitlines()) == 3
    assert "differences" not in read_status(run / "none")  # it was done before
    assert read_status(run)["state"] == "done"
    assert final_hash(run / "l2-init") == final_hash(whole / "l2-init")  # so small a product has one thread anyway


def test_a_run_that_is_done_says_so_and_stays_as_it_is(whole, capsys):
    before = content(whole)
    assert main(["resume", str(whole)]) == 0
    assert f"{whole}: is done, all 2 arms" in capsys.readouterr().err
    assert content(whole) == before


def test_a_single_arm_names_the_command_that_works(run, tmp_path, monkeypatch, capsys):
    assert main(["resume", str(run / "none")]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"neoteny: '{run / 'none'}' is one arm of a run of `neoteny plasticity`; resume all of them: "
        f"neoteny resume {run}\n"
    )
    monkeypatch.chdir(run / "none")
    assert main(["resume", "."]) == 2
    assert f"neoteny resume {run}\n" in capsys.readouterr().err
    shutil.copytree(run / "none", tmp_path / "alone")
    assert main(["resume", str(tmp_path / "alone")]) == 2
    assert "the rest of it is not around it" in capsys.readouterr().err
    assert main(["evaluate", str(run / "none")]) == 2
    assert "was made by `neoteny plasticity`; this works on runs of `neoteny train`" in capsys.readouterr().err


ARM = "l2-init/config.json"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no arms": (edit("config.json", lambda c: c.pop("arms")), "does not list the arms"),
    "arms elsewhere": (edit("config.json", lambda c: c.update(arms=["../x"])), "does not list the arms"),
    "another command": (edit("config.json", lambda c: c.update(command="growth")), "made by `neoteny growth`"),
    "an arm gone": (lambda r: shutil.rmtree(r / "l2-init"), "l2-init' is not the folder of a run"),
    "an arm that is none": (edit(ARM, lambda c: c.update(command="train")), "not as an arm of `neoteny plasticity`"),
    "a setting lost": (edit(ARM, lambda c: c.pop("curvature")), "has no setting 'curvature'; use the Neoteny"),
    "a setting of the future": (edit(ARM, lambda c: c.update(warp=9)), "has the setting 'warp', which this Neoteny"),
    "a word for a number": (edit(ARM, lambda c: c.update(threads="x")), "is damaged: threads cannot be 'x'"),
    "a problem of the future": (edit(ARM, lambda c: c.update(problem="x")), "unknown problem 'x'"),
    "a GPU": (edit("none/config.json", lambda c: c.update(device="cuda")), "was trained on a GPU"),
    "another network": (edit(ARM, lambda c: c["overrides"].update(hidden=[9])), "step_40 does not fit this"),
    "lost rows": (lambda r: (r / "l2-init" / "metrics.jsonl").write_text(""), "metrics.jsonl has lost rows: 0 of"),
    "all damaged": (lambda r: [p.write_bytes(b"x") for p in r.glob("l2-init/checkpoints/*/*.pt")], "is whole: "),
    "no config": (lambda r: (r / "config.json").unlink(), "is not the folder of a run"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=list(BAD))
def test_what_cannot_go_on_is_one_sentence_and_stays_as_it_is(run, change, message, capsys):
    change(run)
    before = content(run)
    assert main(["resume", str(run), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert content(run) == before


def test_threads_below_one_and_a_second_process_are_refused(run, capsys):
    assert main(["resume", str(run), "--threads", "0"]) == 2
    assert "--threads must be at least 1, got 0" in capsys.readouterr().err
    write_status(run, "running", 1, 2, pid=os.getpid())
    with RunLock(run):
        assert main(["resume", str(run)]) == 2
    assert f"process {os.getpid()} is at work on '{run}'" in capsys.readouterr().err


@pytest.mark.parametrize("number", range(1, 8))
def test_a_disk_that_fills_up_while_the_folders_are_made_leaves_none(tmp_path, monkeypatch, number, capsys):
    """Before each fsync of two arms' settings and of their list."""
    sync, done = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal done
        done += 1
        if done >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    assert main([*TOY, "--with", "none,l2-init", "--out", str(tmp_path / "new" / "results")]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_while_training_is_one_sentence_and_the_run_can_go_on(tmp_path, capfd):
    """The kernel's own refusal, in the process of the arm: no file may reach 100 kB, which a checkpoint must."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert main([*TOY, "--with", "none", "--quiet", "--out", str(tmp_path), "--name", "run"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capfd.readouterr().err
    assert f"{tmp_path / 'run' / 'none'} failed: File too large" in said
    assert f"next: neoteny resume {tmp_path / 'run'}" in said
    assert "Traceback" not in said
    assert read_status(tmp_path / "run")["state"] == "failed"
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert read_status(tmp_path / "run")["state"] == "done"


def test_the_folder_of_data_is_found_again_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = PlasticityOptions(problem="permuted-digits", with_="none", data=Path("sets"), stationary=False)
    assert {arm.data for arm in prepare(options)} == {str(tmp_path / "sets")}
