"""`neoteny bench`: its arithmetic on made-up timings, its processes, and the smallest real run."""

import json
import multiprocessing
import os
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import envs
from envs import mujoco_batch, registry
from runs import bench, turns
from runs.cli import main
from runs.contestants import CONTESTANTS, Case, actions_in, envpool_id, played_episodes, random_actions
from runs.options import BenchOptions
from runs.parsing import parse
from runs.turns import Contender, ContestantFailed, Turn
from scripts.runner_goals import GOALS, PARTS, goals_table

PAGE = Path(__file__).parents[2] / "docs" / "results" / "runner.md"
CHEETAH = Case("mujoco/HalfCheetah-v5", 64, 2)
MADE_UP = {
    "neoteny": [Turn(1000, 1.0, 2.0), Turn(900, 1.0, 1.8), Turn(100, 1.0, 0.2)],
    "sync": [Turn(500, 1.0, 1.0), Turn(100, 1.0, 1.0), Turn(100, 1.0, 0.5)],
    "limit": [Turn(2000, 1.0, 2.0), Turn(2700, 3.0, 2.7), Turn(1000, 5.0, 1.0)],
}


def test_medians_of_rates_and_of_ratios_inside_a_round():
    ours, sync, limit = bench.summarise(CHEETAH, MADE_UP)
    assert (ours.env, ours.num_envs) == ("mujoco/HalfCheetah-v5", 64)
    assert [result.contestant for result in (ours, sync, limit)] == ["neoteny", "sync", "limit"]
    assert sync.turns == MADE_UP["sync"]
    assert ours.steps_per_second == 900
    assert sync.steps_per_second == 100
    assert sync.ratio == 2.0  # of 2, 9 and 1; the medians' ratio would be 9
    assert (ours.of_limit, sync.of_limit, limit.of_limit) == (0.5, 0.25, 1.0)  # of .5 1 .5; of .25 1/9 .5
    assert (ours.steps_per_cpu_second, sync.steps_per_cpu_second) == (500, 200)
    assert sync.cpu_ratio == 2.5  # of 1, 5 and 2.5
    assert (ours.cpu_of_limit, limit.cpu_ratio) == (0.5, 0.5)
    assert ours.ratio == 1.0


def test_what_was_not_measured_is_none():
    without_limit = {name: own for name, own in MADE_UP.items() if name != "limit"}
    ours, sync = bench.summarise(CHEETAH, {**without_limit, "sync": [Turn(500, 1.0, None), *MADE_UP["sync"][1:]]})
    assert ours.of_limit is ours.cpu_of_limit is sync.steps_per_cpu_second is sync.cpu_ratio is None
    assert sync.ratio == 2.0
    assert ours.steps_per_cpu_second == 500


def test_table_is_aligned_markdown():
    fast = [Turn(1_234_567, 1.0, 10.0)]
    results = bench.summarise(Case("gym/X", 64, 2), {"neoteny": fast, "sync": [Turn(54_321, 1.0, None)]})
    assert bench.table(results).splitlines() == [
        "| environment | rows | contestant     |   steps/s | of limit | ours / it | per CPU s | of limit | ours / it |",
        "| ----------- | ---: | -------------- | --------: | -------: | --------: | --------: | -------: | --------: |",
        "| gym/X       |   64 | neoteny        | 1 230 000 |        - |           |   123 000 |        - |           |",
        "| gym/X       |   64 | Gymnasium Sync |    54 300 |        - |        23 |         - |        - |         - |",
    ]


