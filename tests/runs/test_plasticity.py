"""`neoteny plasticity` as a user meets it: arms, tables, verdicts, stop and resume, bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from runs.checkpoint import list_checkpoints, read_manifest
from runs.cli import main
from runs.files import read_json
from runs.groups import expand
from runs.options import PlasticityOptions
from runs.plasticity import prepare
from runs.plasticity_arm import ArmConfig, build, resolve_problem, train_arm
from runs.plasticity_summary import print_table, summarise_arms
from runs.record import Record, Row, read_table

ROOT = Path(__file__).parents[2]
TOY = ["plasticity", "--problem", "random-label-digits", "--tasks", "3", "--steps-per-task", "20", "--seeds", "2"]


def never() -> bool:
    return False


def arm(tmp_path, **changes) -> tuple[ArmConfig, Path]:
    options = PlasticityOptions(
        problem="random-label-digits", with_="none", tasks=3, steps_per_task=20, seeds=2, fresh=False, stationary=False
    )
    (config,) = prepare(options)
    config = dataclasses.replace(config, **changes)
    folder = tmp_path / config.name
    folder.mkdir(exist_ok=True)
    config.save(folder)
    return config, folder


def test_the_whole_command(tmp_path, capsys):
    assert main([*TOY, "--with", "none,l2-init+layernorm", "--json", "--quiet", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["interventions"].keys() == {"none", "l2-init+layernorm", "fresh"}
    for found in printed["interventions"].values():
        assert {"mean", "low", "high"} <= found["online_accuracy"].keys()
        assert found["last_accuracy"]["seeds"] == found["slope"]["seeds"] == 2
    assert printed["interventions"]["fresh"]["uses_boundaries"]
    assert "stationary_accuracy" in printed["interventions"]["none"]
    group = tmp_path / "random-label-digits"
    assert read_json(group / "status.json")["state"] == "done"
    names = [folder.name for folder in expand([group])]
    assert names == ["none", "l2-init+layernorm", "fresh", "none-stationary", "l2-init+layernorm-stationary"]
    rows = read_table(group / "none")
    online = {(row.step, row.seed): row.value for row in rows if row.name == "plasticity/online_accuracy"}
    assert online.keys() == {(step, seed) for step in (20, 40, 60) for seed in (0, 1)}
    recorded = {row.name for row in rows}
    assert {"plasticity/dormant_fraction", "plasticity/effective_rank", "plasticity/weight_norm"} <= recorded
    assert main(["report", str(group)]) == 0
    assert "l2-init" in (group / "report.html").read_text()
    assert main(["resume", str(group), "--quiet"]) == 0  # done: nothing to do
    assert main([*TOY, "--out", str(tmp_path), "--name", "random-label-digits"]) == 2
    assert "exists already; continue it with `neoteny resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("intervention", "measured"),
    [("none", None), ("adamp+safe-step", "safe_step/scale"), ("adaptive-batch", "adaptive_batch/size")],
)
def test_an_arm_stopped_anywhere_ends_as_if_it_had_not_been(tmp_path, intervention, measured):
    (tmp_path / "whole").mkdir()
    whole_config, whole = arm(tmp_path / "whole", intervention=intervention)
    assert train_arm(whole_config, whole, lambda steps: None, never) == "done"
    config, folder = arm(tmp_path, intervention=intervention)
    for allowed in (1, 2, 1, 9):
        calls = iter([False] * allowed + [True] * 1000)
        state = train_arm(config, folder, lambda steps: None, lambda calls=calls: next(calls))
    assert state == "done"
    hashes = [read_manifest(list_checkpoints(run)[-1])["state_hash"] for run in (whole, folder)]
    assert hashes[0] == hashes[1]
    timeless = [
        [(r.step, r.name, r.value, r.seed) for r in read_table(run) if not r.name.startswith("speed/")]
        for run in (whole, folder)
    ]
    assert timeless[0] == timeless[1]
    assert measured is None or sum(name == measured for _, name, _, _ in timeless[0]) == 2 * 20


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path):
    config, folder = arm(tmp_path, checkpoint_every=0.0)
    train_arm(config, folder, lambda steps: None, never)
    newest = list_checkpoints(folder)[-1]
    (newest / "seed_0.pt").write_bytes(b"garbage")
    before = read_manifest(newest)["state_hash"]
    assert train_arm(config, folder, lambda steps: None, never) == "done"
    assert read_manifest(list_checkpoints(folder)[-1])["state_hash"] == before


def test_killed_and_resumed(tmp_path):
    command = [sys.executable, "-m", "runs.cli", *TOY, "--with", "adamp", "--no-fresh", "--no-stationary", "--quiet"]
    command += ["--tasks", "20", "--steps-per-task", "100", "--checkpoint-every", "0", "--out", str(tmp_path)]
    child = subprocess.Popen([*command, "--name", "run"], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)
    own = tmp_path / "run" / "adamp"
    deadline = time.monotonic() + 150
    while not list_checkpoints(own) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert read_json(own / "status.json")["state"] == "running"
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    rows = [row for row in read_table(own) if row.name == "plasticity/online_accuracy"]
    assert [row.step for row in rows if row.seed == 0] == list(range(100, 2001, 100))
    moved = [row for row in read_table(own) if row.name == "optimizer/relative_step/1.weight"]
    assert [row.step for row in moved if row.seed == 1] == list(range(100, 2001, 100))


def test_the_summary_against_numbers_by_hand(tmp_path, monkeypatch):
    base = PlasticityOptions(problem="label-shuffle", with_="none", tasks=20, seeds=5, data=None)
    arms = prepare(base)
    seeds = arms[0].seeds
    assert [a.name for a in arms] == ["none", "fresh", "none-stationary"]
    level = {"none": 0.2, "fresh": 0.8, "none-stationary": 0.9}
    for config in arms:
        folder = tmp_path / config.name
        folder.mkdir()
        with Record(folder, seeds, tensorboard=False) as record:
            for task in range(20):
                for seed in seeds:
                    value = level[config.name] + 0.01 * seed - (0.005 * task if config.name == "none" else 0)
                    step = (task + 1) * 500
                    record.write([Row(step, "plasticity/online_accuracy", value, seed)])
                    record.write([Row(step, "plasticity/chance_accuracy", 0.1, seed)])
    found = summarise_arms(tmp_path, arms)["interventions"]
    none = found["none"]
    assert none["first_accuracy"]["mean"] == pytest.approx(0.2 + 0.02 - 0.0025)
    assert none["last_accuracy"]["mean"] == pytest.approx(0.2 + 0.02 - 0.005 * 18.5)
    assert none["online_accuracy"]["mean"] == pytest.approx(0.2 + 0.02 - 0.005 * 9.5)
    assert none["slope"]["mean"] == pytest.approx(-0.005)
    assert none["behind_fresh"]["mean"] == pytest.approx(0.6 + 0.005 * 18.5)
    last = 0.2 + 0.01 * np.arange(5) - 0.005 * 18.5
    expected = (last - 0.1) / (0.8 + 0.01 * np.arange(5) - 0.1)
    assert none["retention"]["mean"] == pytest.approx(expected.mean())
    assert none["stationary_accuracy"]["mean"] == pytest.approx(0.92)
    assert none["verdict"] == "loses plasticity"
    assert found["fresh"]["verdict"] == "anchor"
    summary = summarise_arms(tmp_path, arms)
    printed = io.StringIO()
    print_table(summary, printed)
    assert "0.128 [0.108, 0.147]" in printed.getvalue()
    narrow = io.StringIO()
    monkeypatch.setattr(narrow, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    print_table(summary, narrow)
    (line,) = (line for line in narrow.getvalue().splitlines() if line.startswith("none"))
    assert "0.128" in line
    assert "[" not in line
    with Record(tmp_path / "none", seeds, tensorboard=False) as record:  # now as good as the anchor, seed by seed
        record.cut_to(0)
        metric = "plasticity/online_accuracy"
        record.write([Row((t + 1) * 500, metric, 0.8 + 0.01 * s, s) for t in range(20) for s in seeds])
    assert summarise_arms(tmp_path, arms)["interventions"]["none"]["verdict"] == "no loss shown"


def test_published_settings_and_what_changes_them():
    problem = resolve_problem("permuted-fmnist", "small", {"learning_rate": 0.1, "hidden": [7, 8]})
    assert (problem.tasks, problem.steps, problem.batch_size) == (60, 625, 16)
    assert (problem.learning_rate, problem.hidden) == (0.1, (7, 8))
    options = PlasticityOptions(problem="permuted-digits", with_="none", steps=250, fresh=False, stationary=False)
    (config,) = prepare(options)
    assert config.resolved().tasks == 3
    changing, twin = build(config), build(dataclasses.replace(config, stationary=True))
    orders = [changing.stream.task(index).permutation for index in range(3)]
    kept = [twin.stream.task(index).permutation for index in range(3)]
    assert (kept[0] == kept[1]).all()
    assert (kept[0] == kept[2]).all()
    assert (kept[0] == orders[0]).all()
    assert (orders[1] != orders[0]).any()
    assert (orders[2] != orders[1]).any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--problem", "permuted-digit"], "unknown problem 'permuted-digit'. Did you mean 'permuted-digits'"),
        (["--with", "none,redoo"], "there is no intervention 'redoo'; did you mean 'redo'?"),
        (["--with", "redo+cbp"], "'redo' and 'cbp' do not go together"),
        (["--preset", "smal"], "has no preset 'smal'"),
        (["--problem", "permuted-mnist"], "the data set 'mnist' is not on this machine"),
        (["--tasks", "0"], "tasks must be at least 1, got 0"),
        (["--steps", "9", "--tasks", "3"], "give one of them"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--optimizer", "rmsprop"], "unknown optimizer 'rmsprop'"),
        (["--learning-rate", "-1"], "learning_rate must be positive"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--problem", "class-pairs", "--with", "none", "--hidden", "0"], "layer sizes of at least 1"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NEOTENY_DATA", raising=False)
    base = [] if "--problem" in arguments else ["--problem", "random-label-digits"]
    assert main(["plasticity", *base, *arguments, "--out", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "results").exists()
