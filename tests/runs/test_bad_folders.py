"""What is handed to a command as a run and is none, or another version's: one sentence, exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runs.cli import main
from runs.files import read_json

TRAIN = ["train", "td3", "--env", "gym/Pendulum-v1", "--steps", "60", "--hidden", "8", "--warmup-steps", "10"]
TRAIN += ["--batch-size", "4", "--eval-episodes", "1", "--seeds", "1", "--quiet", "--no-tensorboard"]
TRAIN += ["--checkpoint-every", "30"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made")
    assert main([*TRAIN, "--out", str(out), "--name", "run"]) == 0
    return out / "run"


@pytest.fixture
def run(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def apply(run: Path) -> None:
        config = read_json(run / "config.json")
        change(config)
        (run / "config.json").write_text(json.dumps(config))

    return apply


def each_manifest(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda run: [change(path) for path in run.glob("checkpoints/*/manifest.json")]


COMMANDS = {
    "resume": ["resume", "--quiet"],
    "evaluate": ["evaluate"],
    "watch": ["watch"],
    "report": ["report"],
    "compare": ["compare", "other"],
}
ALL, PLAYED = tuple(COMMANDS), ("resume", "evaluate", "watch")
MAKER = "use the Neoteny that made the run: version "
# What is done to the folder, the commands that must refuse it, and what they say.
BAD: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], str]] = {
    "nothing there": (shutil.rmtree, ALL, "is not the folder of a run: it has no config.json"),
    "a file": (lambda r: (shutil.rmtree(r), r.write_text("x")), ALL, "is not the folder of a run"),
    "an empty folder": (lambda r: (shutil.rmtree(r), r.mkdir()), ALL, "is not the folder of a run"),
    "half a config": (lambda r: (r / "config.json").write_text('{"agent'), ALL, "config.json is damaged"),
    "a list": (lambda r: (r / "config.json").write_text("[]"), ALL, "is not that of a run: it names no command"),
    "another's config": (lambda r: (r / "config.json").write_text('{"name": "x"}'), ALL, "is not that of a run"),
    "seeds that are none": (edit(lambda c: c.update(seeds=3)), ALL, "config.json"),
    "another command": (edit(lambda c: c.update(command="growth")), PLAYED, "was made by `neoteny growth`"),
    "a setting of the future": (edit(lambda c: c.update(warp=9)), PLAYED, f"does not know; {MAKER}"),
    "a setting lost": (edit(lambda c: c.pop("steps")), PLAYED, f"has no setting 'steps'; {MAKER}"),
    "a word for a number": (edit(lambda c: c.update(steps="many")), PLAYED, "is damaged: steps cannot be 'many'"),
    "true for a number": (edit(lambda c: c.update(steps=True)), PLAYED, "is damaged: steps cannot be True"),
    "no hyper-parameters": (edit(lambda c: c.update(agent_config=None)), PLAYED, "agent_config cannot be None"),
    "a new hyper-parameter": (
        edit(lambda c: c["agent_config"].update(x=1)),
        PLAYED,
        f"warmup_steps; {MAKER}",
    ),
    "a word for a hyper-parameter": (edit(lambda c: c["agent_config"].update(discount="x")), PLAYED, "is damaged"),
    "an agent of the future": (edit(lambda c: c.update(agent="td4")), PLAYED, "unknown agent 'td4'"),
    "an environment not here": (edit(lambda c: c.update(env="gym/No-v0")), PLAYED, "unknown environment 'gym/No-v0'"),
    "another network": (edit(lambda c: c["agent_config"].update(hidden=[9])), PLAYED, "does not fit this installation"),
    "no checkpoint": (lambda r: shutil.rmtree(r / "checkpoints"), PLAYED[1:], "has no complete checkpoint yet"),
    "manifests torn": (each_manifest(lambda m: m.write_text("{")), PLAYED, "whole: "),
    "manifests of another format": (each_manifest(lambda m: m.write_text('{"format": 3, "files": {}}')), PLAYED, MAKER),
    "no states": (lambda r: [p.unlink() for p in r.glob("checkpoints/*/*.pt")], PLAYED, "seed_0.pt is missing"),
    "an empty table": (lambda r: (r / "metrics.jsonl").write_text(""), ("report", "compare"), "recorded"),
    "a table of something else": (
        lambda r: (r / "metrics.jsonl").write_bytes(bytes(range(256))),
        ("resume", "report", "compare"),
        "metrics.jsonl, line 1 is damaged",
    ),
}


@pytest.mark.parametrize(
    ("change", "command", "message"),
    [pytest.param(change, c, message, id=f"{name}, {c}") for name, (change, cs, message) in BAD.items() for c in cs],
)
def test_bad_folders_are_one_sentence_and_stay_as_they_are(made, run, change, command, message, capsys):
    (run / "status.json").unlink()  # else resuming would say that it is done
    change(run)
    before = content(run.parent)
    arguments = [str(made) if word == "other" else word for word in COMMANDS[command]]
    assert main([*arguments, str(run)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.startswith("neoteny: ")
    assert said.err.count("\n") == 1
    assert content(run.parent) == before


def test_settings_that_an_older_version_did_not_know_have_their_defaults(run, capsys):
    edit(lambda config: [config.pop(name) for name in ("bf16", "cuda_graphs", "overlap", "histograms", "keep_every")])(
        run
    )
    assert main(["evaluate", str(run), "--episodes", "1"]) == 0
    (run / "status.json").write_text("[]")  # says nothing, so the checkpoint does
    assert main(["resume", str(run)]) == 0
    assert "from step_60" in capsys.readouterr().err


def test_playing_takes_the_newest_whole_checkpoint_and_needs_no_replay(run, capsys):
    for path in run.glob("checkpoints/*/*.bin"):
        path.unlink()
    (run / "checkpoints" / "step_60" / "seed_0.pt").write_bytes(b"x")
    assert main(["evaluate", str(run), "--episodes", "1", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["step"] == 30
    assert "seed_0.pt is damaged: it has 1 bytes" in said.err
    assert "step_30 is used instead" in said.err
    assert said.err.count("\n") == 1


def test_where_nothing_can_be_written_the_way_out_is_named(run, capsys):
    for command, place, *flags in (("report", "/proc/page"), ("watch", "/proc/film.mp4", "--max-steps", "2")):
        assert main([command, str(run), "--out", place, *flags]) == 2
        said = capsys.readouterr().err
        assert "cannot write" in said
        assert "with --out" in said
