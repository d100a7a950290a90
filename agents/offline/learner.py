"""What every offline agent does in the same way: read its data, act, and go on online with half of each batch its own.

An offline agent is trained in two phases. Offline, `read` gives it the data, every `update` is one gradient step, and
`steps` counts those. Online, after `go_online`, it lives as any other agent does, and `steps` counts environment steps;
networks, moments of optimisers and the normalisation of observations stay as the data made them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from agents.agent import (
    ActionScale,
    Metrics,
    Streams,
    check_config,
    load_parts_state,
    parts_state,
    require_continuous,
    require_flat,
    take_pending,
    updates_due,
)
from agents.offline.transitions import STD_EPSILON, FixedReplay, Transitions, mapped, of_all_seeds
from agents.plastic import Plasticity
from agents.population import common_lead
from agents.replay import Batch, Replay
from envs.runner import ActionSpec, ObservationSpec, Step
from plasticity.population import RandomStream


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """What all offline agents have."""

    discount: float = 0.99
    """γ"""
    batch_size: int = 256
    """transitions of a gradient step, drawn with replacement"""
    normalise: bool = True
    """observations by mean and standard deviation (plus 0.001) of the data"""
    reward_scale: float = 1.0
    """of rewards when they are sampled; then they are shifted"""
    reward_shift: float = 0.0
    """see there"""

    def __post_init__(self) -> None:
        check_config(self)


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Of the online phase (`neoteny train --from RUN`); ours, there is no published recipe."""

    mixing: Literal["ratio", "shared"] = "ratio"
    """online: a fixed part of each batch is from the data, or all transitions alike"""
    offline_share: float = 0.5
    """of each batch, with --mixing ratio"""
    anneal: Literal["none", "linear"] = "linear"
    """of the pull towards the data while online"""
    anneal_end: float = 0.2
    """part of that pull which stays"""
    exploration_noise: float = 0.1
    """standard deviation added to actions in [-1, 1] online"""
    warmup_steps: int = 5_000
    """environment steps before the first online update"""
    replay_capacity: int = 1_000_000
    """slots for online transitions"""


