"""Minari's datasets (Farama, 0.5): folders NAMESPACE/NAME-vN with data/metadata.json and data/main_data.hdf5.

An episode of T steps has T + 1 observations, so its transitions are obs[t], action[t] -> obs[t + 1], T of them: the
last one of a time-limited episode is kept, unlike by D4RL's rule. The HDF5 files are read here, without a network and
without the package; Arrow and Parquet are read, and all is written, through it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.offline.transitions import Transitions
from runs.datasets.dataset import About, Allocate, Dataset, fill, in_memory, packed, require_finite
from runs.datasets.extras import require_h5py, require_minari
from runs.errors import UsageError, nearest
from runs.files import read_json, sync

ID = re.compile(r"^(?:[\w.-]+/)*[\w.-]+?-v\d+$")
# Our own keys in metadata.json.
ENV, KIND, CARD = "neoteny_env", "neoteny_kind", "neoteny_card"
REFERENCES = "neoteny_references"
# AntMaze, PointMaze: D4RL's 29 numbers are the position and what the ant feels of itself.
GOAL_KEYS = ("achieved_goal", "observation")


def root() -> Path:
    """Where Minari keeps its datasets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def check_id(name: str) -> str:
    """The id itself. Raises UsageError unless it is (namespace/)*name-vN, as Minari needs it."""
    if not ID.match(name):
        hint = "" if re.search(r"-v\d+$", name) else f"; a version is missing, for example {name}-v0"
        raise UsageError(f"'{name}' is no dataset id, which is (namespace/)name-vN{hint}")
    return name


def local_ids(folder: Path) -> list[str]:
    """Ids of all datasets below a root."""
    return sorted(str(path.parent.parent.relative_to(folder)) for path in folder.glob("**/data/metadata.json"))


def find(name: str, folder: Path) -> Path:
    """The folder of an id below a root; without a version, the newest of that name.

    Raises UsageError, one sentence, if there is none.
    """
    known = local_ids(folder)
    if name in known:
        return folder / name
    versions = [other for other in known if re.sub(r"-v\d+$", "", other) == name]
    if versions:
        return folder / max(versions, key=lambda other: int(other.rpartition("-v")[2]))
    if not re.search(r"-v\d+$", name):
        raise UsageError(f"'{name}' is neither a file or folder nor the id of a dataset: an id ends in a version, -v0")
    where = f"there is no dataset '{name}' in '{folder}'"
    made = " `neoteny collect --preset offline-small` makes the lab's." if name.startswith("lab/") else ""
    raise UsageError(f"{where}.{nearest(name, known)}{made}" if known else f"{where}, which has none.{made}")


def read_minari(folder: Path, observation_keys: Sequence[str] = (), allocate: Allocate = in_memory) -> Dataset:
    """Read the dataset in a folder that has `data`, or is it. observation_keys: of dictionaries, in this order.

    Raises ValueError, one sentence, for files that are missing, damaged or of another kind.
    """
    data = folder / "data" if (folder / "data").is_dir() else folder
    try:
        metadata = read_json(data / "metadata.json")
    except FileNotFoundError as error:
        raise ValueError(f"'{folder}' is no Minari dataset: it has no data/metadata.json") from error
    episodes = _hdf5(data) if metadata.get("data_format", "hdf5") == "hdf5" else _through_minari(data)
    with episodes as (lengths, found):
        transitions = _transitions(str(folder), lengths, found, observation_keys, allocate)
    return Dataset(transitions, _about(folder, metadata))


def _about(folder: Path, metadata: Mapping[str, Any]) -> About:
    references = {name: (float(low), float(high)) for name, (low, high) in metadata.get(REFERENCES, {}).items()}
    if not references and metadata.get("ref_min_score") is not None and metadata.get("ref_max_score") is not None:
        references["minari"] = float(metadata["ref_min_score"]), float(metadata["ref_max_score"])
    told = ("algorithm_name", "author", "minari_version", "total_steps", "description", CARD)
    more = {name: metadata[name] for name in told if metadata.get(name) is not None}
    env = metadata.get(ENV) or _env_of(metadata.get("env_spec"))
    rule = "Minari: all steps, also the last of time-limited episodes"
    return About(str(metadata.get("dataset_id", folder)), rule, env, metadata.get(KIND), references, more)


