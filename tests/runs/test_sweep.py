"""Sweeps: what a file stands for, what is refused, and that nothing is lost when trials or workers are killed."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from runs.cli import main
from runs.errors import UsageError
from runs.files import read_json
from runs.record import read_table
from runs.sweep import Job, run_jobs
from runs.sweep_display import SweepDisplay, newest
from runs.sweep_file import Trial, read_trials
from runs.trial import CHECKOUT

TINY = """
agents = ["td3"]
envs = ["gym/Pendulum-v1"]
seeds = 1
steps = {steps}

[options]
discount = [0.9, 0.99]
hidden = [8, 8]
batch_size = 8
warmup_steps = 100
replay_capacity = 2_000
eval_every = 1_000
eval_episodes = 1
checkpoint_every = 200
tensorboard = false
"""
NAMES = ["td3-gym-Pendulum-v1-discount=0.9", "td3-gym-Pendulum-v1-discount=0.99"]


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def names(folder: Path, text: str) -> list[str]:
    return [trial.name for trial in read_trials(write(folder, text))]


def test_lists_multiply_and_names_show_what_varies(tmp_path):
    trials = read_trials(
        write(
            tmp_path,
            """
            agents = ["td3", "sac"]
            envs = ["gym/Pendulum-v1", "dmc/cartpole-swingup"]
            seeds = 2
            steps = 500
            [options]
            learning-rate = [1e-3, 3e-5]
            hidden = [[64, 64], [32]]
            layer_norm = [true]
            batch_size = 32
            [agent.td3]
            exploration_noise = [0.1, 0.2, 0.3]
            [env."dmc/cartpole-swingup"]
            steps = 700
            """,
        )
    )
    assert len(trials) == 2 * (2 * 2 * 1) * (3 + 1)
    assert len({trial.name for trial in trials}) == len(trials)
    assert trials[0].name == (
        "td3-gym-Pendulum-v1-exploration_noise=0.1-hidden=64x64-layer_norm=true-learning_rate=0.001"
    )
    assert trials[-1].name == "sac-dmc-cartpole-swingup-hidden=32-layer_norm=true-learning_rate=3e-05"
    assert {trial.options["steps"] for trial in trials if trial.where.startswith("dmc")} == {700}
    assert {trial.options["steps"] for trial in trials if trial.where.startswith("gym")} == {500}
    flags = " ".join(trials[0].flags)
    assert "--env gym/Pendulum-v1 --threads 1 --seeds 2 --steps 500 --learning-rate 0.001 --hidden 64 64" in flags
    assert "--layer-norm" in flags.split()


def test_explicit_runs_take_the_tables_and_win_over_them(tmp_path):
    trials = read_trials(
        write(
            tmp_path,
            """
            agents = ["td3"]
            envs = ["gym/Pendulum-v1"]
            [options]
            discount = [0.9, 0.99]
            batch_size = 32
            [[run]]
            agent = "sac"
            env = "gym/Pendulum-v1"
            batch_size = 64
            [[run]]
            agent = "dqn"
            env = "gym/CartPole-v1"
            discount = 0.5
            tensorboard = false
            """,
        )
    )
    assert [trial.name for trial in trials] == [
        "td3-gym-Pendulum-v1-discount=0.9",
        "td3-gym-Pendulum-v1-discount=0.99",
        "sac-gym-Pendulum-v1-batch_size=64-discount=0.9",
        "sac-gym-Pendulum-v1-batch_size=64-discount=0.99",
        "dqn-gym-CartPole-v1-discount=0.5-tensorboard=false",
    ]
    assert [trial.options["batch_size"] for trial in trials] == [32, 32, 64, 64, 32]
    assert "--no-tensorboard" in trials[-1].flags


def test_a_longer_list_keeps_the_names_that_were_there(tmp_path):
    text = 'agents = ["td3"]\nenvs = ["gym/Pendulum-v1"]\noptions.discount = {}'
    assert set(names(tmp_path, text.format([0.9]))) < set(names(tmp_path, text.format([0.5, 0.9])))


GRID = 'agents = ["td3"]\nenvs = ["gym/Pendulum-v1"]\n'
BAD_FILES = {
    "no TOML": ("agents = [", "is not TOML"),
    "key": (GRID + "agnets = []", "unknown key 'agnets'. Did you mean 'agents' or 'agent'?"),
    "nothing": ("steps = 5", "it stands for no trial"),
    "no envs": ('agents = ["td3"]', "it has `agents`, but no `envs`"),
    "one word": ('agents = "td3"\nenvs = ["gym/Pendulum-v1"]', "`agents` must be a list of names, got 'td3'"),
    "agent": ('agents = ["td4"]\nenvs = ["gym/Pendulum-v1"]', "unknown agent 'td4'. Did you mean 'td7' or 'td3'?"),
    "env": ('agents = ["td3"]\nenvs = ["gym/Pendulm-v1"]', "unknown environment 'gym/Pendulm-v1'. Did you mean 'gym/P"),
    "option": (GRID + "options.discont = 0.9", "'td3' has no option 'discont'. Did you mean 'discount'"),
    "option of another agent": (GRID + "options.huber = true", "'td3' has no option 'huber'"),
    "settled": (GRID + 'options.out = "here"', "the sweep sets 'out' of each trial itself"),
    "agent table": (GRID + "[agent.sac]\ndiscount = 0.9", "no trial has the agent of [agent.sac]. It is one of td3"),
    "seeds as list": (GRID + "seeds = [0, 1, 2]", "`seeds` is how many and `seed` the first of them"),
    "no values": (GRID + "options.discount = []", "the list of 'discount' is empty"),
    "list in list": (GRID + "options.discount = [[0.9, 0.5]]", "'discount' needs one value, or a list of them"),
    "no list": (GRID + "options.hidden = 64", "'hidden' needs a list, in a list of lists for several, got 64"),
    "no switch": (GRID + 'options.tensorboard = "no"', "'tensorboard' takes true or false, got 'no'"),
    "a switch": (GRID + "options.discount = true", "'discount' takes no true or false, got True"),
    "a date": (GRID + "options.discount = 2026-01-01", "'discount' needs a number, a word, true or false"),
    "threads": (GRID + "options.threads = 0", "'threads' must be at least 1 in a sweep"),
    "run": ('[run]\nagent = "td3"', "an explicit trial starts with [[run]]"),
    "run without env": ('[[run]]\nagent = "td3"', "a [[run]] needs `env`, one name"),
    "twice": (
        GRID + "options.discount = [0.9, 0.90]",
        "two trials would have the folder 'td3-gym-Pendulum-v1-discount",
    ),
    "number": (GRID + 'steps = "many"', "trial td3-gym-Pendulum-v1: flag '--steps' needs a whole number, got 'many'"),
    "range": (GRID + "options.discount = [0.9, 1.5]", "discount=1.5: discount must be between 0 and 1, got 1.5"),
    "preset": (GRID + 'options.preset = "smal"', "'td3' has no preset 'smal'. Did you mean 'small'?"),
    "discrete agent": ('agents = ["dqn"]\nenvs = ["gym/Pendulum-v1"]', "'dqn' needs discrete actions"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=list(BAD_FILES))
def test_bad_files_are_one_sentence_and_leave_nothing(text, message, tmp_path, capsys):
    path = write(tmp_path, text)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"neoteny: '{path}'")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


BAD_FLAGS = {
    "file": (["none.toml"], "cannot read 'none.toml': No such file"),
    "engine": (["--engine", "slurm"], "unknown engine 'slurm'. It is one of local, ray"),
    "cores": (["--cores", "-1"], "--cores must be 0 or more, got -1"),
    "retries": (["--retries", "-2"], "--retries must be 0 or more, got -2"),
    "gpus": (["--gpus", "1"], "--gpus is for --engine ray"),
    "name": (["--name", "a/b"], "--name must be a plain folder name, got 'a/b'"),
    "folder": (["--out", "/proc/sweeps"], "cannot write to '/proc/sweeps/mine'"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS.values(), ids=list(BAD_FLAGS))
def test_bad_flags_are_one_sentence(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = [] if flags[0] == "none.toml" else [str(write(tmp_path, TINY.format(steps=300)))]
    assert main(["sweep", *file, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_dry_run_prints_commands_that_train_takes_and_writes_nothing(tmp_path, capsys):
    from runs.train import prepare

    path = write(tmp_path, TINY.format(steps=300))
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr()
    commands = [shlex.split(line) for line in said.out.splitlines()]
    assert [command[:3] for command in commands] == [["neoteny", "train", "td3"]] * 2
    assert [command[-4:] for command in commands] == [
        ["--out", str(tmp_path / "out" / "mine"), "--name", name] for name in NAMES
    ]
    for command in commands:
        config, _ = prepare(command[2], command[3:])
        assert (config.steps, config.seeds, config.threads) == (300, (0,), 1)
    assert "2 trials, 2 seeds, 600 steps" in said.err
    assert list(tmp_path.iterdir()) == [path]


class ScriptedEngine:
    """Ends one job at every fifth question, with the next of its exit codes; keeps what ran side by side."""

    def __init__(self, cores: int, codes: dict[str, list[int]]):
        self.cores, self.codes = cores, codes
        self.running: list[str] = []
        self.commands: list[tuple[str, str]] = []
        self.together: list[set[str]] = []
        self.questions = 0
        self.asked_to_stop = False

    def start(self, name: str, arguments: Sequence[str], log: Path, cores: int) -> None:
        assert cores <= self.cores
        self.running.append(name)
        self.commands.append((name, arguments[0]))
        self.together.append(set(self.running))
        run = log.with_suffix("")
        run.mkdir(exist_ok=True)
        (run / "config.json").touch()

    def finished(self) -> list[tuple[str, int]]:
        self.questions += 1
        if not self.running or self.questions % 5:
            return []
        name = self.running.pop(0)
        return [(name, self.codes[name].pop(0))]

    def stop(self) -> None:
        self.asked_to_stop = True

    def close(self) -> None:
        pass


def schedule(
    folder: Path,
    engine: ScriptedEngine,
    costs: dict[str, int],
    retries: int = 2,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Job]:
    jobs = [Job(Trial(name, "td3", "gym/Pendulum-v1", {}), folder / name, 1, cost, 10) for name, cost in costs.items()]
    run_jobs(jobs, engine, retries, stopping, SweepDisplay(jobs, quiet=True), lambda: None)
    return {job.trial.name: job for job in jobs}


def test_trials_never_take_more_cores_than_there_are(tmp_path):
    costs = {"a": 1, "b": 2, "c": 1, "d": 5, "e": 1}
    engine = ScriptedEngine(3, {name: [0] for name in costs})
    jobs = schedule(tmp_path, engine, costs)
    assert {job.state for job in jobs.values()} == {"done"}
    assert all(sum(costs[name] for name in together) <= 3 for together in engine.together if together != {"d"})
    assert {"d"} in engine.together  # wants more than there is, so it runs alone
    assert any(len(together) == 2 for together in engine.together)


def test_killed_trials_are_resumed_and_hopeless_ones_given_up(tmp_path):
    codes = {"fine": [0], "killed": [-9, 3, 0], "always": [-9] * 9, "refused": [2], "defect": [1] * 9}
    for name in codes:
        (tmp_path / f"{name}.log").write_text("ValueError: the same every time\n")
    engine = ScriptedEngine(2, {name: list(each) for name, each in codes.items()})
    jobs = schedule(tmp_path, engine, dict.fromkeys(codes, 1))
    assert {name: (job.state, job.attempts) for name, job in jobs.items()} == {
        "fine": ("done", 1),
        "killed": ("done", 3),
        "always": ("failed", 3),
        "refused": ("failed", 1),
        "defect": ("failed", 2),
    }
    assert [command for name, command in engine.commands if name == "killed"] == ["train", "resume", "resume"]
    assert jobs["always"].error == "killed by signal 9"
    assert jobs["killed"].error is None


def test_a_stop_starts_nothing_more_and_waits_for_what_runs(tmp_path):
    engine = ScriptedEngine(2, {"a": [3], "b": [0], "c": [0]})
    jobs = schedule(tmp_path, engine, {"a": 1, "b": 1, "c": 1}, stopping=lambda: len(engine.commands) == 2)
    assert engine.asked_to_stop
    assert {name: job.state for name, job in jobs.items()} == {"a": "stopped", "b": "done", "c": "waiting"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path, dict]:
    """A sweep of two trials as a user starts it: its file, its folder, its --json summary."""
    folder = tmp_path_factory.mktemp("finished")
    path = write(folder, TINY.format(steps=300))
    ended = subprocess.run(
        [sys.executable, "-m", "runs.cli", "sweep", str(path), "--out", str(folder / "out"), "--json"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"{NAMES[0]}: done, eval/return" in ended.stderr
    assert "next: neoteny report" in ended.stderr
    return path, folder / "out" / "mine", json.loads(ended.stdout)


def test_a_sweep_is_runs_with_logs_and_one_table(finished):
    _, folder, summary = finished
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*NAMES, *(f"{name}.log" for name in NAMES), "sweep.json", "results.jsonl"]
    )
    for name in NAMES:
        assert (folder / f"{name}.log").read_text().startswith("$ neoteny train td3 --env gym/Pendulum-v1")
        assert summary["trials"][name]["state"] == "done"
        assert summary["trials"][name]["metrics"]["eval/return"]["seeds"] == 1
    listed = read_json(folder / "sweep.json")["trials"]
    assert [(trial["name"], trial["state"], trial["attempts"]) for trial in listed] == [(n, "done", 1) for n in NAMES]
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {(row["trial"], row["discount"]) for row in rows} == {(NAMES[0], 0.9), (NAMES[1], 0.99)}
    for name in NAMES:
        last = [row for row in read_table(folder / name) if row.name == "eval/return"][-1]
        found = [row for row in rows if row["trial"] == name and row["name"] == "eval/return"]
        assert [(row["seed"], row["step"], row["value"]) for row in found] == [(0, last.step, last.value)]
        assert found[0]["hidden"] == [8, 8]
    assert newest(folder / NAMES[0], "eval/return")[1] == summary["trials"][NAMES[0]]["metrics"]["eval/return"]["mean"]


def test_started_again_it_skips_what_is_done(finished, capsys):
    path, folder, _ = finished
    before = {run: (folder / run / "metrics.jsonl").stat().st_mtime_ns for run in NAMES}
    assert main(["sweep", str(path), "--out", str(folder.parent)]) == 0
    assert "2 done" in capsys.readouterr().err
    assert {run: (folder / run / "metrics.jsonl").stat().st_mtime_ns for run in NAMES} == before
    assert read_json(folder / "sweep.json")["trials"][0]["attempts"] == 1


def test_a_run_that_the_file_no_longer_describes_is_refused(finished, tmp_path, capsys):
    _, folder, _ = finished
    path = write(tmp_path, TINY.format(steps=400))
    assert main(["sweep", str(path), "--out", str(folder.parent)]) == 2
    error = capsys.readouterr().err
    assert f"'{folder / NAMES[0]}' has steps 300, '{path}' now says 400; remove that folder" in error


def test_what_is_not_a_run_is_left_alone(tmp_path, capsys):
    path = write(tmp_path, TINY.format(steps=300))
    folder = tmp_path / "out" / "mine" / NAMES[1]
    folder.mkdir(parents=True)
    (folder / "precious").write_text("data")
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "is in the way of a trial, and it is not a run" in capsys.readouterr().err
    assert (folder / "precious").read_text() == "data"


def start_sweep(path: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "runs.cli", "sweep", str(path), "--out", str(path.parent / "out"), *flags]
    return subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def trial_processes(folder: Path) -> dict[int, int]:
    """Processes of the trials below `folder` with the processes that started them."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "runs.trial" in words and any(str(folder) in word for word in words):
                found[int(entry.name)] = int(words[words.index("runs.trial") + 1])
    return found


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    give_up = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.1)


