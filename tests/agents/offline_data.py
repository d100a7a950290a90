"""Small fixed data and agents that learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from agents.agent import ActionScale
from agents.offline.transitions import Transitions
from envs import ContinuousActionSpec, ObservationSpec
from plasticity.population import RandomStream
from runs.catalogue import find_agent
from tests.agents.fakes import CPU, stream, streams

# Small values of hyper-parameters, for whichever of them an agent has.
SMALL: dict[str, Any] = {
    "batch_size": 16,
    "critic_hidden": (16, 16),
    "hidden": (16, 16),
    "replay_capacity": 100,
    "sampled_actions": 3,
    "vae_hidden": (16, 16),
    "warmup_steps": 4,
}


def box(size: int, high: float = 1.0) -> ContinuousActionSpec:
    """Actions in ± high."""
    return ContinuousActionSpec(np.full(size, -high, np.float32), np.full(size, high, np.float32))


def streams_and_scale(actions: int) -> tuple[RandomStream, ActionScale]:
    return stream(0), ActionScale(box(actions), CPU)


def make_transitions(count: int, observations: int, actions: int, high: float = 1.0, length: int = 10) -> Transitions:
    """Random episodes of `length` steps, every other one terminated, the others truncated."""
    world = torch.Generator().manual_seed(count)
    episodes = -(-count // length)
    obs = torch.randn(episodes, length + 1, observations, generator=world)
    action = (torch.rand(episodes, length, actions, generator=world) * 2 - 1) * high
    reward = torch.randn(episodes, length, 1, generator=world)
    last = torch.zeros(episodes, length, 1)
    last[::2, -1] = 1
    rows = torch.cat([obs[:, :-1], action, reward, obs[:, 1:], last], -1).flatten(0, 1)[:count]
    truncated = torch.zeros(episodes, length, dtype=torch.bool)
    truncated[1::2, -1] = True
    starts = torch.arange(0, count + length, length).clamp(max=count).unique()
    whole = torch.ones(episodes, dtype=torch.bool)
    return Transitions(rows.clone(), observations, actions, truncated.flatten()[:count], starts, whole)


def new_agent(
    name: str,
    observations: int,
    actions: int,
    config: Any,
    high: float = 1.0,
    seed: int | Sequence[int] = 0,
    device: torch.device = CPU,
    compiled: bool = False,
) -> Any:
    """An offline agent that has read nothing yet."""
    specs = ObservationSpec((observations,)), box(actions, high)
    made = streams(seed, device)
    return find_agent(name).Agent(*specs, config, num_envs=1, device=device, streams=made, compiled=compiled)
