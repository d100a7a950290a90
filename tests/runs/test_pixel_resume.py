"""A run that sees pictures of a simulator (`--obs pixels`) goes on bit for bit.

The agents that take pictures choose among discrete actions and the simulators of `--obs pixels` want forces, so here
two of these stand for left and right.
"""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

import envs
from envs.graphics import OpenGLMissing
from envs.runner import DiscreteActionSpec
from runs import checkpoint
from runs.cli import main
from runs.config import RunConfig
from runs.training import Training
from tests.runs.same_run import assert_same

TRAIN = ["train", "dqn", "--env", "dmc/pendulum-swingup", "--obs", "pixels", "--image-size", "36", "--frame-stack", "2"]
TRAIN += ["--render-profile", "fast", "--env-set", "time_limit=0.5", "--steps", "90", "--seeds", "1", "--num-envs", "2"]
TRAIN += ["--warmup-steps", "20", "--batch-size", "4", "--replay-capacity", "60", "--eval-every", "45", "--hidden", "8"]
TRAIN += ["--eval-episodes", "1", "--checkpoint-every", "30", "--quiet", "--no-tensorboard", "--threads", "1"]


class LeftOrRight:
    """A runner whose action 0 pushes with the least force, 1 with the greatest."""

    def __init__(self, runner: envs.Runner):
        self.runner = runner
        self.action_spec = DiscreteActionSpec(2)
        self.forces = torch.from_numpy(np.stack([runner.action_spec.low, runner.action_spec.high]))

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def step(self, action):
        return self.runner.step(self.forces[action])

    def send(self, action):
        self.runner.send(self.forces[action])


@pytest.fixture(autouse=True)
def two_actions(monkeypatch):
    try:
        envs.make("dmc/pendulum-swingup", obs="pixels", image_size=36).close()
    except OpenGLMissing as error:
        pytest.skip(str(error))
    make = envs.make
    monkeypatch.setattr(envs, "make", lambda *given, **settings: LeftOrRight(make(*given, **settings)))


def test_stopped_twice_and_resumed_is_the_same_run(tmp_path, monkeypatch):
    assert main([*TRAIN, "--out", str(tmp_path), "--name", "whole"]) == 0
    advance, stops = Training.advance, {38, 76}

    def advance_and_stop(self: Training) -> None:
        advance(self)
        if self.agent.steps in stops:
            stops.discard(self.agent.steps)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Training, "advance", advance_and_stop)
    run = tmp_path / "run"
    assert main([*TRAIN, "--out", str(tmp_path), "--name", "run"]) == 3
    assert RunConfig.load(run).env_settings["obs"] == "pixels"
    assert checkpoint.newest(run).name == "step_38"
    assert main(["resume", str(run), "--quiet"]) == 3
    assert checkpoint.newest(run).name == "step_76"
    assert main(["resume", str(run), "--quiet"]) == 0
    assert_same(run, tmp_path / "whole")
