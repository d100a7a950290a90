"""What a user may get wrong: one sentence, the nearest valid name, exit code 2, and nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agents import OFFLINE_NAMES
from runs.catalogue import AGENTS
from runs.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
PENDULUM = ["--env", "gym/Pendulum-v1", "--steps", "100"]
BAD_INPUT = {
    "command": (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
    "no agent": (["train"], "train needs an agent"),
    "agent": (["train", "td4", *PENDULUM], "unknown agent 'td4'. Did you mean 'td7' or 'td3'?"),
    "no environment": (["train", "td3"], "train needs an environment"),
    "environment": (
        ["train", "td3", "--env", "mujoco/HalfCheeta-v5"],
        "unknown environment 'mujoco/HalfCheeta-v5'. Did you mean 'mujoco/HalfCheetah-v5'",
    ),
    "preset": (["train", "td3", *PENDULUM, "--preset", "smal"], "'td3' has no preset 'smal'. Did you mean 'small'?"),
    "flag": (["train", "td3", *PENDULUM, "--discont", "0.9"], "has no flag '--discont'. Did you mean '--discount'"),
    "flag of another agent": (
        ["train", "td3", *PENDULUM, "--temporal-advantage", "true"],
        "`neoteny train td3` has no flag '--temporal-advantage'. It is an option of symphony; `neoteny",
    ),
    "switch of another agent": (["train", "ppo", *PENDULUM, "--no-matched"], "It is an option of beer"),
    "flag without value": (["train", "td3", "--env", "gym/Pendulum-v1", "--steps"], "flag '--steps' needs a value"),
    "stray word": (["train", "td3", "loudly", *PENDULUM], "does not know what to do with 'loudly'"),
    "device": (["train", "td3", *PENDULUM, "--device", "gpu"], "unknown device 'gpu', it is one of auto, cpu, cuda"),
    "no number": (["train", "td3", *PENDULUM, "--seeds", "many"], "flag '--seeds' needs a whole number, got 'many'"),
    "zero steps": (["train", "td3", "--env", "gym/Pendulum-v1", "--steps", "0"], "steps must be at least 1, got 0"),
    "zero seeds": (["train", "td3", *PENDULUM, "--seeds", "0"], "seeds must be at least 1, got 0"),
    "negative seed": (["train", "td3", *PENDULUM, "--seed", "-1"], "seed must not be negative, got -1"),
    "zero environments": (["train", "td3", *PENDULUM, "--num-envs", "0"], "num_envs must be at least 1, got 0"),
    "no evaluation": (["train", "td3", *PENDULUM, "--eval-episodes", "-3"], "eval_episodes must be at least 1, got -3"),
    "threads": (["train", "td3", *PENDULUM, "--threads", "-1"], "threads must be 0 (choose) or more, got -1"),
    "discount": (["train", "td3", *PENDULUM, "--discount", "1.5"], "discount must be between 0 and 1, got 1.5"),
    "batch": (["train", "sac", *PENDULUM, "--batch-size", "0"], "batch_size must be at least 1, got 0"),
    "replay": (["train", "sac", *PENDULUM, "--replay-capacity", "2"], "replay capacity must be at least 3"),
    "discrete agent": (
        ["train", "dqn", *PENDULUM],
        "'dqn' needs discrete actions, this environment has 1 continuous ones; use beer or crossq or ddpg or",
    ),
    "continuous agent": (
        ["train", "sac", "--env", "gym/CartPole-v1", "--steps", "100"],
        "'sac' needs continuous actions, this environment has 2 discrete ones; use dqn or ppo or",
    ),
    "agent for vectors on images": (
        ["train", "symphony", "--env", "atari/Pong", "--steps", "100"],
        "'symphony' needs a vector of observations, this environment shows [4, 84, 84]; use dqn or ppo or",
    ),
    "agent for vectors on pictures": (
        ["train", "td3", "--env", "dmc/cartpole-swingup", "--obs", "pixels"],
        "'td3' needs a vector of observations, this environment shows [9, 84, 84]; use ppo",
    ),
    "no problem": (
        ["plasticity"],
        "`neoteny plasticity` needs --problem, for example: neoteny plasticity --pro",
    ),
    "nothing to resume": (["resume"], "`neoteny resume` needs RUN, for example: neoteny resume results/td3-dmc-"),
    "nothing like it": (["plasticity", "--problem", "cartpole"], "unknown problem 'cartpole'. It is one of"),
    "nothing like a flag": (["train", "td3", *PENDULUM, "--zzz"], "It is one of --batch-size, --bf16"),
    "name": (["train", "td3", *PENDULUM, "--name", "a/b"], "--name must be a plain folder name, got 'a/b'"),
    "no run": (["evaluate", "nowhere"], "'nowhere' is not the folder of a run"),
    "nothing to watch": (["watch", "nowhere"], "'nowhere' is not the folder of a run"),
    "nothing to report": (["report", "nowhere"], "'nowhere' is not the folder of a run"),
    "histograms": (
        ["train", "td3", *PENDULUM, "--histograms", "--no-tensorboard"],
        "--histograms are for TensorBoard, which --no-tensorboard switches off",
    ),
    "bench environment": (
        ["bench", "--env", "mujoco/HalfCheeta-v5"],
        "unknown environment 'mujoco/HalfCheeta-v5'. Did you mean 'mujoco/HalfCheetah-v5'",
    ),
    "contestant": (["bench", "--against", "envpol"], "unknown contestant 'envpol'. Did you mean 'envpool'?"),
    "bench flag": (["bench", "--tasks", "gym/CartPole-v1"], "`neoteny bench` has no flag '--tasks'"),
    "bench rows": (["bench", "--num-envs", "8", "0"], "num_envs must be at least 1, got 0"),
    "bench no number": (
        ["bench", "--num-envs", "8", "many"],
        "flag '--num-envs' needs a whole number, got 'many'",
    ),
    "bench rounds": (["bench", "--rounds", "0"], "rounds must be above 0, got 0"),
    "bench seconds": (["bench", "--seconds", "nan"], "seconds must be above 0, got nan"),
    "bench threads": (["bench", "--threads", "-2"], "threads must be 0 (all cores) or more, got -2"),
    "bench folder": (["bench", "--env", "gym/CartPole-v1", "--out", "/proc/bench"], "cannot write to '/proc/bench'"),
    "list": (["list", "agent"], "cannot list 'agent'. Did you mean 'agents'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=list(BAD_INPUT))
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.startswith("neoteny: ")
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_existing_run_is_refused_and_left_alone(tmp_path, capsys):
    run = tmp_path / "mine"
    run.mkdir()
    (run / "precious").write_text("data")
    assert main(["train", "td3", *PENDULUM, "--out", str(tmp_path), "--name", "mine"]) == 2
    assert "exists already; choose another --name" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["precious"]


def test_output_below_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "td3", *PENDULUM, "--out", str(tmp_path / "file" / "results")]) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_unwritable_output_is_refused(capsys):
    assert main(["train", "td3", *PENDULUM, "--out", "/proc/neoteny"]) == 2
    assert "cannot write to '/proc/neoteny/" in capsys.readouterr().err


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runs.config.write_json", full)
    assert main(["train", "td3", *PENDULUM, "--out", str(tmp_path / "results")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_overview_and_version(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert f"  {command} " in overview
    assert len(overview.splitlines()) < 24


@pytest.mark.parametrize("arguments", [[c] for c in COMMANDS] + [["train", agent] for agent in AGENTS], ids=" ".join)
def test_help_has_an_example_and_fits_one_screen(arguments, capsys):
    if len(arguments) == 1 and arguments[0] == "train":
        assert main([*arguments, "--help"]) == 0
    else:
        with pytest.raises(SystemExit, match="0"):
            main([*arguments, "--help"])
    text = capsys.readouterr().out
    assert f"Example: neoteny {arguments[0]}" in text
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 120


def test_help_does_not_wait_for_torch():
    """All pages in one new process, which imports nothing that takes seconds."""
    code = """
