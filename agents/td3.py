"""Twin delayed deep deterministic policy gradient, TD3 (Fujimoto, van Hoof & Meger 2018, arXiv:1802.09477).

    noise   ε ~ clip(N(0, σ̃), -c, c),  ã = clip(π'(s') + ε, -1, 1)                   eq. 14
    target  y = r + γ (1 - terminated) min_{i=1,2} Q'_i(s', ã)                        eq. 10
    critic  L = Σ_i mean (Q_i(s, a) - y)²                                             algorithm 1
    actor   L = - mean Q_1(s, π(s)), every `policy_delay` critic steps                algorithm 1
    targets θ' <- (1 - τ) θ' + τ θ, together with the actor

Settings are those of the authors' released code (sfujim/TD3), which explores with σ = 0.1 and starts with 25 000 random
steps. Actions are in [-1, 1] here, so noise is in units of half the action range.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from agents.agent import (
    ActionScale,
    Metrics,
    Streams,
    check_config,
    compiled_if,
    gradient_step,
    lerp_,
    load_parts_state,
    parts_state,
    require_continuous,
    require_flat,
    take_pending,
    updates_due,
)
from agents.networks import Critics, DeterministicActor
from agents.plastic import Plasticity
from agents.population import common_lead
from agents.replay import Batch, Replay
from agents.representation import Kind, critic_penalty
from envs.runner import ActionSpec, ObservationSpec, Step


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of TD3; published values (released code unless said)."""

    discount: float = 0.99
    """γ"""
    learning_rate: float = 3e-4
    """of Adam, for actor and critics"""
    batch_size: int = 256
    target_rate: float = 0.005
    """τ, Polyak rate of the target networks"""
    exploration_noise: float = 0.1
    """standard deviation added to actions in [-1, 1]"""
    target_noise: float = 0.2
    """σ̃, standard deviation of target policy smoothing"""
    target_noise_clip: float = 0.5
    """c"""
    policy_delay: int = 2
    """critic steps for each step of actor and targets"""
    warmup_steps: int = 25_000
    """uniformly random environment steps before the first update"""
    replay_capacity: int = 1_000_000
    """slots; one transition each, and one more for each episode"""
    replay: Literal["uniform", "fading"] = "uniform"
    """which transitions a batch is of: all alike, or old ones less often, as Symphony does"""
    n_step: int = 1
    """length of multi-step returns"""
    update_every: int = 1
    """environment steps for each critic step"""
    hidden: tuple[int, ...] = (256, 256)
    layer_norm: bool = False
    """LayerNorm before every ReLU of actor and critics (ours)"""
    representation: Kind = "none"
    """penalty on the critics' features"""
    representation_weight: float = 1e-3
    """of that penalty; BEER's β"""

    def __post_init__(self) -> None:
        check_config(self)


@torch.no_grad()
def td_target(
    target_actor: DeterministicActor, target_critics: Critics, batch: Batch, noise: Tensor, noise_clip: float
) -> Tensor:
    """r + γ (1 - terminated) min_i Q'_i(s', clip(π'(s') + ε)), [*S, B]. Equations 10 and 14.

    noise [*S, B, A]: Gaussian with the standard deviation of target policy smoothing, not yet clipped.
    """
    action = (target_actor(batch.next_obs) + noise.clamp(-noise_clip, noise_clip)).clamp(-1, 1)
    value = target_critics(batch.next_obs, action).amin(-2)
    return batch.reward + batch.discount * ~batch.terminated * value


def critic_loss(critics: Critics, batch: Batch, target: Tensor) -> tuple[Tensor, Metrics]:
    """Mean squared TD error, summed over the critics. target [*S, B]."""
    value = critics(batch.obs, batch.action)
    assert value.shape == (*target.shape[:-1], critics.count, target.shape[-1]), value.shape
    loss = (value - target.unsqueeze(-2)).square().mean(-1).sum(-1)
    return loss, {"loss/critic": loss.detach(), "value/mean": value.detach().mean((-2, -1))}


def actor_loss(actor: DeterministicActor, critics: Critics, batch: Batch) -> tuple[Tensor, Metrics]:
    """- mean Q_1(s, π(s)): the deterministic policy gradient."""
    loss = -critics.first(batch.obs, actor(batch.obs)).mean(-1)
    return loss, {"loss/actor": loss.detach()}


