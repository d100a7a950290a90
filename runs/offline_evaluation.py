"""Without an environment: what the critics of an offline run, and fitted-Q evaluation, expect of its policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import envs
from agents.offline.fitted_q import FittedQ, first_states
from plasticity.population import RandomStream
from runs import compute
from runs.errors import UsageError
from runs.fixed_data import give_data
from runs.play import load_agent, open_run, playable_seeds
from runs.randomness import stream_seed
from runs.record import Row
from runs.statistics import summarise_rows


def values_without_environment(folder: Path, steps: int, device_name: str) -> dict[str, Any]:
    """{"value/initial_by_critics", "value/initial_by_fitted_q"} summarised over seeds; the latter after `steps`.

    Both are mean values of the first states of the data, discounted, in the rewards that the agent learns from. Raises
    UsageError for a run that has no data.
    """
    config, saved = open_run(folder)
    if not config.is_offline:
        raise UsageError(f"--fqe needs a run of `neoteny offline`, '{folder}' is none")
    device, found = compute.resolve_device(device_name), list[Row]()
    compute.set_up(device, config.threads)
    for seed in playable_seeds(config, saved):
        runner = envs.make(str(config.env), 1, seed, device)
        try:
            agent: Any = load_agent(config, saved, seed, runner, device)
            give_data(agent, config, [seed])
        except ValueError as error:
            raise UsageError(str(error)) from error
        finally:
            runner.close()
        if hasattr(agent, "critics"):
            obs = first_states(agent.data)
            with torch.no_grad():
                value = agent.critics(obs, agent.policy(obs)).mean()
            found.append(Row(0, "value/initial_by_critics", float(value), seed))
        draws = torch.Generator(device).manual_seed(stream_seed(seed, "initialisation", steps))
        agent.sampling.manual_seed([stream_seed(seed, "sampling", steps)])
        config_of = agent.config
        hidden = getattr(config_of, "critic_hidden", config_of.hidden)
        learner = FittedQ(agent.policy, agent.data, RandomStream(draws), hidden, batch_size=config_of.batch_size)
        for _ in range(steps):
            learner.update()
        found.append(Row(0, "value/initial_by_fitted_q", float(learner.initial_value()), seed))
    return summarise_rows(found)
