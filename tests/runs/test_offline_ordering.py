"""The order of methods on a small environment (specs/a2pr-and-offline-rl.md, section 15). Minutes: run with -m slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runs.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
KINDS = ("random", "random-expert-6", "medium-replay")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pendulum data of a TD3 agent with two layers of 64, trained for 12 000 steps."""
    pytest.importorskip("minari", reason="datasets need minari: pip install 'neoteny[offline]'")
    folder = tmp_path_factory.mktemp("root")
    command = ["collect", "--env", "gym/Pendulum-v1", "--agent", "td3", "--train-steps", "12000", "--quiet"]
    command += ["--train-eval-every", "250", "--train-flags=--hidden 64 64", "--policy", *KINDS, "--transitions"]
    assert main([*command, "10000", "--out", str(folder), "--work", str(folder / "runs")]) == 0
    return folder


def score(root: Path, kind: str, agent: str, capsys: pytest.CaptureFixture[str]) -> float:
    """Mean score of three seeds after 10 000 gradient steps."""
    data = root / "lab" / "pendulum" / f"{kind}-small-v0"
    command = ["offline", agent, "--data", str(data), "--preset", "tiny", "--steps", "10000", "--quiet", "--json"]
    command += ["--eval-every", "10000", "--no-tensorboard", "--out", str(root / "runs"), "--name", f"{kind}-{agent}"]
    capsys.readouterr()
    assert main(command) == 0
    return json.loads(capsys.readouterr().out)["metrics"]["eval/score_lab"]["mean"]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a2pr_is_far_above_td3_bc_and_bc_on_bad_data(root, kind, capsys):
    bc, td3_bc, a2pr = (score(root, kind, agent, capsys) for agent in ("bc", "td3_bc", "a2pr"))
    assert a2pr - td3_bc >= 30
    assert a2pr - bc >= 30


def test_order_on_medium_replay(root, capsys):
    bc, td3_bc, a2pr = (score(root, "medium-replay", agent, capsys) for agent in ("bc", "td3_bc", "a2pr"))
    assert a2pr > td3_bc > bc - 5
