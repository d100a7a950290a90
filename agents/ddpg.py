"""Deep deterministic policy gradient, DDPG (Lillicrap et al. 2016, arXiv:1509.02971).

    target  y = r + γ (1 - terminated) Q'(s', π'(s'))                                 algorithm 1
    critic  L = mean (Q(s, a) - y)²                                                   algorithm 1
    actor   L = - mean Q(s, π(s)), every `policy_delay` critic steps                  eq. 6
    targets θ' <- (1 - τ) θ' + τ θ, together with the actor

Settings are CleanRL's, the ones its published curves were made with: Gaussian exploration instead of the paper's
Ornstein-Uhlenbeck process, Adam 3e-4 for both networks, no weight decay, actor and targets every second critic step.
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
from envs.runner import ActionSpec, ObservationSpec, Step


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of DDPG; CleanRL's values."""

    discount: float = 0.99
    """γ"""
    learning_rate: float = 3e-4
    """of Adam, for actor and critic"""
    batch_size: int = 256
    target_rate: float = 0.005
    """τ, Polyak rate of the target networks"""
    exploration_noise: float = 0.1
    """standard deviation added to actions in [-1, 1]"""
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
    """LayerNorm before every ReLU of actor and critic (ours)"""

    def __post_init__(self) -> None:
        check_config(self)


@torch.no_grad()
def td_target(target_actor: DeterministicActor, target_critic: Critics, batch: Batch) -> Tensor:
    """r + γ (1 - terminated) Q'(s', π'(s')), [*S, B]. Algorithm 1."""
    value = target_critic.first(batch.next_obs, target_actor(batch.next_obs))
    return batch.reward + batch.discount * ~batch.terminated * value


def critic_loss(critic: Critics, batch: Batch, target: Tensor) -> tuple[Tensor, Metrics]:
    """Mean squared TD error. target [*S, B]."""
    value = critic.first(batch.obs, batch.action)
    assert value.shape == target.shape, value.shape
    loss = (value - target).square().mean(-1)
    return loss, {"loss/critic": loss.detach(), "value/mean": value.detach().mean(-1)}


def actor_loss(actor: DeterministicActor, critic: Critics, batch: Batch) -> tuple[Tensor, Metrics]:
    """- mean Q(s, π(s)): the deterministic policy gradient, eq. 6."""
    loss = -critic.first(batch.obs, actor(batch.obs)).mean(-1)
    return loss, {"loss/actor": loss.detach()}


class Agent:
    """DDPG: owns the networks, the optimisers and the replay ring."""

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
        observations = require_flat("ddpg", observation_spec)
        action_spec = require_continuous("ddpg", action_spec)
        self.config, self.num_envs, self.device, self.lead = config, num_envs, device, common_lead(streams)
        self.plasticity = make = plasticity or Plasticity()
        self.exploration = streams["exploration"]
        self.scale = ActionScale(action_spec, device)
        self.action_size = action_spec.size
        sizes = observations, self.action_size, config.hidden, config.layer_norm
        self.actor = make.network(lambda: DeterministicActor(*sizes), streams["initialisation"])
        self.critic = make.network(lambda: Critics(1, *sizes), streams["initialisation"])
        self.target_actor, self.target_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.online_parameters: list[Tensor] = [*self.actor.parameters(), *self.critic.parameters()]
        self.target_parameters: list[Tensor] = [*self.target_actor.parameters(), *self.target_critic.parameters()]
        self.actor_optimizer = make.optimizer(self.actor, config.learning_rate, target=self.target_actor)
        self.critic_optimizer = make.optimizer(self.critic, config.learning_rate, target=self.target_critic)
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
        return self.critic.first(obs, self.actor(obs))

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
        target = self.td_target(self.target_actor, self.target_critic, batch)
        loss, metrics = self.critic_loss(self.critic, batch, target)
        gradient_step(self.critic_optimizer, loss)
        self.updates += 1
        if self.updates % config.policy_delay == 0:
            loss, more = self.actor_loss(self.actor, self.critic, batch)
            gradient_step(self.actor_optimizer, loss)
            lerp_(self.target_parameters, self.online_parameters, config.target_rate)
            metrics |= more
        return metrics

    def _parts(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critic": self.critic,
            "target_actor": self.target_actor,
            "target_critic": self.target_critic,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "replay": self.replay,
            "exploration": self.exploration,
        }

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        parts = parts_state(self._parts(), seed, self.lead)
        return {"parts": parts, "steps": self.steps, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        load_parts_state(self._parts(), state["parts"], seed, self.lead)
        self.steps, self.updates, self.pending = state["steps"], state["updates"], None
