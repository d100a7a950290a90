"""Atari and processes: a saved state goes on in a new one, and none leaves anything behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from processes import session

import envs
from envs.atari import AtariRunner
from envs.runner import Step

ROOT = Path(__file__).parents[2]

# Breakout loses lives and ends often; episodes of `max_frames` end by truncation too. `reseed_after` is reached.
CASES = {
    "v5": {"reseed_after": 200},
    "machado": {"max_frames": 400},
    "classic": {"reseed_after": 200, "sticky_actions": 0.25},
    "atari-100k": {"grayscale": False, "image_size": 40},
}


def make(protocol: str, threads: int) -> AtariRunner:
    return envs.make("atari/Breakout", 2, 8, threads=threads, protocol=protocol, **CASES[protocol])  # type: ignore


def play(runner: AtariRunner, actions: torch.Tensor) -> dict[str, Any]:
    """Every field of every step, images as checksums, and the picture of a row after the last."""
    fields: dict[str, list] = {name: [] for name in Step.__slots__}
    for action in actions:
        step = runner.step(action)
        for name, values in fields.items():
            value = getattr(step, name)
            values.append(zlib.crc32(value.numpy().tobytes()) if value.dtype == torch.uint8 else value.tolist())
    return {**fields, "picture": zlib.crc32(runner.render(1).tobytes())}


def play_on(folder: str) -> None:
    """What the new process does: load each state, play the rest, save what came."""
    saved = torch.load(Path(folder) / "saved.pt", weights_only=True)
    played = {}
    for protocol, (state, actions) in saved.items():
        runner = make(protocol, threads=1)
        runner.load_state_dict(state)
        played[protocol] = play(runner, actions)
    torch.save(played, Path(folder) / "played.pt")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_new_process_plays_on_to_the_bit(tmp_path):
    """500 steps from the middle of an episode with every protocol; rewards, ends and pictures too."""
    saved, expected = {}, {}
    for protocol in CASES:
        runner = make(protocol, threads=2)
        generator = torch.Generator().manual_seed(1)
        actions = torch.randint(runner.action_spec.count, (840, 2), generator=generator)
        runner.reset()
        for action in actions[:340]:
            runner.step(action)
        saved[protocol] = runner.state_dict(), actions[340:].clone()
        assert (saved[protocol][0]["length"] > 0).all()
        expected[protocol] = play(runner, actions[340:])
        assert sum(map(sum, expected[protocol]["episode_ended"])) >= 2
        runner.close()
    torch.save(saved, tmp_path / "saved.pt")
    code = "import sys; sys.path.append('tests/envs'); from test_atari_processes import play_on; play_on(sys.argv[1])"
    result = run_python(code, str(tmp_path))
    assert result.returncode == 0, result.stderr
    played = torch.load(tmp_path / "played.pt", weights_only=True)
    for protocol in CASES:
        for name, values in expected[protocol].items():
            assert played[protocol][name] == values, (protocol, name)


PLAIN = """
import envs, torch
runner = envs.make("atari/Pong", 2)
runner.reset()
action = torch.zeros(2, dtype=torch.int64)
runner.send(action)
"""
FIRST_READY = """
other = envs.make_first_ready("atari/Pong", 6, 2, threads=2)
other.reset()
other.send(action)
"""


def test_a_process_that_forgets_to_close_ends():
    result = run_python(PLAIN + FIRST_READY)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_killed_process_leaves_nothing():
    code = PLAIN + "print('ready', flush=True)\nwhile True: runner.recv(); runner.send(action)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert session(child.pid) == [child.pid]  # threads only, no workers
        child.kill()
        assert child.wait(20) == -signal.SIGKILL
        assert session(child.pid) == []
