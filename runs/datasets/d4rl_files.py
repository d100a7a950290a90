"""D4RL's HDF5 files, and .npz files with the same arrays (Fu et al. 2020, arXiv:2004.07219).

Two rules make transitions of them:

    d4rl    as `d4rl.qlearning_dataset`: rows at a time limit are left out and so is the last row, the next observation
            is that of the next row, whatever the file says of it. Published numbers are of this rule.
    exact   the file's own next observations, time-limited rows are kept

A row that is flagged both terminal and time-out is a time-out by the first rule, a terminal by the second. Files
without the key `timeouts` are cut where their episodes reach the limit; the first rule then counts as D4RL does, one
row early after a terminal. specs/a2pr-and-offline-rl.md, section 10.2.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agents.offline.transitions import Transitions
from runs.datasets.dataset import (
    AT_A_TIME,
    About,
    Allocate,
    Dataset,
    episodes_of,
    fill,
    in_memory,
    packed,
    require_finite,
)
from runs.datasets.extras import require_h5py
from runs.files import replacing
from runs.scores import D4RL

RULES = ("d4rl", "exact")
_NEEDED = ("observations", "actions", "rewards", "terminals")
# The nearest environments there are for what D4RL simulated with mujoco_py; not the same simulator.
ENVIRONMENTS = {
    "halfcheetah": "gym/HalfCheetah-v4",
    "hopper": "gym/Hopper-v4",
    "walker2d": "gym/Walker2d-v4",
    "ant": "gym/Ant-v4",
}
_LIMIT = 1_000  # steps of an episode of those


def read_d4rl(path: Path, rule: str = "d4rl", limit: int | None = None, allocate: Allocate = in_memory) -> Dataset:
    """Read a file. limit: of an episode's steps, for files without `timeouts`. The file's name tells the environment.

    Raises ValueError, one sentence, for a file that cannot be read, lacks a key, or whose arrays do not fit.
    """
    if rule not in RULES:
        raise ValueError(f"--rule must be one of {', '.join(RULES)}, got '{rule}'")
    name = next((word for word in re.split(r"[-_/.]", path.stem.lower()) if word in D4RL), None)
    env = ENVIRONMENTS.get(name or "")
    with _opened(path) as file:
        _check(file, path)
        terminal, timeout = _flags(file, path, limit or (_LIMIT if name in ENVIRONMENTS else None), rule)
        own_next = rule == "exact" and "next_observations" in file
        count = len(terminal)
        keep = np.ones(count, bool)
        if not own_next:
            keep &= ~timeout
            keep[-1] = rule == "exact" and terminal[-1]
        data = _transitions(file, path, terminal, timeout, keep, own_next, allocate)
    words = f"rule {rule}: {int(keep.sum())} of {count} rows"
    kind = next((k for k in _KINDS if k in path.stem.lower().replace("_", "-")), None)
    references = {} if name is None else {"d4rl": D4RL[name]}
    return Dataset(data, About(str(path), words, env, kind, references))


_KINDS = ("medium-expert", "medium-replay", "full-replay", "medium", "expert", "random", "human", "cloned")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                yield {name: file[name] for name in file.files}
        except (OSError, EOFError) as error:
            raise ValueError(f"cannot read '{path}': {error}") from error
        return
    h5py = require_h5py()
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"cannot read '{path}': it is no HDF5 file, or a truncated one") from error
    with file:
        try:
            yield file
        except (OSError, RuntimeError) as error:  # chunks that are not there
            raise ValueError(f"cannot read '{path}': {str(error).splitlines()[0]}") from error


def _check(file: Mapping[str, Any], path: Path) -> None:
    missing = [key for key in _NEEDED if key not in file]
    if missing:
        raise ValueError(f"'{path}' has no {' and no '.join(missing)}; it needs {', '.join(_NEEDED)}")
    count = len(file["observations"])
    for key in (*_NEEDED, "timeouts", "next_observations"):
        if key in file and len(file[key]) != count:
            raise ValueError(f"'{path}' has {count} observations but {len(file[key])} {key}")
    if count < 2:
        raise ValueError(f"'{path}' has {count} rows, which make no transition")
    for key in ("observations", "actions"):
        if len(file[key].shape) != 2:
            raise ValueError(f"'{path}' has {key} of shape {list(file[key].shape)}, they must be [rows, numbers]")


def _flags(file: Mapping[str, Any], path: Path, limit: int | None, rule: str) -> tuple[np.ndarray, np.ndarray]:
    terminal = np.asarray(file["terminals"][:]).reshape(-1) != 0
    if "timeouts" in file:
        timeout = np.asarray(file["timeouts"][:]).reshape(-1) != 0
    elif limit is None:
        raise ValueError(f"'{path}' has no timeouts: say with --episode-limit after how many steps its episodes end")
    else:
        timeout = _counted(terminal, limit, quirk=rule == "d4rl")
    return (terminal, timeout) if rule == "d4rl" else (terminal, timeout & ~terminal)


def _counted(terminal: np.ndarray, limit: int, quirk: bool) -> np.ndarray:
    """Rows at which episodes reach the limit. quirk: behind a terminal, counting begins at 1."""
    found, step = np.zeros(len(terminal), bool), 0
    for row, ends in enumerate(terminal.tolist()):
        if step == limit - 1:
            found[row] = True
            step = 0
        elif ends:
            step = 1 if quirk else 0
        else:
            step += 1
    return found


def _transitions(
    file: Mapping[str, Any],
    path: Path,
    terminal: np.ndarray,
    timeout: np.ndarray,
    keep: np.ndarray,
    own_next: bool,
    allocate: Allocate,
) -> Transitions:
    count, o, a = len(keep), file["observations"].shape[1], file["actions"].shape[1]
    rows, filled = allocate(int(keep.sum()), 2 * o + a + 2), 0
    for first in range(0, count, AT_A_TIME):
        stop = min(first + AT_A_TIME, count)
        wanted = keep[first:stop]
        obs = np.asarray(file["observations"][first : stop + 1], np.float32)
        action = np.asarray(file["actions"][first:stop], np.float32)
        reward = np.asarray(file["rewards"][first:stop], np.float32).reshape(-1)
        if own_next:
            following = np.asarray(file["next_observations"][first:stop], np.float32)
        else:
            following = np.concatenate([obs[1:], obs[-1:]])[: stop - first]
        for name, values in (
            ("observations", obs),
            ("actions", action),
            ("rewards", reward),
            ("next_observations", following),
        ):
            require_finite(name, str(path), values, first)
        size = int(wanted.sum())
        own = obs[: stop - first][wanted]
        place = rows[filled : filled + size]
        fill(place, own, action[wanted], reward[wanted], following[wanted], terminal[first:stop][wanted])
        filled += size
    starts, whole = episodes_of(terminal | timeout, keep)
    truncated = np.zeros(len(rows), bool)
    last = starts[1:] - 1
    truncated[last] = ~terminal[keep][last] & whole
    return packed(rows, o, a, truncated, starts, whole)


def write_d4rl(path: Path, data: Transitions) -> None:
    """Write data as such a file, with `next_observations` and `timeouts`; whole or not at all."""
    h5py = require_h5py()
    timeouts = data.truncated.clone()
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        arrays = {
            "observations": data.obs,
            "actions": data.action,
            "rewards": data.reward,
            "next_observations": data.next_obs,
            "terminals": data.terminal,
            "timeouts": timeouts,
        }
        for name, values in arrays.items():
            file.create_dataset(name, data=values.numpy(), compression="gzip")
