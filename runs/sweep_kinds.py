"""What a sweep can be of: runs of `neoteny train`, `neoteny offline` or `neoteny continual`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from continual import catalogue
from continual.growth import growclip
from continual.pairs.benchmarks import COLLECTIONS, is_path
from envs.registry import check_id
from runs import continual, offline, train
from runs.catalogue import OFFLINE, find_agent
from runs.config import RunConfig
from runs.continual_run import ContinualConfig
from runs.datasets.source import locate
from runs.errors import UsageError, nearest
from runs.growth_options import GROWCLIP, GrowthOptions
from runs.growth_run import GrowthConfig
from runs.offline_options import OfflineOptions
from runs.options import ContinualOptions, TrainOptions

# What of a run's settings says where it ran, not what it is: a trial may go on elsewhere.
_PLACE = ("environment", "device", "threads", "seed_groups")


@dataclass(frozen=True)
class Prepared:
    """A run that could start. seeds: how many. cores: that it takes. settings: what it is, as plain values."""

    seeds: int
    cores: int
    steps: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class SweepKind:
    """A command, and how a sweep's file speaks of its runs.

    who, where: the words for what learns and what it learns from; whos, wheres: of their lists. settled: options that
    the sweep sets itself. shorthands: those that may stand at the top of the file. options: class of those of the
    command, if it is for `who`. config: class of what is set of `who`. score: the metric that is told of its runs.
    check: raises ValueError for a name that there is not. prepare: (who, flags) -> what would start; raises ValueError.
    saved: settings of the run in a folder.
    """

    command: str
    who: str
    whos: str
    where: str
    wheres: str
    settled: tuple[str, ...]
    shorthands: tuple[str, ...]
    options: Callable[[str], type]
    config: Callable[[str], type]
    score: Callable[[str], str]
    check: Callable[[str, str], None]
    prepare: Callable[[str, Sequence[str]], Prepared]
    saved: Callable[[Path], dict[str, Any]]


def _check_training(agent: str, env: str) -> None:
    find_agent(agent)
    check_id(env)


def _prepare_training(agent: str, flags: Sequence[str]) -> Prepared:
    config, _ = train.prepare(agent, flags)
    cores = len(config.seed_groups) * config.threads
    return Prepared(len(config.seeds), cores, config.steps, _settings_of_training(config))


def _settings_of_training(config: RunConfig) -> dict[str, Any]:
    run = {name: value for name, value in vars(config).items() if name not in (*_PLACE, "agent_config")}
    return run | vars(config.agent_config)


def _check_offline(agent: str, data: str) -> None:
    if agent not in OFFLINE:
        raise UsageError(f"unknown offline agent '{agent}'.{nearest(agent, OFFLINE)}")
    locate(data)


def _prepare_offline(agent: str, flags: Sequence[str]) -> Prepared:
    config, _ = offline.prepare(agent, [*flags, "--quiet"])
    cores = len(config.seed_groups) * config.threads
    return Prepared(len(config.seeds), cores, config.steps, _settings_of_training(config))


def _check_continual(strategy: str, benchmark: str) -> None:
    pairs = strategy == GROWCLIP
    if pairs and is_path(benchmark):
        return
    for word, name, known in (
        ("strategy", strategy, [*catalogue.KNOWN, GROWCLIP]),
        ("benchmark", benchmark, [*COLLECTIONS] if pairs else [*catalogue.BENCHMARKS]),
    ):
        if name not in known:
            raise UsageError(f"unknown {word} '{name}'.{nearest(name, known)}")


def _prepare_continual(strategy: str, flags: Sequence[str]) -> Prepared:
    config, _ = continual.prepare(strategy, flags)
    one = config if isinstance(config, GrowthConfig) else dataclasses.replace(config, seeds=config.seeds[:1])
    return Prepared(len(config.seeds), config.threads, continual.opened(one).total_steps, _settings(config))


def _settings(config: ContinualConfig | GrowthConfig) -> dict[str, Any]:
    run = {name: value for name, value in vars(config).items() if name not in (*_PLACE, "strategy_config")}
    return json.loads(json.dumps(run | config.strategy_config))  # as a saved config has them: lists


KINDS: dict[str, SweepKind] = {
    kind.command: kind
    for kind in (
        SweepKind(
            "train", "agent", "agents", "env", "envs", ("env", "out", "name", "quiet", "json"),
            ("seeds", "seed", "steps"), lambda _: TrainOptions, lambda agent: find_agent(agent).Config,
            lambda _: "eval/return", _check_training, _prepare_training,
            lambda folder: _settings_of_training(RunConfig.load(folder)),
        ),
        SweepKind(
            "offline", "agent", "agents", "data", "datasets", ("data", "out", "name", "quiet", "json"),
            ("seeds", "seed", "steps"), lambda _: OfflineOptions, lambda agent: find_agent(agent).Config,
            lambda _: "eval/return", _check_offline, _prepare_offline,
            lambda folder: _settings_of_training(RunConfig.load(folder)),
        ),
        SweepKind(
            "continual", "strategy", "strategies", "benchmark", "benchmarks",
            ("benchmark", "out", "name", "quiet", "json"), ("seeds", "seed"),
            lambda strategy: GrowthOptions if strategy == GROWCLIP else ContinualOptions,
            lambda strategy: growclip.Config if strategy == GROWCLIP else catalogue.KNOWN[strategy][1],
            lambda strategy: "retrieval/text_to_image_r1" if strategy == GROWCLIP else "cl/average_accuracy",
            _check_continual, _prepare_continual, lambda folder: _settings(continual.load(folder)),
        ),
    )
}  # fmt: skip
