"""Replays larger than memory: counted to the byte, refused in one sentence before anything is made."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import envs
from agents.fading import FadingReplay
from agents.replay import Replay
from runs import memory
from runs.cli import main
from runs.train import prepare
from tests.agents.fakes import CPU, VECTOR, stream

ROOT = Path(__file__).parents[2]
# A process starts with the peak of the one that starts it, so a small one stands between the tests and the command.
WITH_PEAK_MEMORY = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
GIB = 1024**3


def prepared(agent: str, *arguments: str):
    config, _ = prepare(agent, ["--steps", "100", "--seeds", "1", *arguments])
    with contextlib.closing(envs.make(config.env)) as runner:
        return config, memory.measure_replay(config, runner)


def test_bytes_of_a_transition_by_hand():
    """Vector of 3, one action: obs, action and reward in float32, two flags, a row of the list of transitions in int32.

    A frame of Pong is 84 x 84 bytes.
    """
    _, one = prepared("sac", "--env", "gym/Pendulum-v1")
    assert one.each == 4 * 3 + 4 * 1 + 4 + 2 + 4
    assert not one.filled_at_once
    _, one = prepared("dqn", "--env", "atari/Pong")
    assert one.each == 84 * 84 + 8 + 4 + 2 + 4
    # Both observations, a count of rescues in int32, and for its rank a probability and their sum in float64.
    _, one = prepared("symphony", "--env", "gym/Pendulum-v1")
    assert one.each == 4 * (2 * 3 + 1 + 1) + 1 + 4 + 2 * 8
    assert one.filled_at_once


def test_a_replay_of_the_size_measured_is_that_large():
    _, one = prepared("sac", "--env", "gym/Pendulum-v1")
    torque = envs.make("gym/Pendulum-v1").action_spec
    real = Replay(5_000, 1, VECTOR, torque, CPU, stream())
    assert memory._tensor_bytes(real) == one.of(5_000)
    _, one = prepared("symphony", "--env", "gym/Pendulum-v1")
    real = FadingReplay(500, 10, 1, VECTOR, torque, CPU, stream())
    assert memory._tensor_bytes(real) == one.of(5_000)


def refused(arguments: list[str], tmp_path: Path, capsys) -> str:
    assert main(["train", *arguments, "--out", str(tmp_path / "results")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    return said.err


def test_too_large_for_memory_names_both_and_what_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_memory", lambda device: GIB)
    pong = ["dqn", "--env", "atari/Pong", "--steps", "1000000", "--seeds", "3"]
    message = refused(pong, tmp_path, capsys)
    assert (
        "the replays of 3 seeds need 19.8 GiB of memory (1000000 transitions of 6.9 KiB), and 1.0 GiB are free"
        in message
    )
    assert message.endswith("; --replay-capacity 45000 would fit\n")
    prepare("dqn", [*pong[1:], "--replay-capacity", "45000"])
    # On a CPU what is never written takes no memory.
    prepare("dqn", ["--env", "atari/Pong", "--steps", "30000", "--seeds", "3"])


def test_symphony_fills_its_replay_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_memory", lambda device: 20 * 1024**2)
    message = refused(["symphony", "--env", "gym/Pendulum-v1", "--steps", "20000", "--seeds", "1"], tmp_path, capsys)
    assert "the replay needs 25.9 MiB of memory (512000 transitions of 53 bytes), and 20.0 MiB are free" in message
    assert message.endswith("; --replay-capacity 348160 would fit\n")  # 34 times the exploration
    assert 348_160 % 10_240 == 0
    prepare("symphony", ["--env", "gym/Pendulum-v1", "--steps", "20000", "--seeds", "1", "--replay-capacity", "348160"])
    prepare("symphony", ["--env", "gym/Pendulum-v1", "--steps", "9000", "--seeds", "1"])  # ends before it is filled


def test_where_nothing_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_memory", lambda device: 1_000)
    message = refused(["symphony", "--env", "gym/Pendulum-v1", "--steps", "20000"], tmp_path, capsys)
    assert message.endswith("are free; even a small one does not fit, use fewer --seeds\n")


def test_a_gpu_reserves_the_whole_ring(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: GIB if device.type == "cuda" else 99 * GIB)
    config, _ = prepare("dqn", ["--env", "atari/Pong", "--steps", "30000", "--seeds", "1"])
    object.__setattr__(config, "device", "cuda")
    with contextlib.closing(envs.make(config.env)) as runner, pytest.raises(ValueError, match="of GPU memory"):
        memory.require_replay_memory(config, runner)


def test_agents_without_a_replay_are_not_asked(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 1)
    prepare("ppo", ["--env", "gym/CartPole-v1", "--steps", "100"])


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads what the machine has")
def test_a_real_command_that_asks_for_more_than_the_machine_has(tmp_path):
    """In a process of its own, nothing replaced: a thousand million frames, which the run would write."""
    command = [sys.executable, "-m", "runs.cli", "train", "dqn", "--env", "atari/Pong", "--steps", "1000000000"]
    command += [
        "--replay-capacity",
        "1000000000",
        "--seeds",
        "2",
        "--out",
        str(tmp_path / "results"),
        "--device",
        "cpu",
    ]
    said = subprocess.run(
        [sys.executable, "-c", WITH_PEAK_MEMORY, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert said.returncode == 2
    assert "the replays of 2 seeds need 12.9 TiB of memory" in said.stderr
    assert "would fit" in said.stderr
    assert list(tmp_path.iterdir()) == []
    assert int(said.stdout.split()[-1]) < 2 * 1024**2  # KiB: nothing large was made


# What is free


def test_memory_of_the_machine(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemFree: 5 kB\nMemAvailable:   50 kB\n")
    assert memory.available_memory(CPU, tmp_path, tmp_path) == 50 * 1024
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\n")
    assert memory.available_memory(CPU, tmp_path, tmp_path) is None


@pytest.mark.parametrize("version", [2, 1])
def test_a_container_may_have_less(tmp_path, version):
    (tmp_path / "meminfo").write_text("MemAvailable:   50 kB\n")
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    cached = "inactive_file" if version == 2 else "total_inactive_file"
    for name, value in zip(names, ("30000", "20000"), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 3\n{cached} 5000\n")
    assert memory.available_memory(CPU, tmp_path, tmp_path) == 15_000
    (folder / names[0]).write_text("max\n" if version == 2 else str(2**63))
    assert memory.available_memory(CPU, tmp_path, tmp_path) == 50 * 1024


def test_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert memory.available_memory(torch.device("cuda")) == 7
