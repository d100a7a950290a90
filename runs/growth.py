"""From the flags of `neoteny continual growclip` to the settings of a run, checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from continual.growth.genome import PAPER, PAPER_CAP, SMALL, Genome
from continual.growth.growclip import Config
from continual.pairs.benchmarks import COLLECTIONS, is_path
from continual.pairs.stream import StreamConfig
from runs import compute
from runs.errors import UsageError, nearest
from runs.folders import describe_machine
from runs.growth_options import GROWCLIP, GROWTH_EXAMPLE, PRESETS, GrowthOptions
from runs.growth_run import GrowthConfig, read_growths
from runs.parsing import asks_for_help, given_value, help_page, parse_with_agent

_GENOMES = {"small": (SMALL, None), "paper": (PAPER, PAPER_CAP.capacity)}


def prepare_growth(arguments: Sequence[str]) -> tuple[GrowthConfig, GrowthOptions]:
    """Everything about a run, checked as far as it can be without the data. Raises ValueError, one sentence."""
    prog = f"neoteny continual {GROWCLIP}"
    name = given_value(arguments, "--preset") or "small"
    if name not in PRESETS:
        raise UsageError(f"'{GROWCLIP}' has no preset '{name}'.{nearest(name, PRESETS)}")
    preset = PRESETS[name]
    first, largest = _GENOMES[preset.genome]
    defaults = Config(**{"largest": largest, **preset.settings})
    if asks_for_help(arguments):
        print(help_page([GrowthOptions, Config], [None, defaults], prog, GROWTH_EXAMPLE))
        raise SystemExit(0)
    options, settings = parse_with_agent(GrowthOptions, defaults, arguments, prog, GROWTH_EXAMPLE, {}, preset.options)
    _check(options)
    seeds = tuple(range(options.seed, options.seed + options.seeds))
    genomes, paths = _beginnings(options, _changed(first, options.genome), seeds)
    if options.follow is not None:
        settings = dataclasses.replace(settings, choice="path")
    stream = StreamConfig(
        batch=options.batch_size, text_length=genomes[0].length, regime=options.regime, memory=options.memory,
        replay_ratio=options.replay_ratio, held_out=options.held_out, train_views=options.train_views,
        augment=options.augment,
    )  # fmt: skip
    config = GrowthConfig(
        strategy=GROWCLIP,
        strategy_config=dataclasses.asdict(settings),
        benchmark=options.benchmark,
        preset=options.preset,
        genomes=tuple(genome.as_dict() for genome in genomes),
        paths=paths,
        stream=dataclasses.asdict(stream),
        tasks=options.tasks,
        concepts=options.concepts,
        steps=options.steps,
        first_steps=options.first_steps,
        study=options.study,
        seeds=seeds,
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        device=compute.resolve_device(options.device).type,
        threads=options.threads,
        data=None if options.data is None else str(options.data.absolute()),
        tensorboard=options.tensorboard,
        environment=describe_machine(),
    )
    return config, options


def _check(options: GrowthOptions) -> None:
    """Raises UsageError for a number out of range, or a benchmark that has no pairs."""
    least = {"seeds": 1, "threads": 1, "seed": 0, "eval_every": 0, "checkpoint_every": 0, "steps": 1}
    for flag in ("tasks", "concepts", "first_steps"):
        least |= {flag: 1} if vars(options)[flag] is not None else {}
    for flag, bound in least.items():
        if not vars(options)[flag] >= bound:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least {bound}, got {vars(options)[flag]}")
    if options.benchmark not in COLLECTIONS and not is_path(options.benchmark):
        from continual.catalogue import BENCHMARKS

        if options.benchmark in BENCHMARKS:
            pairs = ", ".join(COLLECTIONS)
            raise UsageError(
                f"'{GROWCLIP}' learns image-caption pairs ({pairs}, a folder), and '{options.benchmark}' has labels"
            )
        raise UsageError(
            f"unknown benchmark '{options.benchmark}'.{nearest(options.benchmark, COLLECTIONS)} "
            "A folder of one's own has a / in its name."
        )
    if options.study == "dims" and (options.start is not None or options.follow is not None):
        raise UsageError("--study dims begins with one small model; leave out --start and --follow")


def _changed(genome: Genome, changes: Sequence[str]) -> Genome:
    """With KEY=VALUE ...: a whole number, a word, or three numbers parted by commas."""
    values: dict[str, Any] = {}
    known = {field.name for field in dataclasses.fields(Genome)} - {"vocabulary"}
    for change in changes:
        key, given, value = change.partition("=")
        if not given or key not in known:
            raise UsageError(f"--genome takes KEY=VALUE with a key of {', '.join(sorted(known))}, got '{change}'")
        values[key] = _value(value)
    try:
        return Genome.from_dict({**genome.as_dict(), **values})
    except TypeError as error:
        raise UsageError(f"--genome {' '.join(changes)} is no genome: {error}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(f"[{text}]") if "," in text else json.loads(text)
    except json.JSONDecodeError:
        return text


def _beginnings(
    options: GrowthOptions, genome: Genome, seeds: Sequence[int]
) -> tuple[list[Genome], tuple[tuple[str, ...], ...]]:
    """The first genome of every seed, and the growths that it repeats."""
    genomes, paths = [genome] * len(seeds), ((),) * len(seeds)
    if options.start is not None:
        genomes = [Genome.from_dict(history[-1]["genome"]) for history in _histories(options.start, seeds)]
    if options.follow is not None:
        histories = _histories(options.follow, seeds)
        paths = tuple(tuple(record["chosen"] for record in history if "cap" in record) for history in histories)
    return genomes, paths


def _histories(run: Path, seeds: Sequence[int]) -> list[list[dict[str, Any]]]:
    found = read_growths(run)
    missing = [seed for seed in seeds if seed not in found]
    if missing:
        raise UsageError(f"'{run}' has no seed {missing[0]}, only {', '.join(map(str, found))}")
    return [found[seed] for seed in seeds]
