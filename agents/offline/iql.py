"""Implicit Q-learning, IQL (Kostrikov, Nair & Levine 2022, arXiv:2110.06169).

    value   u = min_i Q'_i(s, a) - V(s),  L = mean |τ_e - 1[u < 0]| u²                           eq. 5
    critic  L = mean over both Q of (Q_i(s, a) - r - γ (1 - terminal) V(s'))², V before its step   eq. 6
    actor   L = mean min(exp(β u), 100) · (-log π(a|s)), or · Σ (π(s) - a)² without noise          eq. 7
    targets θ' <- (1 - τ) θ' + τ θ of the critics, after every step

The policy is Gaussian around a tanh mean with a standard deviation of its own for each action, the same everywhere, and
not squashed. Order and settings are those of CORL. The actor's learning rate falls as a cosine to 0 over the offline
run; online it is constant, instead of rising again as the reference's does.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.agent import Metrics, compiled_if, gradient_step, lerp_
from agents.networks import Critics, DeterministicActor, Liftable
from agents.offline.a2pr import Value
from agents.offline.learner import FineTuning, OfflineAgent, OfflineConfig, policy_value
from agents.offline.transitions import Transitions
from agents.plastic import Plasticity
from agents.replay import Batch
from plasticity.population import RandomStream

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
LARGEST_WEIGHT = 100.0  # of a sample in the actor's loss


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig, FineTuning):
    """Hyper-parameters of IQL; those of CORL for locomotion. Presets hold what differs by data set."""

    expectile: float = 0.7
    """τ_e"""
    inverse_temperature: float = 3.0
    """β"""
    actor: Literal["gaussian", "deterministic"] = "gaussian"
    reward_scaling: Literal["none", "return_range"] = "none"
    """rewards times 1000 / (largest - smallest return of the data), before --reward-scale"""
    learning_rate: float = 3e-4
    """of all; the actor's falls as a cosine to 0"""
    actor_schedule: Literal["cosine", "constant"] = "cosine"
    target_rate: float = 0.005
    """τ, Polyak rate of the target critics"""
    hidden: tuple[int, ...] = (256, 256)
    """of all networks"""