class OfflineAgent(ABC):
    """The common part; an agent gives `name`, `actor`, `_build`, `_networks` and `_update_once`.

    Observations are normalised before any network sees them, actions are in [-1, 1] inside.
    """

    name: str
    actor: Any  # a deterministic or stochastic policy, called for its action

    def __init__(
        self,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        config: Any,
        *,
        num_envs: int,
        device: torch.device,
        streams: Streams,
        compiled: bool = False,
        plasticity: Plasticity | None = None,
    ):
        self.observation_size = require_flat(self.name, observation_spec)
        self.specs = observation_spec, require_continuous(self.name, action_spec)
        self.action_size = self.specs[1].size
        self.config, self.num_envs, self.device, self.compiled = config, num_envs, device, compiled
        self.lead = common_lead(streams)
        self.plasticity = plasticity or Plasticity()
        self.exploration, self.noise, self.sampling = streams["exploration"], streams["update"], streams["sampling"]
        self.scale = ActionScale(self.specs[1], device)
        zero, one = (torch.full((self.observation_size,), value, device=device) for value in (0.0, 1.0))
        self.mean, self.std = of_all_seeds(zero, self.lead), of_all_seeds(one, self.lead)
        self.data: FixedReplay | None = None
        self.replay: Replay | None = None  # of the online phase
        self.total_steps = 0  # of the phase
        self.steps = self.updates = 0
        self.pending: tuple[Tensor, Tensor] | None = None
        self._build(self.plasticity, streams["initialisation"])

    @abstractmethod
    def _build(self, make: Plasticity, initialisation: RandomStream) -> None:
        """Networks and their optimisers."""

    @abstractmethod
    def _networks(self) -> dict[str, Any]:
        """Networks, optimisers and tensors of the agent by name, all that its state holds beside what is here."""

    @abstractmethod
    def _update_once(self) -> Metrics:
        """One gradient step of everything; counts itself in `updates`."""

    def policy(self, obs: Tensor) -> Tensor:
        """The action taken without exploration, normalised obs [*S, B, O] -> [*S, B, A] in [-1, 1]."""
        return self.actor(obs)

    def read(self, transitions: Transitions, total_steps: int) -> None:
        """Learn from these from now on. total_steps: how many gradient steps there will be.

        Raises ValueError if they are of another kind of environment. What `load_state_dict` restores comes later.
        """
        found, own = (transitions.observations, transitions.actions), (self.observation_size, self.action_size)
        if found != own:
            raise ValueError(
                f"the data have {found[0]} observed values and {found[1]} actions, "
                f"the environment has {own[0]} and {own[1]}"
            )
        config = self.config
        self.total_steps = total_steps
        self.data = FixedReplay(
            transitions,
            self.device,
            self.sampling,
            self.scale,
            config.discount,
            self.reward_map(transitions),
            self.usable_rows(transitions),
        )
        if config.normalise:
            mean, std = (moment.to(self.device) for moment in transitions.moments())
            self.mean.copy_(of_all_seeds(mean, self.lead))
            self.std.copy_(of_all_seeds(std + STD_EPSILON, self.lead))
        self._share_normalisation()

    def reward_map(self, transitions: Transitions) -> tuple[float, float]:
        """(scale, shift) of rewards."""
        return self.config.reward_scale, self.config.reward_shift

    def usable_rows(self, transitions: Transitions) -> Tensor | None:
        """Rows to learn from; None for all."""
        return None

    def _share_normalisation(self) -> None:
        """All seeds read the same data, so their moments are one."""
        if self.data is not None:
            self.data.normalise_by(*(of_all.reshape(-1, self.observation_size)[0] for of_all in (self.mean, self.std)))

    def go_online(self, total_steps: int) -> None:
        """From now on `steps` counts environment steps. total_steps: how many there will be. Needs `read` first.

        Raises ValueError for an agent that has no recipe for that.
        """
        if not isinstance(self.config, FineTuning):
            raise ValueError(f"'{self.name}' cannot go on online; a2pr, td3_bc and iql can")
        capacity = self.config.replay_capacity
        self.replay = Replay(capacity, self.num_envs, *self.specs, self.device, self.sampling)
        self.steps, self.total_steps, self.pending = 0, total_steps, None

    @property
    def pull(self) -> float:
        """Which part of its weight the pull towards the data has at this step."""
        config = self.config
        if self.replay is None or not isinstance(config, FineTuning) or config.anneal == "none":
            return 1.0
        return max(config.anneal_end, 1 - self.steps / self.total_steps)

    @property
    def phases_alike(self) -> bool:
        """Whether all updates of a phase have the same host numbers, see `agents.graphs`."""
        return self.replay is None

    def normalised(self, obs: Tensor) -> Tensor:
        """Observations as the networks read them: obs [*S, B, O]."""
        return (obs - self.mean) / self.std

    @torch.no_grad()
    def act(self, obs: Tensor, explore: bool) -> Tensor:
        action = self.policy(self.normalised(obs))
        if explore:
            noise = self.exploration.normal(obs.shape[-2], self.action_size)
            action = self.explored(self.normalised(obs), action, noise)
            self.pending = obs, action
        return self.scale.to_environment(action)

    def explored(self, obs: Tensor, action: Tensor, noise: Tensor) -> Tensor:
        """The action taken with exploration, all [*S, N, ...]."""
        return torch.add(action, noise, alpha=self.config.exploration_noise).clamp_(-1, 1)

    def observe(self, step: Step) -> None:
        obs, action = take_pending(self.pending)
        assert self.replay is not None, "go_online() comes first"
        self.replay.add(obs, action, step)
        self.pending = None
        self.steps += self.num_envs

    def update(self) -> Metrics:
        if self.replay is None:
            self.steps += 1
            self.plasticity.at(self.steps)
            return self._update_once()
        self.plasticity.at(self.steps)
        metrics: Metrics = {}
        for _ in range(updates_due(self.steps, self.num_envs, self.config.warmup_steps, 1)):
            metrics = metrics | self._update_once()
        return metrics

    def sample(self) -> Batch:
        """The batch of a gradient step, as the networks see it: of the data, while online of both kinds."""
        assert self.data is not None, "read() comes first"
        size = self.config.batch_size
        if self.replay is None:
            return self.data.sample(size)
        if self.config.mixing == "ratio":
            fixed = round(self.config.offline_share * size)
            parts = [self.data.sample(fixed)] if fixed else []
            parts += [self._online(size - fixed)] if fixed < size else []
            return joined(parts)
        own = min(self.steps, self.config.replay_capacity)
        online = self.sampling.uniform(size) < own / (own + len(self.data))
        return chosen(online, self._online(size), self.data.sample(size))

    def _online(self, size: int) -> Batch:
        assert self.replay is not None, "go_online() comes first"
        assert self.data is not None, "read() comes first"
        batch = self.replay.sample(size, self.config.discount)
        obs, next_obs = self.normalised(batch.obs), self.normalised(batch.next_obs)
        return dataclasses.replace(batch, obs=obs, next_obs=next_obs, reward=mapped(batch.reward, self.data.reward_map))

    def _parts(self) -> dict[str, Any]:
        draws = {"exploration": self.exploration, "noise": self.noise}
        online = {"sampling": self.sampling} if self.replay is None else {"replay": self.replay}  # which saves it too
        return {**self._networks(), "mean": self.mean, "std": self.std, **draws, **online}

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        parts = parts_state(self._parts(), seed, self.lead)
        return {"parts": parts, "steps": self.steps, "updates": self.updates}

    def go_on_from(self, state: dict[str, Any], seed: int = 0) -> None:
        """Take what a seed learnt offline from its state: networks, moments of optimisers, normalisation."""
        own = {**self._networks(), "mean": self.mean, "std": self.std}
        load_parts_state(own, state["parts"], seed, self.lead)
        self.updates = state["updates"]
        self._share_normalisation()

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        load_parts_state(self._parts(), state["parts"], seed, self.lead)
        self.steps, self.updates, self.pending = state["steps"], state["updates"], None
        self._share_normalisation()


@torch.no_grad()
def policy_value(agent: Any, obs: Tensor) -> Tensor:
    """What the critics of an offline agent expect of its policy at obs [*S, B, O] as the environment gives it, [*S, B].

    Their mean, in the rewards that the agent learns from.
    """
    seen = agent.normalised(obs)
    return agent.critics(seen, agent.policy(seen)).mean(-2)


_FIELDS = [field.name for field in dataclasses.fields(Batch)]


def joined(parts: list[Batch]) -> Batch:
    """Batches one after the other, [*S, B1 + B2, ...]."""
    if len(parts) == 1:
        return parts[0]
    axis = parts[0].reward.ndim - 1
    return Batch(**{name: torch.cat([getattr(part, name) for part in parts], axis) for name in _FIELDS})


def chosen(first: Tensor, one: Batch, other: Batch) -> Batch:
    """Row by row `one` where `first` [*S, B], else `other`."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(first.view(*first.shape, *[1] * (a.ndim - first.ndim)), a, b)

    return Batch(**{name: pick(getattr(one, name), getattr(other, name)) for name in _FIELDS})
