"""`neoteny probe` as a user meets it: agents, populations, plain modules, verdicts, bad input."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from runs import probe as probe_module
from runs.checkpoint import newest, read_seed
from runs.cli import main
from runs.probe_verdict import verdict

QUICK = ["--steps", "20", "--draws", "2", "--samples", "32", "--seeds", "1", "--quiet", "--json"]


def probe(capsys, *arguments):
    assert main(["probe", *map(str, arguments), *QUICK]) == 0
    return json.loads(capsys.readouterr().out)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "probe" not in path.name}


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    out = tmp_path_factory.mktemp("population")
    toy = ["--problem", "random-label-digits", "--tasks", "2", "--steps-per-task", "20", "--seeds", "2"]
    more = ["--with", "none,layernorm", "--no-stationary", "--quiet", "--out", str(out), "--name", "run"]
    assert main(["plasticity", *toy, *more]) == 0
    return out / "run"


@pytest.fixture(scope="module")
def strategy(tmp_path_factory):
    out = tmp_path_factory.mktemp("strategy")
    toy = ["--benchmark", "split-blobs", "--seeds", "2", "--with", "layernorm", "--eval-every", "0"]
    assert main(["continual", "uer", *toy, "--quiet", "--no-tensorboard", "--out", str(out), "--name", "run"]) == 0
    return out / "run"


def train(out: Path, agent: str, env: str, name: str, *more: str) -> None:
    toy = ["--steps", "200", "--seeds", "1", "--eval-episodes", "1", "--warmup-steps", "50", "--batch-size", "16"]
    quick = ["--hidden", "16", "16", "--replay-capacity", "1000", "--quiet", "--no-tensorboard"]
    assert main(["train", agent, "--env", env, "--out", str(out), "--name", name, *toy, *quick, *more]) == 0


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    out = tmp_path_factory.mktemp("agents")
    train(out, "td3", "gym/Pendulum-v1", "td3")
    train(out, "dqn", "gym/CartPole-v1", "dqn", "--layer-norm")
    return out


def test_a_strategy_on_the_tasks_so_far(strategy, capsys):
    before = files(strategy)
    found = probe(capsys, strategy)
    assert files(strategy) == before
    assert [(row["network"], row["family"]) for row in found["networks"]] == [
        ("uer", "random labels"),
        ("uer", "random network"),
    ]
    assert main(["probe", str(strategy), "--families", "next", *QUICK]) == 2
    assert "'uer' has no next tasks" in capsys.readouterr().err


def test_every_arm_of_a_population_and_its_next_tasks(population, capsys):
    before = files(population)
    found = probe(capsys, population)
    assert files(population) == before
    rows = {(row["network"], row["family"]): row for row in found["networks"]}
    families = ("random labels", "random network", "next tasks")
    assert list(rows) == [(arm, family) for arm in ("none", "layernorm") for family in families]
    row = rows["none", "random labels"]
    assert row["seeds"] == [0]
    assert row["gap"]["mean"] == pytest.approx(row["fresh"]["mean"] - row["checkpoint"]["mean"])
    assert row["gap"]["low"] <= row["gap"]["mean"] <= row["gap"]["high"]
    assert list(row["layers"]) == ["1", "3", "5"]
    assert row["held_out_gap"] is None
    assert rows["none", "random network"]["held_out_gap"] is not None
    assert row["learning_rate"] == 3e-3  # the problem's own
    assert found["step"] == 40
    for name in ("probe.json", "probe.png", "probe_layers.png"):
        assert (population / name).stat().st_size > 500


def test_one_arm_one_family_without_layers(population, capsys, tmp_path):
    found = probe(capsys, population / "none", "--families", "network", "--no-layers", "--out", tmp_path / "here")
    (row,) = found["networks"]
    assert (row["network"], row["family"], row["layers"]) == ("none", "random network", {})
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["probe.json", "probe.png"]


def test_networks_of_agents_on_observations_they_visited(agents, capsys):
    before = files(agents / "td3")
    found = probe(capsys, agents / "td3")
    assert files(agents / "td3") == before
    names = [(row["network"], row["family"]) for row in found["networks"]]
    assert names == [(n, f) for n in ("actor", "critics") for f in ("random labels", "random network")]
    assert found["step"] == 200
    again = probe(capsys, agents / "td3")
    assert [row["gap"] for row in again["networks"]] == [row["gap"] for row in found["networks"]]


def test_symphony_is_asked_before_what_bounds_its_actions(agents, capsys):
    train(agents, "symphony", "gym/Pendulum-v1", "symphony", "--nodes", "3")
    found = probe(capsys, agents / "symphony")
    rows = {row["network"]: row for row in found["networks"]}
    assert list(rows) == ["actor", "critics"]
    assert len(rows["actor"]["layers"]) == len(rows["critics"]["layers"]) == 5


@pytest.mark.parametrize(
    ("agent", "more", "networks"),
    [
        ("symphony", ["--nodes", "3", "--encoder-features", "4"], ["actor", "critics"]),
        ("td7", ["--embedding", "8", "--no-checkpoints"], ["encoder", "actor", "critics"]),
    ],
)
def test_networks_behind_an_encoder_are_asked_on_what_it_makes(agents, capsys, agent, more, networks):
    train(agents, agent, "gym/Pendulum-v1", f"{agent}-encoder", *more)
    found = probe(capsys, agents / f"{agent}-encoder", "--families", "network")
    assert [row["network"] for row in found["networks"]] == networks
    assert all(len(row["layers"]) >= 3 for row in found["networks"])


def test_networks_of_agents_with_interventions(agents, capsys):
    train(agents, "td3", "gym/Pendulum-v1", "nap", "--with", "nap")
    found = probe(capsys, agents / "nap", "--families", "network", "--no-layers")
    assert [row["network"] for row in found["networks"]] == ["actor", "critics"]


def test_the_q_network_of_dqn_at_a_named_step(agents, capsys):
    found = probe(capsys, agents / "dqn", "--step", "150", "--network", "net", "--learning-rate", "0.01")
    assert {row["network"] for row in found["networks"]} == {"net"}
    assert found["step"] == 150
    assert {row["learning_rate"] for row in found["networks"]} == {0.01}


def test_a_report_takes_up_what_was_found(agents, capsys, tmp_path):
    found = probe(capsys, agents / "dqn")
    assert main(["report", str(agents / "dqn"), "--out", str(tmp_path), "--format", "html"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "What can still be learnt" in page
    assert found["networks"][0]["verdict"].partition(".")[0] in page
    (agents / "dqn" / "probe.json").write_text('{"networks": [{}]}')
    assert main(["report", str(agents / "dqn"), "--out", str(tmp_path), "--format", "html"]) == 2
    assert "probe.json is damaged" in capsys.readouterr().err


def test_a_report_of_arms_takes_up_what_was_found_beside_them(population, capsys, tmp_path):
    probe(capsys, population, "--families", "labels", "--network", "none", "--no-layers")
    assert main(["report", str(population), "--out", str(tmp_path), "--format", "html"]) == 0
    assert (tmp_path / "report.html").read_text().count("run: none at step 40") == 1


def test_a_table_and_verdicts_are_told(agents, capsys):
    assert main(["probe", str(agents / "dqn"), "--families", "labels", "--steps", "20", "--samples", "32"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "gap at best rates" in said.err
    assert "net, random labels: " in said.err
    assert "probe.png" in said.err


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's own, its saved weights, and its inputs."""
    monkeypatch.chdir(tmp_path)
    name = "networks_of_" + tmp_path.name.replace("-", "_")
    code = """
        from torch import nn

        def build():
            return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

        def other():
            return nn.Linear(5, 2)

        def number():
            return 3
    """
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
    weights = tmp_path / "weights.pt"
    torch.save(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).state_dict(), weights)
    torch.save(torch.randn(40, 5), tmp_path / "inputs.pt")
    return name