class GaussianActor(Liftable):
    """N(tanh f(s), σ²) with a σ for each action: `mean` maps obs [*S, B, O] to [*S, B, A] in [-1, 1]."""

    def __init__(self, observations: int, actions: int, hidden: tuple[int, ...]):
        super().__init__()
        self.mean = DeterministicActor(observations, actions, hidden, False)
        self.log_std = nn.Parameter(torch.zeros(actions))

    @torch.no_grad()
    def draw_(self, generator: torch.Generator) -> None:
        """σ is 1 at first."""
        self.log_std.zero_()

    def forward(self, obs: Tensor) -> Tensor:
        return self.mean(obs)

    def clamped_log_std(self) -> Tensor:
        """[*S, 1, A]."""
        return self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).unsqueeze(-2)

    def penalty(self, obs: Tensor, action: Tensor) -> Tensor:
        """-log π(a|s), [*S, B]."""
        log_std = self.clamped_log_std()
        distance = (action - self.mean(obs)) * (-log_std).exp()
        return (0.5 * distance.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


class PlainActor(Liftable):
    """The same without noise."""

    def __init__(self, observations: int, actions: int, hidden: tuple[int, ...]):
        super().__init__()
        self.mean = DeterministicActor(observations, actions, hidden, False)

    def forward(self, obs: Tensor) -> Tensor:
        return self.mean(obs)

    def penalty(self, obs: Tensor, action: Tensor) -> Tensor:
        """Σ (π(s) - a)², [*S, B]."""
        return (self.mean(obs) - action).square().sum(-1)


def value_loss(value: Value, target_critics: Critics, batch: Batch, expectile: float) -> tuple[Tensor, Tensor, Metrics]:
    """Expectile regression of V to the target critics; and the advantage u [*S, B] before the step. Equation 5."""
    with torch.no_grad():
        aim = target_critics(batch.obs, batch.action).amin(-2)
    advantage = aim - value(batch.obs)
    weight = (expectile - (advantage.detach() < 0).float()).abs()
    loss = (weight * advantage.square()).mean(-1)
    metrics = {"loss/value": loss.detach(), "value/advantage": advantage.detach().mean(-1)}
    return loss, advantage.detach(), metrics


def critic_loss(critics: Critics, batch: Batch, next_value: Tensor) -> tuple[Tensor, Metrics]:
    """Mean squared TD error over both critics. Equation 6. next_value V(s') [*S, B]."""
    target = batch.reward + batch.discount * ~batch.terminated * next_value
    value = critics(batch.obs, batch.action)
    loss = (value - target.unsqueeze(-2)).square().mean((-2, -1))
    return loss, {"loss/critic": loss.detach(), "value/mean": value.detach().mean((-2, -1))}


def actor_loss(
    actor: GaussianActor | PlainActor, batch: Batch, advantage: Tensor, inverse_temperature: float
) -> tuple[Tensor, Metrics]:
    """Advantage-weighted regression. Equation 7."""
    weight = (inverse_temperature * advantage).exp().clamp(max=LARGEST_WEIGHT)
    loss = (weight * actor.penalty(batch.obs, batch.action)).mean(-1)
    return loss, {"loss/actor": loss.detach(), "iql/mean_weight": weight.mean(-1)}


class Agent(OfflineAgent):
    """IQL: owns the networks and their optimisers; the data are the base's."""

    name = "iql"
    config: Config

    def _build(self, make: Plasticity, initialisation: RandomStream) -> None:
        config, o, a = self.config, self.observation_size, self.action_size
        kind = GaussianActor if config.actor == "gaussian" else PlainActor
        self.actor: Any = make.network(lambda: kind(o, a, config.hidden), initialisation)
        self.critics = make.network(lambda: Critics(2, o, a, config.hidden, False), initialisation)
        self.value_net = make.network(lambda: Value(o, config.hidden), initialisation)
        self.target_critics = copy.deepcopy(self.critics)
        self.critic_parameters: list[Tensor] = list(self.critics.parameters())
        self.target_parameters: list[Tensor] = list(self.target_critics.parameters())
        self.actor_optimizer = make.optimizer(self.actor, config.learning_rate)
        self.critic_optimizer = make.optimizer(self.critics, config.learning_rate, target=self.target_critics)
        self.value_optimizer = make.optimizer(self.value_net, config.learning_rate)
        self.value_loss = compiled_if(self.compiled, value_loss)
        self.critic_loss = compiled_if(self.compiled, critic_loss)
        self.actor_loss = compiled_if(self.compiled, actor_loss)

    def reward_map(self, transitions: Transitions) -> tuple[float, float]:
        scale, shift = super().reward_map(transitions)
        if self.config.reward_scaling == "none":
            return scale, shift
        returns = transitions.returns()[transitions.whole]
        spread = float(returns.max() - returns.min()) if len(returns) else 0.0
        if spread == 0:
            raise ValueError("--reward-scaling return_range needs episodes of different returns")
        return scale * 1000 / spread, shift

    def value(self, obs: Tensor) -> Tensor:
        return policy_value(self, obs)

    def explored(self, obs: Tensor, action: Tensor, noise: Tensor) -> Tensor:
        if self.config.actor == "deterministic":
            return super().explored(obs, action, noise)
        return (action + self.actor.clamped_log_std().exp() * noise).clamp(-1, 1)

    @property
    def update_variant(self) -> bool | None:
        """All updates are alike, see `agents.graphs`, if the actor's rate stays and batches are of one kind."""
        return True if self.config.actor_schedule == "constant" and self.phases_alike else None

    def _set_actor_rate(self) -> None:
        """The cosine of the offline phase, for the update that is due."""
        if self.config.actor_schedule == "cosine":
            done = self.updates / self.total_steps if self.replay is None else 0.0
            self.actor_optimizer.learning_rate = self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def _update_once(self) -> Metrics:
        config, batch = self.config, self.sample()
        self._set_actor_rate()
        with torch.no_grad():
            next_value = self.value_net(batch.next_obs)
        loss, advantage, metrics = self.value_loss(self.value_net, self.target_critics, batch, config.expectile)
        gradient_step(self.value_optimizer, loss)
        loss, more = self.critic_loss(self.critics, batch, next_value)
        gradient_step(self.critic_optimizer, loss)
        lerp_(self.target_parameters, self.critic_parameters, config.target_rate)
        metrics |= more
        loss, more = self.actor_loss(self.actor, batch, advantage, config.inverse_temperature)
        gradient_step(self.actor_optimizer, loss)
        self.updates += 1
        return metrics | more

    def _networks(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critics": self.critics,
            "value_net": self.value_net,
            "target_critics": self.target_critics,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "value_optimizer": self.value_optimizer,
        }
