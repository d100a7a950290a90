"""Finished or running experiments read back from their folders: what `report` and `compare` start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runs import statistics
from runs.files import read_json
from runs.record import TABLE, Row, read_status, read_table
from runs.settings import CONFIG, flat_settings
from runs.statistics import Summary

BACKENDS_APART = ("mujoco.warp",)  # float32, and other contacts than the C engine
COMPLETE = 0.9  # of the steps that the furthest seed reached; a seed that ended before is not averaged with the others


@dataclass(frozen=True)
class Ending:
    """The last value of a metric for one seed. value None: not measured, `missing` says why.

    complete: the seed went (nearly) as far as the others of its run and has a value there.
    """

    step: int
    value: float | None
    missing: str | None
    complete: bool


@dataclass(frozen=True)
class Run:
    """One run folder as read: its name, settings, state, and rows by metric."""

    path: Path
    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    metrics: dict[str, list[Row]]

    @property
    def seeds(self) -> list[int]:
        """Seeds that were asked for, and any other that has rows."""
        recorded = {row.seed for rows in self.metrics.values() for row in rows}
        return sorted(recorded.union(self.config.get("seeds") or []))

    @property
    def command(self) -> str:
        return self.config.get("command") or "train"

    @property
    def learner(self) -> str:
        """What learnt: the agent or strategy; empty where the settings do not say."""
        return str(self.config.get("agent") or self.config.get("strategy") or self.config.get("intervention") or "")

    @property
    def place(self) -> str:
        """On what it learnt: environments, benchmark, problem or data set; empty where the settings do not say.

        Environments of a backend whose numbers are not those of the others are a place of their own, and so is each
        data set of offline runs.
        """
        data = self.config.get("data")
        if self.command == "offline" and isinstance(data, dict):
            return "/".join(Path(str(data.get("path", ""))).parts[-3:])
        found = next(
            (self.config[key] for key in ("place", "env", "benchmark", "problem", "data") if self.config.get(key)), ""
        )
        place = " → ".join(map(str, found)) if isinstance(found, list) else str(found)
        apart = [name for name in BACKENDS_APART if name in self._backend]
        return f"{place} ({', '.join(apart)})" if apart else place

    @property
    def _backend(self) -> str:
        """Of the runner that made the environments; empty where the settings do not say."""
        runner = (self.config.get("environment") or {}).get("runner") or {}
        return str(runner.get("backend", ""))

    @property
    def state(self) -> str:
        return str(self.status.get("state", "state unknown"))

    def tasks(self, metric: str) -> list[int | str | None]:
        """Tasks that a metric was recorded for, in order of appearance; [None] if it knows none."""
        return list(dict.fromkeys(row.task for row in self.metrics.get(metric, [])))

    def endings(self, metric: str, task: int | str | None = None) -> dict[int, Ending]:
        """Each seed's last value of a metric, seeds in order. Rows of one step are averaged if none is missing."""
        last: dict[int, list[Row]] = {}
        for row in self.metrics.get(metric, []):
            if row.task != task:
                continue
            if row.seed not in last or row.step > last[row.seed][0].step:
                last[row.seed] = [row]
            elif row.step == last[row.seed][0].step:
                last[row.seed].append(row)
        furthest = max((rows[0].step for rows in last.values()), default=0)
        return {seed: _ending(last[seed], furthest) for seed in sorted(last)}

    def final_values(self, metric: str, task: int | str | None = None) -> dict[int, float]:
        """The last value of every seed that has one and went as far as the others."""
        endings = self.endings(metric, task).items()
        return {seed: ending.value for seed, ending in endings if ending.complete and ending.value is not None}

    def means_over_tasks(self, metric: str) -> dict[int, float]:
        """The mean of a metric's final values over its tasks, for every seed that has all of them."""
        per_task = [self.final_values(metric, task) for task in self.tasks(metric)]
        shared = set.intersection(*map(set, per_task)) if per_task else set()
        return {seed: float(np.mean([values[seed] for values in per_task])) for seed in sorted(shared)}

    def lost_seeds(self, metric: str) -> Iterator[str]:
        """A sentence for each seed that is missing from the summary of a metric, with the reason where one is known."""
        endings: dict[int, Ending] = {}
        for task in self.tasks(metric):
            for seed, ending in self.endings(metric, task).items():
                if seed not in endings or not ending.complete:
                    endings[seed] = ending
        for seed in self.seeds:
            ending = endings.get(seed)
            if ending is None:
                yield f"seed {seed} has no {metric}{self._reason(seed)}"
            elif ending.value is None:
                yield f"seed {seed}: the last {metric}, at step {ending.step:,}, is missing ({ending.missing})"
            elif not ending.complete:
                yield f"seed {seed} has no {metric} after step {ending.step:,}{self._reason(seed)}"

    def _reason(self, seed: int) -> str:
        """'; loss/critic became nan at step 20,040', from the first row without a value."""
        lost = [row for rows in self.metrics.values() for row in rows if row.seed == seed and row.value is None]
        if not lost:
            return ""
        first = min(lost, key=lambda row: row.step)
        return f"; {first.name} became {first.missing} at step {first.step:,}"


