"""`neoteny continual growclip`: what it writes, that it may be stopped anywhere, what it refuses in a sentence."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runs.cli import main
from runs.continual import opened, prepare
from runs.files import read_json
from runs.growth_run import GrowthConfig, build
from runs.growth_section import growth_section
from runs.probe_subjects import ImageEncoder
from runs.record import read_status, read_table
from runs.report import read_report
from tests.runs.same_run import assert_same

GENOME = ["image_size=16", "patch=8", "width=8", "heads=1", "head_dim=8", "ffn=16", "embedding=8", "length=6"]
TOY = [
    "--benchmark", "shapes-captions", "--tasks", "3", "--concepts", "24", "--steps", "4", "--batch-size", "8",
    "--seeds", "2", "--no-tensorboard", "--quiet", "--genome", *GENOME,
]  # fmt: skip
SEARCHED = [*TOY, "--proxy-steps", "1", "--repeats", "1", "--width", "None", "--head-dim", "None", "--heads", "None"]
SEARCHED += ["--image-depth", "None", "--text-depth", "None", "--budget-exponent", "1", "--tasks", "2"]


def run(out: Path, name: str, *flags: str) -> Path:
    assert main(["continual", "growclip", *flags, "--out", str(out), "--name", name]) == 0
    return out / name


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("whole"), "run", *SEARCHED)


def values(folder: Path, name: str, task: int | None = None) -> list[float | None]:
    return [row.value for row in read_table(folder) if row.name == name and row.task == task]


def test_what_a_run_writes(whole, capsys):
    assert read_status(whole)["state"] == "done"
    config = read_json(whole / "config.json")
    assert config["task_steps"] == [4, 4]
    assert config["pairs"] == [22, 44]
    cells = {row.name for row in read_table(whole) if row.name.startswith("acc/")}
    assert cells == {f"acc/task_{j}_after_{i}" for i in (1, 2) for j in range(1, i + 1)}
    history = read_json(whole / "growth.json")
    assert list(history) == ["0", "1"]
    for seed, records in enumerate(history.values()):
        # Forced to grow: more parameters, of which the table tells.
        sizes = [record["parameters"] for record in records]
        assert sizes[0] < sizes[1]
        assert sizes[1] == values(whole, "growth/parameters")[-2:][seed]
        names = [row["name"] for row in records[1]["candidates"]]
        assert records[1]["chosen"] in names
        assert "hold" not in names
        assert all(row["score"] > 0 and len(row["losses"]) == 1 for row in records[1]["candidates"])
    # New words change nothing, and growth of momentum 0.9 a little.
    (before, _), (after, _) = (values(whole, f"loss/validation_{when}_growth", 2) for when in ("before", "after"))
    assert before is not None
    assert after is not None
    assert 0 < abs(before - after) < 1
    flops, search = (values(whole, f"growth/{name}_flops")[-1] for name in ("cumulative", "search"))
    assert 0 < search < flops
    assert main(["resume", str(whole), "--quiet", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["metrics"]
    wanted = "retrieval/text_to_image_r1 retrieval/other_view_image_to_text_r5 retrieval/forward_transfer"
    assert {*wanted.split(), "retrieval/backward_transfer", "growth/flops"} <= set(told)
    assert told["retrieval/chance_r1"]["mean"] == pytest.approx(1 / 4)


def test_its_report_has_growths_candidates_and_a_gallery(whole):
    text = growth_section(read_report([whole]))
    assert "How the models grew" in text
    assert "Candidates of seed 1 at part 2" in text
    assert text.count("data:image/png;base64") >= 4 * 4


def test_a_probe_asks_the_image_encoders_in_the_architectures_they_have_grown_to(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert main(["probe", str(folder), "--steps", "3", "--draws", "1", "--samples", "8", "--seeds", "2"]) == 0
    rows = read_json(folder / "probe.json")["networks"]
    assert [(row["network"], row["seeds"], row["family"]) for row in rows] == [
        ("image_encoder", [0, 1], "random labels"),
        ("image_encoder", [0, 1], "random network"),
    ]
    names = list(rows[0]["layers"])
    assert {"encoder", "encoder.patch", "projection"} <= set(names)
    assert not [name for name in names if "text" in name]
    depths = [record[-1]["genome"]["depth"]["shared"] for record in read_json(folder / "growth.json").values()]
    assert len([name for name in names if "shared_blocks" in name and name.endswith("qkv")]) == min(depths)
    clip = build(GrowthConfig.load(folder)).clips[0]
    images = torch.rand(3, 3, 16, 16)
    outputs = ImageEncoder(clip.model)(images)
    assert torch.allclose(outputs / outputs.norm(dim=1, keepdim=True), clip.model.encode_image(images), atol=1e-6)
    capsys.readouterr()
    assert main(["probe", str(folder), "--network", "text_encoder"]) == 2
    assert "there is no network 'text_encoder'" in capsys.readouterr().err


def test_a_model_that_preserves_its_function_grows_without_a_dent(tmp_path):
    """m = 1: the loss on held-out pairs is the same before and after, while the model is another one."""
    folder = run(tmp_path, "run", *TOY, "--path", "width", "shared_depth+ffn", "--choice", "path", "--momentum", "1")
    for task in (2, 3):
        before, after = (values(folder, f"loss/validation_{when}_growth", task) for when in ("before", "after"))
        assert after == pytest.approx(before, abs=1e-5)
    assert len(values(folder, "zero_shot/accuracy")) == 2 * 2  # the first part knows one category
    genome = read_json(folder / "growth.json")["0"][-1]["genome"]
    assert (genome["width"], genome["depth"]["shared"]) == (16, 2)
    # The same growths again from another run, this time from scratch; and its last models from the start.
    again = run(tmp_path, "again", *TOY, "--follow", str(folder), "--inheritance", "scratch", "--seeds", "1")
    assert read_json(again / "growth.json")["0"][-1]["genome"] == genome
    large = run(tmp_path, "large", *TOY, "--start", str(folder), "--choice", "fixed", "--seeds", "1")
    assert read_json(large / "growth.json")["0"][0]["genome"] == genome | {"vocabulary": _words(large, 0)}


def _words(folder: Path, part: int) -> int:
    return read_json(folder / "config.json")["vocabularies"][part]


@pytest.fixture(scope="module")
def sliced(tmp_path_factory) -> Path:
    """Losses are told as means over slices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runs.growth_run._SLICE", 3)
        return run(tmp_path_factory.mktemp("sliced"), "run", *SEARCHED)


