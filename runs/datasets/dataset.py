"""Data with what is known of them; building them from arrays; their fingerprint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from agents.offline.transitions import Transitions
from envs.runner import ContinuousActionSpec

AT_A_TIME = 65_536  # rows that are read, checked or hashed together
_TOLERANCE = 1e-6  # relative, of actions at their bounds
Allocate = Callable[[int, int], np.ndarray]  # float32 [rows, columns], in memory or mapped


@dataclass(frozen=True)
class About:
    """What is known of data beside their numbers.

    source: where they were read. rule: how the file became transitions, in words. env: the id of the environment, None
    if unknown. kind: random, medium, ... references: pairs (return that scores 0, that scores 100) by who says so.
    more: whatever else the file says.
    """

    source: str
    rule: str = ""
    env: str | None = None
    kind: str | None = None
    references: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """Transitions and what is known of them."""

    transitions: Transitions
    about: About


def in_memory(rows: int, columns: int) -> np.ndarray:
    """Room for packed rows."""
    return np.empty((rows, columns), np.float32)


class MappedRows:
    """Room for packed rows in a file of `folder`, for data larger than memory.

    The file has no name once it is open, so that the disk gets its room back when the process ends.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, rows: int, columns: int) -> np.ndarray:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".rows-{rows}-{columns}.{id(self):x}.part"
        try:
            return np.memmap(path, np.float32, "w+", shape=(rows, columns))
        finally:
            path.unlink(missing_ok=True)


def packed(
    rows: np.ndarray, observations: int, actions: int, truncated: np.ndarray, starts: ArrayLike, whole: ArrayLike
) -> Transitions:
    """Packed rows [N, 2 O + A + 2] as `Transitions`, without a copy; a file that is mapped stays one."""
    return Transitions(
        rows=torch.from_numpy(rows),
        observations=observations,
        actions=actions,
        truncated=torch.from_numpy(np.ascontiguousarray(truncated, bool)),
        starts=torch.from_numpy(np.asarray(starts, np.int64)),
        whole=torch.from_numpy(np.asarray(whole, bool)),
        mapped=isinstance(rows, np.memmap),
    )


def fill(
    rows: np.ndarray,
    obs: np.ndarray,
    action: np.ndarray,
    reward: np.ndarray,
    next_obs: np.ndarray,
    terminal: np.ndarray,
) -> None:
    """Write transitions into packed rows of as many: obs, next_obs [n, O], action [n, A], reward, terminal [n]."""
    o, a = obs.shape[1], action.shape[1]
    rows[:, :o], rows[:, o : o + a], rows[:, o + a] = obs, action, reward
    rows[:, o + a + 1 : -1], rows[:, -1] = next_obs, terminal


def require_finite(name: str, source: str, values: np.ndarray, first: int = 0) -> None:
    """Raises ValueError naming the first row of `values` [n, ...] that holds NaN or an infinity."""
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))[0]
        raise ValueError(f"{name} of '{source}' hold NaN or an infinity in row {first + bad}")


def from_arrays(
    observations: ArrayLike,
    actions: ArrayLike,
    rewards: ArrayLike,
    terminals: ArrayLike,
    truncations: ArrayLike | None = None,
    next_observations: ArrayLike | None = None,
    source: str = "arrays",
    env: str | None = None,
) -> Dataset:
    """Data from arrays in the order in which they happened: [N, O], [N, A], [N], [N], [N], [N, O].

    truncations: where a time limit ended an episode. Without next_observations the next row's observation is taken,
    and rows that have none of their episode (at a limit, at the end) are left out, but terminal ones.
    Raises ValueError, one sentence, for lengths that differ, shapes that do not fit, or numbers that are not finite.
    """
    obs, action = (np.atleast_2d(np.asarray(x, np.float32)) for x in (observations, actions))
    reward = np.asarray(rewards, np.float32).reshape(-1)
    terminal = np.asarray(terminals).reshape(-1).astype(bool)
    cut = np.zeros_like(terminal) if truncations is None else np.asarray(truncations).reshape(-1).astype(bool)
    following = None if next_observations is None else np.atleast_2d(np.asarray(next_observations, np.float32))
    named = {"observations": obs, "actions": action, "rewards": reward, "terminals": terminal, "truncations": cut}
    named |= {} if following is None else {"next_observations": following}
    for name, values in named.items():
        if len(values) != len(obs):
            raise ValueError(f"'{source}' has {len(obs)} observations but {len(values)} {name}")
        require_finite(name, source, values)
    if not len(obs):
        raise ValueError(f"'{source}' has no transition")
    if following is not None and following.shape != obs.shape:
        raise ValueError(f"'{source}' has observations {obs.shape} but next_observations {following.shape}")
    cut &= ~terminal
    ends = terminal | cut
    keep = np.ones(len(obs), bool)
    if following is None:
        following = np.concatenate([obs[1:], obs[-1:]])
        keep = ~cut
        keep[-1] = terminal[-1]
    starts, whole = episodes_of(ends, keep)
    last = starts[1:] - 1
    truncated = np.zeros(int(keep.sum()), bool)
    truncated[last] = ~terminal[keep][last] & whole
    rows = in_memory(int(keep.sum()), 2 * obs.shape[1] + action.shape[1] + 2)
    fill(rows, obs[keep], action[keep], reward[keep], following[keep], terminal[keep])
    transitions = packed(rows, obs.shape[1], action.shape[1], truncated, starts, whole)
    return Dataset(transitions, About(source, "arrays in the order in which they happened", env))