def _env_of(spec: Any) -> str | None:
    """The environment of Gymnasium that a dataset names, by its id here."""
    import envs

    if isinstance(spec, str):
        with contextlib.suppress(ValueError):
            spec = json.loads(spec)
    name = spec.get("id") if isinstance(spec, Mapping) else None
    if not name:
        return None
    native = f"mujoco/{name}"
    return native if native in envs.known_ids() else f"gym/{name}"


Episode = Mapping[str, np.ndarray]


@contextlib.contextmanager
def _hdf5(data: Path) -> Iterator[tuple[list[int], Iterator[Episode]]]:
    """Lengths of all episodes, and the episodes."""
    h5py, path = require_h5py(), data / "main_data.hdf5"
    if not path.is_file():
        raise ValueError(f"'{path}' is missing")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"cannot read '{path}': it is no HDF5 file, or a truncated one") from error
    with file:
        names = sorted((name for name in file if name.startswith("episode_")), key=lambda n: int(n.rpartition("_")[2]))
        try:
            yield [len(file[name]["rewards"]) for name in names], (_episode(file[name]) for name in names)
        except KeyError as error:
            raise ValueError(f"'{path}' has an episode without {str(error).split()[-1]}") from error
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot read '{path}': {str(error).splitlines()[0]}") from error


def _episode(group: Any) -> Episode:
    def content(name: str) -> Any:
        if name not in group:
            raise KeyError(name)
        found = group[name]
        return found[:] if hasattr(found, "shape") else {key: found[key][:] for key in found}

    return {name: content(name) for name in ("observations", "actions", "rewards", "terminations", "truncations")}


@contextlib.contextmanager
def _through_minari(data: Path) -> Iterator[tuple[list[int], Iterator[Episode]]]:
    minari = require_minari()
    try:
        found = list(minari.MinariDataset(data).iterate_episodes())
    except ImportError as error:
        raise UsageError(f"cannot read '{data}': {error}") from error
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    episodes = [{name: getattr(episode, name) for name in names} for episode in found]
    yield [len(episode["rewards"]) for episode in episodes], iter(episodes)


def _transitions(
    source: str, lengths: list[int], episodes: Iterator[Episode], keys: Sequence[str], allocate: Allocate
) -> Transitions:
    if not lengths or not sum(lengths):
        raise ValueError(f"'{source}' has no transition")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    truncated, whole = np.zeros(int(starts[-1]), bool), np.zeros(len(lengths), bool)
    rows: np.ndarray | None = None
    o = a = 0
    for number, episode in enumerate(episodes):
        obs, action = _flat(source, episode["observations"], keys), np.asarray(episode["actions"])
        _check(source, number, lengths[number], obs, action, episode)
        action = action.astype(np.float32, copy=False)
        if rows is None:
            o, a = obs.shape[1], action.shape[1]
            rows = allocate(int(starts[-1]), 2 * o + a + 2)
        if (obs.shape[1], action.shape[1]) != (o, a):
            raise ValueError(f"'{source}' has other observations or actions in episode {number} than in the first")
        first, stop = starts[number], starts[number + 1]
        terminal = np.asarray(episode["terminations"], bool)
        fill(rows[first:stop], obs[:-1], action, np.asarray(episode["rewards"], np.float32), obs[1:], terminal)
        if stop > first:
            cut = np.asarray(episode["truncations"], bool) & ~terminal
            truncated[first:stop], whole[number] = cut, bool(terminal[-1] | cut[-1])
    assert rows is not None
    return packed(rows, o, a, truncated, starts, whole)


