"""`neoteny resume`: every agent and backend goes on bit for bit, and what cannot go on says why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import checkpoint
from runs.cli import main
from runs.config import RunConfig
from runs.files import read_json, write_json
from runs.record import read_table
from runs.recovery import differences
from runs.resume import require_environment
from tests.runs.fault_server import ROOT, FaultServer
from tests.runs.same_run import assert_same, put_together, told

COMMON = ["--steps", "120", "--hidden", "8", "8", "--batch-size", "4", "--warmup-steps", "10", "--eval-every", "50"]
COMMON += ["--checkpoint-every", "40", "--quiet"]
# agent, environment, more flags; a ring of 50 slots wraps, and episodes end within the run.
SHORT = ["--replay-capacity", "50", "--eval-episodes", "2"]
BRIEF = ["--env-set", "max_episode_steps=35"]
RUNS = {
    "td3 gym, two environments": (
        "td3",
        "gym/Pendulum-v1",
        [*SHORT, *BRIEF, "--num-envs", "2", "--diagnostics-every", "9"],
    ),
    "ddpg mujoco": ("ddpg", "mujoco/HalfCheetah-v5", [*BRIEF, "--eval-episodes", "1", "--n-step", "3"]),
    "sac mujoco, dying": ("sac", "mujoco/Hopper-v5", [*SHORT, "--num-envs", "3"]),
    "td3 mujoco in the background": ("td3", "mujoco/Hopper-v5", [*SHORT, "--overlap", "--layer-norm"]),
    "crossq, renormalising, two environments": (
        "crossq",
        "gym/Pendulum-v1",
        [*SHORT, *BRIEF, "--num-envs", "2", "--critic-hidden", "8", "8", "--renormalise-after", "20"],
    ),
    "td7, judging policies": (
        "td7",
        "mujoco/Hopper-v5",
        [*SHORT, "--embedding", "8", "--target-update-every", "10", "--checkpoint-after", "40"],
    ),
    "sac with SimBa": (
        "sac",
        "gym/Pendulum-v1",
        [*SHORT, *BRIEF, "--preset", "simba", "--critic-hidden", "8", "8"],
    ),
    "dqn with InFeR in an environment of Gymnasium's": (
        "dqn",
        "gym/GridWorld-v0",
        [*SHORT, *BRIEF, "--num-envs", "2", "--representation", "infer"],
    ),
    "sac dmc": ("sac", "dmc/cartpole-swingup", [*SHORT, "--env-set", "time_limit=0.35"]),
    "dqn gym": ("dqn", "gym/CartPole-v1", [*SHORT, "--num-envs", "2", "--epsilon-evaluation", "0.5"]),
    "dqn gym, prioritised": (
        "dqn",
        "gym/CartPole-v1",
        [*SHORT, "--replay", "prioritised", "--num-envs", "2", "--update-every", "4", "--updates-per-round", "2"],
    ),
    "rainbow gym": ("rainbow", "gym/CartPole-v1", [*SHORT, "--num-envs", "2", "--with", "nap"]),
    "rainbow on tasks in turn, rates beginning again": (
        "rainbow",
        "sequence/shuffled-cartpole",
        [*SHORT, "--env-set", "switch_every=30", "--preset", "nap-atari-sequence", "--lr-warmup", "5"],
    ),
    "qrdqn gym": ("qrdqn", "gym/CartPole-v1", [*SHORT, "--quantiles", "5", "--epsilon-evaluation", "0.5"]),
    "dqn gym, dormant units recycled": (
        "dqn",
        "gym/CartPole-v1",
        [*SHORT, "--update-every", "1", "--updates-per-round", "2", "--with", "redo(every=10,threshold=0.3)"],
    ),
    "symphony mujoco, dying": (
        "symphony",
        "mujoco/Hopper-v5",
        ["--replay-capacity", "60", "--num-envs", "2"],
    ),
    "beer with InFeR": ("beer", "gym/Pendulum-v1", [*SHORT, *BRIEF, "--representation", "infer", "--replay", "fading"]),
    "dqn atari": (
        "dqn",
        "atari/RoadRunner",
        [*SHORT, "--env-set", "max_frames=100", "--eval-every", "120", "--num-envs", "2"],
    ),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[FaultServer]:
    server = FaultServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.mark.parametrize(("agent", "env", "more"), RUNS.values(), ids=list(RUNS))
def test_every_agent_and_backend_goes_on_bit_for_bit(server, tmp_path, agent, env, more):
    """Stopped between two checkpoints, resumed in a new process, killed there, resumed: as if nothing had happened."""
    train = ["train", agent, "--env", env, *COMMON, *more, "--seeds", "1", "--no-tensorboard", "--out", tmp_path]
    room = {"chunk_bytes": 20_000 if "atari" in env else 600}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert server.run(*train, "--name", "whole", **room).code == 0
    assert server.run(*train, "--name", "run", **room, signals={54: signal.SIGTERM}).code == 3
    first, last = (path.name for path in checkpoint.list_checkpoints(run))
    assert (first, last) in (("step_40", "step_54"), ("step_42", "step_54"))  # 42: with three environments
    assert server.run("resume", run, **room, signals={102: signal.SIGKILL}).code == -signal.SIGKILL
    assert checkpoint.newest(run).name in ("step_54", "step_80", "step_81")  # the kill may come before step_80 is whole
    ended = server.run("resume", run, "--quiet", **room)
    assert ended.code == 0, ended.err
    assert_same(run, whole)


def test_training_is_the_same_whether_evaluated_or_not(server, tmp_path):
    """An evaluation draws nothing that training draws, in the agent (ε-greedy here) or in the environments."""
    train = ["train", "dqn", "--env", "gym/CartPole-v1", *COMMON, *SHORT, "--seeds", "1", "--out", tmp_path]
    states = []
    for every in ("7", "120"):
        assert server.run(*train, "--name", every, "--eval-every", every, "--epsilon-evaluation", "0.5").code == 0
        state = checkpoint.read_seed(checkpoint.newest(tmp_path / every), 0)
        states.append(checkpoint.state_hash({"agent": state["agent"], "runner": state["runner"], "obs": state["obs"]}))
        assert any(row.name == "eval/return" and row.value != 0 for row in read_table(tmp_path / every))
    assert states[0] == states[1]


def test_stopped_within_an_evaluation(server, tmp_path, monkeypatch):
    """The evaluation of the stop's step is made up for, once, before anything else; here of step 0 and of the last."""
    train = ["train", "dqn", "--env", "gym/CartPole-v1", *COMMON, *SHORT, "--seeds", "1", "--no-tensorboard"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert server.run(*train, "--out", tmp_path, "--name", "whole").code == 0
    # A signal at the very step whose evaluation comes next stops it in its first step.
    assert server.run(*train, "--out", tmp_path, "--name", "run", signals={100: signal.SIGINT}).code == 3
    assert 100 not in [row.step for row in read_table(run) if row.name == "eval/return"]
    assert server.run("resume", run, "--quiet", signals={120: signal.SIGINT}).code == 3
    status = read_json(run / "status.json")
    assert (status["state"], status["step"]) == ("stopped", 120)
    assert server.run("resume", run, "--quiet").code == 0
    assert_same(run, whole)


@pytest.fixture(scope="module")
def stopped(server, tmp_path_factory) -> Path:
    """A run with checkpoints at 40 and 54 of 120 steps."""
    out = tmp_path_factory.mktemp("stopped")
    train = ["train", "td3", "--env", "gym/Pendulum-v1", *COMMON, *SHORT, "--seeds", "1", "--out", out]
    assert server.run(*train, "--name", "run", signals={54: signal.SIGTERM}).code == 3
    return out / "run"


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    """A copy of it, with its hard links."""
    subprocess.run(["cp", "-a", str(stopped), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_train_names_resume(run, capsys):
    assert main(["train", "td3", "--env", "gym/Pendulum-v1", "--out", str(run.parent), "--name", "run"]) == 2
    assert f"exists already; continue it with `neoteny resume {run}`" in capsys.readouterr().err


def test_a_run_that_is_done_says_so_and_stays_as_it_is(server, run):
    assert server.run("resume", run, "--quiet").code == 0
    before = content(run)
    ended = server.run("resume", run, "--json")
    assert ended.code == 0
    assert "is done: 120 steps of 1 seeds" in ended.err
    assert json.loads(ended.out)["metrics"]["eval/return"]["seeds"] == 1
    assert content(run) == before


def test_time_and_tensorboard_go_on(server, run):
    """Wall seconds add up; no point of a curve is there twice, though a killed session has drawn some already."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_json(run / "status.json", {**read_json(run / "status.json"), "wall_seconds": 1000.0})
    assert server.run("resume", run, signals={110: signal.SIGKILL}).code == -signal.SIGKILL
    time.sleep(1.1)  # names of event files tell seconds apart
    assert server.run("resume", run, "--quiet").code == 0
    assert 1000 < read_json(run / "status.json")["wall_seconds"] < 1100
    events = EventAccumulator(str(run / "tensorboard" / "seed_0"))
    events.Reload()
    for name in ("loss/critic", "eval/return"):
        drawn = [event.step for event in events.Scalars(name)]
        assert drawn == [row.step for row in read_table(run) if row.name == name]
        assert len(drawn) == len(set(drawn)) > 2


def test_a_run_without_any_checkpoint_starts_again(server, run):
    shutil.rmtree(run / "checkpoints")
    ended = server.run("resume", run)
    assert ended.code == 0
    assert "from the start, it has no checkpoint yet" in ended.err
    assert [row.step for row in read_table(run) if row.name == "eval/return"] == [0, 50, 100, 120]


def test_damaged_checkpoint_gives_way_to_the_one_before(server, run):
    """A flipped bit in the newest: named in one sentence, set aside, and the older one is used."""
    before = told(run)
    state = run / "checkpoints" / "step_54" / "seed_0.pt"
    damage(state)
    ended = server.run("resume", run)
    assert ended.code == 0
    assert f"neoteny: {state} is damaged: its checksum is not the one in manifest.json; step_54 is now " in ended.err
    assert "from step_40" in ended.err
    assert told(run)[0][: len(before[0])] == before[0]
    assert (run / "checkpoints" / "damaged_step_54").is_dir()


def test_all_checkpoints_damaged_is_refused_and_nothing_is_touched(run, capsys):
    for state in run.glob("checkpoints/*/seed_0.pt"):
        damage(state)
    before = content(run)
    assert main(["resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert "no checkpoint of" in said
    assert "to start again from step 0, remove" in said
    assert said.count("\n") == 1
    assert content(run) == before


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # a hard link would carry the damage elsewhere
    path.write_bytes(data)


def test_garbage_behind_the_counted_rows_is_cut_off(server, run):
    """A power cut may leave zeros at the end of a file that was not synced."""
    with (run / "metrics.jsonl").open("ab") as table:
        table.write(b'{"step": 55, "na\n' + bytes(5000))
    assert server.run("resume", run, "--quiet").code == 0
    assert [row.step for row in read_table(run) if row.name == "eval/return"] == [0, 50, 100, 120]


def test_lost_rows_are_refused(run, capsys):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:3]))
    assert main(["resume", str(run)]) == 2
    assert "metrics.jsonl has lost rows: 3 of the" in capsys.readouterr().err


FOREIGN = {
    "other seeds": (
        lambda run: write_json(
            run / "config.json", {**read_json(run / "config.json"), "seeds": [0, 1], "seed_groups": []}
        ),
        "has the seeds [0], config.json [0, 1]",
    ),
    "a GPU": (
        lambda run: write_json(run / "config.json", {**read_json(run / "config.json"), "device": "cuda"}),
        "was trained on a GPU and PyTorch sees none here",
    ),
}


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=list(FOREIGN))
def test_what_cannot_go_on_here_is_one_sentence(run, change, message, capsys):
    change(run)
    assert main(["resume", str(run)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_touched(server, run):
    """Whole by its checksums, but of a larger network than the config says."""
    config = read_json(run / "config.json")
    write_json(run / "config.json", {**config, "agent_config": {**config["agent_config"], "hidden": [9]}})
    before = content(run)
    ended = server.run("resume", run, "--quiet")
    assert ended.code == 2
    assert "step_54 does not fit this installation" in ended.err
    assert content(run) == before


def test_differences_are_named_with_what_to_do(run):
    here = RunConfig.load(run).environment
    assert differences(here, here) == []
    then = {**here, "versions": {**here["versions"], "torch": "2.13.0"}, "machine": "a VAX", "commit": "a" * 40}
    torch_, commit, machine = differences(then, {**here, "commit": "b" * 40})
    assert torch_.startswith("torch 2.14")
    assert torch_.endswith("instead of 2.13.0; for 2.13.0: pip install 'torch==2.13.0'")
    assert commit == f"Neoteny at commit {'b' * 10} instead of {'a' * 10}; for that: git checkout {'a' * 10}"
    assert "instead of a VAX" in machine
    with pytest.raises(ValueError, match="the environment of the run has backend ale, here it has classic_control"):
        require_environment({**here, "runner": {**here["runner"], "backend": "ale"}}, here)


def test_other_threads_are_a_warning_that_stays_in_the_record(server, run):
    ended = server.run("resume", run, "--threads", "2", "--quiet")
    assert ended.code == 0
    assert "not bit for bit the same run from here on: 2 threads instead of 1" in ended.err
    assert read_json(run / "status.json")["differences"] == [
        "from step 54 on: 2 threads instead of 1; leave --threads away"
    ]
    assert main(["resume", str(run), "--threads", "0"]) == 0  # done by now


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_rows(run: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len(read_table(run)) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the run does not go on")


def test_ctrl_c_while_seeds_start_is_a_checkpoint(tmp_path):
    """It reaches the processes of the seeds too, which are still importing then."""
    train = ["train", "td3", "--env", "gym/Pendulum-v1", *COMMON, *SHORT, "--seeds-as", "processes", "--seeds", "2"]
    train += ["--steps", "1200", "--out", str(tmp_path), "--name", "run"]
    child = start([sys.executable, "-m", "runs.cli", *train])
    children, deadline = Path(f"/proc/{child.pid}/task/{child.pid}/children"), time.monotonic() + 100
    while len(children.read_text().split()) < 3 and time.monotonic() < deadline:  # a tracker of semaphores, two seeds
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=100)
    assert child.returncode == 3, said
    assert "Traceback" not in said
    assert checkpoint.verify(checkpoint.newest(tmp_path / "run"))["step"] == 0


def test_two_seeds_stopped_apart_killed_and_resumed(server, tmp_path, capsys):
    """One process a seed, real ones: Ctrl-C finds them at different steps, kill -9 of the parent takes all with it,
    and a second process is told which one is at work."""
    train = ["train", "td3", "--env", "gym/Pendulum-v1", *COMMON, *SHORT, "--steps", "1200", "--eval-every", "600"]
    train += ["--checkpoint-every", "160", "--seeds-as", "processes", "--no-tensorboard", "--out", str(tmp_path)]
    neoteny, run = [sys.executable, "-m", "runs.cli"], tmp_path / "run"
    resume = [*neoteny, "resume", str(run)]
    child = start([*neoteny, *train, "--seeds", "2", "--seed", "3", "--name", "run"])
    wait_for_rows(run, 100)
    os.killpg(child.pid, signal.SIGSTOP)  # or it might have ended before the second one has started
    try:
        assert main(["resume", str(run)]) == 2
        assert f"process {child.pid} is at work on '{run}'" in capsys.readouterr().err
    finally:
        os.killpg(child.pid, signal.SIGINT)
        os.killpg(child.pid, signal.SIGCONT)
    assert child.wait(60) == 3, child.stderr.read()
    manifest = checkpoint.verify(checkpoint.newest(run))
    assert manifest["seed_steps"].keys() == {"3", "4"}
    assert manifest["step"] == min(manifest["seed_steps"].values())

    child = start(resume)
    wait_for_rows(run, sum(manifest["seed_rows"].values()) + 60)
    seeds = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    child.kill()
    child.wait()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in seeds) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in seeds)

    ended = subprocess.run(resume, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    undisturbed = {seed: tmp_path / str(seed) for seed in (3, 4)}
    for seed, alone in undisturbed.items():
        assert server.run(*train, "--seeds", "1", "--seed", str(seed), "--name", alone.name).code == 0
    put_together(tmp_path / "whole", undisturbed)
    assert_same(run, tmp_path / "whole")


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_seeds_far_apart_share_checkpoints(server, tmp_path):
    """Seed 1 done, seed 0 barely begun: checkpoints of seed 0 carry what seed 1 has, and the end is that of any run."""
    out = tmp_path
    train = ["train", "td3", "--env", "gym/Pendulum-v1", *COMMON, *SHORT, "--no-tensorboard", "--out", out]
    # Runs of one seed each, put together as a run of two would have stopped, or ended.
    for name, seed, fault in (("0", 0, {"signals": {54: signal.SIGTERM}}), ("1", 1, {}), ("all of 0", 0, {})):
        server.run(*train, "--name", name, "--seeds", "1", "--seed", str(seed), **fault)
    put_together(out / "whole", {0: out / "all of 0", 1: out / "1"})
    run = out / "run"
    assert put_together(run, {0: out / "0", 1: out / "1"}).name == "step_54"
    command = [sys.executable, "-m", "runs.cli", "resume", str(run), "--quiet"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step_80", "step_120"]
    assert checkpoint.read_manifest(run / "checkpoints" / "step_80")["seed_steps"] == {"0": 80, "1": 120}
    assert_same(run, out / "whole")