def episodes_of(ends: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where episodes start among kept rows, and which are whole. Both [N] bool: the last row of an episode, kept.

    The last episode is whole if its end is in the data. Episodes of which no row is kept are none.
    """
    episode = np.concatenate([[0], np.cumsum(ends)[:-1]])
    kept, counts = np.unique(episode[keep], return_counts=True)
    complete = ends[-1] | (kept < episode[-1])
    return np.concatenate([[0], np.cumsum(counts)]), np.asarray(complete, bool)


def joined(parts: Sequence[Transitions]) -> Transitions:
    """Data one after the other. All must observe and act alike."""
    sizes = {(part.observations, part.actions) for part in parts}
    if len(sizes) != 1:
        raise ValueError(f"data of different environments cannot be joined: (observed values, actions) {sorted(sizes)}")
    starts, offset = [torch.zeros(1, dtype=torch.int64)], 0
    for part in parts:
        starts.append(part.starts[1:] + offset)
        offset += len(part)
    return Transitions(
        torch.cat([part.rows for part in parts]),
        *sizes.pop(),
        torch.cat([part.truncated for part in parts]),
        torch.cat(starts),
        torch.cat([part.whole for part in parts]),
    )


def chosen_episodes(data: Transitions, episodes: Sequence[int]) -> Transitions:
    """Only these episodes, in this order."""
    spans = [tuple(data.starts[e : e + 2].tolist()) for e in episodes]
    lengths = torch.tensor([0, *(stop - start for start, stop in spans)])
    return Transitions(
        torch.cat([data.rows[start:stop] for start, stop in spans]),
        data.observations,
        data.actions,
        torch.cat([data.truncated[start:stop] for start, stop in spans]),
        lengths.cumsum(0),
        data.whole[list(episodes)],
    )


def fingerprint(data: Transitions) -> str:
    """SHA-256 of everything an agent can see of the data: transitions, time limits, episodes."""
    found = hashlib.sha256(f"{list(data.rows.shape)} {data.observations} {data.actions}".encode())
    for part in data.rows.split(AT_A_TIME):
        found.update(np.ascontiguousarray(part.numpy()).data)
    for flags in (data.truncated, data.starts, data.whole):
        found.update(np.ascontiguousarray(flags.numpy()).data)
    return found.hexdigest()


def check_actions(data: Transitions, spec: ContinuousActionSpec, source: str, clip: bool) -> None:
    """Raises ValueError if an action is outside of the environment's bounds; with `clip` it is moved there instead."""
    low, high = (torch.from_numpy(bound) for bound in (spec.low, spec.high))
    slack = _TOLERANCE * torch.maximum(low.abs(), high.abs())
    first = 0
    for part in data.action.split(AT_A_TIME):
        outside = ((part < low - slack) | (part > high + slack)).any(1)
        if clip:
            part.copy_(torch.minimum(torch.maximum(part, low), high))
        elif outside.any():
            row = int(outside.nonzero()[0])
            value = part[row][((part[row] < low - slack) | (part[row] > high + slack))][0]
            raise ValueError(
                f"'{source}' has an action of {float(value):.6g} in row {first + row}, outside of the environment's "
                f"{_range(spec)}; --clip-actions moves such actions to the bounds"
            )
        first += len(part)


def _range(spec: ContinuousActionSpec) -> str:
    low, high = float(spec.low.min()), float(spec.high.max())
    same = math.isclose(low, float(spec.low.max())) and math.isclose(high, float(spec.high.min()))
    return f"{low:g} to {high:g}" if same else "bounds"
