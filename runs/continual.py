"""`neoteny continual`: a strategy on a benchmark of tasks, all seeds as one population in this process."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from continual import catalogue, presets
from runs import compute, growth_run
from runs.checkpoint import list_checkpoints
from runs.continual_run import ContinualConfig, build, resolve_benchmark, train
from runs.errors import UsageError, nearest
from runs.folders import describe_machine, new_run_folder
from runs.growth import prepare_growth
from runs.growth_options import GROWCLIP, GrowthOptions
from runs.growth_run import GrowthConfig
from runs.lock import RunLock
from runs.options import CONTINUAL_EXAMPLE, ContinualOptions, ResumeOptions
from runs.parsing import asks_for_help, given_value, help_page, parse_with_agent
from runs.progress import Progress
from runs.record import State, read_status, read_table, write_status
from runs.recovery import differences, other_threads, require_device, warn_of
from runs.session import EXPECTED_FAILURES, explain
from runs.settings import read_config
from runs.statistics import final_values, summarise
from runs.stopping import stop_on_signals

# Flags that change the benchmark, and the names that its settings have.
_OVERRIDES = {
    "batch_size": "batch",
    **{
        name: name
        for name in (
            "kind", "tasks", "epochs", "blurry", "class_groups", "class_order", "train_per_class", "test_per_class",
            "augmentation",
            "network", "hidden", "optimizer", "learning_rate", "momentum",
        )
    },
}  # fmt: skip
_SHOWN = (
    "cl/average_accuracy", "cl/forgetting", "cl/bwt", "cl/learning_accuracy", "cl/average_anytime_accuracy",
    "retrieval/text_to_image_r1", "retrieval/image_to_text_r1", "retrieval/chance_r1", "zero_shot/accuracy",
    "zero_shot/chance", "growth/parameters",
)  # fmt: skip


def continual_command(arguments: Sequence[str]) -> int:
    """Run `neoteny continual ARGUMENTS`. Returns the exit code; raises UsageError before anything is written."""
    names = ", ".join([*catalogue.KNOWN, GROWCLIP])
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"continual needs a strategy ({names}), for example: {CONTINUAL_EXAMPLE}")
    try:
        config, options = prepare(arguments[0], arguments[1:])
        found = opened(config)
    except ValueError as error:  # also of the rooms below, whose messages are written for users
        raise UsageError(str(error)) from error
    stem = f"{config.strategy}-{Path(config.benchmark).stem}"
    folder = new_run_folder(options.out, options.name, stem, found.save)
    if not options.quiet:
        print(f"{folder}: {config.strategy} on {config.benchmark}, {len(config.seeds)} seeds", file=sys.stderr)
    with RunLock(folder):
        return _run(config, found, folder, options.quiet, options.json)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run that can start. save: its settings into a folder. train: as `runs.continual_run.train`, but the config."""

    total_steps: int
    save: Callable[[Path], None]
    train: Callable[..., State]


def opened(config: ContinualConfig | GrowthConfig) -> Opened:
    """What a config describes, with its data. Raises ValueError, one sentence, for what does not fit together."""
    if isinstance(config, GrowthConfig):
        grower = growth_run.build(config)
        return Opened(grower.total_steps, partial(config.save, learner=grower), partial(growth_run.train, config))
    learner = build(config)
    return Opened(learner.total_steps, partial(config.save, learner=learner), partial(train, config))


def load(folder: Path) -> ContinualConfig | GrowthConfig:
    """What the run in a folder was started with. Raises ValueError, one sentence, if its file is no good."""
    growing = read_config(folder).get("strategy") == GROWCLIP
    return GrowthConfig.load(folder) if growing else ContinualConfig.load(folder)


def prepare(
    strategy: str, arguments: Sequence[str]
) -> tuple[ContinualConfig | GrowthConfig, ContinualOptions | GrowthOptions]:
    """Everything about a run, checked as far as it can be without the data. Raises ValueError, one sentence."""
    if strategy == GROWCLIP:
        return prepare_growth(arguments)
    return _prepare_labels(strategy, arguments)


