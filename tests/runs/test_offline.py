"""`neoteny offline`, `inspect` and the step to online: runs, resuming, and what users get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import envs
from runs import checkpoint
from runs.cli import main
from runs.datasets.dataset import About, Dataset
from runs.datasets.source import references_of, same_task
from runs.files import read_json
from runs.record import read_table
from runs.results import read_runs
from tests.agents.offline_data import make_transitions

SMALL = ["--hidden", "8", "8", "--batch-size", "8", "--quiet", "--no-tensorboard", "--eval-episodes", "2"]


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory) -> Path:
    """Random steps of the pendulum, whose actions are in ± 2."""
    runner = envs.make("gym/Pendulum-v1", 1, 0)
    world = np.random.default_rng(0)
    obs, kept = runner.reset(), {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
    import torch

    for _ in range(420):
        action = torch.from_numpy(world.uniform(-2, 2, (1, 1)).astype(np.float32))
        kept["observations"].append(obs[0].numpy().copy())
        step = runner.step(action)
        kept["actions"].append(action[0].numpy())
        kept["rewards"].append(float(step.reward[0]))
        kept["terminals"].append(False)
        kept["timeouts"].append(bool(step.truncated[0]))
        obs = step.obs.clone()
    path = tmp_path_factory.mktemp("data") / "pendulum.npz"
    np.savez(path, **{name: np.asarray(values) for name, values in kept.items()})
    return path


def offline(out: Path, data: Path, *more: str, agent: str = "td3_bc", name: str = "run") -> int:
    command = ["offline", agent, "--data", str(data), "--env", "gym/Pendulum-v1", *SMALL, "--out", str(out)]
    return main([*command, "--name", name, *more])


def hashes(run: Path) -> list[str]:
    return [read_json(path / "manifest.json")["state_hash"] for path in checkpoint.list_checkpoints(run)[-1:]]


def test_a_run_steps_no_environment_but_to_evaluate_and_is_told_in_scores(tmp_path, pendulum, monkeypatch, capsys):
    from runs import side_by_side

    stepped: list[int] = []
    real = side_by_side.SideBySide.send

    def send(self, action):
        stepped.append(self.runners[0].num_envs)
        return real(self, action)

    monkeypatch.setattr(side_by_side.SideBySide, "send", send)
    more = ["--steps", "12", "--eval-every", "6", "--seeds", "2", "--seeds-as", "population", "--critic-hidden", "8"]
    assert offline(tmp_path, pendulum, *more, "--ref-min", "-1200", "--ref-max", "-150", "--json") == 0
    assert set(stepped) == {2}  # episodes of evaluations: the run's own environments are one each
    assert len(stepped) == 3 * 200
    summary = json.loads(capsys.readouterr().out)["metrics"]
    assert {"eval/return", "eval/score_given", "eval/return_last10", "eval/return_best", "loss/bc"} <= set(summary)
    rows = read_table(tmp_path / "run")
    for row in (row for row in rows if row.name == "eval/return"):
        score = next(r.value for r in rows if (r.step, r.seed, r.name) == (row.step, row.seed, "eval/score_given"))
        assert score == pytest.approx(100 * (row.value + 1200) / 1050)
    config = read_json(tmp_path / "run" / "config.json")
    assert config["command"] == "offline"
    assert config["data"]["rows"] == 417
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--fqe", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found["value/initial_by_critics"]["seeds"] == found["value/initial_by_fitted_q"]["seeds"] == 2
    assert main(["report", str(tmp_path / "run"), "--format", "csv"]) == 0
    assert read_runs([tmp_path / "run"])[0].place.endswith("/pendulum.npz")


@pytest.mark.parametrize("agent", ["a2pr", "bc"])
def test_stopped_at_an_odd_step_and_resumed_it_is_the_same_run(tmp_path, pendulum, agent, monkeypatch):
    more = ["--steps", "14", "--checkpoint-every", "7", "--seeds", "1", "--eval-every", "14"]
    more += ["--critic-hidden", "8", "--vae-hidden", "8"] if agent == "a2pr" else []
    assert offline(tmp_path, pendulum, *more, agent=agent, name="whole") == 0
    from runs.training import Training

    real = Training.advance

    def stopping(self):
        if self.agent.steps == 7:
            raise OSError(28, "No space left on device")
        real(self)

    monkeypatch.setattr(Training, "advance", stopping)
    assert offline(tmp_path, pendulum, *more, agent=agent, name="cut") == 3
    monkeypatch.setattr(Training, "advance", real)
    assert main(["resume", str(tmp_path / "cut"), "--quiet"]) == 0
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")

    def told(name: str):
        return [(r.step, r.name, r.value) for r in read_table(tmp_path / name) if not r.name.startswith("speed/")]

    assert told("cut") == told("whole")


def test_what_goes_on_online_begins_with_the_offline_score(tmp_path, pendulum, capsys):
    more = ["--steps", "8", "--seeds", "2", "--critic-hidden", "8", "--eval-every", "8"]
    more += ["--seeds-as", "population"]
    assert offline(tmp_path, pendulum, *more, name="before") == 0
    command = ["train", "--from", str(tmp_path / "before"), "--steps", "40", "--eval-every", "40", "--quiet"]
    command += ["--warmup-steps", "10", "--replay-capacity", "60", "--out", str(tmp_path), "--name", "after"]
    command += ["--eval-episodes", "2", "--checkpoint-every", "20", "--no-tensorboard", "--json"]
    command += ["--seeds-as", "population"]
    assert main(command) == 0
    config = read_json(tmp_path / "after" / "config.json")
    assert (config["command"], config["agent"], config["seeds"]) == ("train", "td3_bc", [0, 1])
    newest = checkpoint.newest(tmp_path / "after")
    state = checkpoint.read_seed(newest, 0)["agent"]
    assert (state["steps"], state["updates"]) == (40, 8 + 30)
    first = checkpoint.read_seed(checkpoint.newest(tmp_path / "before"), 0)["agent"]["parts"]
    assert np.array_equal(first["mean"], state["parts"]["mean"])
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert {"finetune/drawdown_return", "finetune/gain_return", "eval/return_best"} <= set(metrics)
    assert main(["evaluate", str(tmp_path / "after"), "--episodes", "1"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--env", "gym/MountainCarContinuous-v0"], "have 3 observed values and 1 actions"),
        (["--env", "gym/CartPole-v1"], "offline agents need continuous actions"),
        (["--ref-min", "3"], "--ref-min and --ref-max go together"),
        (["--ref-min", "3", "--ref-max", "1"], "the second must be larger"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--fraction", "0.1"], "It is an option of bc"),
        (["--preset", "hoper-medium"], "Did you mean"),
    ],
)
def test_bad_options_are_one_sentence_and_leave_nothing(tmp_path, pendulum, capsys, more, message):
    command = ["offline", "iql", "--data", str(pendulum), "--env", "gym/Pendulum-v1", "--out", str(tmp_path / "out")]
    if "--env" in more:
        command = command[:4] + command[6:]
    assert main([*command, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_bad_data_are_one_sentence_and_leave_nothing(tmp_path, pendulum, capsys, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    with np.load(pendulum) as file:
        arrays = dict(file)
    arrays["actions"] = arrays["actions"] * 3
    np.savez(tmp_path / "wild.npz", **arrays)
    cases = {
        str(tmp_path / "wild.npz"): "outside of the environment's -2 to 2; --clip-actions moves",
        str(tmp_path / "nothing.hdf5"): "there is no file",
        "lab/pendulum/random": "an id ends in a version, -v0",
        "lab/pendulum/random-v0": "there is no dataset 'lab/pendulum/random-v0' in",
        str(tmp_path): "it has no data/metadata.json",
    }
    for source, message in cases.items():
        assert offline(tmp_path / "out", Path(source)) == 2, source
        assert message in capsys.readouterr().err, source
    assert not (tmp_path / "out").exists()
    assert offline(tmp_path / "out", tmp_path / "wild.npz", "--clip-actions", "--steps", "1", "--seeds", "1") == 0


def test_changed_data_do_not_go_on(tmp_path, pendulum, capsys):
    copy = tmp_path / "copy.npz"
    copy.write_bytes(pendulum.read_bytes())
    assert offline(tmp_path, copy, "--steps", "2", "--seeds", "1", agent="bc") == 0
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace('"done"', '"stopped"'))
    with np.load(pendulum) as file:
        np.savez(copy, **(dict(file) | {"rewards": np.zeros(420)}))
    assert main(["resume", str(tmp_path / "run")]) == 2
    assert "are not those that the run began with" in capsys.readouterr().err


SWEEP = """
agents = ["a2pr"]
datasets = ["{data}"]
seeds = 1
steps = 12
[options]
env = "gym/Pendulum-v1"
hidden = [[8, 8]]
critic_hidden = [[8, 8]]
vae_hidden = [[8, 8]]
batch_size = 8
mask = [0.5, 1.0]
eval_episodes = 1
diagnostics_every = 6
tensorboard = false
"""


def test_a_sweep_over_data_is_diagnosed_and_probed(tmp_path, pendulum, capsys):
    path = tmp_path / "masks.toml"
    path.write_text(SWEEP.format(data=pendulum))
    assert main(["sweep", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("neoteny offline a2pr --data") == 2
    path.write_text(SWEEP.format(data=pendulum).replace("[0.5, 1.0]", "[0.5]"))
    assert main(["sweep", str(path), "--out", str(tmp_path)]) == 0
    assert "done, eval/return" in capsys.readouterr().err
    (run,) = (path for path in (tmp_path / "masks").iterdir() if path.is_dir())
    assert {json.loads(line)["data"] for line in (tmp_path / "masks" / "results.jsonl").open()} == {str(pendulum)}
    names = {row.name for row in read_table(run)}
    networks = ("actor", "critics", "value_net", "vae_encoder", "vae_decoder")
    assert {f"plasticity/effective_rank/{network}" for network in networks} <= names
    assert main(["sweep", str(path), "--out", str(tmp_path)]) == 0
    assert "1 done" in capsys.readouterr().err
    more = ["--samples", "8", "--steps", "2", "--draws", "2", "--no-layers", "--json", "--quiet"]
    assert main(["probe", str(run), *more]) == 0
    assert {row["network"] for row in json.loads(capsys.readouterr().out)["networks"]} == set(networks)
    path.write_text(SWEEP.format(data="lab/nothing-v0"))
    assert main(["sweep", str(path), "--dry-run"]) == 2
    assert "lab/nothing-v0" in capsys.readouterr().err


def test_agents_are_sent_to_their_own_commands(capsys, pendulum):
    assert main(["train", "a2pr", "--env", "gym/Pendulum-v1"]) == 2
    assert "neoteny offline a2pr --data" in capsys.readouterr().err
    assert main(["offline", "sac", "--data", str(pendulum)]) == 2
    assert "neoteny train sac --env" in capsys.readouterr().err
    assert main(["offline", "a2rp", "--data", str(pendulum)]) == 2
    assert "Did you mean 'a2pr'" in capsys.readouterr().err


def test_antmaze_needs_shifted_rewards(tmp_path, pendulum, capsys):
    copy = tmp_path / "antmaze-umaze-v2.npz"
    copy.write_bytes(pendulum.read_bytes())
    assert offline(tmp_path / "out", copy) == 2
    assert "--reward-shift -1; --force" in capsys.readouterr().err


def test_inspect_says_what_data_hold(pendulum, capsys):
    assert main(["inspect", str(pendulum)]) == 0
    page = capsys.readouterr().out
    assert "417 transitions in 3 episodes" not in page
    assert "417 in 3 episodes (1 of them unfinished)" in page
    assert main(["inspect", str(pendulum), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["transitions"], told["time_limits"], told["terminals"]) == (417, 2, 0)
    assert len(told["fingerprint"]) == 64


def test_reference_pairs_come_in_order_and_from_the_same_task():
    data = Dataset(make_transitions(10, 3, 1), About("x", references={"lab": (0.0, 2.0)}))
    assert list(references_of(data, "mujoco/Hopper-v5", (1.0, 5.0))) == ["given", "lab", "d4rl"]
    assert references_of(data, "gym/Hopper-v4")["d4rl"] == (-20.272305, 3234.3)
    assert list(references_of(data, "gym/Pendulum-v1")) == ["lab"]
    assert same_task("gym/Hopper-v4", "mujoco/Hopper-v5")
    assert not same_task("mujoco/Walker2d-v5", "mujoco/HalfCheetah-v5")
