"""Datasets from trained agents: which snapshot is what, whole episodes, and files that Minari reads back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
from agents.agent import ActionScale
from agents.replay import Replay
from envs import ObservationSpec
from runs.cli import main
from runs.collect import PRESETS, fractions_of
from runs.datasets.collection import alive_share, cut_to, expert_step, medium_step, ring_transitions, roll_out
from runs.datasets.dataset import fingerprint
from runs.datasets.minari_files import read_minari
from tests.agents.fakes import CPU, make_step, stream
from tests.agents.offline_data import box, make_transitions


def test_medium_is_the_first_snapshot_in_the_band_or_the_nearest_below():
    curve = [(0, 0.3), (1, 0.1), (2, 0.45), (3, 0.3), (4, 1.0)]
    assert medium_step(curve, 0.0, 1.0) == (2, pytest.approx(0.45))
    assert medium_step([(1, 0.05), (2, 0.2), (3, 0.55), (4, 1.0)], 0.0, 1.0)[0] == 2
    with pytest.raises(ValueError, match="evaluate more often"):
        medium_step([(1, 0.0), (2, 0.9)], 0.0, 1.0)
    with pytest.raises(ValueError, match="train longer"):
        medium_step(curve, 1.0, 0.5)
    assert expert_step([(1, 9.0), (2, 0.0), (3, 5.0), (4, 6.0), (5, 5.0)]) == 4


def test_rollouts_are_whole_episodes_in_the_order_they_began_and_the_same_again():
    def collected(seed: int):
        runner = envs.make("gym/MountainCarContinuous-v0", 3, seed, CPU, max_episode_steps=20)
        draws = torch.Generator().manual_seed(seed)
        data = roll_out(runner, lambda obs: torch.rand(len(obs), 1, generator=draws) * 2 - 1, 110)
        runner.close()
        return data

    data = collected(1)
    assert data.lengths.tolist() == [20] * 6
    assert data.truncated.sum() == 6
    inside = data.followed
    assert torch.equal(data.next_obs[:-1][inside[:-1]], data.obs[1:][inside[:-1]])
    assert fingerprint(data) == fingerprint(collected(1)) != fingerprint(collected(2))


@pytest.mark.parametrize(("slots", "steps_taken"), [(40, 12), (12, 10)])
def test_a_ring_becomes_transitions_until_the_end_of_an_episode(slots, steps_taken):
    """Also if a boundary fills its last slot."""
    spec = ObservationSpec((1,))
    ring = Replay(slots, 1, spec, box(1, 2.0), CPU, stream())
    for t in range(steps_taken):
        ended = t % 5 == 4
        step = make_step(torch.tensor([[t + 100.0]]), float(t), ended and t < 5, ended, torch.tensor([[t + 1.0]]))
        ring.add(torch.tensor([[float(t)]]), torch.tensor([[0.5]]), step)
    tensors = {"frame": ring.frame, "action": ring.action, "reward": ring.reward, "terminated": ring.terminated}
    tensors |= {"is_transition": ring.is_transition}
    whole = {name: tensor[None] for name, tensor in tensors.items()}
    for steps, kept in ((3, 5), (5, 5), (6, 10), (12, 10)):
        data = ring_transitions(whole, int(ring.head), ActionScale(box(1, 2.0), CPU), steps)
        assert data.reward.tolist() == list(range(kept))
        assert data.next_obs.flatten().tolist() == [t + 1 for t in range(kept)]
        assert (data.action == 1.0).all()
        assert data.terminal.nonzero().flatten().tolist() == [4]
        assert data.truncated.nonzero().flatten().tolist() == [9][: kept // 10]


def test_standing_still_is_noticed_and_names_of_mixtures_are_read():
    data = make_transitions(40, 3, 1)
    data.reward[:] = 1.0
    assert alive_share("mujoco/Hopper-v5", data) == pytest.approx(1.0)
    assert alive_share("mujoco/HalfCheetah-v5", data) is None
    assert len(cut_to(data, 11)) == 20
    assert fractions_of("random-expert-6") == {"random": pytest.approx(0.94), "expert": 0.06}
    assert set(fractions_of("random-medium-expert")) == {"random", "medium", "expert"}
    assert all(
        kind in ("random", "medium", "expert") for jobs in PRESETS.values() for job in jobs for kind in job.kinds[:2]
    )


SOURCE = ["--hidden", "8", "8", "--warmup-steps", "100", "--batch-size", "8", "--preset", "small"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A run of TD3 whose snapshots are all kept."""
    out = tmp_path_factory.mktemp("source")
    flags = ["--env", "gym/Pendulum-v1", "--steps", "600", "--seeds", "1", "--eval-episodes", "2"]
    flags += ["--eval-every", "200", "--checkpoint-every", "200", "--keep-every", "200", "--quiet", "--no-tensorboard"]
    assert main(["train", "td3", *SOURCE, *flags, "--out", str(out), "--name", "run"]) == 0
    return out / "run"


