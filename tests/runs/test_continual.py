"""`neoteny continual`: what it writes, that it can be killed anywhere, and the sentence for what cannot be."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from runs.checkpoint import list_checkpoints
from runs.cli import main
from runs.continual import prepare
from runs.continual_run import build, train
from runs.files import read_json
from runs.record import read_status, read_table
from tests.runs.same_run import assert_same

ROOT = Path(__file__).parents[2]
TOY = ["--benchmark", "split-blobs", "--seeds", "2", "--no-tensorboard", "--quiet"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert main(["continual", "uer", *TOY, "--out", str(out), "--name", "run"]) == 0
    return out / "run"


def values(run: Path, name: str, task: int | None = None) -> list[float | None]:
    return [row.value for row in read_table(run) if row.name == name and row.task == task]


def test_what_a_run_writes(whole, capsys):
    assert read_status(whole)["state"] == "done"
    config = read_json(whole / "config.json")
    assert sorted(config["class_orders"][0]) == list(range(10))
    assert config["task_steps"] == [8] * 5
    assert config["strategy_config"]["tau"] == 0.09
    assert len(config["fingerprint"]) == 64
    cells = {name for row in read_table(whole) if (name := row.name).startswith("acc/")}
    assert cells == {f"acc/task_{j}_after_{i}" for i in range(1, 6) for j in range(1, 6)}
    assert len(values(whole, "cl/average_accuracy")) == 10  # two seeds, five tasks
    assert len(values(whole, "cl/forgetting")) == 8
    assert len(values(whole, "plasticity/proxy_norm", 3)) == 10
    assert values(whole, "cost/parameters") == [64 * 64 + 64 + 640] * 2
    final = [values(whole, f"acc/task_{j}_after_5") for j in range(1, 6)]
    assert np.mean([column[0] for column in final]) == pytest.approx(values(whole, "cl/average_accuracy")[-2])
    assert main(["resume", str(whole), "--quiet", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"]["cl/average_accuracy"]["seeds"] == 2
    assert told["metrics"]["cl/average_accuracy"]["mean"] == pytest.approx(
        np.mean(values(whole, "cl/average_accuracy")[-2:])
    )
    assert {"cl/bwt", "cl/fwt", "cl/stability_gap", "cost/flops_per_step"} <= set(told["metrics"])


def test_predictions_are_kept_for_metrics_to_come(whole):
    for task in range(1, 6):
        kept = np.load(whole / "predictions" / f"after_task_{task}.npz", allow_pickle=False)
        right = (kept["answers"] == kept["labels"])[:, kept["tasks"] == 2].mean(1)
        assert right.tolist() == pytest.approx(values(whole, f"acc/task_2_after_{task}"))


FLAGS = {
    "uer": TOY,
    "dst": [*TOY, "--preset", "small", "--epochs", "2", "--policy", "free-capacity-density"],
    "hypernet": [*TOY, "--chunk", "600"],
    "mixture_growth": [*TOY, "--tasks", "2", "--eval-every", "0"],
    "grow": [*TOY, "--choice", "search", "--proxy-steps", "4", "--eval-every", "0"],
}


def stopped(command: list[str], folder: Path, looks: int, monkeypatch) -> Path:
    """The same run, stopped when it looked so often whether it should, three steps between two looks."""
    monkeypatch.setattr("runs.continual_run._SLICE", 3)
    config, _ = prepare(command[0], command[1:])
    folder.mkdir()
    config.save(folder, build(config))
    left = iter([False] * looks + [True] * 99)
    assert train(config, folder, lambda steps: None, lambda: next(left)) == "stopped"
    return folder


@pytest.mark.parametrize(
    ("strategy", "looks"),
    [
        ("uer", 0),
        ("uer", 1),
        ("uer", 5),
        ("uer", 6),
        ("dst", 5),
        ("dst", 6),
        ("hypernet", 5),
        ("mixture_growth", 8),
        ("grow", 4),
    ],
)
def test_stopped_anywhere_and_resumed_it_is_the_same_run(strategy, looks, tmp_path, monkeypatch):
    """Before the first step, in the midst of the first and the second task, and at a task's end (8 = 3 + 3 + 2)."""
    command = [strategy, *FLAGS[strategy]]
    reference = tmp_path / "reference"
    monkeypatch.setattr("runs.continual_run._SLICE", 3)  # losses are told as means over slices
    config, _ = prepare(command[0], command[1:])
    reference.mkdir()
    config.save(reference, build(config))
    assert config.resolved().epochs == (2 if strategy == "dst" else 1)
    train(config, reference, lambda steps: None, lambda: False)
    run = stopped(command, tmp_path / "run", looks, monkeypatch)
    assert main(["resume", str(run), "--quiet"]) == 0
    assert_same(run, reference)
    for path in sorted((reference / "predictions").iterdir()):
        assert (run / "predictions" / path.name).read_bytes() == path.read_bytes()


