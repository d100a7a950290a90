"""Promises of every runner on random action sequences, rows, threads and moments; and in what a process leaves behind.

Atari has the same in test_atari.py, whose episodes take longer to end; pictures in test_pixels.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import session

import envs
from envs.runner import Runner, Step, row_seeds

ROOT = Path(__file__).parents[2]
# Episodes end within a few dozen steps, by termination or by truncation.
CASES = {
    "mujoco/Hopper-v5": {"max_episode_steps": 17},
    "mujoco/Ant-v5": {"max_episode_steps": 23},
    "dmc/finger-turn_hard": {"time_limit": 0.3},
    "dmc/reacher-easy": {"time_limit": 0.3},
    "gym/CartPole-v1": {"max_episode_steps": 19},
    "gym/Pendulum-v1": {"max_episode_steps": 19},
}
cases = st.sampled_from(list(CASES))
seeds = st.integers(0, 2**31 - 1)
some_rows = st.lists(st.integers(0, 4), min_size=1, max_size=6)


def actions_of(runner: Runner, rows: list[int], steps: int, seed: int) -> torch.Tensor:
    """[steps, len(rows), ...]: those of row i depend on i alone. A third is at a bound."""
    spec, drawn = runner.action_spec, []
    for row in rows:
        random = np.random.default_rng((seed, row))
        if isinstance(spec, envs.DiscreteActionSpec):
            drawn.append(torch.from_numpy(random.integers(spec.count, size=steps)))
        else:
            inside = random.uniform(1.5 * spec.low, 1.5 * spec.high, (steps, spec.size))
            drawn.append(torch.from_numpy(inside.clip(spec.low, spec.high).astype(np.float32)))
    return torch.stack(drawn, 1)


Played = list[dict[str, torch.Tensor]]


def play(runner: Runner, actions: torch.Tensor) -> Played:
    steps = (runner.step(action) for action in actions)
    return [{name: getattr(step, name).clone() for name in Step.__slots__} for step in steps]


def assert_rows_equal(
    whole: list[dict[str, torch.Tensor]], rows: list[int], part: list[dict[str, torch.Tensor]]
) -> None:
    for t, (a, b) in enumerate(zip(whole, part, strict=True)):
        for name in Step.__slots__:
            assert torch.equal(a[name][rows], b[name]), f"{name} at step {t}"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    env_id=cases, rows=some_rows, threads=st.integers(0, 4), seed=st.integers(0, 2**31 - 1), steps=st.integers(1, 60)
)
def test_a_row_depends_on_neither_neighbours_nor_threads(env_id, rows, threads, seed, steps):
    """Any rows in any order, the same one twice too."""
    whole = envs.make(env_id, 5, seed, threads=1, **CASES[env_id])
    same = [row_seeds(seed, 5)[row] for row in rows]
    part = envs.make(env_id, len(rows), 0, threads=threads, row_seeds=same, **CASES[env_id])
    assert torch.equal(whole.reset()[rows], part.reset())
    everyone = play(whole, actions_of(whole, list(range(5)), steps, seed))
    assert_rows_equal(everyone, rows, play(part, actions_of(part, rows, steps, seed)))
    whole.close()
    part.close()


@settings(max_examples=18, deadline=None, derandomize=True)
@given(env_id=cases, threads=st.integers(1, 3), saved_at=st.integers(0, 50), seed=seeds)
def test_a_state_may_be_saved_after_any_step(env_id, threads, saved_at, seed):
    """And loaded into a runner that has been used, with another seed and other threads."""
    whole = envs.make(env_id, 3, seed, threads=1, **CASES[env_id])
    again = envs.make(env_id, 3, seed + 1, threads=threads, **CASES[env_id])
    whole.reset()
    again.reset()
    actions = actions_of(whole, [0, 1, 2], saved_at + 40, seed)
    play(again, actions[: saved_at // 2])
    play(whole, actions[:saved_at])
    again.load_state_dict(whole.state_dict())
    assert_rows_equal(play(whole, actions[saved_at:]), [0, 1, 2], play(again, actions[saved_at:]))
    whole.close()
    again.close()


PLAY_ON = """
import sys, torch
from test_runner_properties import CASES, make_for, play
saved = torch.load(sys.argv[1], weights_only=True)
played = {}
for name, (state, actions) in saved.items():
    runner = make_for(name, 99)
    runner.load_state_dict(state)
    played[name] = play(runner, actions)
torch.save(played, sys.argv[2])
"""


def make_for(name: str, seed: int) -> Runner:
    if name == "sequence":
        segments = [
            envs.Segment("mujoco/Hopper-v5"),
            envs.Segment("mujoco/Hopper-v5", model={"gravity": 0.8}),
            envs.Segment("dmc/reacher-easy"),
        ]
        return envs.make_sequence(segments, 2, seed, switch_every=150)
    return envs.make(name, 2, seed, threads=1, **CASES[name])


def test_500_steps_in_a_new_process_are_exact_for_every_backend(tmp_path):
    """Observations, rewards, flags and returns. Atari: test_atari_processes.py, pictures: test_pixels.py."""
    saved, expected = {}, {}
    for name in (*CASES, "sequence"):
        runner = make_for(name, 4)
        actions = actions_of(runner, [0, 1], 591, 7)
        runner.reset()
        play(runner, actions[:91])
        saved[name] = runner.state_dict(), actions[91:].clone()
        expected[name] = play(runner, actions[91:])
        assert sum(int(step["episode_ended"].sum()) for step in expected[name]) > 5
        runner.close()
    torch.save(saved, tmp_path / "saved.pt")
    command = [sys.executable, "-c", PLAY_ON, str(tmp_path / "saved.pt"), str(tmp_path / "played.pt")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "envs")])
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
    played = torch.load(tmp_path / "played.pt", weights_only=True)
    for name, steps in expected.items():
        assert_rows_equal(steps, [0, 1], played[name])


MAKE_ALL = """
import torch, envs
from envs.overlap import TwoHalves
runners = [envs.make(env_id, 2) for env_id in ("mujoco/Hopper-v5", "dmc/reacher-easy", "gym/CartPole-v1")]
runners.append(envs.make_sequence(["mujoco/Hopper-v5", "dmc/reacher-easy"], 2, switch_every=10))
for runner in runners:
    runner.reset()
    discrete = isinstance(runner.action_spec, envs.DiscreteActionSpec)
    runner.send(torch.zeros(2, dtype=torch.int64) if discrete else torch.zeros(2, runner.action_spec.size))
halves = TwoHalves("mujoco/Humanoid-v5", 64)
halves.reset_halves()
halves.send(0, torch.zeros(32, 17))
"""


def test_a_process_that_forgets_to_close_ends():
    ended = subprocess.run([sys.executable, "-c", MAKE_ALL], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_killed_process_leaves_nothing():
    code = MAKE_ALL + "print('ready', flush=True)\nwhile True: halves.recv(0); halves.send(0, torch.zeros(32, 17))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert session(child.pid) == [child.pid]  # threads only, no workers
        child.kill()
        assert child.wait(20) == -signal.SIGKILL
        assert session(child.pid) == []