def collect(source: Path, out: Path, *more: str) -> int:
    return main(["collect", "--from", str(source), "--transitions", "300", "--out", str(out), "--quiet", *more])


def test_collected_sets_are_read_back_by_us_and_by_minari(source, tmp_path, capsys, monkeypatch):
    pytest.importorskip("minari", reason="datasets need minari: pip install 'neoteny[offline]'")
    import minari

    from runs.snapshots import Source

    monkeypatch.setattr(Source, "medium", (400, 0.3))  # so short a training has no medium policy of its own
    monkeypatch.setattr(Source, "low", -1200.0)
    monkeypatch.setattr(Source, "high", -200.0)
    more = ["--policy", "random", "medium-replay", "medium-expert", "random-expert-50", "--size", "tiny", "--d4rl"]
    assert collect(source, tmp_path, *more, "--json") == 0
    made = {one["id"]: one for one in json.loads(capsys.readouterr().out)["datasets"]}
    assert list(made) == [f"lab/pendulum/{kind}-tiny-v0" for kind in more[1:5]]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for name, one in made.items():
        data = read_minari(tmp_path / name)
        assert fingerprint(data.transitions) == one["fingerprint"]
        assert data.about.env == "gym/Pendulum-v1"
        assert list(data.about.references) == ["lab"]
        assert minari.load_dataset(name).total_steps == len(data.transitions) == one["transitions"]
        assert (tmp_path / name / "CARD.md").read_text().startswith(f"# {name}")
    assert set(minari.list_local_datasets()) == set(made)
    assert made["lab/pendulum/medium-replay-tiny-v0"]["transitions"] == 400
    assert made["lab/pendulum/medium-expert-tiny-v0"]["transitions"] == 800
    untrained = ["collect", "--env", "gym/Pendulum-v1", "--policy", "random", "--size", "tiny", "--transitions", "300"]
    assert main([*untrained, "--out", str(tmp_path / "again"), "--quiet", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)["datasets"][0]
    assert one["fingerprint"] == made["lab/pendulum/random-tiny-v0"]["fingerprint"]
    mixture = "lab/pendulum/random-tiny:0.5,lab/pendulum/medium-replay-tiny:0.5"
    assert main(["collect", "--mix", mixture, "--name", "lab/mine-v1", "--out", str(tmp_path), "--quiet"]) == 0
    d4rl = tmp_path / "lab/pendulum/random-tiny-v0/random-tiny-v0.hdf5"
    assert main(["inspect", str(d4rl), "--rule", "exact", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["transitions"] == made["lab/pendulum/random-tiny-v0"]["transitions"]
    command = ["offline", "bc", "--data", "lab/pendulum/random-tiny", "--steps", "2", "--seeds", "1", "--quiet"]
    assert main([*command, "--eval-episodes", "1", "--out", str(tmp_path / "runs"), "--no-tensorboard"]) == 0


def test_quiet_is_quiet_also_of_the_compiler_of_models(tmp_path, capfd, monkeypatch):
    """MuJoCo calls an attribute of the cheetah's model outdated; Minari has it compiled."""
    pytest.importorskip("minari", reason="datasets need minari: pip install 'neoteny[offline]'")
    monkeypatch.chdir(tmp_path)
    command = ["collect", "--env", "mujoco/HalfCheetah-v5", "--policy", "random", "--size", "tiny", "--quiet"]
    assert main([*command, "--transitions", "1000", "--out", str(tmp_path / "data")]) == 0
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # no log of the engine's


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policy", "randm"], "unknown policy 'randm'. Did you mean 'random'"),
        (["--name", "lab/pendulum/random"], "a version is missing, for example lab/pendulum/random-v0"),
        (["--policy", "random", "medium", "--name", "lab/x-v0"], "--name is of one dataset"),
        (["--env", "gym/CartPole-v1"], "collect is for continuous actions"),
        (["--preset", "offline-smal"], "Did you mean 'offline-small'"),
        (["--mix", "lab/x-v0", "--name", "lab/y-v0"], "--mix is ID:AMOUNT"),
        (["--mix", "lab/x-v0:1"], "--mix needs a --name"),
    ],
)
def test_what_users_get_wrong_leaves_nothing(source, tmp_path, capsys, more, message):
    assert collect(source, tmp_path / "root", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "root").exists()


def test_what_exists_is_not_overwritten(source, tmp_path, capsys):
    (tmp_path / "lab" / "x-v0").mkdir(parents=True)
    assert collect(source, tmp_path, "--policy", "random", "--name", "lab/x-v0") == 2
    assert "exists already" in capsys.readouterr().err
    assert np.array_equal(list((tmp_path / "lab" / "x-v0").iterdir()), [])