def test_presets_of_a_strategy_set_it_and_the_benchmark_and_flags_win(tmp_path, capsys):
    common = ["--benchmark", "perm-digits", "--preset", "perm-digits-small"]
    config, _ = prepare("hypernet", [*common, "--beta", "0.5", "--epochs", "1"])
    assert (config.strategy_config["hidden_size"], config.strategy_config["beta"]) == (16, 0.5)
    benchmark = config.resolved()
    assert (benchmark.kind, benchmark.tasks, benchmark.hidden, benchmark.epochs) == ("task", 5, (32, 32), 1)
    plain = prepare("hypernet", ["--benchmark", "split-digits", "--preset", "small"])[0].resolved()
    assert (plain.optimizer, plain.learning_rate, plain.kind) == ("adam", 1e-3, "class")
    told = prepare("hypernet", ["--benchmark", "split-digits", "--optimizer", "sgd"])[0].resolved()
    assert (told.optimizer, told.learning_rate) == ("sgd", 0.1)
    assert main(["list", "presets"]) == 0
    assert "chunked_hypernet split-cifar" in capsys.readouterr().out


def test_what_makes_weights_cannot_be_probed(tmp_path, monkeypatch, capsys):
    run = stopped(["chunked_hypernet", *FLAGS["hypernet"]], tmp_path / "run", 1, monkeypatch)
    assert main(["probe", str(run)]) == 2
    assert "'chunked_hypernet' trains what makes weights, not a network" in capsys.readouterr().err


def test_killed_and_resumed(tmp_path):
    command = ["continual", "er", *TOY, "--epochs", "12", "--checkpoint-every", "0", "--out", str(tmp_path)]
    started = [sys.executable, "-m", "runs.cli", *command, "--name", "run"]
    child = subprocess.Popen(started, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)
    run, deadline = tmp_path / "run", time.monotonic() + 150
    while not list_checkpoints(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert read_json(run / "status.json")["state"] == "running"
    assert main(["resume", str(run), "--quiet"]) == 0
    assert main([*command, "--name", "whole"]) == 0
    assert_same(run, tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["uer"], "needs --benchmark"),
        (["ure", *TOY], "unknown strategy 'ure'. Did you mean"),
        (["uer", "--benchmark", "split-digit"], "unknown benchmark 'split-digit'. Did you mean 'split-digits'"),
        (["uer", *TOY, "--tasks", "3"], "10 classes do not divide into 3 tasks; choose 1, 2, 5 or 10"),
        (["uer", *TOY, "--preset", "tiny"], "'split-blobs' has no preset 'tiny'"),
        (["uer", *TOY, "--tau", "0"], "tau must be positive"),
        (
            ["hypernet", *TOY, "--preset", "split-mnst"],
            "has no preset 'split-mnst'. Did you mean 'split-mnist'",
        ),
        (["hypernet", *TOY, "--growth", "full"], "growth 'full' keeps all that wrote earlier weights"),
        (["hypernet", *TOY, "--with", "nap"], "'hypernet' itself decides which weights move"),
        (["hypernet", *TOY, "--chunk", "0"], "chunk must be at least 1, got 0"),
        (
            ["er", *TOY, "--network", "zenkenet"],
            "hidden of zenkenet must be two widths and the size of a layer",
        ),
        (["er", *TOY, "--network", "zenkenet", "--hidden", "2", "2", "3"], "too small, or not square, for zenkenet"),
        (["naive", *TOY, "--tau", "1"], "--tau"),
        (["er", *TOY, "--policy", "ring", "--memory", "5"], "memory of 5 is smaller than the 10 classes"),
        (["er", *TOY, "--batch-size", "100"], "too few for a batch of 100"),
        (["er", *TOY, "--network", "cnm"], "unknown network 'cnm'"),
        (
            ["er", *TOY, "--network", "resnet18-reduced", "--hidden", "8", "8", "8", "8"],
            "are too small for this ResNet",
        ),
        (["er", *TOY, "--seeds", "0"], "--seeds must be at least 1"),
        (["er", "--benchmark", "split-cifar100"], "'cifar100' is not on this machine: put torchvision's folder"),
        (["er", "--benchmark", "split-miniimagenet"], "'miniimagenet' is not on this machine: save the array"),
        (["dst", *TOY], "'dst' needs to be told the task of each sample, which only --kind task does"),
        (["dst", *TOY, "--preset", "cifar100"], "preset 'cifar100' of 'dst' is for split-cifar100, not for 'split-bl"),
        (["dst", *TOY, "--preset", "cifar"], "'split-blobs' has no preset 'cifar'. Did you mean 'cifar100'"),
        (["dst", *TOY, "--preset", "small", "--with", "nap"], "'dst' itself decides which weights move"),
        (["dst", *TOY, "--preset", "small", "--density", "0"], "density must be above 0 and at most 1, got 0"),
        (["dst", *TOY, "--preset", "small", "--update-every", "80"], "the topology would never change"),
        (["naive", *TOY, "--nesterov"], "Nesterov's step is for sgd with momentum"),
        ([], "continual needs a strategy"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NEOTENY_DATA", raising=False)
    out = ["--out", str(tmp_path / "out")] if arguments else []
    assert main(["continual", *arguments, *out]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_command_says_so(whole, capsys):
    assert main(["evaluate", str(whole)]) == 2
    assert "was made by `neoteny continual`; this works on runs of `neoteny train`" in capsys.readouterr().err


def test_help_and_list(capsys):
    with pytest.raises(SystemExit):
        main(["continual", "uer", "--help"])
    assert "--tau" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["continual", "chunked_hypernet", "--help"])
    assert re.search(r"--beta +0.1 +its weight", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["continual", "--help"])
    assert "--benchmark" in capsys.readouterr().out
    assert main(["list", "benchmarks"]) == 0
    assert "split-fmnist" in capsys.readouterr().out
    assert main(["list", "strategies"]) == 0
    assert "derpp" in capsys.readouterr().out
