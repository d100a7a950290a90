"""What penalties on features do to a critic whose exact values are known: BEER's first illustration.

A critic Q(s, a) = w·φ(s, a) is fitted by Q-learning to all transitions of `envs.grid_world.GridWorld`, drawn uniformly:
there is no exploration to hide behind. Seeds are one population. The error is mean |Q - Q*| over states and actions, Q*
from the Bellman equation (specs/beer-and-online-rl.md, section 7).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.agent import joint_step, lerp_
from agents.diagnostics import representation_ranks
from agents.networks import Critics, new_network
from agents.replay import Batch
from agents.representation import FirstFeatures, critic_penalty, infer
from envs.grid_world import GridWorld
from plasticity.adam import Adam
from plasticity.population import RandomStream

KINDS = ("none", "beer", "infer", "peer", "dr3")
# Published weights; InFeR's and DR3's as far as remembered (specs/beer-and-online-rl.md, section 5).
WEIGHTS = {"none": 0.0, "beer": 1e-3, "infer": 0.1, "peer": 1e-3, "dr3": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one study; ours, but for the penalties."""

    discount: float = 0.99
    hidden: tuple[int, ...] = (64, 64)
    learning_rate: float = 1e-3
    batch_size: int = 256
    target_rate: float = 0.01
    updates: int = 10_000
    measure_every: int = 2_000
    heads: int = 10
    """InFeR's"""
    scale: float = 100.0
    """InFeR's β₀"""


def optimal_values(grid: GridWorld, discount: float) -> Tensor:
    """Q* [cells, 4], float64, by policy iteration; each policy's values solve its linear Bellman equation exactly."""
    successor = torch.from_numpy(grid.successor)
    reward = torch.from_numpy(grid.reward).double()
    going = (~torch.from_numpy(grid.terminated)).double() * discount
    rows, policy = torch.arange(grid.cells), torch.zeros(grid.cells, dtype=torch.int64)
    while True:
        walk = torch.zeros(grid.cells, grid.cells, dtype=torch.float64)
        walk[rows, successor[rows, policy]] = going[rows, policy]
        values = torch.linalg.solve(torch.eye(grid.cells, dtype=torch.float64) - walk, reward[rows, policy])
        found = reward + going * values[successor]
        best = found.argmax(1)
        better = found[rows, best] > found[rows, policy] + 1e-12
        if not better.any():
            return found
        policy = torch.where(better, best, policy)


class Transitions:
    """All (s, a) of a grid but those of the goal, drawn with replacement by the seeds of `stream`."""

    def __init__(self, grid: GridWorld, stream: RandomStream, discount: float):
        pairs = torch.cartesian_prod(torch.arange(grid.goal), torch.arange(4))
        self.cell, self.action = pairs.unbind(1)
        self.observations = torch.from_numpy(grid.observations)
        self.next_cell = torch.from_numpy(grid.successor)[self.cell, self.action]
        self.reward = torch.from_numpy(grid.reward).float()[self.cell, self.action]
        self.terminated = torch.from_numpy(grid.terminated)[self.cell, self.action]
        self.stream, self.discount = stream, discount

    def sample(self, batch_size: int) -> Batch:
        at = self.stream.integers(len(self.cell), batch_size)
        return Batch(
            self.observations[self.cell[at]],
            one_hot(self.action[at]),
            self.reward[at],
            self.observations[self.next_cell[at]],
            self.terminated[at],
            torch.full(at.shape, self.discount),
        )


def one_hot(action: Tensor) -> Tensor:
    """[...] int64 -> [..., 4] float32, what the critic reads."""
    return torch.eye(4)[action]


def values_of(critic: Critics, obs: Tensor) -> Tensor:
    """Q(s, ·): obs [*S, B, O] -> [*S, B, 4]."""
    actions = one_hot(torch.arange(4)).repeat(obs.shape[-2], 1)  # every action behind every observation
    pairs = critic.first(obs.repeat_interleave(4, -2), actions.expand(*obs.shape[:-2], -1, -1))
    return pairs.unflatten(-1, (-1, 4))