def test_everyone_has_one_turn_a_round_in_changing_order():
    log: list[str] = []

    def player(name: str, last: int = 99):
        def turn(seconds: float) -> Turn:
            log.append(name)
            if log.count(name) > last:
                raise ContestantFailed("tired")
            return Turn(len(log), seconds, None)

        return turn

    taken, failed = turns.take_turns({name: player(name) for name in "abc"}, rounds=8, seconds=0.5)
    rounds = [log[i : i + 3] for i in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 2
    assert [len(own) for own in taken.values()] == [8, 8, 8]
    assert failed == {}
    log.clear()
    taken, failed = turns.take_turns({"a": player("a"), "b": player("b", last=2)}, rounds=4, seconds=0.5)
    assert list(taken) == ["a"]
    assert failed == {"b": "tired"}
    assert log.count("b") == 3


def test_missing_library_is_one_line_and_no_contestant(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    names, left_out = bench.choose(())
    assert "envpool" not in names
    assert names[0] == "neoteny"
    assert left_out == ["EnvPool is not installed, its rows are left out: pip install 'neoteny[bench]'"]
    assert bench.choose(("sync", "limit")) == (["neoteny", "sync", "limit"], [])


def test_the_runner_s_own_failure_is_not_left_out(monkeypatch):
    class Broken:
        def open(self, case: Case) -> None:
            raise ContestantFailed("no such thing")

    with pytest.raises(RuntimeError, match="the runner failed on gym/CartPole-v1 with 2 rows: no such thing"):
        bench.run_case(Case("gym/CartPole-v1", 2, 1), {"neoteny": Broken()}, 1, 0.1, [])  # type: ignore[dict-item]


def test_smallest_real_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WHOSE_CHILD", str(tmp_path))
    arguments = ["--env", "mujoco/Hopper-v5", "--num-envs", "2", "--against", "async", "dm_control", "limit"]
    folder = tmp_path / "new" / "folder"
    assert main(["bench", *arguments, "--rounds", "2", "--seconds", "0.05", "--out", str(folder), "--json"]) == 0
    said = capfd.readouterr()
    summary = json.loads(said.out)
    assert "mujoco/Hopper-v5, 2 rows" in said.err
    assert [row["contestant"] for row in summary["results"]] == ["neoteny", "async", "limit"]
    for row in summary["results"]:
        assert len(row["turns"]) == 2
        assert all(0.05 <= turn["seconds"] < 5 and turn["steps"] > 2 for turn in row["turns"])
        assert all(0 < turn["cpu_seconds"] < 5 for turn in row["turns"])
    ours, peer, limit = summary["results"]
    assert ours["ratio"] == limit["of_limit"] == 1.0
    assert peer["cpu_ratio"] > 1.2  # processes that wait for one another cost far more
    written = json.loads((folder / "bench.json").read_text())
    assert written["results"] == summary["results"]
    assert written["environments"]["mujoco/Hopper-v5"]["versions"]["mujoco"]
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.png"]
    assert multiprocessing.active_children() == []
    assert [command for command in _children_marked(str(tmp_path)) if "resource_tracker" not in command] == []


def _children_marked(mark: str) -> list[str]:
    """Command lines of the processes that were started with `mark` in their environment, also children's children."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def test_a_process_survives_what_it_cannot_build_and_is_replaced_when_killed():
    pong = Case("atari/Pong", 2, 1)
    with Contender("ale") as contender:
        with pytest.raises(ContestantFailed, match="ALE has no Pung"):
            contender.open(Case("atari/Pung", 2, 1))
        contender.open(pong)
        assert contender.turn(0.02).steps > 2
        process: Any = contender._process
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ContestantFailed, match="its process ended with code -9"):
            contender.turn(0.02)
        with pytest.raises(ContestantFailed, match="its process has ended"):
            contender.turn(0.02)
        contender.close_case()
        contender.open(pong)
        assert contender.turn(0.02).steps > 2
        process = contender._process
    assert process.exitcode == 0


def _burn(pipe: Any) -> None:
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    pipe.send(None)
    pipe.recv()


@pytest.mark.skipif(not Path("/proc").exists(), reason="only Linux tells the time of another process")
def test_processor_seconds_are_those_of_the_whole_tree():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    before, own = turns.tree_cpu_seconds(), time.process_time()
    assert before is not None
    child = context.Process(target=_burn, args=(theirs,), daemon=True)
    child.start()
    ours.recv()
    spent = (turns.tree_cpu_seconds() or 0.0) - before - (time.process_time() - own)
    ours.send(None)
    child.join()
    assert 0.19 < spent < 0.4


def test_the_limit_walks_through_the_runner_s_own_states():
    import mujoco

    env, rows, steps = "mujoco/Hopper-v5", 2, 120
    played = played_episodes(env, rows, steps)
    actions = random_actions(rows, *[np.full(3, bound, np.float32) for bound in (-1, 1)])
    task = mujoco_batch.make_task(env)
    data = mujoco.MjData(task.model)
    with closing(envs.make(env, rows, row_seeds=[0, 1])) as runner:
        runner.reset()
        states = [runner.state_dict()["simulation"].numpy()]
        begins = [np.ones(rows, bool)]
        for t in range(steps):
            step = runner.step(torch.from_numpy(actions[t]))
            states.append(runner.state_dict()["simulation"].numpy())
            begins.append(step.episode_ended.numpy().copy())
    size = 1 + task.model.nq + task.model.nv  # time, qpos, qvel
    for row in range(rows):
        assert sum(start is not None for start, _ in played[row * steps :][:steps]) > 1
        for t, (start, action) in enumerate(played[row * steps :][:steps]):
            assert (start is not None) == begins[t][row]
            if start is not None:
                mujoco.mj_setState(task.model, data, start, mujoco.mjtState.mjSTATE_INTEGRATION)
            data.ctrl[:] = action
            mujoco.mj_step(task.model, data, task.substeps)
            if not begins[t + 1][row]:
                assert np.array_equal([data.time, *data.qpos, *data.qvel], states[t + 1][row, :size])


def test_peers_take_the_same_actions():
    runner = envs.make("mujoco/Ant-v5", 3)
    spec = runner.action_spec
    space = envs.as_gymnasium(runner).single_action_space
    assert np.array_equal(random_actions(3, spec.low, spec.high), actions_in(space, 3))
    assert random_actions(3, spec.low, spec.high).shape == (1000, 3, 8)
    assert set(random_actions(2, count=3).ravel().tolist()) == {0, 1, 2}


def test_names_of_envpool():
    names = {
        "mujoco/HalfCheetah-v5": "HalfCheetah-v5",
        "gym/CartPole-v1": "CartPole-v1",
        "atari/MsPacman": "MsPacman-v5",
        "dmc/cartpole-swingup_sparse": "CartpoleSwingupSparse-v1",
        "dmc/humanoid_CMU-run": "HumanoidCMURun-v1",
    }
    assert {env: envpool_id(Case(env, 1, 1)) for env in names} == names


def test_who_takes_part():
    def playing(env: str, num_envs: int) -> str:
        return " ".join(name for name, peer in CONTESTANTS.items() if peer.takes_part(Case(env, num_envs, 1)))

    assert playing("mujoco/Ant-v5", 1) == "neoteny gymnasium envpool limit"
    assert playing("mujoco/Ant-v5", 8) == "neoteny sync async envpool limit"
    assert playing("dmc/walker-walk", 8) == "neoteny dm_control envpool limit"
    assert playing("atari/Pong", 8) == "neoteny sync async ale envpool limit"
    assert playing("gym/CartPole-v1", 8) == "neoteny sync async envpool"


def test_the_commands_of_the_results_page_are_commands():
    commands = [line.split()[2:] for line in PAGE.read_text().splitlines() if line.startswith("neoteny bench")]
    assert commands
    for arguments in commands:
        options = parse(BenchOptions, arguments, "neoteny bench", "")
        assert bench.check_cases(options)
        assert bench.choose(options.against)
        for env in options.env:
            registry.check_id(env)


def test_goals_are_compared_with_what_was_measured():
    def result(env: str, contestant: str, ratio: float, cpu_ratio: float | None) -> dict[str, Any]:
        return {"env": env, "num_envs": 256, "contestant": contestant, "ratio": ratio, "cpu_ratio": cpu_ratio}

    table = goals_table(
        [
            result("mujoco/HalfCheetah-v5", "envpool", 1.296, 1.2),
            result("mujoco/Ant-v5", "envpool", 0.98, None),
        ]
    )
    line = "| 256 | EnvPool | 1, 1.3 (HalfCheetah) | HalfCheetah 1.30, **Ant 0.98**, Humanoid - "
    assert line + "| **HalfCheetah 1.20**, Ant -, Humanoid - |" in table.splitlines()
    assert not any(line.startswith("| 64") for line in table.splitlines())


def test_goals_are_of_what_is_measured():
    measured = {
        (env, num_envs, name)
        for num_envs, envs, against in PARTS.values()
        for env in envs
        for name in against or CONTESTANTS
        if CONTESTANTS[name].takes_part(Case(env, num_envs, 1))
    }
    assert {(env, goal.num_envs, goal.contestant) for goal in GOALS for env in goal.least} <= measured
