"""How good is an agent: whole episodes on environments of their own, without exploration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

import envs
from agents.agent import Agent, Valuing
from envs import Runner, Step
from plasticity.population import Axes
from runs import compute
from runs.config import RunConfig
from runs.side_by_side import SideBySide
from runs.tasks import CUT_SHORT, new_environments


@dataclass(frozen=True)
class Scores:
    """Of the first episode of each environment of each seed, on the CPU; 0 where a seed has no finite numbers.

    returns [S, episodes] float32, lengths [S, episodes] int64. errors: what went wrong, by the index of the seed.
    first_values: if the agent was asked for them.
    """

    returns: Tensor
    lengths: Tensor
    errors: Mapping[int, FloatingPointError]
    first_values: FirstValues | None = None


@dataclass
class FirstValues:
    """Q(s, a) of the first state of each episode, and the discounted return G = Σ γ^t r_t that followed, [S, episodes].

    Only whole episodes count: G from a later state would end too soon where a time limit cuts the episode off. What
    lies behind a limit of T steps is missing in G all the same; `beyond` is its share γ^T, 0 after a termination.
    Rewards are those that the agent learns from, which Atari clips, and an episode ends where they do.
    """

    expected: Tensor
    discount: float
    returned: Tensor
    weight: Tensor
    beyond: Tensor

    @classmethod
    def of(cls, agent: Valuing, obs: Tensor) -> FirstValues:
        """Before the first step. obs [*S, episodes, *obs_shape]."""
        expected = agent.value(obs)
        zero = torch.zeros_like(expected)
        return cls(expected, agent.config.discount, zero, torch.ones_like(expected), zero)  # type: ignore[attr-defined]

    def add(self, step: Step) -> None:
        """What came of an action."""
        self.returned = self.returned + self.weight * step.reward
        self.weight = self.weight * self.discount
        self.beyond = torch.where(step.truncated & ~step.terminated, self.weight + self.beyond, self.beyond)
        self.weight = self.weight * ~(step.terminated | step.truncated)

    def errors(self, index: int) -> dict[str, float]:
        """Of one seed: mean Q - G and mean |Q - G|, both also over |mean G|; and what G may miss of the future."""
        lead = (index,) if self.expected.ndim > 1 else ()
        expected, returned, beyond = (of_all[lead] for of_all in (self.expected, self.returned, self.beyond))
        error, size = expected - returned, returned.mean().abs()
        found = {"bias": error.mean(), "error": error.abs().mean()}
        found |= {f"relative_{name}": value / size for name, value in list(found.items()) if size > 0}
        found["beyond_limit"] = beyond.mean()
        return {f"value/approximation_{name}": float(value) for name, value in found.items()}


def evaluation_environments(config: RunConfig, runner: Runner, task: int, episodes: int, seed: int) -> Runner:
    """Environments of one task of a run, made anew, in which each first episode is a whole one.

    runner: of the run; they look to the agent as its own do.
    """
    alone = new_environments(runner, task, episodes, seed)
    if alone is not None:
        return alone
    whole = {name: value for name, value in config.env_settings.items() if name not in CUT_SHORT}
    return envs.make(config.env, episodes, seed, runner.device, **whole)


@torch.no_grad()
def evaluate(
    agent: Agent,
    environments: Sequence[Runner],
    stop: Callable[[], bool] = lambda: False,
    left_out: Collection[int] = (),
    values: bool = False,
) -> Scores | None:
    """Scores in the first episode of each environment, or None if `stop` became true on the way.

    environments: made anew for each seed of the agent, a single one for an agent that is no population; they are closed
    at the end. So an evaluation depends on the seed and the agent alone, and taking first episodes is fair to long
    ones. left_out: indices of seeds that are not evaluated. values: whether to compare values with what was returned.
    """
    first_of_all = environments[0]
    seeds, episodes, device = len(environments), first_of_all.num_envs, first_of_all.device
    lead: Axes = () if seeds == 1 else (seeds,)
    runners = SideBySide(environments, lead)
    try:
        obs = runners.reset()
        returns = torch.zeros(*lead, episodes, device=device)
        lengths = torch.zeros(*lead, episodes, dtype=torch.int64, device=device)
        running = torch.ones(seeds, episodes, dtype=torch.bool, device=device)
        for index in left_out:
            runners.rest(index)
        first_values = FirstValues.of(cast(Valuing, agent), obs) if values else None
        while len(runners.resting) < seeds:
            if stop():
                return None
            with compute.small_products(episodes):
                action = agent.act(obs, explore=False)
            step = runners.step(action)
            if first_values is not None:
                first_values.add(step)
            first = running.view(returns.shape) & step.episode_ended
            returns = torch.where(first, step.episode_return, returns)
            lengths = torch.where(first, step.episode_length, lengths)
            running &= ~step.episode_ended.view(running.shape)
            for index, goes_on in enumerate(running.any(1).tolist()):
                if not goes_on:
                    runners.rest(index)
            obs = step.obs
        return Scores(
            returns.view(running.shape).cpu(), lengths.view(running.shape).cpu(), runners.errors, first_values
        )
    finally:
        runners.close()
