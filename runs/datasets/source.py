"""From what a user names to data: an .hdf5 or .npz file, a Minari folder, or the id of one below Minari's root."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.runner import ContinuousActionSpec
from runs.datasets import d4rl_files, minari_files
from runs.datasets.dataset import Dataset, MappedRows, check_actions, fingerprint, in_memory
from runs.errors import UsageError
from runs.scores import D4RL, reference_pair

FILES = (".hdf5", ".h5", ".npz")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where data are and how they are read; plain values, a part of a run's `config.json`.

    path: absolute. rule, episode_limit: of D4RL's files. observation_keys: of Minari's dictionaries. stream: folder
    for a mapped file, None for memory. fingerprint, rows, references: as found when the run was made; {} and "" before.
    """

    path: str
    rule: str = "d4rl"
    episode_limit: int | None = None
    observation_keys: tuple[str, ...] = ()
    clip_actions: bool = False
    stream: str | None = None
    fingerprint: str = ""
    rows: int = 0
    references: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> DataSource:
        """From `config.json`."""
        references = {name: (float(low), float(high)) for name, (low, high) in values["references"].items()}
        keys = tuple(values["observation_keys"])
        return cls(**{**values, "references": references, "observation_keys": keys})

    def open(self) -> Dataset:
        """Read the data. Raises ValueError, one sentence, if that cannot be, UsageError if a package is missing."""
        path = Path(self.path)
        allocate = in_memory if self.stream is None else MappedRows(Path(self.stream))
        if path.suffix in FILES:
            return d4rl_files.read_d4rl(path, self.rule, self.episode_limit, allocate)
        return minari_files.read_minari(path, self.observation_keys, allocate)

    def open_for(self, spec: ContinuousActionSpec) -> Dataset:
        """The same for an environment with these actions, as the run was made with.

        Raises ValueError also if they are not the same any more.
        """
        found = self.open()
        check_actions(found.transitions, spec, self.path, self.clip_actions)
        if self.fingerprint and fingerprint(found.transitions) != self.fingerprint:
            raise ValueError(f"the data in '{self.path}' are not those that the run began with")
        return found


def locate(name: str) -> Path:
    """The absolute path of what a user calls data. Raises UsageError, one sentence, if there is no such thing."""
    path = Path(name).expanduser()
    if path.suffix in FILES:
        if not path.is_file():
            raise UsageError(f"there is no file '{name}'")
        return path.absolute()
    if path.exists():
        if not path.is_dir():
            raise UsageError(f"'{name}' is neither a folder nor a file that ends in {', '.join(FILES)}")
        return path.absolute()
    return minari_files.find(name, minari_files.root()).absolute()


def references_of(
    data: Dataset, env: str | None, given: tuple[float | None, float | None] = (None, None)
) -> dict[str, tuple[float, float]]:
    """Pairs (return that scores 0, that scores 100) by who says so: given, then of the data, then of D4RL.

    The first one is the one to quote. Raises UsageError for half a pair, or one without a range.
    """
    low, high = given
    if (low is None) != (high is None):
        raise UsageError("--ref-min and --ref-max go together")
    found = {} if low is None or high is None else {"given": (low, high)}
    found |= dict(data.about.references)
    if "d4rl" not in found and env is not None and env.partition("/")[0] in ("mujoco", "gym"):
        name = env.partition("/")[2].rpartition("-v")[0].lower()
        if name in D4RL:
            pair = reference_pair(f"{name}-v2")
            found["d4rl"] = pair.low, pair.high
    for name, (low, high) in found.items():
        if not high > low:
            raise UsageError(f"the reference pair '{name}' is {low:g} and {high:g}: the second must be larger")
    return found


def same_task(one: str, other: str) -> bool:
    """Whether two ids are of one task, whatever their versions and who registers them."""

    def name(env: str) -> str:
        return env.partition("/")[2].rpartition("-v")[0].lower() or env

    return name(one) == name(other)
