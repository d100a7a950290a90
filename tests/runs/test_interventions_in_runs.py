"""`neoteny train --with`: interventions that act where the task changes, and what is refused."""

from __future__ import annotations

import pytest

from agents.plastic import Plasticity
from runs.cli import main
from runs.files import read_json
from runs.record import read_table

SMALL = [
    "--warmup-steps",
    "20",
    "--hidden",
    "8",
    "8",
    "--batch-size",
    "8",
    "--quiet",
    "--no-tensorboard",
    "--seeds",
    "1",
]


def train(tmp_path, *arguments):
    return main(["train", *arguments, *SMALL, "--out", str(tmp_path), "--name", "run", "--eval-episodes", "1"])


@pytest.mark.parametrize("overlap", [(), ("--overlap",)])
def test_a_sequence_of_tasks_tells_its_interventions(tmp_path, monkeypatch, overlap):
    told = []
    tell = Plasticity.at_boundary

    def tell_and_note(plasticity):
        [(optimizer, _)] = plasticity._rates
        before = optimizer.parameters[0].clone()
        tell(plasticity)
        told.append(((optimizer.parameters[0] - before).abs().min() > 0, optimizer.inner.step_count[0] == 0))

    monkeypatch.setattr(Plasticity, "at_boundary", tell_and_note)
    sequence = ["--env", "sequence/shuffled-cartpole", "--env-set", "switch_every=50", "--steps", "160"]
    assert train(tmp_path, "dqn", *sequence, "--with", "reset", "--eval-every", "160", *overlap) == 0
    assert told == [(True, True)] * 3
    assert read_json(tmp_path / "run" / "status.json")["state"] == "done"
    assert all(row.value is not None for row in read_table(tmp_path / "run"))


@pytest.mark.parametrize(
    ("agent", "env", "interventions", "sentence"),
    [
        ("dqn", "gym/CartPole-v1", "reset", "'reset' acts where the task changes, and gym/CartPole-v1 is one task"),
        ("td3", "gym/Pendulum-v1", "l2-init+injection", "injection needs linear heads"),
        ("dqn", "gym/CartPole-v1", "churn", "Churn runs the network on the inputs"),
    ],
)
def test_what_cannot_act_is_said_before_anything_is_written(tmp_path, capsys, agent, env, interventions, sentence):
    assert train(tmp_path, agent, "--env", env, "--with", interventions, "--steps", "50") == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()
