"""Whole runs: what lies in the folder, how they end, and what is kept when they end badly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from agents import td3
from runs import checkpoint
from runs.cli import main
from runs.config import RunConfig
from runs.files import read_json
from runs.record import read_table
from runs.statistics import final_values
from runs.training import Episodes, Training
from tests.agents.fakes import make_step

ROOT = Path(__file__).parents[2]
QUICK = ["--env", "gym/Pendulum-v1", "--warmup-steps", "100", "--hidden", "16", "16", "--batch-size", "16"]
QUICK += ["--env-set", "max_episode_steps=50", "--eval-episodes", "2", "--quiet", "--no-tensorboard"]


def train(tmp_path: Path, *more: str, agent: str = "td3") -> int:
    return main(["train", agent, *QUICK, "--out", str(tmp_path), "--name", "run", *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """A run of two seeds in two processes, as a user starts it; its folder and its --json summary."""
    out = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "-m", "runs.cli", "train", "sac", *QUICK, "--out", str(out), "--name", "run"]
    command += ["--steps", "600", "--seeds", "2", "--seed", "5", "--json", "--checkpoint-every", "150"]
    command += ["--seeds-as", "processes"]
    command[command.index("--no-tensorboard")] = "--histograms"
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return out / "run", json.loads(ended.stdout)


def test_run_folder_holds_what_the_design_names(finished):
    run, _ = finished
    assert {path.name for path in run.iterdir()} == {
        "config.json", "metrics.jsonl", "status.json", "checkpoints", "tensorboard"
    }  # fmt: skip
    status = read_json(run / "status.json")
    assert (status["state"], status["step"], status["of"], status["error"]) == ("done", 600, 600, None)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_450", "step_600"]
    assert {path.name for path in (run / "tensorboard").iterdir()} == {"seed_5", "seed_6"}


def test_table_has_standard_names_for_every_seed_and_evaluations_on_schedule(finished):
    run, _ = finished
    rows = read_table(run)
    for seed in (5, 6):
        names = {row.name for row in rows if row.seed == seed}
        assert {"eval/return", "train/return", "train/length", "loss/critic", "speed/steps_per_second"} <= names
        evaluated = [row.step for row in rows if row.seed == seed and row.name == "eval/return"]
        assert evaluated == list(range(0, 601, 30))
        episodes = [(row.step, row.value) for row in rows if row.seed == seed and row.name == "train/length"]
        assert episodes == [(step, 50.0) for step in range(50, 601, 50)]


def test_summary_is_computed_from_the_table(finished):
    run, summary = finished
    assert summary["run"] == str(run)
    score = summary["metrics"]["eval/return"]
    values = list(final_values(read_table(run), "eval/return").values())
    assert score["seeds"] == 2
    assert score["mean"] == pytest.approx(sum(v for v in values if v is not None) / 2)
    assert score["low"] <= score["mean"] <= score["high"]


def test_histograms_of_every_network_stand_in_tensorboard_alone(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = finished
    for seed in (5, 6):
        events = EventAccumulator(str(run / "tensorboard" / f"seed_{seed}"), {"histograms": 0})
        events.Reload()
        tags = events.Tags()["histograms"]
        assert {tag.split("/")[1] for tag in tags} == {"actor", "critics"}  # no targets
        found = events.Histograms(tags[0])
        assert [event.step for event in found] == list(range(0, 601, 30))
        state = checkpoint.read_seed(checkpoint.newest(run), seed)["agent"]["parts"]
        _, network, name = tags[0].split("/")
        assert found[-1].histogram_value.num == state[network][name].numel()
        assert found[-1].histogram_value.sum == pytest.approx(float(state[network][name].sum()), abs=1e-4)
    assert not [row for row in read_table(run) if row.name.startswith("weights/")]


def test_config_reloads_the_run(finished, tmp_path):
    run, _ = finished
    config = RunConfig.load(run)
    assert (config.agent, config.env, config.seeds) == ("sac", "gym/Pendulum-v1", (5, 6))
    assert config.agent_config.hidden == (16, 16)
    assert config.environment["versions"]["torch"] == torch.__version__
    config.save(tmp_path)
    assert RunConfig.load(tmp_path) == config


def test_manifest_checks_every_file_and_counts_rows(finished):
    run, _ = finished
    newest = checkpoint.newest(run)
    manifest = read_json(newest / "manifest.json")
    assert manifest["step"] == 600
    assert manifest["seed_steps"] == {"5": 600, "6": 600}
    rows = read_table(run)
    assert manifest["seed_rows"] == {seed: sum(row.seed == int(seed) for row in rows) for seed in ("5", "6")}
    assert len(manifest["state_hash"]) == 64
    state = checkpoint.read_seed(newest, 5)
    assert state["agent"]["steps"] == 600


def test_damaged_checkpoint_is_noticed(finished, tmp_path):
    run, _ = finished
    copy = tmp_path / "step_600"
    copy.mkdir()
    for path in checkpoint.newest(run).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = bytearray((copy / "seed_5.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "seed_5.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"seed_5\.pt is damaged"):
        checkpoint.read_seed(copy, 5)
    with pytest.raises(ValueError, match="has no seed 9; it has 5, 6"):
        checkpoint.read_seed(copy, 9)


def test_evaluate_scores_every_seed_and_repeats_itself(finished, capsys):
    run, _ = finished
    scores = []
    for _ in range(2):
        assert main(["evaluate", str(run), "--episodes", "3", "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[1]
    assert scores[0]["step"] == 600
    assert scores[0]["metrics"]["eval/return"]["seeds"] == 2
    assert -2000 < scores[0]["metrics"]["eval/return"]["mean"] < 0
    assert main(["evaluate", str(run), "--episodes", "3", "--seed", "7"]) == 0
    assert "eval/return" in capsys.readouterr().out


def test_watch_writes_a_video_of_one_episode(finished, tmp_path, capsys):
    import av

    run, _ = finished
    film = tmp_path / "film.mp4"
    assert main(["watch", str(run), "--out", str(film), "--max-steps", "20", "--size", "120"]) == 0
    assert "20 steps" in capsys.readouterr().out
    with av.open(str(film)) as video:
        assert len(list(video.decode(video=0))) == 20
    assert main(["watch", str(run), "--seed", "1"]) == 2
    assert "has no seed 1; it has 5, 6" in capsys.readouterr().err


def test_report_of_a_run(finished, tmp_path, capsys):
    run, _ = finished
    assert main(["report", str(run), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "report.html") in capsys.readouterr().out


def test_one_process_or_several_make_the_same_run(finished, tmp_path):
    """Seed 6 alone, in this process, must repeat what it did beside seed 5: same rows, same state."""
    run, _ = finished
    threads = torch.get_num_threads()
    try:
        more = ["--steps", "600", "--seeds", "1", "--seed", "6", "--checkpoint-every", "150"]
        assert train(tmp_path, *more, agent="sac") == 0
    finally:
        torch.set_num_threads(threads)

    def told(folder: Path) -> list:
        return [(r.step, r.name, r.value) for r in read_table(folder) if r.seed == 6 and "speed" not in r.name]

    assert told(run) == told(tmp_path / "run")
    alone, beside = (checkpoint.read_seed(checkpoint.newest(f), 6) for f in (tmp_path / "run", run))
    assert checkpoint.state_hash(alone) == checkpoint.state_hash(beside)


@pytest.mark.parametrize("env_id", ["gym/Pendulum-v1", "mujoco/Hopper-v5"])
def test_overlapped_runs_repeat_and_are_one_round_of_updates_behind(tmp_path, env_id):
    hashes, updates = [], []
    for name, more in (("a", ["--overlap"]), ("b", ["--overlap"]), ("c", [])):
        flags = [*QUICK, "--env", env_id, "--steps", "160", "--num-envs", "2", "--seeds", "1", *more]
        assert main(["train", "td3", *flags[2:], "--out", str(tmp_path), "--name", name]) == 0
        state = checkpoint.read_seed(checkpoint.newest(tmp_path / name), 0)
        hashes.append(checkpoint.state_hash(state))
        updates.append(state["agent"]["updates"])
    assert hashes[0] == hashes[1] != hashes[2]
    assert updates == [58, 58, 60]


def test_runs_without_a_name_are_numbered(tmp_path):
    for _ in range(2):
        assert main(["train", "td3", *QUICK, "--steps", "20", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["td3-gym-Pendulum-v1", "td3-gym-Pendulum-v1-2"]


def interrupt(tmp_path: Path, number: signal.Signals, seeds: int) -> tuple[int, str, Path]:
    """Start a long run, send the signal to its process group once it trains, and wait for it."""
    command = [sys.executable, "-m", "runs.cli", "train", "td3", *QUICK, "--out", str(tmp_path), "--name", "run"]
    command += ["--steps", "500000", "--seeds", str(seeds), "--eval-every", "100000"]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    table = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = read_table(tmp_path / "run") if table.exists() else []
        if len({row.seed for row in rows if row.step >= 1000}) == seeds:
            break
        time.sleep(0.1)
    os.killpg(child.pid, number)
    _, errors = child.communicate(timeout=60)
    return child.returncode, errors, tmp_path / "run"


@pytest.mark.parametrize(("number", "seeds"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_interrupted_run_saves_a_checkpoint_and_says_so(tmp_path, number, seeds):
    code, errors, run = interrupt(tmp_path, number, seeds)
    assert code == 3, errors
    status = read_json(run / "status.json")
    assert status["state"] == "stopped"
    assert 1000 <= status["step"] < 500_000
    newest = checkpoint.newest(run)
    for seed in range(seeds):
        state = checkpoint.read_seed(newest, seed)
        assert state["agent"]["steps"] >= status["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [newest.name]


def test_diverged_run_stops_with_step_and_quantity_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    true_loss = td3.critic_loss

    def loss(critics, batch, target):
        value, metrics = true_loss(critics, batch, target)
        broken = torch.nan if loss.calls > 300 else 1.0
        loss.calls += 1
        return value * broken, {**metrics, "loss/critic": metrics["loss/critic"] * broken}

    loss.calls = 0
    monkeypatch.setattr(td3, "critic_loss", loss)
    assert train(tmp_path, "--steps", "1000", "--seeds", "1", "--checkpoint-every", "200") == 1
    said = capsys.readouterr().err
    assert "its last checkpoint is kept" in said
    assert re.search(r"loss/critic became nan at step 4\d\d of seed 0", said), said
    status = read_json(tmp_path / "run" / "status.json")
    assert status["state"] == "failed"
    assert "loss/critic" in status["error"]
    kept = checkpoint.newest(tmp_path / "run")
    assert kept.name == "step_400"
    state = checkpoint.read_seed(kept, 0)
    assert all(value.isfinite().all() for value in state["agent"]["parts"]["critics"].values())


def test_nan_observation_stops_the_run(tmp_path, monkeypatch, capsys):
    from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv

    true_step, calls = InvertedPendulumEnv.step, 0

    def step(self, action):
        nonlocal calls
        calls += 1
        obs, *rest = true_step(self, action)
        return (obs * float("nan") if calls > 1000 else obs), *rest

    monkeypatch.setattr(InvertedPendulumEnv, "step", step)
    flags = ["--env", "gym/InvertedPendulum-v5", "--steps", "2000", "--seeds", "1", "--eval-every", "2000"]
    assert main(["train", "td3", *QUICK[2:], *flags, "--out", str(tmp_path), "--name", "run"]) == 1
    assert re.search(r"the observation of row 0 is not finite, at step \d+ of seed 0", capsys.readouterr().err)
    assert "observation" in read_json(tmp_path / "run" / "status.json")["error"]


def test_killed_seed_is_reported(tmp_path):
    """A child that dies without a word (out of memory, kill -9) fails the run instead of hanging it."""
    command = [sys.executable, "-m", "runs.cli", "train", "td3", *QUICK, "--out", str(tmp_path), "--name", "run"]
    command += ["--steps", "500000", "--seeds", "2", "--seeds-as", "processes", "--eval-every", "100000"]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline, children = time.monotonic() + 120, []
    while time.monotonic() < deadline and not children:
        time.sleep(0.2)
        table = tmp_path / "run" / "metrics.jsonl"
        if table.exists() and len({row.seed for row in read_table(tmp_path / "run") if row.step >= 1000}) == 2:
            found = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            children = [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == 1
    assert "was killed (exit -9)" in errors
    assert read_json(tmp_path / "run" / "status.json")["state"] == "failed"


def test_episodes_are_reported_with_their_step():
    episodes = Episodes()
    going = make_step(torch.zeros(2, 3))
    ended = make_step(torch.zeros(2, 3), truncated=True)
    ended.episode_return[:] = torch.tensor([3.5, -1.0])
    ended.episode_length[:] = torch.tensor([7, 9])
    episodes.add(going, 2, torch.zeros(1, dtype=torch.int64))
    episodes.add(ended, 4, torch.tensor([0, 1]))
    assert episodes.drain() == [(4, 3.5, 7.0, 0), (4, -1.0, 9.0, 1)]
    assert episodes.drain() == []


def test_training_state_holds_everything_that_moves(tmp_path):
    """A loop restored from another's state goes on bit for bit: agent, replay, generators and environments."""
    import dataclasses

    class Silent:
        def rows(self, *_): ...
        def progress(self, *_): ...
        def lost(self, *_): ...
        def saved(self, *_): ...

    config = dataclasses.replace(
        RunConfig.load(make_config(tmp_path)), steps=10_000, eval_every=10_000, checkpoint_every=10_000
    )
    whole = Training(config, [0], tmp_path, Silent())
    for _ in range(250):
        whole.advance()
    saved = tmp_path / "state.pt"
    torch.save(whole.state_dict(), saved)
    other = Training(config, [0], tmp_path, Silent())
    other.load_state_dicts([torch.load(saved, weights_only=True)])
    for training in (whole, other):
        for _ in range(250):
            training.advance()
    assert checkpoint.state_hash(whole.state_dict()) == checkpoint.state_hash(other.state_dict())


