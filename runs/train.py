"""`neoteny train`: checks everything a user may get wrong, then makes the run's folder and trains."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import envs
from agents.agent import Misfit, Valuing
from agents.diagnostics import AgentDiagnostics
from envs import Runner
from envs.graphics import OpenGLMissing
from envs.sequence import sequence_of
from runs import compute
from runs.catalogue import AGENTS, OFFLINE, default_preset, find_agent, preset_config, run_preset
from runs.checkpoint import list_checkpoints
from runs.config import RunConfig
from runs.errors import UsageError
from runs.evaluation_summary import evaluation_summary
from runs.folders import describe_machine, new_run_folder
from runs.keeping import advice
from runs.lock import RunLock
from runs.memory import require_replay_memory
from runs.options import TRAIN_EXAMPLE, TrainOptions, WatchOptions, environment_settings
from runs.parsing import asks_for_help, given_value, given_values, help_page, parse_with_agent
from runs.randomness import spawn_streams
from runs.record import State, read_table
from runs.seed_groups import group_seeds
from runs.sequence_options import check_switching, finish_sequence, require_clearable
from runs.session import SeedFailed, run_session
from runs.statistics import summarise_rows
from runs.training import build_agent

_TOLD = ("eval/return", "eval/score", "finetune/", "cl/")  # of the closing summary, on a terminal


def train_command(arguments: Sequence[str]) -> int:
    """Run `neoteny train ARGUMENTS`. Returns the exit code; raises UsageError before anything is written."""
    begins = given_value(arguments, "--from") is not None
    if not begins and (not arguments or arguments[0].startswith("-")):
        raise UsageError(f"train needs an agent ({', '.join(AGENTS)}), for example: {TRAIN_EXAMPLE}")
    try:
        config, options = prepare_online(arguments) if begins else prepare(arguments[0], arguments[1:])
        folder = make_run_folder(config, options)
    except (ValueError, OpenGLMissing) as error:  # also of the rooms below, whose messages are written for users
        raise UsageError(str(error)) from error
    if not options.quiet:
        print(f"{folder}: {config.agent} on {config.place}, {len(config.seeds)} seeds", file=sys.stderr)
        if warning := advice(config):
            print(f"neoteny: {warning}", file=sys.stderr)
    with RunLock(folder) as lock:
        return conclude(folder, lambda: run_session(config, folder, lock, options.quiet), options.quiet, options.json)


def conclude(folder: Path, session: Callable[[], State], quiet: bool, as_json: bool) -> int:
    """Run a session to its end and say how it ended. Returns the exit code. Raises UsageError if it was refused."""
    try:
        state = session()
    except SeedFailed as failure:
        if failure.kind == "refused":
            raise UsageError(str(failure)) from failure
        has_checkpoint = bool(list_checkpoints(folder))
        kept = "its last checkpoint is kept" if has_checkpoint else "it has no checkpoint"
        print(f"neoteny: {folder} failed, {kept}: {failure}", file=sys.stderr)
        if failure.kind != "outside":
            return 1
        print(f"next: neoteny resume {folder}", file=sys.stderr)
        return 3 if has_checkpoint else 1
    if state == "done" and RunConfig.load(folder).film:
        _film(folder, quiet)
    print_summary(folder, state, quiet, as_json)
    return 0 if state == "done" else 3


def _film(folder: Path, quiet: bool) -> None:
    """What `neoteny watch` does; the run is done, whether there is a film or not."""
    from runs.play import film_run

    how = WatchOptions(run=folder)
    try:
        path, _, _ = film_run(folder, how.seed, how.episode_seed, how.out, how.max_steps, how.size, how.fps)
    except UsageError as error:
        print(f"neoteny: no film: {error}", file=sys.stderr)
        return
    if not quiet:
        print(f"film: {path}", file=sys.stderr)


def prepare(agent: str, arguments: Sequence[str]) -> tuple[RunConfig, TrainOptions]:
    """Everything about a run, checked, without writing anything. Raises ValueError or UsageError, one sentence."""
    module, prog = find_agent(agent), f"neoteny train {agent}"
    if agent in OFFLINE:
        raise UsageError(f"'{agent}' learns from fixed data: neoteny offline {agent} --data SOURCE")
    if asks_for_help(arguments):
        print(help_page([module.Config], [module.Config()], prog, TRAIN_EXAMPLE))
        print("`neoteny train --help` shows the options of a run, which go with these.")
        raise SystemExit(0)
    if not given_values(arguments, "--env"):
        raise UsageError(f"train needs an environment, for example: {TRAIN_EXAMPLE}")
    preset = given_value(arguments, "--preset")
    preset_config(agent, preset)  # a wrong name is found before an environment is built
    # The environment decides the default preset, and its settings are flags, so the flags are read twice.
    page = (arguments, prog, TRAIN_EXAMPLE, {name: other.Config for name, other in AGENTS.items()})
    options, _ = parse_with_agent(TrainOptions, preset_config(agent, preset), *page, run_preset(preset))
    check_switching(options)
    env_settings, env = environment_settings(options), _environment(options)
    try:
        runner = envs.make(env, **env_settings)
    except TypeError as error:  # a constructor of another package got a value of another kind
        if not env_settings:
            raise
        raise UsageError(f"{' '.join(options.env)} does not take the settings {env_settings}: {error}") from error
    try:
        preset = preset or default_preset(agent, _environment_ids(runner, options), runner.observation_spec)
        options, agent_config = parse_with_agent(TrainOptions, preset_config(agent, preset), *page, run_preset(preset))
        config = new_run_config(agent, agent_config, preset, options, env_settings, runner)
        config = finish_sequence(config, options, runner)
        try:
            require_replay_memory(config, runner)
            groups = choose_groups(config, options.seeds_as, runner)
        except Misfit as error:
            raise UsageError(f"{error}; use {' or '.join(_fitting_agents(config, runner)) or 'another one'}") from error
        threads = compute.resolve_threads(options.threads, len(groups), shows_images(runner))
        config = dataclasses.replace(config, seed_groups=groups, threads=threads)
        if config.film:
            runner.reset()
            runner.render(0, 64, 64)  # so that what is missing for pictures is found now
    finally:
        runner.close()
    return config, options


def prepare_online(arguments: Sequence[str]) -> tuple[RunConfig, TrainOptions]:
    """The same for a run that goes on from an offline one (`--from`); its agent may be named or not."""
    from runs.fine_tuning import prepare_from

    named = bool(arguments) and not arguments[0].startswith("-")
    source, saved, options, runner = prepare_from(arguments[1:] if named else arguments)
    if named and arguments[0] != source.agent:
        raise UsageError(f"'{options.from_}' is a run of '{source.agent}', not of '{arguments[0]}'")
    with contextlib.closing(runner):
        settings = environment_settings(options)
        config = new_run_config(source.agent, source.agent_config, source.preset, options, settings, runner)
        config = dataclasses.replace(config, data=source.data, initial=str(saved.absolute()))
        require_replay_memory(config, runner)
        groups = choose_groups(config, options.seeds_as, runner)
        threads = compute.resolve_threads(options.threads, len(groups), shows_images(runner))
        return dataclasses.replace(config, seed_groups=groups, threads=threads), options


def _environment(options: TrainOptions) -> str | tuple[str, ...]:
    (first, *others) = options.env
    return options.env if others else first


def _environment_ids(runner: Runner, options: TrainOptions) -> list[str]:
    """Of every task, also where one name stands for a sequence."""
    sequence = sequence_of(runner)
    return list(options.env) if sequence is None else [task.env_id for task in sequence.tasks]


def new_run_config(
    agent: str,
    agent_config: Any,
    preset: str | None,
    options: TrainOptions,
    env_settings: dict[str, Any],
    runner: Runner,
) -> RunConfig:
    """The settings of a run as the user gave them. Raises UsageError or ValueError for a value out of range."""
    for name in ("steps", "seeds"):
        if vars(options)[name] < 1:
            raise UsageError(f"--{name} must be at least 1, got {vars(options)[name]}")
    if options.histograms and not options.tensorboard:
        raise UsageError("--histograms are for TensorBoard, which --no-tensorboard switches off")
    device = compute.resolve_device(options.device)
    if options.bf16:
        compute.require_bfloat16(device)
    return RunConfig(
        agent=agent,
        env=_environment(options),
        env_settings=env_settings,
        steps=options.steps,
        seeds=tuple(range(options.seed, options.seed + options.seeds)),
        num_envs=options.num_envs,
        eval_every=max(1, options.steps // 20) if options.eval_every is None else options.eval_every,
        eval_episodes=options.eval_episodes,
        eval_tasks=options.eval_tasks,
        replay_at_switch=options.replay_at_switch,
        keep_every=options.keep_every,
        checkpoint_every=(max(1, options.steps // 4) if options.checkpoint_every is None else options.checkpoint_every),
        log_every=min(1_000, max(1, options.steps // 100)),
        diagnostics_every=options.diagnostics_every,
        value_error=options.value_error,
        device=device.type,
        threads=options.threads,
        compiled=options.compile,
        overlap=options.overlap,
        bf16=options.bf16,
        cuda_graphs=options.cuda_graphs,
        tensorboard=options.tensorboard,
        histograms=options.histograms,
        film=options.film,
        preset=preset,
        agent_config=agent_config,
        interventions=options.with_,
        lr_schedule=options.lr_schedule,
        lr_warmup=options.lr_warmup,
        lr_end=options.lr_end,
        environment=describe_environment(runner),
    )


def choose_groups(config: RunConfig, seeds_as: str, runner: Runner) -> tuple[tuple[int, ...], ...]:
    """Which seeds train as one population. runner: of the run's environments.

    Raises ValueError if the agent does not fit the environment, or not as it is wanted; nothing is written before.
    """
    _try_to_build(config, runner, 0)
    try:
        _try_to_build(config, runner, (0,))
        sequence = sequence_of(runner)
        liftable = sequence is None or sequence.switch_every is not None  # so that all seeds change together
    except ValueError:
        liftable = False
    return group_seeds(seeds_as, config.seeds, liftable, torch.device(config.device), shows_images(runner))


def _fitting_agents(config: RunConfig, runner: Runner) -> list[str]:
    """Those whose plain defaults can act in the environment."""
    found = []
    for name, module in AGENTS.items():
        other = dataclasses.replace(config, agent=name, agent_config=module.Config(), interventions="none")
        with contextlib.suppress(ValueError):
            build_agent(other, runner, torch.device("cpu"), spawn_streams(0, torch.device("cpu")))
            found.append(name)
    return found


def shows_images(runner: Runner) -> bool:
    """Whether observations are more than vectors."""
    return len(runner.observation_spec.shape) > 1


def _try_to_build(config: RunConfig, runner: Runner, seeds: int | tuple[int, ...]) -> None:
    """Build the agent once on the CPU. Raises ValueError if it does not fit the environment."""
    cpu = torch.device("cpu")
    agent = build_agent(config, runner, cpu, spawn_streams(seeds, cpu))
    require_clearable(config, agent)
    if config.diagnostics_every is not None:
        AgentDiagnostics(agent)
    if config.value_error and not isinstance(agent, Valuing):
        able = [name for name, module in AGENTS.items() if hasattr(module.Agent, "value")]
        raise ValueError(
            f"--value-error needs an agent with action values ({', '.join(able)}), '{config.agent}' has none"
        )


def make_run_folder(config: RunConfig, options: TrainOptions) -> Path:
    """Make OUT/NAME and write `config.json` into it. Raises UsageError if it exists or cannot be made."""
    first, *others = options.env
    name = f"{config.agent}-{first.replace('/', '-')}" + (f"-and-{len(others)}-more" if others else "")
    return new_run_folder(options.out, options.name, name, config.save)


def describe_environment(runner: Runner) -> dict[str, Any]:
    """Where a result was made: commit, machine, versions, and what the runner says of itself. Plain values."""
    here = describe_machine()
    return {
        **here,
        "versions": here["versions"] | runner.spec.versions,
        "runner": _plain(dataclasses.asdict(runner.spec)),
    }


def _plain(value: Any) -> Any:
    """The same for JSON, which has no infinite numbers: "inf", as in a robot's range of healthy heights."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def summarise_run(folder: Path) -> dict[str, Any]:
    """The closing summary: the last value of every metric, over seeds; see `statistics.summarise_rows`."""
    rows = list(read_table(folder))
    return {"run": str(folder), "metrics": summarise_rows(rows) | evaluation_summary(folder, rows)}


def print_summary(folder: Path, state: State, quiet: bool, as_json: bool) -> None:
    """Say what came out of a run: its scores and what to do next on stderr, all metrics on stdout if `as_json`."""
    summary = summarise_run(folder)
    if as_json:
        print(json.dumps(summary))
    if quiet:
        return
    for name, score in summary["metrics"].items():
        if score["mean"] is not None and name.startswith(_TOLD):
            interval = "" if score["low"] is None else f" [{score['low']:.4g}, {score['high']:.4g}]"
            print(f"{name} {score['mean']:.4g}{interval} over {score['seeds']} seeds", file=sys.stderr)
    if state == "stopped":
        print(f"stopped early; continue with: neoteny resume {folder}", file=sys.stderr)
    print(f"next: neoteny report {folder}", file=sys.stderr)
