"""How good is an agent: whole episodes on environments of their own, without exploration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import envs
from agents.agent import Agent
from plasticity.population import Axes
from runs import compute
from runs.side_by_side import SideBySide


@dataclass(frozen=True)
class Scores:
    """Of the first episode of each environment of each seed, on the CPU; 0 where a seed has no finite numbers.

    returns [S, episodes] float32, lengths [S, episodes] int64. errors: what went wrong, by the index of the seed.
    """

    returns: Tensor
    lengths: Tensor
    errors: Mapping[int, FloatingPointError]


@torch.no_grad()
def evaluate(
    agent: Agent,
    env_id: str,
    env_settings: Mapping[str, Any],
    episodes: int,
    seeds: Sequence[int],
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    left_out: Collection[int] = (),
) -> Scores | None:
    """Scores on `episodes` environments for each seed of the agent, or None if `stop` became true on the way.

    seeds: of the environments, one for each seed of the agent; a single one for an agent that is no population.
    left_out: indices of seeds that are not evaluated. The environments are made anew, so an evaluation depends on the
    seed and the agent alone, and taking the first episode of each is fair to long ones.
    """
    whole = {name: value for name, value in env_settings.items() if name != "staggered_starts"}  # which cuts them short
    lead: Axes = () if len(seeds) == 1 else (len(seeds),)
    runners = SideBySide([envs.make(env_id, episodes, seed, device, **whole) for seed in seeds], lead)
    try:
        obs = runners.reset()
        returns = torch.zeros(*lead, episodes, device=device)
        lengths = torch.zeros(*lead, episodes, dtype=torch.int64, device=device)
        running = torch.ones(len(seeds), episodes, dtype=torch.bool, device=device)
        for index in left_out:
            runners.rest(index)
        while len(runners.resting) < len(seeds):
            if stop():
                return None
            with compute.small_products(episodes):
                action = agent.act(obs, explore=False)
            step = runners.step(action)
            first = running.view(returns.shape) & step.episode_ended
            returns = torch.where(first, step.episode_return, returns)
            lengths = torch.where(first, step.episode_length, lengths)
            running &= ~step.episode_ended.view(running.shape)
            for index, goes_on in enumerate(running.any(1).tolist()):
                if not goes_on:
                    runners.rest(index)
            obs = step.obs
        return Scores(returns.view(running.shape).cpu(), lengths.view(running.shape).cpu(), runners.errors)
    finally:
        runners.close()