class Agent:
    """TD3: owns the networks, the optimisers and the replay ring."""

    def __init__(
        self,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        config: Config,
        *,
        num_envs: int,
        device: torch.device,
        streams: Streams,
        compiled: bool = False,
        plasticity: Plasticity | None = None,
    ):
        observations = require_flat("td3", observation_spec)
        action_spec = require_continuous("td3", action_spec)
        self.config, self.num_envs, self.device, self.lead = config, num_envs, device, common_lead(streams)
        self.plasticity = make = plasticity or Plasticity()
        self.exploration, self.noise = streams["exploration"], streams["update"]
        self.scale = ActionScale(action_spec, device)
        self.action_size = action_spec.size
        sizes = observations, self.action_size, config.hidden, config.layer_norm
        self.actor = make.network(lambda: DeterministicActor(*sizes), streams["initialisation"])
        self.critics = make.network(lambda: Critics(2, *sizes), streams["initialisation"])
        self.target_actor, self.target_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.online_parameters: list[Tensor] = [*self.actor.parameters(), *self.critics.parameters()]
        self.target_parameters: list[Tensor] = [*self.target_actor.parameters(), *self.target_critics.parameters()]
        self.actor_optimizer = make.optimizer(self.actor, config.learning_rate, target=self.target_actor)
        self.critic_optimizer = make.optimizer(self.critics, config.learning_rate, target=self.target_critics)
        self.replay = Replay(
            config.replay_capacity,
            num_envs,
            observation_spec,
            action_spec,
            device,
            streams["sampling"],
            fading=config.replay == "fading",
        )
        self.steps = self.updates = 0
        self.pending: tuple[Tensor, Tensor] | None = None  # obs and action that wait for their outcome
        self.td_target = compiled_if(compiled, td_target)
        self.critic_loss = compiled_if(compiled, critic_loss)
        self.actor_loss = compiled_if(compiled, actor_loss)
        self.penalty = compiled_if(compiled, critic_penalty)

    @torch.no_grad()
    def act(self, obs: Tensor, explore: bool) -> Tensor:
        if not explore:
            return self.scale.to_environment(self.actor(obs))
        shape = (obs.shape[-2], self.action_size)
        if self.steps < self.config.warmup_steps:
            action = self.exploration.uniform(*shape) * 2 - 1
        else:
            noise = self.exploration.normal(*shape)
            action = torch.add(self.actor(obs), noise, alpha=self.config.exploration_noise).clamp_(-1, 1)
        self.pending = obs, action
        return self.scale.to_environment(action)

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        return self.critics(obs, self.actor(obs)).mean(-2)

    def observe(self, step: Step) -> None:
        obs, action = take_pending(self.pending)
        self.replay.add(obs, action, step)
        self.pending = None
        self.steps += self.num_envs

    def update(self) -> Metrics:
        config, metrics = self.config, {}
        self.plasticity.at(self.steps)
        for _ in range(updates_due(self.steps, self.num_envs, config.warmup_steps, config.update_every)):
            metrics = metrics | self._update_once()
        return metrics

    @property
    def update_variant(self) -> bool:
        """Of the next update, see `agents.graphs`: whether the actor and the targets move with it."""
        return (self.updates + 1) % self.config.policy_delay == 0

    def _update_once(self) -> Metrics:
        config = self.config
        batch = self.replay.sample(config.batch_size, config.discount, config.n_step)
        noise = self.noise.normal(config.batch_size, self.action_size) * config.target_noise
        target = self.td_target(self.target_actor, self.target_critics, batch, noise, config.target_noise_clip)
        loss, metrics = self.critic_loss(self.critics, batch, target)
        if config.representation != "none":
            extra, more = self.penalty(config.representation, self.critics, batch, *self._next(batch))
            loss, metrics = loss + config.representation_weight * extra, metrics | more
        gradient_step(self.critic_optimizer, loss)
        self.updates += 1
        if self.updates % config.policy_delay == 0:
            loss, more = self.actor_loss(self.actor, self.critics, batch)
            gradient_step(self.actor_optimizer, loss)
            lerp_(self.target_parameters, self.online_parameters, config.target_rate)
            metrics |= more
        return metrics

    @torch.no_grad()
    def _next(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The policy's actions at the next observations, and the target networks' features there, without noise."""
        action = self.target_actor(batch.next_obs)
        return self.actor(batch.next_obs), self.target_critics.features(batch.next_obs, action)

    def _parts(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critics": self.critics,
            "target_actor": self.target_actor,
            "target_critics": self.target_critics,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "replay": self.replay,
            "exploration": self.exploration,
            "noise": self.noise,
        }

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        parts = parts_state(self._parts(), seed, self.lead)
        return {"parts": parts, "steps": self.steps, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        load_parts_state(self._parts(), state["parts"], seed, self.lead)
        self.steps, self.updates, self.pending = state["steps"], state["updates"], None