@pytest.mark.parametrize(("agent", "env"), [("td3", "gym/Pendulum-v1"), ("dqn", "gym/CartPole-v1")])
def test_diagnostics_are_recorded_and_change_nothing(agent, env, tmp_path):
    common = ["--steps", "400", "--seeds", "1", "--with", "nap", "--env", env, *QUICK[2:], "--out", str(tmp_path)]
    common += ["--update-every", "1", *(["--updates-per-round", "1"] if agent == "dqn" else [])]
    for name, more in {"plain": [], "measured": ["--diagnostics-every", "100"]}.items():
        assert main(["train", agent, *common, "--name", name, *more]) == 0
    rows = {name: read_table(tmp_path / name) for name in ("plain", "measured")}
    kept = {name: [row for row in of if row.name.startswith(("train/", "eval/"))] for name, of in rows.items()}
    assert kept["plain"] == kept["measured"]
    assert [r.step for r in rows["measured"] if r.name == "plasticity/weight_norm"] == [200, 300, 400]  # warm-up: 100
    names = {row.name for row in rows["measured"]} - {row.name for row in rows["plain"]}
    whole = {f"plasticity/{what}" for what in ("dormant_fraction", "effective_rank", "weight_norm", "gradient_norm")}
    assert whole <= names
    assert {name for name in names if name.startswith("speed/")} == {"speed/diagnostics_seconds"}
    states = [checkpoint.read_seed(checkpoint.newest(tmp_path / name), 0)["agent"] for name in rows]
    assert checkpoint.state_hash(states[0]) == checkpoint.state_hash(states[1])


def test_diagnostics_on_no_schedule_are_refused(tmp_path, capsys):
    assert train(tmp_path, "--diagnostics-every", "0") == 2
    assert "diagnostics_every must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def make_config(tmp_path: Path) -> Path:
    from runs.train import make_run_folder, prepare

    config, options = prepare("td3", [*QUICK, "--out", str(tmp_path), "--name", "config"])
    return make_run_folder(config, options)