import contextlib, sys
from runs.cli import COMMANDS, main
for command in COMMANDS:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
print("heavy:", [name for name in ("torch", "gymnasium", "mujoco", "matplotlib", "ray") if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.count("Example: neoteny") == len(COMMANDS)
    assert ended.stdout.splitlines()[-1] == "heavy: []"


def test_what_stands_without_a_flag_is_not_offered_as_one(capsys):
    for flag in ("--quiet", "--runn", "--run"):
        assert main(["evaluate", "results/somewhere", flag]) == 2
        message = capsys.readouterr().err
        assert f"has no flag '{flag}'" in message
        assert "mean '--run'" not in message


def test_every_hyper_parameter_is_a_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "sac", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--discount", "--target-rate", "--initial-temperature", "--layer-norm", "`neoteny train --help`"):
        assert flag in text
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--env", "--num-envs", "--json", f"Agents: {', '.join(AGENTS)};"):
        assert flag in text


def test_list_names_what_train_takes(capsys):
    assert main(["list", "envs"]) == 0
    ids = capsys.readouterr().out.split()
    assert {"mujoco/HalfCheetah-v5", "dmc/walker-walk", "atari/Pong", "gym/CartPole-v1"} <= set(ids)
    assert main(["list", "agents"]) == 0
    assert capsys.readouterr().out.split() == [
        "beer",
        "crossq",
        "ddpg",
        "dqn",
        "ppo",
        "qrdqn",
        "rainbow",
        "sac",
        "symphony",
        "td3",
        "td7",
        *OFFLINE_NAMES,
    ]
    assert main(["list"]) == 0
    assert "td3 small" in capsys.readouterr().out


def test_no_command_of_the_house_loads_the_heavy_libraries_for_its_help(tmp_path):
    import subprocess
    import sys

    code = "import sys; from runs.cli import main; main([]); print([m for m in sys.modules if m in %r])"
    heavy = ("avalanche", "dm_control", "warp", "matplotlib", "ray", "torch")
    ended = subprocess.run(
        [sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True, env=os.environ
    )
    assert ended.stdout.strip().endswith("[]")
