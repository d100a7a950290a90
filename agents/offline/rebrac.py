"""ReBRAC, TD3+BC with a penalty in the critic as well (Tarasov et al. 2023, arXiv:2305.09836).

    critic  y = r + γ (1 - terminal) (min_i Q'_i(s', ã') - β_c Σ (ã' - a')²),  a' what the data did next    eq. 4
    actor   L = β_a mean Σ (π(s) - a)² - mean min_i Q_i(s, π(s)) / mean |min_i Q_i(s, π(s))|                  eq. 3
    targets θ' <- (1 - τ) θ' + τ θ, with the actor, every `policy_delay` steps

Three hidden layers, LayerNorm in the critics (before each ReLU, as everywhere here), large batches; settings of CORL.
Where the data hold no next action, because a time limit came first, the target has no penalty.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.agent import Metrics, compiled_if, gradient_step, lerp_
from agents.networks import Critics, DeterministicActor
from agents.offline.learner import OfflineAgent, OfflineConfig, policy_value
from agents.plastic import Plasticity
from agents.replay import Batch
from agents.td3 import critic_loss
from plasticity.population import RandomStream


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """Hyper-parameters of ReBRAC. Its two weights are tuned for each data set; presets hold published ones."""

    cloning_weight: float = 1.0
    """β_a, weight of the cloning term in the actor's loss"""
    critic_penalty: float = 1.0
    """β_c, weight of the distance to the data's next action in the target"""
    batch_size: int = 1024
    normalise: bool = False
    actor_learning_rate: float = 1e-3
    critic_learning_rate: float = 1e-3
    target_rate: float = 0.005
    """τ, Polyak rate of the target networks"""
    target_noise: float = 0.2
    """standard deviation of target policy smoothing"""
    target_noise_clip: float = 0.5
    policy_delay: int = 2
    """critic steps for each step of actor and targets"""
    hidden: tuple[int, ...] = (256, 256, 256)
    critic_hidden: tuple[int, ...] = (256, 256, 256)


@torch.no_grad()
def td_target(
    target_actor: DeterministicActor,
    target_critics: Critics,
    batch: Batch,
    noise: Tensor,
    following: tuple[Tensor, Tensor],
    config: Config,
) -> Tensor:
    """The target of equation 4, [*S, B]. following: next actions of the data [*S, B, A], and where there are any."""
    next_action, there = following
    clip = config.target_noise_clip
    action = (target_actor(batch.next_obs) + noise.clamp(-clip, clip)).clamp(-1, 1)
    distance = there * (action - next_action).square().sum(-1)
    value = target_critics(batch.next_obs, action).amin(-2) - config.critic_penalty * distance
    return batch.reward + batch.discount * ~batch.terminated * value


def actor_loss(
    actor: DeterministicActor, critics: Critics, batch: Batch, cloning_weight: float
) -> tuple[Tensor, Metrics]:
    """Cloning and normalised ascent. Equation 3."""
    action = actor(batch.obs)
    value = critics(batch.obs, action).amin(-2)
    distance = (action - batch.action).square().sum(-1).mean(-1)
    ascent = -value.mean(-1) / value.detach().abs().mean(-1).clamp(min=1e-8)
    return cloning_weight * distance + ascent, {"loss/actor": ascent.detach(), "loss/bc": distance.detach()}


class Agent(OfflineAgent):
    """ReBRAC: owns the networks and their optimisers; the data are the base's."""

    name = "rebrac"
    config: Config

    def _build(self, make: Plasticity, initialisation: RandomStream) -> None:
        config, o, a = self.config, self.observation_size, self.action_size
        self.actor = make.network(lambda: DeterministicActor(o, a, config.hidden, False), initialisation)
        self.critics = make.network(lambda: Critics(2, o, a, config.critic_hidden, True), initialisation)
        self.target_actor, self.target_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.online_parameters: list[Tensor] = [*self.actor.parameters(), *self.critics.parameters()]
        self.target_parameters: list[Tensor] = [*self.target_actor.parameters(), *self.target_critics.parameters()]
        self.actor_optimizer = make.optimizer(self.actor, config.actor_learning_rate, target=self.target_actor)
        self.critic_optimizer = make.optimizer(self.critics, config.critic_learning_rate, target=self.target_critics)
        self.td_target = compiled_if(self.compiled, td_target)
        self.critic_loss = compiled_if(self.compiled, critic_loss)
        self.actor_loss = compiled_if(self.compiled, actor_loss)

    def value(self, obs: Tensor) -> Tensor:
        return policy_value(self, obs)

    @property
    def update_variant(self) -> bool:
        """Of the next update, see `agents.graphs`: whether the actor and the targets move with it."""
        return (self.updates + 1) % self.config.policy_delay == 0

    def _update_once(self) -> Metrics:
        assert self.data is not None, "read() comes first"
        config, index = self.config, self.data.draw(self.config.batch_size)
        batch, following = self.data.gather(index), self.data.next_actions(index)
        noise = self.noise.normal(config.batch_size, self.action_size) * config.target_noise
        target = self.td_target(self.target_actor, self.target_critics, batch, noise, following, config)
        loss, metrics = self.critic_loss(self.critics, batch, target)
        gradient_step(self.critic_optimizer, loss)
        self.updates += 1
        if self.updates % config.policy_delay == 0:
            loss, more = self.actor_loss(self.actor, self.critics, batch, config.cloning_weight)
            gradient_step(self.actor_optimizer, loss)
            lerp_(self.target_parameters, self.online_parameters, config.target_rate)
            metrics |= more
        return metrics

    def _networks(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critics": self.critics,
            "target_actor": self.target_actor,
            "target_critics": self.target_critics,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
        }
