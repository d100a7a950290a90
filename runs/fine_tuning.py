"""`neoteny train --from RUN`: an offline run goes on online, with its data, its hyper-parameters and its seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import envs
from envs.runner import Runner
from runs import checkpoint
from runs.catalogue import OFFLINE, find_agent
from runs.config import RunConfig
from runs.errors import UsageError
from runs.options import TRAIN_EXAMPLE, TrainOptions, environment_settings
from runs.parsing import given_value, given_values, parse_with_agent
from runs.play import open_run, playable_seeds


def prepare_from(arguments: Sequence[str]) -> tuple[RunConfig, Path, TrainOptions, Runner]:
    """The offline run, its newest whole checkpoint, the options of the run to come, and an environment of it.

    The config has the agent's hyper-parameters as the user changed them. Raises UsageError, one sentence.
    """
    source, saved = open_run(Path(given_value(arguments, "--from") or ""))
    if not source.is_offline:
        raise UsageError(f"--from needs a run of `neoteny offline`, '{given_value(arguments, '--from')}' is none")
    seeds = playable_seeds(source, saved)
    more = [] if given_values(arguments, "--env") else ["--env", str(source.env)]
    more += [] if given_value(arguments, "--seeds") else ["--seeds", str(len(seeds))]
    more += [] if given_value(arguments, "--seed") else ["--seed", str(seeds[0])]
    if given_value(arguments, "--preset") is not None:
        raise UsageError("--from keeps the settings of the run it begins with; change single ones by their flags")
    others = {name: find_agent(name).Config for name in OFFLINE}
    options, agent_config = parse_with_agent(
        TrainOptions, source.agent_config, [*arguments, *more], "neoteny train", TRAIN_EXAMPLE, others
    )
    wanted = range(options.seed, options.seed + options.seeds)
    if missing := [seed for seed in wanted if seed not in seeds]:
        raise UsageError(f"'{options.from_}' has no seed {missing[0]}; it has {', '.join(map(str, seeds))}")
    env, *further = options.env
    if further:
        raise UsageError("--from goes on in one environment")
    checkpoint.verify(saved)
    runner = envs.make(env, **environment_settings(options))
    return dataclasses.replace(source, agent_config=agent_config), saved, options, runner
