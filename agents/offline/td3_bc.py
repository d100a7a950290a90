"""TD3+BC, TD3 with a term of behaviour cloning (Fujimoto & Gu 2021, arXiv:2106.06860).

    critic  as in TD3 (`agents.td3`)
    actor   L = -λ mean Q_1(s, π(s)) + mean (π(s) - a)²,  λ = α / mean |Q_1(s, π(s))|            eqs. 3 and 5
    targets θ' <- (1 - τ) θ' + τ θ, with the actor, every `policy_delay` steps

Settings are those of the authors' code (sfujim/TD3_BC).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from agents.agent import Metrics, compiled_if, gradient_step, lerp_
from agents.networks import Critics, DeterministicActor
from agents.offline.learner import FineTuning, OfflineAgent, OfflineConfig, policy_value
from agents.plastic import Plasticity
from agents.replay import Batch
from agents.td3 import critic_loss, td_target
from plasticity.population import RandomStream


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig, FineTuning):
    """Hyper-parameters of TD3+BC."""

    alpha: float = 2.5
    """α, weight of the Q term"""
    learning_rate: float = 3e-4
    """of Adam, for actor and critics"""
    target_rate: float = 0.005
    """τ, Polyak rate of the target networks"""
    target_noise: float = 0.2
    """standard deviation of target policy smoothing"""
    target_noise_clip: float = 0.5
    policy_delay: int = 2
    """critic steps for each step of actor and targets"""
    hidden: tuple[int, ...] = (256, 256)
    critic_hidden: tuple[int, ...] = (256, 256)


def actor_loss(
    actor: DeterministicActor, critics: Critics, batch: Batch, alpha: float, cloning: float
) -> tuple[Tensor, Metrics]:
    """-λ mean Q_1(s, π(s)) + `cloning` mean (π(s) - a)². Equations 3 and 5."""
    action = actor(batch.obs)
    value = critics.first(batch.obs, action)
    scale = alpha / value.detach().abs().mean(-1).clamp(min=1e-8)
    ascent, distance = -scale * value.mean(-1), (action - batch.action).square().mean((-2, -1))
    loss = ascent + cloning * distance
    return loss, {"loss/actor": ascent.detach(), "loss/bc": distance.detach(), "loss/combined": loss.detach()}


class Agent(OfflineAgent):
    """TD3+BC: owns the networks and their optimisers; the data are the base's."""

    name = "td3_bc"
    config: Config

    def _build(self, make: Plasticity, initialisation: RandomStream) -> None:
        config, o, a = self.config, self.observation_size, self.action_size
        self.actor = make.network(lambda: DeterministicActor(o, a, config.hidden, False), initialisation)
        self.critics = make.network(lambda: Critics(2, o, a, config.critic_hidden, False), initialisation)
        self.target_actor, self.target_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.online_parameters: list[Tensor] = [*self.actor.parameters(), *self.critics.parameters()]
        self.target_parameters: list[Tensor] = [*self.target_actor.parameters(), *self.target_critics.parameters()]
        self.actor_optimizer = make.optimizer(self.actor, config.learning_rate, target=self.target_actor)
        self.critic_optimizer = make.optimizer(self.critics, config.learning_rate, target=self.target_critics)
        self.td_target = compiled_if(self.compiled, td_target)
        self.critic_loss = compiled_if(self.compiled, critic_loss)
        self.actor_loss = compiled_if(self.compiled, actor_loss)

    def value(self, obs: Tensor) -> Tensor:
        return policy_value(self, obs)

    @property
    def update_variant(self) -> bool | None:
        """Of the next update, see `agents.graphs`; None online, where the pull anneals."""
        return (self.updates + 1) % self.config.policy_delay == 0 if self.phases_alike else None

    def _update_once(self) -> Metrics:
        config, batch = self.config, self.sample()
        noise = self.noise.normal(batch.reward.shape[-1], self.action_size) * config.target_noise
        target = self.td_target(self.target_actor, self.target_critics, batch, noise, config.target_noise_clip)
        loss, metrics = self.critic_loss(self.critics, batch, target)
        gradient_step(self.critic_optimizer, loss)
        self.updates += 1
        if self.updates % config.policy_delay == 0:
            loss, more = self.actor_loss(self.actor, self.critics, batch, config.alpha, self.pull)
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
