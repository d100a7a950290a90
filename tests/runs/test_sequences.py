"""`neoteny train AGENT --env A B C`: what is measured where tasks change, what becomes of the replay, and resuming."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import envs
from agents.plastic import Plasticity
from agents.replay import Replay
from runs import checkpoint, transfer
from runs.cli import main
from runs.config import RunConfig
from runs.probe_subjects import _visited
from runs.record import read_table
from runs.train import prepare
from runs.training import Training
from tests.runs.fault_server import FaultServer
from tests.runs.same_run import assert_same, told

TASKS = ["gym/CartPole-v1", "gym/MountainCar-v0", "gym/Acrobot-v1"]
SMALL = ["--hidden", "8", "8", "--batch-size", "8", "--warmup-steps", "10", "--eval-episodes", "1", "--no-tensorboard"]
SHORT = [*SMALL, "--update-every", "1", "--updates-per-round", "1", "--quiet"]
LENGTH = ["--steps", "160", "--eval-every", "50"]
BRIEF = ["--env-set", "max_episode_steps=40"]
THREE = ["--env", *TASKS, *BRIEF, "--switch-every", "60", *LENGTH]


def train(out, name, *arguments, agent="dqn"):
    return main(["train", agent, *arguments, "--out", str(out), "--name", name])


def rows_of(run, name, seed=0):
    return [row for row in read_table(run) if row.name == name and row.seed == seed]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[FaultServer]:
    server = FaultServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def test_every_task_is_measured_and_the_matrix_is_in_the_table(tmp_path, capsys):
    more = ["--diagnostics-every", "40", "--seeds", "1", "--json"]
    assert train(tmp_path, "run", *THREE, *SHORT, *more) == 0
    run = tmp_path / "run"
    returns = {(row.step, row.task): row.value for row in rows_of(run, "eval/return")}
    assert list(returns) == [(step, task) for step in (0, 50, 60, 100, 120, 150, 160) for task in TASKS]
    ends = (0, 60, 120, 160)
    matrix = [[returns[step, task] for task in TASKS] for step in ends]
    for visit, step in enumerate(ends):
        for task, expected in enumerate(matrix[visit]):
            (row,) = rows_of(run, f"return/task_{task}_after_{visit}")
            assert (row.step, row.value) == (step, expected)
    for name, expected in transfer.measures(matrix, [0, 1, 2]).items():
        rows = rows_of(run, f"cl/{name}")
        assert [row.step for row in rows] == ([60, 120, 160] if name == "average_return" else [120, 160])
        assert rows[-1].value == pytest.approx(expected)
    begun = [(row.step, row.value, row.task) for row in rows_of(run, "sequence/task")]
    assert begun == [(0, 0, TASKS[0]), (60, 1, TASKS[1]), (120, 2, TASKS[2])]
    dormant = [(row.step, row.task) for row in rows_of(run, "plasticity/dormant_fraction")]
    expected = [(40, 0), (60, 0), (80, 1), (120, 1), (160, 2)]
    assert dormant == [(step, TASKS[task]) for step, task in expected]
    assert {row.task for row in rows_of(run, "train/return")} <= set(TASKS)
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["eval/return"]["mean"] == pytest.approx(sum(matrix[-1]) / 3)
    assert metrics["eval/return/gym/Acrobot-v1"]["mean"] == matrix[-1][2]
    assert main(["evaluate", str(run), "--episodes", "1", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["metrics"]) >= {f"eval/return/{task}" for task in TASKS}


def test_current_evaluates_the_rest_only_where_a_task_ends(tmp_path):
    assert train(tmp_path, "all", *THREE, *SHORT, "--seeds", "1") == 0
    assert train(tmp_path, "some", *THREE, *SHORT, "--seeds", "1", "--eval-tasks", "current") == 0
    whole, some = ({(r.step, r.task): r.value for r in rows_of(tmp_path / n, "eval/return")} for n in ("all", "some"))
    left_out = {(50, TASKS[1]), (50, TASKS[2]), (100, TASKS[0]), (100, TASKS[2]), (150, TASKS[0]), (150, TASKS[1])}
    assert some == {key: value for key, value in whole.items() if key not in left_out}


ROBOTS = ["--env", "dmc/cartpole-balance", "dmc/pendulum-swingup", "--env-set", "time_limit=0.4"]
ROLLOUT = ["--rollout-steps", "16", "--minibatches", "2"]
QUIET = ["--eval-episodes", "1", "--no-tensorboard", "--quiet"]
RUNS = {
    "replay cleared": ("dqn", [*THREE, *SHORT, "--replay-at-switch", "clear", "--diagnostics-every", "25"]),
    "in the background": ("dqn", [*THREE, *SHORT, "--overlap", "--with", "reset", "--num-envs", "2"]),
    "shuffles, by episodes": (
        "dqn",
        ["--env", "sequence/shuffled-cartpole", "--switch-episodes", "3", *LENGTH, *SHORT, "--eval-tasks", "current"],
    ),
    "ppo on two robots": ("ppo", [*ROBOTS, "--switch-every", "60", *LENGTH, *QUIET, "--hidden", "8", *ROLLOUT]),
}


@pytest.mark.parametrize(("agent", "arguments"), RUNS.values(), ids=list(RUNS))
def test_a_sequence_goes_on_bit_for_bit(server, tmp_path, agent, arguments):
    """Stopped in the middle of a task, where it changes, and right behind; killed; resumed each time."""
    common = ["train", agent, *arguments, "--seeds", "1", "--checkpoint-every", "40", "--out", tmp_path]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert server.run(*common, "--name", "whole").code == 0
    stops = [55, 60, 62] if "--num-envs" not in arguments else [56, 60, 62]
    assert server.run(*common, "--name", "run", signals={stops[0]: signal.SIGTERM}).code == 3
    assert server.run("resume", run, "--quiet", signals={stops[1]: signal.SIGTERM}).code == 3
    state = checkpoint.read_seed(checkpoint.newest(run), 0)
    if "--switch-episodes" not in arguments:
        assert (state["agent"]["steps"], state["tasks"]["changed"], state["evaluation_due"]) == (60, True, True)
    assert server.run("resume", run, "--quiet", signals={stops[2]: signal.SIGKILL}).code == -signal.SIGKILL
    assert server.run("resume", run, "--quiet", signals={120: signal.SIGTERM}).code == 3
    assert server.run("resume", run, "--quiet").code == 0
    assert_same(run, whole)


def test_a_population_changes_its_tasks_as_its_seeds_do(tmp_path):
    more = [*THREE, *SHORT, "--with", "reset", "--replay-at-switch", "clear"]
    assert train(tmp_path, "all", *more, "--seeds", "2", "--seeds-as", "population") == 0
    population = told(tmp_path / "all")
    for seed in (0, 1):
        assert train(tmp_path, str(seed), *more, "--seeds", "1", "--seed", str(seed)) == 0
        alone = told(tmp_path / str(seed))[seed]
        assert [row[:2] for row in population[seed]] == [row[:2] for row in alone]
        for (_, name, own), (_, _, expected) in zip(population[seed], alone, strict=True):
            if isinstance(expected, float):
                assert own == pytest.approx(expected, rel=2e-3, abs=1e-3), name


def training_of(tmp_path, *arguments, agent="dqn"):
    config, _ = prepare(agent, [*arguments, "--seeds", "1"])
    listener = SimpleNamespace(**{n: lambda *_: None for n in ("rows", "progress", "weights", "lost", "saved")})
    return Training(config, [0], tmp_path, listener)


def test_a_cleared_replay_waits_for_a_batch_and_forgets_the_old_task(tmp_path, monkeypatch):
    training = training_of(tmp_path, *THREE, *SHORT, "--replay-at-switch", "clear")
    sampled, boundaries = [], []
    sample = Replay.sample

    def note(replay, *arguments):
        batch = sample(replay, *arguments)
        sampled.append((training.agent.steps, batch.obs))
        return batch

    monkeypatch.setattr(Replay, "sample", note)
    monkeypatch.setattr(Plasticity, "at_boundary", lambda _: boundaries.append(training.agent.steps))
    monkeypatch.setattr("runs.training.evaluate", lambda *_: SimpleNamespace(
        returns=torch.zeros(1, 1), lengths=torch.zeros(1, 1), errors={}, first_values=None
    ))  # fmt: skip
    training.run(lambda: False)
    steps = [step for step, _ in sampled]
    assert boundaries == [60, 120]
    # Behind a change there is no update until as many transitions are there as a batch has rows.
    assert steps == [*range(11, 61), *range(68, 121), *range(128, 161)]
    for step, obs in sampled:
        # CartPole has 4 numbers, MountainCar 2, Acrobot 6; the others are padding.
        seen = {60: 4, 120: 2, 200: 6}[next(end for end in (60, 120, 200) if step <= end)]
        assert (obs[:, seen:] == 0).all()
        assert (obs[:, seen - 1] != 0).any()
    training.agent.replay.clear()  # a checkpoint right behind a change is like that
    visited, taken = _visited(training.agent, envs.make(TASKS, 1, 0, switch_every=60), 5)
    assert (visited.shape, taken.shape) == ((5, 6), (5,))


def test_symphony_explores_again_behind_a_cleared_replay(tmp_path):
    arguments = [*ROBOTS, "--switch-every", "40", "--steps", "70", "--eval-every", "70", "--hidden", "8", "8"]
    arguments += ["--nodes", "4", "--batch-size", "4", "--warmup-steps", "10", "--replay-capacity", "30"]
    training = training_of(tmp_path, *arguments, *QUIET, "--replay-at-switch", "clear", agent="symphony")
    updates = []
    advance = training.advance
    training.advance = lambda: (advance(), updates.append(training.agent.updates))
    training.run(lambda: False)
    grown = [step for step, (before, now) in enumerate(zip([0, *updates], updates, strict=False), 1) if now > before]
    assert grown == [*range(11, 41), *range(51, 71)]


def test_references_give_forward_transfer(tmp_path, capsys):
    dmc = ["dmc/cartpole-balance", "dmc/pendulum-swingup"]
    short = ["--env-set", "time_limit=0.4", *SMALL, "--quiet", "--seeds", "1", "--eval-every", "20"]
    for task in dmc:
        name = task.rpartition("/")[2]
        assert train(tmp_path, name, "--env", task, "--steps", "60", *short, agent="td3") == 0
    references = ["--reference", *(str(tmp_path / task.rpartition("/")[2]) for task in dmc)]
    sequence = ["--env", *dmc, "--switch-every", "60", "--steps", "120", *short]
    assert train(tmp_path, "run", *sequence, *references, agent="td3") == 0
    run = tmp_path / "run"

    def area(folder, task, start):
        curve = [
            (r.step, r.value)
            for r in rows_of(folder, "eval/return")
            if r.task == task and start <= r.step <= start + 60
        ]
        assert [step for step, _ in curve] == [start, start + 20, start + 40, start + 60]
        return transfer.mean_over_steps(curve)

    own = [area(run, task, 60 * index) for index, task in enumerate(dmc)]
    scratch = [area(tmp_path / task.rpartition("/")[2], None, 0) for task in dmc]
    assert RunConfig.load(run).reference == pytest.approx(dict(zip(dmc, scratch, strict=True)))
    assert rows_of(run, "cl/transfer")[-1].value == pytest.approx(sum(own) / 2 - sum(scratch) / 2)
    scores = [(o - s) / 1000 / (1 - s / 1000) for o, s in zip(own, scratch, strict=True)]
    assert rows_of(run, "cl/transfer_score")[-1].value == pytest.approx(sum(scores) / 2)
    average = rows_of(run, "cl/average_return")[-1].value
    assert rows_of(run, "cl/average_score")[-1].value == pytest.approx(average / 1000)
    capsys.readouterr()
    for missing, message in (
        (references[:2], "there is none on dmc/pendulum-swingup"),
        ([*references, str(run)], "is of ['dmc/cartpole-balance', 'dmc/pendulum-swingup'], which is no task"),
        (["--reference", str(tmp_path / "nowhere")], "cannot read a reference"),
    ):
        assert train(tmp_path, "more", *sequence, *missing, agent="td3") == 2
        assert message in capsys.readouterr().err
    longer = [part if part != "60" else "90" for part in sequence]
    assert train(tmp_path, "more", *longer, *references, agent="td3") == 2
    assert "was evaluated over the 90 steps of a task" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


TWO = ["--env", *TASKS[:2]]


@pytest.mark.parametrize(
    ("agent", "arguments", "sentence"),
    [
        ("dqn", TWO, "several environments need --switch-every or --switch-episodes"),
        ("dqn", ["--env", TASKS[0], "--switch-every", "9"], "--switch-every is for a sequence of tasks"),
        ("dqn", ["--env", TASKS[0], "--replay-at-switch", "clear"], "--replay-at-switch is for a sequence"),
        ("dqn", [*TWO, "--switch-every", "9", "--switch-episodes", "9"], "give one of the two"),
        ("dqn", [*TWO, "--switch-every", "0"], "--switch-every must be at least 1, got 0"),
        ("dqn", [*TWO, "--switch-every", "160", "--steps", "160"], "before its second task begins at 160"),
        ("dqn", ["--env", "sequence/shuffled-cartpole", "--steps", "900"], "before its second task begins at 10000"),
        ("dqn", ["--env", TASKS[0], TASKS[0], "--switch-every", "9"], "at least two tasks that differ"),
        ("dqn", ["--env", TASKS[0], "gym/Pendulum-v1", "--switch-every", "9"], "cannot share an agent"),
        ("dqn", ["--env", TASKS[0], "gym/Nothing-v1", "--switch-every", "9"], "unknown environment 'gym/Nothing-v1'"),
        ("dqn", ["--env", TASKS[0], "sequence/seq-ale", "--switch-every", "9"], "is a sequence of tasks itself"),
        ("ppo", [*TWO, "--switch-every", "9", "--replay-at-switch", "clear"], "needs an agent with a replay, and"),
        ("dqn", [*TWO, "--switch-every", "9", "--eval-tasks", "some"], "all"),
        ("dqn", [*TWO, "--switch-episodes", "9", "--reference", "x"], "needs tasks of equal length, so --switch-every"),
        ("dqn", [*TWO, "--switch-episodes", "9", "--seeds-as", "population"], "cannot train its seeds as a population"),
    ],
)  # fmt: skip
def test_bad_sequences_are_one_sentence_and_leave_nothing(tmp_path, capsys, agent, arguments, sentence):
    assert train(tmp_path, "run", *arguments, agent=agent) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
