"""From files to transitions: alignment, time limits, mixtures (specs/a2pr-and-offline-rl.md, sections 10 and 14)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from runs.datasets.d4rl_files import read_d4rl, write_d4rl
from runs.datasets.dataset import MappedRows, chosen_episodes, fingerprint, from_arrays
from runs.datasets.minari_files import episodes, read_minari
from runs.datasets.mix import mix
from tests.agents.offline_data import make_transitions


def d4rl_arrays(rows: int = 8, **changes) -> dict[str, np.ndarray]:
    """Observation t at row t; terminal at row 2 only, time-out at row 5 only."""
    flags = np.zeros((2, rows), bool)
    flags[0, 2] = flags[1, 5] = True
    arrays = {
        "observations": np.arange(rows, dtype=np.float64)[:, None],
        "actions": np.linspace(-1, 1, rows, dtype=np.float32)[:, None],
        "rewards": np.arange(rows, dtype=np.float32)[:, None] * 10,
        "terminals": flags[0],
        "timeouts": flags[1],
    }
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def npz(tmp_path: Path, name: str = "hopper-medium-v2", **changes) -> Path:
    path = tmp_path / f"{name}.npz"
    np.savez(path, **d4rl_arrays(**changes))
    return path


KEPT = [0, 1, 2, 3, 4, 6]


@pytest.mark.parametrize("counted", [False, True])
def test_d4rls_rule_keeps_what_qlearning_dataset_keeps(tmp_path, counted):
    path = npz(tmp_path, timeouts=None) if counted else npz(tmp_path)
    data = read_d4rl(path, limit=4 if counted else None)
    found = data.transitions
    assert found.obs.flatten().tolist() == KEPT
    assert found.next_obs.flatten().tolist() == [row + 1 for row in KEPT]
    assert found.reward.tolist() == [10 * row for row in KEPT]
    assert found.terminal.tolist() == [False, False, True, False, False, False]
    assert found.truncated.tolist() == [False] * 4 + [True, False]
    assert found.starts.tolist() == [0, 3, 5, 6]
    assert found.whole.tolist() == [True, True, False]
    assert (data.about.env, data.about.kind) == ("gym/Hopper-v4", "medium")
    assert data.about.references == {"d4rl": (-20.272305, 3234.3)}


def test_a_row_with_both_flags_is_a_timeout_to_d4rl_and_a_terminal_to_the_exact_rule(tmp_path):
    both = d4rl_arrays()["terminals"].copy()
    both[5] = True
    following = d4rl_arrays()["observations"] + 0.5
    path = npz(tmp_path, terminals=both, next_observations=following)
    assert read_d4rl(path).transitions.obs.flatten().tolist() == KEPT
    exact = read_d4rl(path, rule="exact").transitions
    assert exact.obs.flatten().tolist() == list(range(8))
    assert exact.next_obs.flatten().tolist() == [row + 0.5 for row in range(8)]
    assert exact.terminal.tolist() == both.tolist()
    assert not exact.truncated.any()


def test_exact_rule_keeps_time_limited_rows_and_does_without_next_observations(tmp_path):
    exact = read_d4rl(npz(tmp_path, next_observations=d4rl_arrays()["observations"]), rule="exact").transitions
    assert exact.truncated.tolist() == [row == 5 for row in range(8)]
    assert not exact.terminal[5]
    found = read_d4rl(npz(tmp_path, "other"), rule="exact").transitions
    assert found.obs.flatten().tolist() == KEPT


def test_data_that_end_with_a_time_limit_end_with_a_whole_episode(tmp_path):
    timeouts = d4rl_arrays()["timeouts"].copy()
    timeouts[7] = True
    found = read_d4rl(npz(tmp_path, timeouts=timeouts)).transitions
    assert found.obs.flatten().tolist() == KEPT
    assert found.whole.all()
    assert found.truncated.tolist() == [False] * 4 + [True, True]


def test_hdf5_files_are_read_as_written_in_memory_and_mapped(tmp_path):
    pytest.importorskip("h5py", reason="HDF5 files need h5py: pip install 'neoteny[offline]'")
    data = make_transitions(45, 3, 2)
    data.whole[-1] = False
    write_d4rl(tmp_path / "pendulum.hdf5", data)
    for allocate in ({}, {"allocate": MappedRows(tmp_path / "cache")}):
        found = read_d4rl(tmp_path / "pendulum.hdf5", rule="exact", **allocate).transitions
        assert torch.equal(found.rows, data.rows)
        assert torch.equal(found.truncated, data.truncated)
        assert torch.equal(found.starts, data.starts)
        assert found.mapped == bool(allocate)
    assert not list((tmp_path / "cache").iterdir())
    content = (tmp_path / "pendulum.hdf5").read_bytes()
    (tmp_path / "short.hdf5").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="it is no HDF5 file, or a truncated one"):
        read_d4rl(tmp_path / "short.hdf5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, "has no rewards; it needs observations, actions, rewards, terminals"),
        ({"actions": np.zeros((7, 1))}, "has 8 observations but 7 actions"),
        (
            {"observations": np.array([[0.0]] * 5 + [[np.nan]] + [[1.0]] * 2)},
            "observations of .* hold NaN or an infinity in row 5",
        ),
        ({"timeouts": None}, "has no timeouts: say with --episode-limit"),
        ({"observations": np.zeros((8, 2, 2))}, r"observations of shape \[8, 2, 2\]"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read_d4rl(npz(tmp_path, "mine", **changes))
    assert "\n" not in str(error.value)


def write_counter_set(folder: Path, lengths: list[int]) -> None:
    """A Minari dataset whose observation counts all steps and whose action is (counter mod 7) / 7, by h5py alone."""
    import h5py

    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        counter = 0
        for number, length in enumerate(lengths):
            group = file.create_group(f"episode_{number}")
            steps = np.arange(counter, counter + length + 1, dtype=np.float64)
            group["observations"] = steps[:, None]
            group["actions"] = (steps[:-1, None] % 7 / 7).astype(np.float32)
            group["rewards"] = np.ones(length)
            last = np.arange(length) == length - 1
            group["terminations"], group["truncations"] = last & (number % 2 == 0), last & (number % 2 == 1)
            counter += length + 1
    metadata = {"data_format": "hdf5", "dataset_id": "lab/counter/x-v0", "env_spec": json.dumps({"id": "Pendulum-v1"})}
    (folder / "data" / "metadata.json").write_text(json.dumps(metadata | {"ref_min_score": -1.0, "ref_max_score": 2.0}))


def test_minaris_observations_and_actions_stay_in_step(tmp_path):
    pytest.importorskip("h5py", reason="HDF5 files need h5py: pip install 'neoteny[offline]'")
    lengths = [4, 5, 1, *[3] * 8]  # more than ten, whose names do not sort as their numbers
    write_counter_set(tmp_path / "x-v0", lengths)
    data = read_minari(tmp_path / "x-v0")
    found = data.transitions
    assert len(found) == sum(lengths)
    assert (found.next_obs - found.obs == 1).all()
    torch.testing.assert_close(found.action, found.obs % 7 / 7)
    assert found.terminal.sum() == 6
    assert found.truncated.sum() == 5
    assert found.whole.all()
    assert found.lengths.tolist() == lengths
    assert data.about.env == "gym/Pendulum-v1"
    assert data.about.references == {"minari": (-1.0, 2.0)}


def test_episodes_as_minari_has_them_keep_every_number():
    data = make_transitions(25, 3, 2)
    back = list(episodes(data))
    assert [len(episode["rewards"]) for episode in back] == [10, 10, 5]
    assert np.array_equal(back[1]["observations"][:-1], data.obs[10:20].numpy())
    assert np.array_equal(back[1]["observations"][-1], data.next_obs[19].numpy())


def test_mixtures_are_of_whole_episodes_in_the_wanted_amounts():
    many, few = make_transitions(37 * 330, 1, 1, length=37), make_transitions(1_200, 1, 1, length=50)
    few.obs[:] = 5.0
    mixed, labels = mix([(many, 9_500), (few, 500)], "transitions", seed=3)
    counts = np.bincount(labels)
    assert 9_500 <= counts[0] < 9_500 + 37
    assert 500 <= counts[1] < 500 + 50
    assert len(mixed) == counts.sum() == int(mixed.lengths.sum())
    assert set(mixed.lengths.tolist()) == {37, 50}
    assert (mixed.obs[labels == 1] == 5).all()
    ends = mixed.starts[1:] - 1
    assert (mixed.terminal[ends] | mixed.truncated[ends]).all()
    again, _ = mix([(many, 9_500), (few, 500)], "transitions", seed=3)
    other, _ = mix([(many, 9_500), (few, 500)], "transitions", seed=4)
    assert fingerprint(mixed) == fingerprint(again) != fingerprint(other)
    _, labels = mix([(many, 0.94), (few, 0.06)], "fraction", seed=0)
    assert (labels == 1).mean() == pytest.approx(0.06, abs=50 / len(labels))
    filtered = chosen_episodes(many, [4, 7])
    _, labels = mix([(filtered, 2), (few, 3)], "episodes", seed=0)
    assert np.bincount(labels).tolist() == [2 * 37, 3 * 50]
    with pytest.raises(ValueError, match="component 0 has 2 episodes in whole episodes, 3 are wanted"):
        mix([(filtered, 3)], "episodes", seed=0)
    with pytest.raises(ValueError, match="must add up to 1, got 0.5"):
        mix([(many, 0.5)], "fraction", seed=0)


def test_arrays_become_transitions_or_are_refused():
    obs, action = np.arange(6.0)[:, None], np.zeros((6, 1))
    terminal, cut = np.eye(6)[1], np.eye(6)[3]
    found = from_arrays(obs, action, np.ones(6), terminal, cut).transitions
    assert found.obs.flatten().tolist() == [0, 1, 2, 4]
    assert found.next_obs.flatten().tolist() == [1, 2, 3, 5]
    assert found.whole.tolist() == [True, True, False]
    own = from_arrays(obs, action, np.ones(6), terminal, cut, next_observations=obs + 1).transitions
    assert len(own) == 6
    assert own.truncated.tolist() == [False] * 3 + [True, False, False]
    with pytest.raises(ValueError, match="has 6 observations but 5 rewards"):
        from_arrays(obs, action, np.ones(5), terminal)
    with pytest.raises(ValueError, match="rewards of 'arrays' hold NaN or an infinity in row 2"):
        from_arrays(obs, action, np.array([0, 0, np.inf, 0, 0, 0]), terminal)
