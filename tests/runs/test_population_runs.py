"""Runs whose seeds train as one population: what they did, stop, resume and lose is what seeds alone would."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from agents import td3
from envs import ObservationSpec, Step
from runs import checkpoint, chunks
from runs.cli import main
from runs.config import RunConfig
from runs.files import read_json, write_json
from runs.record import read_table
from runs.seed_groups import described, group_seeds, in_step
from runs.session import SeedFailed, _listen
from runs.side_by_side import SideBySide
from tests.runs.fault_server import FaultServer
from tests.runs.same_run import assert_same, put_together, told

SHORT = ["--hidden", "12", "--batch-size", "16", "--warmup-steps", "40", "--eval-every", "80", "--eval-episodes", "2"]
SHORT += ["--checkpoint-every", "60", "--quiet"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def train(out: Path, name: str, *more: str, agent: str = "td3", env: str = "gym/Pendulum-v1") -> int:
    threads = torch.get_num_threads()
    record = [] if "--histograms" in more else ["--no-tensorboard"]
    try:
        return main(["train", agent, "--env", env, *SHORT, *record, "--out", str(out), "--name", name, *more])
    finally:
        torch.set_num_threads(threads)


def places(rows: list) -> list[tuple[int, str]]:
    return [(step, name) for step, name, _ in rows]


def assert_rows_close(ours: list, theirs: list) -> None:
    """What `told` gives of one seed: the same rows, with the same numbers to rounding."""
    assert places(ours) == places(theirs)
    for (step, name, own), (_, _, expected) in zip(ours, theirs, strict=True):
        if isinstance(expected, float):
            assert own == pytest.approx(expected, rel=2e-3, abs=1e-3), (step, name)


RUNS = {
    "td3": ("td3", "gym/Pendulum-v1", ["--num-envs", "2", "--layer-norm"]),
    "sac dying": ("sac", "mujoco/Hopper-v5", ["--n-step", "3"]),
    "dqn": (
        "dqn",
        "gym/CartPole-v1",
        ["--update-every", "2", "--updates-per-round", "1", "--epsilon-evaluation", "0.3"],
    ),
    "ddpg in the background": ("ddpg", "gym/Pendulum-v1", ["--overlap"]),
}


@pytest.mark.parametrize(("agent", "env", "more"), RUNS.values(), ids=list(RUNS))
def test_population_of_three_is_three_single_runs(tmp_path, agent, env, more):
    """Same rows, episodes and evaluations, at the same steps; values and states to rounding."""
    more = [*more, "--steps", "240"]
    assert train(tmp_path, "all", *more, "--seeds", "3", "--seeds-as", "population", agent=agent, env=env) == 0
    population = told(tmp_path / "all")
    assert read_json(tmp_path / "all" / "config.json")["seed_groups"] == [[0, 1, 2]]
    for seed in ("0", "1", "2"):
        assert train(tmp_path, seed, *more, "--seeds", "1", "--seed", seed, agent=agent, env=env) == 0
        alone = told(tmp_path / seed)[int(seed)]
        ours = population[int(seed)]
        assert_rows_close(ours, alone)
        states = [checkpoint.read_seed(checkpoint.newest(tmp_path / run), int(seed))["agent"] for run in ("all", seed)]
        assert states[0]["updates"] == states[1]["updates"] > 40
        network = "net" if agent == "dqn" else "actor"
        for name, parameter in states[1]["parts"][network].items():
            torch.testing.assert_close(states[0]["parts"][network][name], parameter, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[FaultServer]:
    server = FaultServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def command(out: Path, name: str, *more: str) -> list[str]:
    run = ["--steps", "200", "--seeds", "3", "--seed", "4", "--replay-capacity", "120"]
    run += ["--update-every", "2", "--updates-per-round", "1", "--no-tensorboard", "--out", str(out), "--name", name]
    return ["train", "dqn", "--env", "gym/CartPole-v1", *SHORT, *run, *more]


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert server.run(*command(out, "whole", "--seeds-as", "population")).code == 0
    return out / "whole"


def test_stopped_killed_and_resumed_population_goes_on_bit_for_bit(server, tmp_path, whole):
    train = command(tmp_path, "run", "--seeds-as", "population")
    run = tmp_path / "run"
    assert server.run(*train, signals={90: signal.SIGTERM}).code == 3
    assert checkpoint.read_manifest(checkpoint.newest(run))["seed_steps"] == {"4": 90, "5": 90, "6": 90}
    assert server.run("resume", run, "--quiet", signals={150: signal.SIGKILL}).code == -signal.SIGKILL
    ended = server.run("resume", run, "--quiet")
    assert ended.code == 0, ended.err
    assert_same(run, whole)
    (run / "status.json").unlink()  # else the run is known to be done
    assert server.run("resume", run, "--quiet").code == 0
    assert_same(run, whole)
    assert not list((run / "checkpoints").glob(".*"))


def test_population_goes_on_in_two_processes(server, tmp_path, whole):
    """As two seeds together and one alone, after the settings were changed; the saved format knows no population."""
    run = tmp_path / "run"
    assert server.run(*command(tmp_path, "run", "--seeds-as", "population"), signals={110: signal.SIGTERM}).code == 3
    write_json(run / "config.json", {**read_json(run / "config.json"), "seed_groups": [[4, 6], [5]]})
    ended = server.run("resume", run, "--quiet")
    assert ended.code == 0, ended.err
    assert read_json(run / "status.json")["state"] == "done"
    ours, theirs = told(run), told(whole)
    for seed in theirs:
        assert_rows_close(ours[seed], theirs[seed])


def test_seeds_alone_go_on_as_population(server, tmp_path, whole):
    """The change is told, and kept in the record; numbers agree to rounding."""
    alone = {seed: tmp_path / str(seed) for seed in (4, 5, 6)}
    for seed in alone:
        one = ["--seeds", "1", "--seed", str(seed)]
        assert server.run(*command(tmp_path, str(seed), *one), signals={110: signal.SIGTERM}).code == 3
    run = tmp_path / "run"
    put_together(run, alone)
    ended = server.run("resume", run, "--quiet", "--seeds-as", "population")
    assert ended.code == 0, ended.err
    words = "seeds train otherwise, 4, 5, 6 together instead of 4, 5, 6 alone"
    assert words in ended.err
    assert words in read_json(run / "status.json")["differences"][0]
    ours, theirs = told(run), told(whole)
    for seed in theirs:
        assert_rows_close(ours[seed], theirs[seed])


def test_tensorboard_shows_each_seed_of_a_population(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = {}
    for name, more in (("both", ["--seeds", "2", "--seeds-as", "population"]), ("alone", ["--seeds", "1"])):
        assert train(tmp_path, name, "--steps", "80", "--histograms", "--seed", "3", *more) == 0
        assert sorted(path.name for path in (tmp_path / name / "tensorboard").iterdir())[0] == "seed_3"
        shown[name] = EventAccumulator(str(tmp_path / name / "tensorboard" / "seed_3"))
        shown[name].Reload()
    both, alone = shown.values()
    assert both.Tags() == alone.Tags()
    assert "weights/actor/net.0.weight" in both.Tags()["histograms"]
    for tag in alone.Tags()["histograms"]:
        for ours, theirs in zip(both.Histograms(tag), alone.Histograms(tag), strict=True):
            assert ours.step == theirs.step
            assert ours.histogram_value.sum == pytest.approx(theirs.histogram_value.sum, rel=1e-3, abs=1e-3)


def test_evaluate_and_watch_read_a_population(whole, tmp_path, capsys):
    assert main(["evaluate", str(whole), "--episodes", "2", "--json"]) == 0
    assert '"seeds": 3' in capsys.readouterr().out
    assert main(["watch", str(whole), "--seed", "6", "--out", str(tmp_path / "x.mp4"), "--max-steps", "3"]) == 0


def broken_loss(seed_index: int, after: int):
    """The critic's loss, nan for one seed of a population from some call on."""
    true_loss, calls = td3.critic_loss, 0

    def loss(critics, batch, target):
        nonlocal calls
        calls += 1
        value, metrics = true_loss(critics, batch, target)
        factor = torch.ones_like(value)
        factor[seed_index] = torch.nan if calls > after else 1.0
        return value * factor, metrics | {"loss/critic": metrics["loss/critic"] * factor}

    return loss