def study(
    grid: GridWorld, kind: str, weight: float, seeds: Sequence[int], settings: Settings
) -> Iterator[dict[str, Tensor]]:
    """Fit one critic for each seed; before the first and every `measure_every` updates a row of numbers, [S] each.

    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"the penalty must be one of {', '.join(KINDS)}, got '{kind}'")
    stream = RandomStream([torch.Generator().manual_seed(seed) for seed in seeds])
    size = len(grid.observations[0])
    critic = new_network(lambda: Critics(1, size, 4, settings.hidden, False), stream)
    fit = _Fit(critic, copy.deepcopy(critic), stream, kind, weight, settings)
    transitions = Transitions(grid, stream, settings.discount)
    exact = optimal_values(grid, settings.discount)[: grid.goal].float()
    yield {"update": torch.zeros(len(seeds)), **measure(critic, transitions, exact, len(seeds))}
    sums: dict[str, Tensor] = {}
    for update in range(1, settings.updates + 1):
        for name, value in fit.step(transitions.sample(settings.batch_size)).items():
            sums[name] = sums.get(name, torch.zeros(len(seeds))) + value
        if update % settings.measure_every == 0:
            means = {name: total / settings.measure_every for name, total in sums.items()}
            sums = {}
            at = torch.full((len(seeds),), float(update))
            yield {"update": at, **measure(critic, transitions, exact, len(seeds)), **means}


class _Fit:
    """A critic, its target and its penalty."""

    def __init__(
        self, critic: Critics, target: Critics, stream: RandomStream, kind: str, weight: float, settings: Settings
    ):
        self.critic, self.target = critic, target
        self.kind, self.weight, self.settings = kind, weight, settings
        self.optimizers = [Adam(list(critic.parameters()), settings.learning_rate)]
        self.first: FirstFeatures | None = None
        if kind == "infer":
            self.first = FirstFeatures.of(critic, settings.hidden[-1], settings.heads, stream)
            self.optimizers.append(Adam(list(self.first.heads.parameters()), settings.learning_rate))

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step, and one of the target towards it."""
        with torch.no_grad():
            following = values_of(self.target, batch.next_obs)
            target = batch.reward + batch.discount * ~batch.terminated * following.amax(-1)
        features = self.critic.features(batch.obs, batch.action)
        loss = (self.critic.head_values(features).squeeze(-2) - target).square().mean(-1)
        metrics: dict[str, Any] = {"loss": loss.detach()}
        if self.kind != "none":
            extra, more = self._penalty(batch, features, following.argmax(-1))
            loss = loss + self.weight * extra
            metrics |= more
        joint_step(self.optimizers, loss)
        lerp_(list(self.target.parameters()), self.optimizers[0].parameters, self.settings.target_rate)
        return metrics

    def _penalty(self, batch: Batch, features: Tensor, target_action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.first is not None:
            with torch.no_grad():
                features_then = self.first.first_network.features(batch.obs, batch.action)
            return infer(self.first, features, features_then, self.settings.scale), {}
        with torch.no_grad():
            action = one_hot(values_of(self.critic, batch.next_obs).argmax(-1))
            target_next = self.target.features(batch.next_obs, one_hot(target_action))
        kind: Any = self.kind
        mask = {"mask": batch.terminated} if kind == "beer" else {}
        return critic_penalty(kind, self.critic, batch, action, target_next, features, **mask)


@torch.no_grad()
def measure(critic: Critics, transitions: Transitions, exact: Tensor, seeds: int) -> dict[str, Tensor]:
    """Against Q* [cells, 4] and over all transitions, [S]: mean error, share of states whose greedy action is optimal,
    and ranks of the features."""
    cells = transitions.observations[: len(exact)]
    obs = cells.repeat_interleave(4, 0).expand(seeds, -1, -1)
    action = one_hot(transitions.action).expand(seeds, -1, -1)
    values = critic.first(obs, action).unflatten(-1, (-1, 4))
    greedy = exact.expand_as(values).gather(-1, values.argmax(-1, keepdim=True)).squeeze(-1)
    ranks = [representation_ranks(own) for own in critic.features(obs, action).squeeze(1)]
    return {
        "error": (values - exact).abs().mean((-2, -1)),
        "greedy_is_optimal": (greedy >= exact.amax(-1) - 1e-6).float().mean(-1),
        **{name.removeprefix("representation/"): torch.stack([own[name] for own in ranks]) for name in ranks[0]},
    }
