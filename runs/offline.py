"""`neoteny offline`: checks data and everything else a user may get wrong, then makes the run's folder and trains."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import envs
from envs.graphics import OpenGLMissing
from envs.runner import ContinuousActionSpec, Runner
from runs import compute
from runs.catalogue import AGENTS, OFFLINE, find_agent, preset_config
from runs.config import RunConfig
from runs.datasets.card import describe, page
from runs.datasets.dataset import Dataset, check_actions, fingerprint
from runs.datasets.source import DataSource, locate, references_of, same_task
from runs.errors import UsageError, nearest
from runs.folders import new_run_folder
from runs.lock import RunLock
from runs.offline_options import InspectOptions, OfflineOptions
from runs.options import INSPECT_EXAMPLE, OFFLINE_EXAMPLE, TrainOptions
from runs.parsing import asks_for_help, given_value, help_page, parse, parse_with_agent
from runs.session import run_session
from runs.train import choose_groups, conclude, new_run_config


def offline_command(arguments: Sequence[str]) -> int:
    """Run `neoteny offline ARGUMENTS`. Returns the exit code; raises UsageError before anything is written."""
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"offline needs an agent ({', '.join(OFFLINE)}), for example: {OFFLINE_EXAMPLE}")
    try:
        config, options = prepare(arguments[0], arguments[1:])
    except (ValueError, OpenGLMissing) as error:  # also of the rooms below, whose messages are written for users
        raise UsageError(str(error)) from error
    stem = f"{config.agent}-{re.sub(r'[^A-Za-z0-9.]+', '-', options.data).strip('-.')}"
    folder = new_run_folder(options.out, options.name, stem, config.save)
    if not options.quiet:
        print(f"{folder}: {config.agent} on {options.data}, {len(config.seeds)} seeds", file=sys.stderr)
    with RunLock(folder) as lock:
        return conclude(folder, lambda: run_session(config, folder, lock, options.quiet), options.quiet, options.json)


def prepare(agent: str, arguments: Sequence[str]) -> tuple[RunConfig, OfflineOptions]:
    """Everything about a run, checked, without writing anything. Raises ValueError or UsageError, one sentence."""
    if agent in AGENTS:
        raise UsageError(f"'{agent}' learns in environments: neoteny train {agent} --env ID")
    if agent not in OFFLINE:
        raise UsageError(f"unknown agent '{agent}'.{nearest(agent, OFFLINE)}")
    module, prog = find_agent(agent), f"neoteny offline {agent}"
    if asks_for_help(arguments):
        print(help_page([module.Config], [module.Config()], prog, OFFLINE_EXAMPLE))
        print("`neoteny offline --help` shows the options of a run, which go with these.")
        raise SystemExit(0)
    preset = given_value(arguments, "--preset")
    others = {name: other.Config for name, other in OFFLINE.items()}
    options, agent_config = parse_with_agent(
        OfflineOptions, preset_config(agent, preset), arguments, prog, OFFLINE_EXAMPLE, others
    )
    for name in ("steps", "seeds"):
        if vars(options)[name] < 1:
            raise UsageError(f"--{name} must be at least 1, got {vars(options)[name]}")
    source = source_of(options)
    data = source.open()
    env = _environment(data, options)
    _require_shift(options.data, env, agent_config, options.force)
    with contextlib.closing(envs.make(env)) as runner:
        _check(data, runner, options)
        references = references_of(data, env, (options.ref_min, options.ref_max))
        if not options.quiet:
            _tell(data, env, references)
        found = {"fingerprint": fingerprint(data.transitions), "rows": len(data.transitions)}
        source = dataclasses.replace(source, **found, references=references)
        config = new_run_config(agent, agent_config, preset, _as_training(options, env), {}, runner)
        config = dataclasses.replace(config, data=_plain(source))
        groups = choose_groups(config, options.seeds_as, runner)
        threads = compute.resolve_threads(options.threads, len(groups), images=False)
        return dataclasses.replace(config, seed_groups=groups, threads=threads), options


def source_of(options: OfflineOptions | InspectOptions) -> DataSource:
    """Where the data are that a user names. Raises UsageError if there are none."""
    names = ("rule", "episode_limit", "observation_keys")
    how: dict[str, Any] = {name: vars(options)[name] for name in names}
    if isinstance(options, OfflineOptions):
        stream = None if options.stream is None else str(options.stream.absolute())
        how |= {"clip_actions": options.clip_actions, "stream": stream}
    return DataSource(path=str(locate(options.data)), **how)


def _environment(data: Dataset, options: OfflineOptions) -> str:
    env = options.env or data.about.env
    if env is None:
        raise UsageError(f"'{options.data}' does not say of which environment it is; say it with --env")
    return env


def _require_shift(source: str, env: str, agent_config: Any, force: bool) -> None:
    """AntMaze's rewards are 0 but at the goal: without a shift nothing tells a long way from a short one."""
    if "antmaze" in f"{env} {source}".lower() and not agent_config.reward_shift and not force:
        raise UsageError("AntMaze needs shifted rewards: --preset antmaze, or --reward-shift -1; --force to go without")


