"""How good is an agent: whole episodes on environments of their own, without exploration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import envs
from agents.agent import Agent
from runs import compute


@torch.no_grad()
def evaluate(
    agent: Agent,
    env_id: str,
    env_settings: Mapping[str, Any],
    episodes: int,
    seed: int,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor] | None:
    """Returns and lengths [episodes] on the CPU, of the first episode of each of `episodes` environments.

    The environments are made anew, so an evaluation depends on the seed and the agent alone, and taking the first
    episode of each is fair to long ones. None if `stop` became true on the way.
    """
    whole = {name: value for name, value in env_settings.items() if name != "staggered_starts"}  # which cuts them short
    runner = envs.make(env_id, episodes, seed, device, **whole)
    try:
        obs = runner.reset()
        returns = torch.zeros(episodes, device=device)
        lengths = torch.zeros(episodes, dtype=torch.int64, device=device)
        running = torch.ones(episodes, dtype=torch.bool, device=device)
        while running.any():
            if stop():
                return None
            with compute.small_products(episodes):
                action = agent.act(obs, explore=False)
            step = runner.step(action)
            first = running & step.episode_ended
            returns = torch.where(first, step.episode_return, returns)
            lengths = torch.where(first, step.episode_length, lengths)
            running &= ~step.episode_ended
            obs = step.obs
        return returns.cpu(), lengths.cpu()
    finally:
        runner.close()
