"""Presets that set the run beside the agent: NaP networks with an explicit schedule of the learning rate."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch

import envs
from plasticity.nap import NaP
from runs.catalogue import PRESET_RUNS, PRESETS
from runs.cli import main
from runs.keeping import advice, plasticity_of
from runs.options import TrainOptions
from runs.train import prepare

CASES = [(agent, preset) for agent, presets in PRESETS.items() for preset in presets if preset in PRESET_RUNS]
ENVS = {
    "nap-atari": "atari/Pong",
    "nap-atari-sequence": "sequence/seq-ale",
    "nap-dmc": "dmc/walker-walk",
    "nap-dmc-sequence": "sequence/cont-dmc-walker",
}


def test_options_of_presets_exist():
    kinds = typing.get_type_hints(TrainOptions)
    for options in PRESET_RUNS.values():
        assert options.keys() <= {field.name for field in dataclasses.fields(TrainOptions)}
        assert options["lr_schedule"] in typing.get_args(kinds["lr_schedule"])
    assert {preset for _, preset in CASES} == PRESET_RUNS.keys()


@pytest.mark.parametrize(("agent", "preset"), CASES)
def test_a_nap_preset_has_nap_and_a_schedule(agent, preset):
    """Prepared, and so built once, without training."""
    small = [] if agent == "ppo" else ["--replay-capacity", "5000"]
    tasks = ["--switch-every", "10000"] if preset.endswith("sequence") else []
    arguments = ["--env", ENVS[preset], "--preset", preset, "--steps", "20000", *tasks, *small]
    config, _ = prepare(agent, arguments)
    assert config.interventions == "nap"
    assert advice(config) is None
    assert config.preset == preset
    plasticity = plasticity_of(config, 10_000)
    assert isinstance(plasticity._interventions()[0], NaP)
    factors = [plasticity._schedule.factor(step, step % 10_000) for step in (5_000, 9_999, 15_000, 19_999)]
    if preset.endswith("sequence"):
        assert factors[:2] == factors[2:]
        assert factors[1] == pytest.approx(0.0016, abs=1e-4)
    else:
        assert factors == pytest.approx([0.75, 0.5, 0.25, 0.0], abs=1e-3)


def test_flags_go_before_the_preset():
    arguments = ["--env", "dmc/walker-walk", "--preset", "nap-dmc", "--with", "none", "--lr-end", "0.5"]
    config, _ = prepare("sac", [*arguments, "--replay-capacity", "5000"])
    assert (config.interventions, config.lr_schedule, config.lr_end) == ("none", "linear", 0.5)


def test_rates_that_begin_again_need_tasks(tmp_path, capsys):
    arguments = ["--env", "gym/CartPole-v1", "--lr-schedule", "cosine-restart", "--out", str(tmp_path)]
    assert main(["train", "dqn", *arguments]) == 2
    assert "gym/CartPole-v1 has no tasks of so many steps; use cosine" in capsys.readouterr().err


def test_steps_of_a_task_are_whole_rounds():
    runner = envs.make("sequence/shuffled-cartpole", 3, switch_every=10)
    assert envs.sequence.steps_of_task(runner) == 12
    runner.reset()
    for _ in range(8):
        runner.step(torch.zeros(3, dtype=torch.int64))
    assert [switch.step for switch in runner.switches][1:] == [12, 24]
    assert envs.sequence.steps_of_task(envs.make("gym/CartPole-v1", 1)) is None
