"""Sweeps of continual strategies, and the files that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runs.cli import main
from runs.files import read_json
from runs.sweep_file import read_trials

BLOBS = """
strategies = ["dst"]
benchmarks = ["split-blobs"]
seeds = 2
[options]
preset = "small"
density = [0.1, 0.3]
epochs = 1
tensorboard = false
[benchmark.split-blobs]
growth = {growth}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_sweep_of_strategies(tmp_path, capsys):
    path = write(tmp_path, BLOBS.format(growth='"none"').replace("[0.1, 0.3]", "[0.3]"))
    out = ["--out", str(tmp_path / "out")]
    assert main(["sweep", str(path), *out]) == 0
    name = "dst-split-blobs-density=0.3"
    assert f"{name}: done, cl/average_accuracy" in capsys.readouterr().err
    run = tmp_path / "out" / "mine" / name
    assert read_json(run / "config.json")["strategy_config"]["density"] == 0.3
    rows = [json.loads(line) for line in (run.parent / "results.jsonl").read_text().splitlines()]
    assert {(row["strategy"], row["benchmark"], row["growth"]) for row in rows} == {("dst", "split-blobs", "none")}
    assert main(["sweep", str(path), *out]) == 0
    assert "1 done" in capsys.readouterr().err
    write(tmp_path, BLOBS.format(growth='"random"').replace("[0.1, 0.3]", "[0.3]"))
    assert main(["sweep", str(path), *out]) == 2
    assert f"'{run}' has growth none, '{path}' now says random; remove that folder" in capsys.readouterr().err


PAIRS = """
strategies = ["growclip"]
benchmarks = ["shapes-captions"]
seeds = 1
[options]
momentum = [0.9, 1.0]
choice = "path"
path = ["ffn"]
tasks = 2
concepts = 24
steps = 2
batch_size = 8
genome = ["image_size=16", "width=8", "heads=1", "head_dim=8", "ffn=16", "embedding=8", "length=6"]
tensorboard = false
"""


def test_a_sweep_of_growth(tmp_path, capsys):
    path = write(tmp_path, PAIRS)
    out = ["--out", str(tmp_path / "out")]
    assert main(["sweep", str(path), "--dry-run"]) == 0
    assert "2 trials, 2 seeds, 8 steps" in capsys.readouterr().err
    assert main(["sweep", str(path), *out]) == 0
    names = [f"growclip-shapes-captions-momentum={m}" for m in (0.9, 1.0)]
    told = capsys.readouterr().err
    assert all(f"{name}: done, retrieval/text_to_image_r1" in told for name in names)
    rows = [json.loads(line) for line in (tmp_path / "out" / "mine" / "results.jsonl").read_text().splitlines()]
    assert {(row["strategy"], row["momentum"]) for row in rows} == {("growclip", 0.9), ("growclip", 1.0)}
    write(tmp_path, PAIRS.replace("steps = 2", "steps = 3"))
    assert main(["sweep", str(path), *out]) == 2
    assert "has steps 2, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAIRS.replace("shapes-captions", "split-blobs"), "unknown benchmark 'split-blobs'"),
        (PAIRS.replace("shapes-captions", "emojis"), "Did you mean 'emoji'"),
        (PAIRS.replace("concepts", "density"), "'growclip' has no option 'density'"),
        (BLOBS.format(growth='["gradient", "rigl"]'), "growth=rigl: "),
        ('strategies = ["dts"]\nbenchmarks = ["split-blobs"]', "unknown strategy 'dts'. Did you mean 'dst'"),
        ('strategies = ["dst"]\nbenchmarks = ["split-blob"]', "unknown benchmark 'split-blob'. Did you mean"),
        ('strategies = ["dst"]\nenvs = ["gym/Pendulum-v1"]', "unknown key 'envs'"),
        ('strategies = ["dst"]', "it has `strategies`, but no `benchmarks`"),
        ('[[run]]\nstrategy = "dst"', "a [[run]] needs `benchmark`, one name"),
        ('strategies = ["dst"]\nbenchmarks = ["split-blobs"]', "'dst' needs to be told the task of each sample"),
    ],
)
def test_bad_files_of_strategies(text, message, tmp_path, capsys):
    path = write(tmp_path, text)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_files_that_come_with_the_package_are_sound(capsys):
    """Their trials parse; those of the large one need data that is not here, which only building them asks for."""
    from runs.continual import prepare

    trials = {name: read_trials(Path(name)) for name in ("dst", "dst-small", "pim")}
    assert {name: len(found) for name, found in trials.items()} == {"dst": 96, "dst-small": 30, "pim": 5}
    assert [prepare(trial.who, trial.flags)[0].strategy_config["momentum"] for trial in trials["pim"]][2] == 0.9
    for trial in trials["dst"][::7]:
        config, _ = prepare(trial.who, trial.flags)
        assert config.strategy_config["growth"] == trial.options["growth"]
        assert config.resolved().kind == "task"
    assert main(["sweep", "dst-small", "--dry-run"]) == 0
    assert "30 trials, 150 seeds" in capsys.readouterr().err
    assert main(["list", "sweeps"]) == 0
    assert capsys.readouterr().out.split() == ["dst", "dst-small", "pim"]