@pytest.mark.parametrize("after", [120, 10])
def test_a_diverged_seed_is_lost_and_the_others_go_on(tmp_path, monkeypatch, capsys, after):
    """They end as if nothing had happened; the lost one keeps its last good checkpoint, if any, and can try again."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 600)  # several chunks, so that checkpoints share some
    more = ["--steps", "240", "--seeds", "3", "--seeds-as", "population"]
    assert train(tmp_path, "calm", *more) == 0
    with monkeypatch.context() as patch:
        patch.setattr(td3, "critic_loss", broken_loss(1, after))
        assert train(tmp_path, "torn", *more) == 1
    calm, torn = tmp_path / "calm", tmp_path / "torn"
    said = capsys.readouterr().err
    assert "loss/critic became nan at step" in said
    assert "of seed 1" in said
    status = read_json(torn / "status.json")
    assert status["state"] == "failed"
    assert 40 < status["step"] < 240
    assert [row.name for row in read_table(torn) if row.seed == 1 and row.missing == "nan"][0] == "loss/critic"
    for seed in (0, 2):
        assert told(torn)[seed] == told(calm)[seed]
        states = [checkpoint.read_seed(checkpoint.newest(run), seed) for run in (calm, torn)]
        assert checkpoint.state_hash(states[0]) == checkpoint.state_hash(states[1])
    manifest = checkpoint.verify(checkpoint.newest(torn))
    assert manifest["step"] == (120 if after == 120 else 0)  # of the slowest seed
    assert manifest["seed_steps"] == {"0": 240, "2": 240} | ({"1": 120} if after == 120 else {})
    assert manifest["seeds_without_state"] == ([] if after == 120 else [1])
    assert main(["evaluate", str(torn), "--episodes", "1", "--json"]) == 0
    scored = capsys.readouterr()
    assert json.loads(scored.out)["metrics"]["eval/return"]["seeds"] == (3 if after == 120 else 2)
    assert ("seed 1 was lost before it had a checkpoint" in scored.err) == (after == 10)
    assert main(["resume", str(torn), "--quiet"]) == 0
    ended = told(torn)
    assert places(ended[1]) == places(told(calm)[1])
    assert ended[0] == told(calm)[0]
    assert checkpoint.read_manifest(checkpoint.newest(torn))["seed_steps"] == {"0": 240, "1": 240, "2": 240}


class Child:
    """A process that has ended well."""

    exitcode = 0

    def join(self): ...


@pytest.mark.parametrize("kind", ["diverged", "outside"])
def test_a_process_whose_seeds_diverged_does_not_stop_the_others(kind):
    stops, signals = [], SimpleNamespace(begin=threading.Event(), stop=threading.Event())
    session = SimpleNamespace(begin=lambda: None, rows=lambda *_: stops.append(signals.stop.is_set()))
    session.progress = session.weights = session.lost = session.saved = None
    (first, broken), (second, other) = Pipe(duplex=False), Pipe(duplex=False)
    said = {broken: [("ready", [(0, 1)]), ("failed", ("loss/critic became nan", kind))]}
    said[other] = [("ready", [(2,)]), *[("rows", (2, []))] * 3]
    for sender, messages in said.items():
        for message in messages:
            sender.send(message)
        sender.close()
    with pytest.raises(SeedFailed, match="became nan"):
        _listen({first: ((0, 1), Child()), second: ((2,), Child())}, session, lambda: False, signals)
    assert stops[-1] == (kind == "outside")


def test_config_without_groups_has_every_seed_alone(whole, tmp_path):
    values = read_json(whole / "config.json")
    del values["seed_groups"]
    write_json(tmp_path / "config.json", values)
    assert RunConfig.load(tmp_path).seed_groups == ((4,), (5,), (6,))
    assert RunConfig.load(whole).seed_groups == ((4, 5, 6),)
    write_json(tmp_path / "config.json", {**values, "seed_groups": [[4, 5]]})
    with pytest.raises(ValueError, match="seed_groups must hold each of the seeds"):
        RunConfig.load(tmp_path)


def groups(seeds_as: str, seeds: Sequence[int], cores: int, monkeypatch, **more) -> tuple[tuple[int, ...], ...]:
    monkeypatch.setattr("runs.seed_groups.available_cores", lambda: cores)
    return group_seeds(seeds_as, seeds, **{"liftable": True, "device": CPU, "images": False, **more})


def test_auto_gives_every_core_a_population_where_that_is_faster(monkeypatch):
    assert groups("auto", range(5), 2, monkeypatch) == ((0, 1, 2), (3, 4))
    assert groups("auto", range(4), 2, monkeypatch) == ((0, 1), (2, 3))
    assert groups("auto", range(3), 2, monkeypatch) == ((0,), (1,), (2,))  # one core would idle half of the time
    assert groups("auto", range(3), 8, monkeypatch) == ((0,), (1,), (2,))
    assert groups("auto", range(3), 1, monkeypatch) == ((0, 1, 2),)
    assert groups("auto", range(3), 8, monkeypatch, device=CUDA) == ((0, 1, 2),)
    assert groups("auto", range(3), 1, monkeypatch, images=True) == ((0,), (1,), (2,))
    assert groups("auto", range(3), 1, monkeypatch, liftable=False) == ((0,), (1,), (2,))
    assert groups("population", range(3), 8, monkeypatch) == ((0, 1, 2),)
    assert groups("processes", [7, 9], 1, monkeypatch) == ((7,), (9,))
    with pytest.raises(ValueError, match="cannot train its seeds as a population"):
        groups("population", range(3), 1, monkeypatch, liftable=False)


def test_wrong_way_is_one_sentence(tmp_path, capsys):
    assert train(tmp_path, "x", "--seeds-as", "swarm") == 2
    assert "unknown --seeds-as 'swarm', it is one of auto, population, processes" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_groups_part_where_their_seeds_are_at_different_steps():
    apart = in_step(((0, 1, 2), (3, 4)), {0: 10, 1: 5, 2: 10, 3: 10, 4: 10}, {4})
    assert apart == ((0, 2), (1,), (3,), (4,))
    assert described(apart) == "0, 2 together; 1, 3, 4 alone"


class Counter:
    """Environments that count their steps, and break at one of them."""

    num_envs, device = 2, CPU
    observation_spec = ObservationSpec((1,))

    def __init__(self, breaks_at: int):
        self.clock, self.breaks_at = 0, breaks_at

    def reset(self):
        return torch.zeros(2, 1)

    def send(self, action):
        self.clock += 1

    def recv(self):
        if self.clock == self.breaks_at:
            raise FloatingPointError("the observation of row 0 is not finite")
        obs, no = torch.full((2, 1), float(self.clock)), torch.zeros(2, dtype=torch.bool)
        return Step(obs, obs[:, 0], no, no, obs, obs[:, 0], no.long(), no)

    def close(self): ...


def test_environments_that_break_leave_the_others_alone():
    runners = SideBySide([Counter(9), Counter(2), Counter(9)], (3,))
    assert runners.reset().shape == (3, 2, 1)
    seen = [runners.step(torch.zeros(3, 2, 1)).reward[:, 0].tolist() for _ in range(3)]
    assert seen == [[1, 1, 1], [2, 0, 2], [3, 0, 3]]
    assert "row 0" in str(runners.errors[1])
    runners.rest(0)
    assert runners.step(torch.zeros(3, 2, 1)).reward[:, 0].tolist() == [0, 0, 4]
    assert [runner.clock for runner in runners.runners] == [3, 2, 4]
    alone = SideBySide([Counter(1)], ())
    assert alone.step(torch.zeros(2, 1)).obs.shape == (2, 1)
    assert list(alone.errors) == [0]