def has_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob("step_*/manifest.json"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks up processes in /proc")
def test_a_killed_trial_is_resumed_and_a_stopped_sweep_goes_on(tmp_path):
    path = write(tmp_path, TINY.format(steps=3_000).replace("[0.9, 0.99]", "[0.9]"))
    run = tmp_path / "out" / "mine" / NAMES[0]
    sweep = start_sweep(path)
    try:
        wait_for(lambda: has_checkpoint(run))
        (victim,) = trial_processes(tmp_path)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: (others := trial_processes(tmp_path)) and victim not in others)
        wait_for(lambda: read_json(run / "status.json").get("pid") in trial_processes(tmp_path))
        sweep.send_signal(signal.SIGTERM)
        _, said = sweep.communicate(timeout=120)
    finally:
        sweep.kill()
    assert "killed by signal 9; to be resumed, try 2 of 4" in said
    assert "go on with: neoteny sweep" in said
    assert sweep.returncode == 3
    assert trial_processes(tmp_path) == {}
    assert read_json(run / "status.json")["state"] == "stopped"

    again = start_sweep(path)
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert f"{NAMES[0]}: resumed" in said
    ends = [row.step for row in read_table(run) if row.name == "train/length"]
    assert ends == list(range(200, 3_001, 200))  # no row lost, none doubled


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `sweep` (ray)")
def test_ray_loses_nothing_when_a_worker_is_killed(tmp_path):
    path = write(tmp_path, TINY.format(steps=3_000))
    runs = [tmp_path / "out" / "mine" / name for name in NAMES]
    sweep = start_sweep(path, "--engine", "ray", "--cores", "2")
    try:
        wait_for(lambda: all(map(has_checkpoint, runs)), 500)
        workers = set(trial_processes(tmp_path).values())
        assert len(workers) == 2
        os.kill(workers.pop(), signal.SIGKILL)
        _, said = sweep.communicate(timeout=500)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, said
    assert said.count("killed by signal 9; to be resumed, try 2 of 4") == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "mine" / "results.jsonl").read_text().splitlines()]
    assert {row["trial"]: row["step"] for row in rows if row["name"] == "eval/return"} == dict.fromkeys(NAMES, 3_000)
    for run in runs:
        assert [row.step for row in read_table(run) if row.name == "train/length"] == list(range(200, 3_001, 200))


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'agents = ["\xe9"]')
    with pytest.raises(UsageError, match=r"latin\.toml' is not TOML"):
        read_trials(tmp_path / "latin.toml")
