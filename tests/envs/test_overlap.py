"""Simulation in the background changes when things happen, not what happens."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

import envs
from envs.overlap import InBackground, TwoHalves

FIELDS = envs.Step.__dataclass_fields__
IDS = ["mujoco/Hopper-v5", "dmc/cartpole-swingup", "atari/Breakout", "gym/CartPole-v1"]


def actions(spec: envs.ActionSpec, rows: int, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(spec, envs.DiscreteActionSpec):
        return [torch.randint(spec.count, (rows,), generator=generator) for _ in range(steps)]
    return [torch.rand(rows, spec.size, generator=generator) * 2 - 1 for _ in range(steps)]


@pytest.mark.parametrize("env_id", IDS)
def test_two_halves_are_the_whole_bit_for_bit(env_id):
    whole, halves = envs.make(env_id, 4, seed=3), TwoHalves(env_id, 4, seed=3, threads=1)
    obs = whole.reset()
    assert torch.equal(torch.cat(halves.reset_halves()), obs)
    ends = 0
    for action in actions(whole.action_spec, 4, 120):
        halves.send(0, action[:2])
        halves.send(1, action[2:])
        second, first = halves.recv(1), halves.recv(0)
        step = whole.step(action)
        for name in FIELDS:
            joined = torch.cat([getattr(first, name), getattr(second, name)])
            assert torch.equal(joined, getattr(step, name)), name
        ends += int(step.episode_ended.sum())
    assert ends or env_id in ("dmc/cartpole-swingup", "atari/Breakout")
    again = TwoHalves(env_id, 4, seed=9, threads=1)
    again.load_state_dict(halves.state_dict())
    for action in actions(whole.action_spec, 4, 20):
        for pair in (halves, again):
            pair.send(0, action[:2])
        assert torch.equal(halves.recv(0).obs, again.recv(0).obs)
    for each in (whole, halves, again):
        each.close()
        each.close()


def test_the_caller_is_free_while_the_background_simulates():
    runner = InBackground(envs.make("mujoco/Humanoid-v5", 64, threads=1))
    runner.reset()
    action = torch.zeros(64, 17)
    runner.step(action)
    start = time.perf_counter()
    runner.send(action)
    sent = time.perf_counter() - start
    with pytest.raises(RuntimeError, match="call recv first"):
        runner.send(action)
    with pytest.raises(RuntimeError, match="call recv first"):
        runner.state_dict()
    runner.recv()
    assert sent < (time.perf_counter() - start) / 2
    runner.close()


def test_what_the_simulation_raises_comes_out_of_recv_and_the_runner_goes_on():
    runner = InBackground(envs.make("mujoco/Hopper-v5", 2))
    with pytest.raises(RuntimeError, match="call send first"):
        runner.recv()
    runner.reset()
    runner.step(torch.zeros(2, 3))  # actions are looked at now and then, the first time among them
    runner.send(torch.full((2, 3), float("nan")))
    with pytest.raises(FloatingPointError, match="row 0"):
        runner.recv()
    runner.reset()
    runner.send(torch.zeros(2, 3))
    runner.reset()  # what was sent is not waited for by anyone
    assert runner.step(torch.zeros(2, 3)).obs.isfinite().all()
    with pytest.raises(ValueError, match="action must be"):
        runner.send(torch.zeros(3))
    runner.step(torch.zeros(2, 3))
    runner.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("simulation")]


def test_a_process_that_forgets_to_close_ends():
    code = (
        "import torch, envs\nfrom envs.overlap import TwoHalves\n"
        "halves = TwoHalves('mujoco/Hopper-v5', 4)\nhalves.reset_halves()\nhalves.send(0, torch.zeros(2, 3))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_an_odd_number_of_rows_has_no_halves(rows):
    with pytest.raises(ValueError, match="even number of environments"):
        TwoHalves("mujoco/Hopper-v5", rows)