def _flat(source: str, obs: Any, keys: Sequence[str]) -> np.ndarray:
    """[T + 1, O] float32. Of dictionaries `keys`; by default all, of goal-conditioned ones those of `GOAL_KEYS`."""
    if isinstance(obs, Mapping):
        wanted = list(keys) or (list(GOAL_KEYS) if set(GOAL_KEYS) <= set(obs) else sorted(obs))
        if missing := [key for key in wanted if key not in obs]:
            raise ValueError(f"'{source}' has no observation '{missing[0]}'; it has {', '.join(sorted(obs))}")
        parts = [np.asarray(obs[key], np.float32) for key in wanted]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], 1)
    if isinstance(obs, tuple):
        return np.concatenate([np.asarray(part, np.float32).reshape(len(part), -1) for part in obs], 1)
    found = np.asarray(obs)
    if found.ndim > 2:
        raise ValueError(f"'{source}' shows images {list(found.shape[1:])}; offline agents need vectors")
    return found.astype(np.float32, copy=False).reshape(len(found), -1)


def _check(
    source: str, number: int, length: int, obs: np.ndarray, action: np.ndarray, episode: Mapping[str, Any]
) -> None:
    where = f"episode {number} of '{source}'"
    if action.ndim != 2 or action.dtype.kind != "f":
        raise ValueError(f"{where} has actions that are no vectors of real numbers; offline agents need those")
    if len(obs) != length + 1:
        raise ValueError(f"{where} has {len(obs)} observations for {length} steps; it needs {length + 1}")
    for name in ("actions", "terminations", "truncations"):
        if len(episode[name]) != length:
            raise ValueError(f"{where} has {length} rewards but {len(episode[name])} {name}")
    for name, values in (("observations", obs), ("actions", action), ("rewards", np.asarray(episode["rewards"]))):
        require_finite(f"{name} in episode {number}", source, values)


def write_minari(
    target: Path,
    dataset_id: str,
    data: Transitions,
    spaces: tuple[Any, Any],
    metadata: Mapping[str, Any],
    env_spec: Any = None,
) -> None:
    """Write data as a dataset in `target`, whole or not at all. Every episode must be whole.

    spaces: observation and action space of Gymnasium. metadata: further keys of metadata.json; `algorithm_name`,
    `description`, `ref_min_score` and `ref_max_score` are Minari's own. Raises UsageError if `target` exists.
    """
    if target.exists():
        raise UsageError(f"'{target}' exists already; choose another --name or remove it")
    minari = require_minari()
    from minari.data_collector import EpisodeBuffer

    made = [path for path in target.parents if not path.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    own = ("algorithm_name", "description", "ref_min_score", "ref_max_score", "author", "requirements")
    known = {name: value for name, value in metadata.items() if name in own}
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(staging)
    try:
        with warnings.catch_warnings(action="ignore"):  # of addresses and links that are not given
            made_set = minari.create_dataset_from_buffers(
                dataset_id,
                [EpisodeBuffer(id=number, **episode) for number, episode in enumerate(episodes(data))],
                env=env_spec,
                observation_space=spaces[0],
                action_space=spaces[1],
                data_format="hdf5",
                jpeg_encoding=False,
                **known,
            )
        made_set.storage.update_metadata({name: value for name, value in metadata.items() if name not in own})
        del made_set
        _sync_all(staging / dataset_id)
        (staging / dataset_id).rename(target)
        sync(target.parent)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # what others have put there stays
                shutil.rmtree(staging, ignore_errors=True)
                path.rmdir()
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)


def episodes(data: Transitions) -> Iterator[dict[str, Any]]:
    """As Minari has them: observations [T + 1, O], actions [T, A], rewards, terminations, truncations [T]."""
    for first, stop in zip(data.starts[:-1].tolist(), data.starts[1:].tolist(), strict=True):
        part = slice(first, stop)
        yield {
            "observations": np.concatenate([data.obs[part].numpy(), data.next_obs[stop - 1 : stop].numpy()]),
            "actions": data.action[part].numpy().copy(),
            "rewards": data.reward[part].numpy().copy(),
            "terminations": data.terminal[part].numpy().copy(),
            "truncations": data.truncated[part].numpy().copy(),
        }