def _check(data: Dataset, runner: Runner, options: OfflineOptions) -> None:
    """Raises ValueError unless the data are of this environment."""
    env, spec = runner.spec.env_id, runner.action_spec
    if not isinstance(spec, ContinuousActionSpec):
        raise ValueError(f"offline agents need continuous actions, '{env}' has {spec.count} discrete ones")
    own = data.about.env
    if own is not None and not same_task(own, env):
        raise ValueError(f"the data in '{options.data}' are of '{own}', not of '{env}'")
    found = data.transitions
    sizes, wanted = (found.observations, found.actions), (*runner.observation_spec.shape, spec.size)
    if sizes != wanted:
        raise ValueError(
            f"the data in '{options.data}' have {sizes[0]} observed values and {sizes[1]} actions, '{env}' has "
            f"{' x '.join(map(str, wanted[:-1]))} and {wanted[-1]}"
        )
    check_actions(found, spec, options.data, options.clip_actions)


def _tell(data: Dataset, env: str, references: dict[str, tuple[float, float]]) -> None:
    found = data.transitions
    told = f"{len(found):,} transitions in {len(found.lengths):,} episodes ({data.about.rule}), evaluated on {env}"
    print(told, file=sys.stderr)
    for name, (low, high) in references.items():
        simulator = f", D4RL-normalised on {env.partition('/')[2]}" if name == "d4rl" else ""
        print(f"score 0 to 100: returns {low:g} to {high:g} ({name}{simulator})", file=sys.stderr)
    if not references:
        print(f"no reference pair for {env}: returns without scores (--ref-min, --ref-max)", file=sys.stderr)


def _as_training(options: OfflineOptions, env: str) -> TrainOptions:
    """The options of `neoteny train` that both have, for the same settings of a run."""
    names = {field.name for field in dataclasses.fields(TrainOptions)} - {"env"}
    shared = {name: value for name, value in vars(options).items() if name in names}
    return TrainOptions(env=(env,), **shared)


def _plain(source: DataSource) -> dict[str, Any]:
    """As `config.json` gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(source)))


def inspect_command(arguments: Sequence[str]) -> int:
    """Run `neoteny inspect ARGUMENTS`. Returns the exit code; raises UsageError for data that cannot be read."""
    options = parse(InspectOptions, arguments, "neoteny inspect", INSPECT_EXAMPLE)
    try:
        data = source_of(options).open()
    except ValueError as error:
        raise UsageError(str(error)) from error
    references = references_of(data, data.about.env)
    data = dataclasses.replace(data, about=dataclasses.replace(data.about, references=references))
    if options.json:
        print(json.dumps(describe(data)))
    else:
        print("\n".join(page(data)))
    return 0
