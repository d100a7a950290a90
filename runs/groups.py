"""A run of `neoteny plasticity` is a folder of runs, one for each arm; report, compare and resume take it for all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from runs.errors import UsageError
from runs.settings import CONFIG, read_config

GROUP, ARM = "plasticity", "plasticity-arm"  # the commands in `config.json`
PLAIN, FRESH = "none", "fresh"  # the learner without an intervention; one that is drawn anew for each task
STATIONARY = "stationary"  # ends the name of an arm whose tasks do not change


def arm_names(group: Path) -> list[str]:
    """The arms that a group's `config.json` lists; empty for any other run.

    Raises ValueError, one sentence, for what is no run or a list that is none.
    """
    config = read_config(group)
    if config["command"] != GROUP:
        return []
    names = config.get("arms")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise ValueError(f"'{group / CONFIG}' is damaged: it does not list the arms of the run")
    return names


def expand(folders: Iterable[Path], with_stationary: bool = True) -> list[Path]:
    """The folders with those of its arms in place of each group. An arm whose folder was removed is left out.

    with_stationary: else also those in which nothing changes. Raises ValueError, one sentence, for what is no run or a
    group without any arm.
    """
    found: list[Path] = []
    for folder in folders:
        if not (names := arm_names(folder)):
            found.append(folder)
            continue
        arms = [folder / name for name in names if (folder / name / CONFIG).is_file()]
        chosen = [arm for arm in arms if with_stationary or not read_config(arm).get("stationary")]
        if not chosen:
            raise ValueError(f"the folders of the arms of '{folder}' are gone")
        found += chosen
    return found


def refuse_single_arm(folder: Path) -> None:
    """Raise UsageError with the command that works if `folder` is that of one arm: arms are resumed together."""
    if read_config(folder)["command"] != ARM:
        return
    group = folder.resolve().parent
    try:
        together = folder.resolve().name in arm_names(group)
    except ValueError:
        together = False
    if together:
        way = f"neoteny resume {folder.parent if folder.name else group}"
        raise UsageError(f"'{folder}' is one arm of a run of `neoteny plasticity`; resume all of them: {way}")
    raise UsageError(f"'{folder}' is one arm of a run of `neoteny plasticity`, and the rest of it is not around it")