def test_a_plain_module(module, tmp_path, capsys):
    state = torch.get_rng_state()
    found = probe(capsys, "weights.pt", "--builder", f"{module}:build", "--inputs", "inputs.pt")
    assert torch.equal(state, torch.get_rng_state())
    assert [row["family"] for row in found["networks"]] == ["random labels", "random network"]
    assert {row["network"] for row in found["networks"]} == {"weights"}
    assert list(found["networks"][0]["layers"]) == ["0", "2"]
    assert (tmp_path / "weights.probe.json").exists()
    numbers = probe(capsys, "weights.pt", "--builder", f"{module}:build", "--input-shape", "5", "--outputs", "numbers")
    assert numbers["networks"][0]["chance"]["mean"] == 0


BAD_MODULE = {
    "no builder": (["--input-shape", "5"], "needs --builder MODULE:FUNCTION"),
    "no colon": (["--builder", "build"], "--builder needs MODULE:FUNCTION, got 'build'"),
    "no module": (["--builder", "nowhere_at_all:build"], "cannot be called: No module named 'nowhere_at_all'"),
    "no function": (["--builder", "{}:built"], "cannot be called"),
    "no network": (["--builder", "{}:number"], "gives a int, not a torch module"),
    "other network": (["--builder", "{}:other"], "does not hold the weights of"),
    "no inputs": (["--builder", "{}:build"], "needs --inputs FILE, or --input-shape"),
    "missing inputs": (["--builder", "{}:build", "--inputs", "x.pt"], "'x.pt' holds no tensor of inputs"),
    "other shape": (["--builder", "{}:build", "--input-shape", "4"], "does not take inputs of shape [4]"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_MODULE.values(), ids=list(BAD_MODULE))
def test_a_module_that_does_not_fit_is_one_sentence(module, arguments, message, tmp_path, capsys):
    before = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")
    assert main(["probe", "weights.pt", *[text.format(module) for text in arguments]]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before


BAD_RUN = {
    "family": (["--families", "label"], "unknown family of targets 'label'. Did you mean 'labels'"),
    "no next task": (["--families", "next"], "has no next tasks; ask for labels or network"),
    "step": (["--step", "7"], "has no checkpoint of step 7; it has 150, 200"),
    "network": (["--network", "critic"], "there is no network 'critic'."),
    "draws": (["--draws", "0"], "draws must be at least 1, got 0"),
    "seeds": (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    "samples": (["--samples", "2"], "--samples must be at least 4, got 2"),
    "rate": (["--learning-rate", "-1"], "learning_rate must be positive, got -1.0"),
    "device": (["--device", "gpu"], "unknown device 'gpu'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_RUN.values(), ids=list(BAD_RUN))
def test_bad_input_is_one_sentence_and_writes_nothing(agents, arguments, message, tmp_path, capsys):
    assert main(["probe", str(agents / "dqn"), "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_named(population, tmp_path, capsys):
    shutil.copytree(population / "none", tmp_path / "arm")
    for path in (tmp_path / "arm" / "checkpoints").rglob("seed_*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    assert main(["probe", str(tmp_path / "arm"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "is damaged: its checksum is not the one in manifest.json" in said
    assert said.count("\n") == 1
    assert "does not fit" not in said
    assert not (tmp_path / "out").exists()


def test_no_run_is_refused(tmp_path, capsys):
    assert main(["probe", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def interval(mean, spread=0.01):
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def row(gap, **changes):
    layers = {"a": {"recovered": interval(0.0)}, "b": {"recovered": interval(0.8 * gap)}}
    plain = {
        "fresh": interval(0.8), "chance": interval(0.2), "gap": interval(gap), "gap_at_best_rates": interval(gap),
        "best_rate": {"fresh": [1e-3], "checkpoint": [3e-3]}, "layers": layers, "held_out_gap": None,
    }  # fmt: skip
    return plain | changes


VERDICTS = {
    "most": (row(0.5), "lost most of its plasticity: 83 % of what a fresh network learns beyond chance. "),
    "part": (row(0.2), "lost part of its plasticity: 33 % of"),
    "slightly": (row(0.05), "slightly behind, by 8 % of"),
    "none": (row(0.0), "It learns as well as a fresh network."),
    "ahead": (row(-0.1), "No plasticity is lost: it is ahead by 17 %"),
    "undecided": (row(0.1) | {"gap": interval(0.1, 0.2)}, "Undecided"),
    "where": (row(0.5), "Re-initialising `b` alone brings back 80 % of the gap."),
    "nowhere": (row(0.5, layers={"a": {"recovered": interval(0.0)}}), "No single layer brings it back"),
    "rate": (row(0.5, gap_at_best_rates=interval(0.1)), "at its best rate (0.003) the gap is 0.10"),
    "nothing": (row(0.0, fresh=interval(0.2)), "Nothing can be said"),
    "held out": (row(0.0, held_out_gap=interval(0.1)), "generalises less (held out: 0.10 lower)"),
    "one draw": (row(0.3) | {"gap": {"mean": 0.3, "low": None, "high": None}}, "one draw of targets says no more"),
}


@pytest.mark.parametrize(("given", "words"), VERDICTS.values(), ids=list(VERDICTS))
def test_verdicts(given, words):
    assert words in verdict(given)


def test_ppo_is_asked_on_its_last_rollout_as_its_networks_saw_it(agents, capsys, monkeypatch):
    seen = []
    probing = probe_module.probe
    monkeypatch.setattr(probe_module, "probe", lambda *given: seen.append(given) or probing(*given))
    toy = ["--steps", "64", "--rollout-steps", "16", "--minibatches", "2", "--hidden", "8", "--seeds", "1", "--quiet"]
    more = ["--eval-episodes", "1", "--no-tensorboard", "--out", str(agents), "--name", "ppo"]
    assert main(["train", "ppo", "--env", "gym/CartPole-v1", *toy, *more]) == 0
    found = probe(capsys, agents / "ppo", "--families", "network")
    assert [row["network"] for row in found["networks"]] == ["net"]
    rollout = read_seed(newest(agents / "ppo"), 0)["agent"]["parts"]["rollout"]["obs"].flatten(0, 1)
    inputs = seen[0][2].inputs.flatten(0, 1)
    assert all((rollout == row).all(-1).any() for row in inputs)