@dataclass(frozen=True)
class Measured:
    """The final values of one metric of one run, and of one task where it has tasks: seed -> value, and summaries.

    iqm_low, iqm_high: 95 % interval of the interquartile mean, None for fewer than two seeds.
    """

    run: Run
    metric: str
    task: int | str | None
    values: dict[int, float]
    summary: Summary
    iqm_low: float | None
    iqm_high: float | None

    @property
    def name(self) -> str:
        return self.metric if self.task is None else f"{self.metric} · {self.task}"


def measure(run: Run, metric: str, task: int | str | None = None) -> Measured:
    """Summarise the final values of a metric, in one task if it has tasks, over the seeds that went to the end."""
    return _measured(run, metric, task, run.final_values(metric, task))


def measure_over_tasks(run: Run, metric: str) -> Measured:
    """The same for each seed's mean over all tasks."""
    return _measured(run, metric, None, run.means_over_tasks(metric))


def _measured(run: Run, metric: str, task: int | str | None, values: dict[int, float]) -> Measured:
    bounds: tuple[float | None, float | None] = (None, None)
    if len(values) > 1:
        column = np.array(list(values.values()))[:, None]
        bounds = statistics.stratified_bootstrap_interval(
            column, statistics.interquartile_mean, statistics.report_generator()
        )
    return Measured(run, metric, task, values, statistics.summarise(values.values()), *bounds)


def _ending(rows: Sequence[Row], furthest: int) -> Ending:
    values = [row.value for row in rows]
    missing = next((row.missing for row in rows if row.value is None), None)
    value = None if missing else sum(v for v in values if v is not None) / len(values)
    step = rows[0].step
    return Ending(step, value, missing, complete=value is not None and step >= COMPLETE * furthest)


def read_runs(folders: Sequence[Path | str]) -> list[Run]:
    """Read run folders. A missing file counts as empty.

    Raises ValueError if no folder is given, one is given twice, one has neither settings nor table, or a file is
    damaged.
    """
    paths = [Path(folder) for folder in folders]
    return [_read_run(path, name) for path, name in zip(paths, _distinct_names(paths), strict=True)]


def _read_run(path: Path, name: str) -> Run:
    if not (path / CONFIG).is_file() and not (path / TABLE).is_file():
        raise ValueError(f"{path} is not a run folder: it has neither {CONFIG} nor {TABLE}")
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if not isinstance(config, dict) or not isinstance(config.get("seeds") or [], list):
        raise ValueError(f"{path / CONFIG} is damaged: it is not that of a run")
    metrics: dict[str, list[Row]] = {}
    for row in read_table(path) if (path / TABLE).is_file() else []:
        metrics.setdefault(row.name, []).append(row)
    return Run(path, name, config, read_status(path), metrics)


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell the folders apart."""
    if not paths:
        raise ValueError("no run folder is given")
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError("a run folder is given twice")
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: name -> one value a run, None where a run has no such setting."""
    columns = [flat_settings(run.config) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    table = {name: [column.get(name) for column in columns] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def method_labels(runs: Sequence[Run]) -> list[str]:
    """A short name for what learnt in each run; runs of one method in different environments share it.

    The agent's name alone where that is enough; with up to two settings in which runs of the same agent in the same
    place differ; the names of the runs where those do not tell them apart either.
    """
    labels = {run.name: run.learner for run in runs}
    for learner in dict.fromkeys(filter(None, labels.values())):
        same = [run for run in runs if run.learner == learner]
        varying = _varying_settings(same)
        if 0 < len(varying) <= 2:
            for run in same:
                settings = flat_settings(run.config)
                values = ", ".join(f"{name.split('.')[-1]}={settings.get(name)}" for name in varying)
                labels[run.name] = f"{learner} {values}"
    pairs = {(labels[run.name], run.place) for run in runs}
    if "" in labels.values() or len(pairs) < len(runs):
        return [run.name for run in runs]
    return list(labels.values())


def _varying_settings(runs: Sequence[Run]) -> list[str]:
    """Hyper-parameters that vary among runs in the same place."""
    found: dict[str, None] = {}
    for place in dict.fromkeys(run.place for run in runs):
        for name in differing_settings([run for run in runs if run.place == place]):
            if name.startswith("agent_config.") or name in ("preset", "strategy_config"):
                found[name] = None
    return [name for name in found if name != "preset"] or list(found)