def _prepare_labels(strategy: str, arguments: Sequence[str]) -> tuple[ContinualConfig, ContinualOptions]:
    """The same for a strategy that learns labels."""
    if strategy not in catalogue.KNOWN:
        raise UsageError(f"unknown strategy '{strategy}'.{nearest(strategy, [*catalogue.KNOWN, GROWCLIP])}")
    _, settings = catalogue.KNOWN[strategy]
    if asks_for_help(arguments):
        print(help_page([settings], [settings()], f"neoteny continual {strategy}", CONTINUAL_EXAMPLE))
        print("`neoteny continual --help` shows the options of a run, which go with these.")
        raise SystemExit(0)
    others = {name: other for name, (_, other) in catalogue.KNOWN.items()}
    preset = presets.find(strategy, *(given_value(arguments, flag) for flag in ("--preset", "--benchmark")))
    options, chosen = parse_with_agent(
        ContinualOptions,
        settings(**preset.settings),
        arguments,
        f"neoteny continual {strategy}",
        CONTINUAL_EXAMPLE,
        others,
    )
    for flag, least in {"seeds": 1, "threads": 1, "seed": 0, "eval_every": 0, "checkpoint_every": 0}.items():
        value = vars(options)[flag]
        if value is not None and not value >= least:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least {least}, got {value}")
    wanted = presets.WANTED.get(strategy, {})
    if options.optimizer not in (None, wanted.get("optimizer")):
        wanted = {}  # its learning rate is not for another optimiser
    overrides: dict[str, Any] = {**wanted, **preset.benchmarks.get(options.benchmark, {})} | {
        name: vars(options)[flag] for flag, name in _OVERRIDES.items() if vars(options)[flag] not in (None, ())
    }
    overrides |= {"nesterov": True} if options.nesterov else {}
    resolve_benchmark(options.benchmark, options.preset, overrides, strategy)
    config = ContinualConfig(
        strategy=strategy,
        strategy_config=dataclasses.asdict(chosen),
        benchmark=options.benchmark,
        preset=options.preset,
        overrides=overrides,
        seeds=tuple(range(options.seed, options.seed + options.seeds)),
        interventions=options.with_,
        mask_unseen=options.mask_unseen,
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        device=compute.resolve_device(options.device).type,
        threads=options.threads,
        data=None if options.data is None else str(options.data.absolute()),
        tensorboard=options.tensorboard,
        environment=describe_machine(),
    )
    return config, options


def resume_continual(options: ResumeOptions) -> int:
    """Continue a run that is not done. Returns the exit code; raises UsageError if it cannot go on."""
    folder = options.run
    try:
        config = load(folder)
        with RunLock(folder):
            if read_status(folder).get("state") == "done":
                if not options.quiet:
                    print(f"{folder} is done: {config.strategy} on {config.benchmark}", file=sys.stderr)
                _print_summary(folder, "done", options.quiet, options.json)
                return 0
            if not os.access(folder, os.W_OK):
                raise UsageError(f"cannot write to '{folder}': it is read-only")
            require_device(config.device)
            found = other_threads(config.threads, options.threads)
            found = [*differences(config.environment, describe_machine()), *found]
            config = dataclasses.replace(config, threads=options.threads or config.threads)
            run = opened(config)  # before anything is written
            warn_of(found)
            return _run(config, run, folder, options.quiet, options.json, found)
    except OSError as error:
        raise UsageError(f"cannot resume '{folder}': {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _run(
    config: ContinualConfig | GrowthConfig,
    run: Opened,
    folder: Path,
    quiet: bool,
    as_json: bool,
    found: Sequence[str] = (),
) -> int:
    """Train, and say what came out. found: differences of this place from that of the run."""
    total = run.total_steps
    before = {seed: int(read_status(folder).get("step", 0)) for seed in config.seeds}
    with stop_on_signals() as stopping, Progress(total, config.seeds, quiet, before) as display:

        def tell(steps: int) -> None:
            for seed in config.seeds:
                display.update(seed, steps)

        code = _trained(lambda: run.train(folder, tell, stopping.is_set, found), folder, total)
    if isinstance(code, int):
        return code
    _print_summary(folder, code, quiet, as_json)
    return 0 if code == "done" else 3


def _trained(session: Callable[[], State], folder: Path, total: int) -> State | int:
    """The state that training ended in, or the exit code if it failed."""
    try:
        return session()
    except EXPECTED_FAILURES as error:
        sentence, kind = explain(error)
    except Exception:  # noqa: BLE001 - not swallowed: printed as a defect
        sentence, kind = traceback.format_exc(), "defect"
    if kind == "refused":
        raise UsageError(sentence)
    saved = list_checkpoints(folder)
    step = int(saved[-1].name.removeprefix("step_")) if saved else 0
    try:
        write_status(folder, "failed", step, total, sentence)
    except OSError as error:
        print(f"neoteny: {explain(error)[0]}", file=sys.stderr)
    print(f"neoteny: {folder} failed: {sentence}", file=sys.stderr)
    if kind != "outside":
        return 1
    print(f"next: neoteny resume {folder}", file=sys.stderr)
    return 3 if saved else 1


def summarise_continual(folder: Path) -> dict[str, Any]:
    """The last value of every metric that is not of a single task, over seeds."""
    rows = [row for row in read_table(folder) if row.task is None]
    names = dict.fromkeys(row.name for row in rows)
    return {"run": str(folder), "metrics": {n: summarise(final_values(rows, n).values()) for n in names}}


def _print_summary(folder: Path, state: State, quiet: bool, as_json: bool) -> None:
    summary = summarise_continual(folder)
    if as_json:
        print(json.dumps(summary))
    if quiet:
        return
    for name in _SHOWN:
        found = summary["metrics"].get(name)
        if found and found["mean"] is not None:
            interval = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
            print(f"{name} {found['mean']:.3f}{interval} over {found['seeds']} seeds", file=sys.stderr)
    if state == "stopped":
        print(f"stopped early; continue with: neoteny resume {folder}", file=sys.stderr)
    print(f"next: neoteny report {folder}", file=sys.stderr)
