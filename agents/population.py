"""The axis of seeds: an agent that trains several seeds at once, as one population.

Every tensor of a population has one more axis in front, of length S: parameters, moments of optimisers, batches,
observations, losses. Shapes are written [*S, B, ...]; for one seed *S is empty and nothing is different from an agent
that knows of no populations. What an agent does to be liftable is said in `agents.agent.Agent`.

Seeds never mix. Products are batched, everything else goes along the last axes or is elementwise; a seed whose numbers
became NaN leaves the others alone. Each seed draws from generators of its own, what it would draw alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plasticity.population import Axes, RandomStream


def common_lead(streams: Mapping[str, RandomStream]) -> Axes:
    """() or (S,), as all streams of an agent have it."""
    leads = {stream.lead for stream in streams.values()}
    if len(leads) != 1:
        raise ValueError(f"the random streams of an agent must be of the same number of seeds, got {sorted(leads)}")
    return leads.pop()


def require_one_seed(agent_name: str, lead: Axes) -> None:
    """Raises ValueError for a population. For agents, or networks, that cannot be lifted."""
    if lead:
        raise ValueError(f"'{agent_name}' cannot train its seeds as a population; train them in processes")


def of_seed(state: Any, seed: int | slice, lead: Axes) -> Any:
    """One seed's part of a nested state: views of its tensors, in the shapes that it would have alone.

    seed: its number, or its place along the first axis.

    A 0-d tensor of a population, such as a count of steps, is common to all seeds.
    """
    if isinstance(state, Mapping):
        return {name: of_seed(value, seed, lead) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [of_seed(value, seed, lead) for value in state]
    return state[seed] if isinstance(state, Tensor) and state.ndim and lead else state