@pytest.mark.parametrize("looks", [5, 6, 8, 10, 11])
def test_stopped_anywhere_and_resumed_it_is_the_same_run(looks, sliced, tmp_path, monkeypatch):
    """While candidates are tried for the first seed or the second, between them, before and in the midst of a part.

    Looks at whether to stop: 4 in the first part (2 arrivals, 3 + 1 steps), then for each seed one at its arrival and
    one for each of 2 candidates.
    """
    monkeypatch.setattr("runs.growth_run._SLICE", 3)
    config, _ = prepare("growclip", SEARCHED)
    folder = tmp_path / "stopped"
    folder.mkdir()
    found = opened(config)
    found.save(folder)
    left = iter([False] * looks + [True] * 99)
    assert found.train(folder, lambda steps: None, lambda: next(left)) == "stopped"
    assert main(["resume", str(folder), "--quiet"]) == 0
    assert_same(folder, sliced)
    assert read_json(folder / "growth.json") == read_json(sliced / "growth.json")


def test_dimensions_grown_alone_to_one_size(tmp_path):
    genome = ["image_size=16", "patch=8", "width=16", "heads=2", "head_dim=8", "ffn=64", "embedding=8", "length=6"]
    flags = [*TOY[: TOY.index("--genome")], "--genome", *genome, "--study", "dims", "--concepts", "16", "--seeds", "1"]
    folder = run(tmp_path, "dims", *flags)
    told = {row.name: row.value for row in read_table(folder) if row.name.startswith("dims/")}
    sizes = {name.split("/")[1]: value for name, value in told.items() if name.endswith("/parameters")}
    grown = [value for name, value in sizes.items() if name != "hold"]
    assert len(grown) >= 4
    assert max(grown) / min(grown) < 1.03 < min(grown) / sizes["hold"]
    assert 0 <= told["dims/shared_depth/text_to_image_r1"] <= 1
    # Stopped within an arm it goes on exactly.
    learner = build(prepare("growclip", flags)[0])
    for _ in range(6):
        learner.advance(3)
    assert learner.index > 1
    assert learner.step == 3
    state = copy.deepcopy(learner.state_dict())
    learner.advance(3)
    ended = learner.measurements[-1].values
    learner.load_state_dict(state)
    learner.advance(3)
    again = learner.measurements[-1].values
    assert ended.keys() == again.keys()
    assert all(torch.equal(ended[name], again[name]) for name in ended)


def test_a_folder_of_ones_own(tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    draw = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(draw.integers(0, 256, (9, 12, 3), np.uint8)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"photo number {number}")
    flags = [str(place) if flag == "shapes-captions" else flag for flag in TOY]
    folder = run(tmp_path, "own", *flags, "--choice", "fixed", "--seeds", "1", "--tasks", "2")
    assert folder.name == "own"
    assert not values(folder, "retrieval/other_view_text_to_image_r1")
    assert len(values(folder, "retrieval/text_to_image_r1")) == 2


NO_MOVE = ["--ffn", "None", "--image-depth", "None", "--text-depth", "None", "--shared-depth", "None"]
BAD = [
    (["uer", "--benchmark", "emoji"], "'emoji' has image-caption pairs and 'uer' learns labels"),
    (["growclip", "--benchmark", "split-digits"], "'growclip' learns image-caption pairs"),
    (["growclip", "--benchmark", "emojis"], "Did you mean 'emoji'"),
    (["growclip", "--benchmark", "./nowhere"], "there is no 'nowhere'"),
    (["growclip", *TOY, "--preset", "large"], "has no preset 'large'"),
    (["growclip", *TOY, "--largest", "500"], "more than --largest 500"),
    (["growclip", *TOY, "--budget-exponent", "0.01"], "no growth ever fits: the smallest makes"),
    (["growclip", *SEARCHED, *NO_MOVE], "every move is disabled"),
    (["growclip", *TOY, "--steps", "0"], "--steps must be at least 1"),
    (["growclip", *TOY, "--momentum", "2"], "momentum must be in [0, 1]"),
    (["growclip", *TOY, "--follow", "./nowhere"], "has no growth.json"),
    (["growclip", *TOY[: TOY.index("--genome")], "--genome", "depth=0"], "image and text towers need a block"),
    (["growclip", *TOY[: TOY.index("--genome")], "--genome", "deep=2"], "--genome takes KEY=VALUE"),
    (["growclip", *TOY, "--concepts", "1"], "too few concepts"),
    (["growclip", *TOY, "--learning-rat", "1"], "has no flag '--learning-rat'"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_bad_input_is_a_sentence_and_nothing_is_written(command, words, tmp_path, capsys):
    assert main(["continual", *command, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
