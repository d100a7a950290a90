"""Conservative Q-learning, CQL(H) on SAC (Kumar et al. 2020, arXiv:2006.04779).

    target  y = r + γ (1 - terminal) max_k min_i Q'_i(s', a'_k),  a'_k ~ π(s'), without the entropy
    critic  L = Σ_i mean (Q_i(s, a) - y)² + α_c Σ_i mean max(logsumexp_a Q_i(s, a) - Q_i(s, a), low)     eq. 4
    actor   L = mean α log π(a|s) - min_i Q_i(s, a); the temperature α as in SAC (`agents.sac`)
    targets θ' <- (1 - τ) θ' + τ θ of the critics, after every step

The logsumexp is an importance sampling (appendix F) over actions of three kinds, `sampled_actions` of each: uniform
ones, and the policy's at s and at s', each with its log-density taken off. `lagrange` turns α_c into a multiplier that
keeps the difference at `gap`. Order and settings are those of CORL (specs/a2pr-and-offline-rl.md, section 9); log σ is
squashed into [-5, 2] as in SAC here, where CORL clips it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents import sac
from agents.agent import Metrics, compiled_if, gradient_step, lerp_
from agents.networks import Critics, mlp
from agents.offline.learner import OfflineAgent, OfflineConfig, policy_value
from agents.plastic import Plasticity
from agents.replay import Batch
from plasticity.adam import Adam
from plasticity.population import RandomStream

LARGEST_MULTIPLIER = 1e6


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """Hyper-parameters of CQL; those of CORL for locomotion. The preset `antmaze` holds the others."""

    conservatism: float = 10.0
    """α_c, weight of the conservative term"""
    sampled_actions: int = 10
    """of each kind, for the logsumexp"""
    clip_below: float = math.inf
    """logsumexp - Q counts as minus this where it is lower"""
    lagrange: bool = False
    """a multiplier keeps the difference at --gap"""
    gap: float = 0.8
    backup_actions: int = 1
    """next actions, of which the best counts"""
    actor_learning_rate: float = 3e-5
    """of policy and temperature"""
    critic_learning_rate: float = 3e-4
    """of critics and multiplier"""
    initial_temperature: float = 1.0
    target_entropy_per_action: float = -1.0
    target_rate: float = 0.005
    """τ, Polyak rate of the target critics"""
    hidden: tuple[int, ...] = (256, 256, 256)
    """of the policy"""
    critic_hidden: tuple[int, ...] = (256, 256, 256)


@torch.no_grad()
def td_target(actor: sac.StochasticActor, target_critics: Critics, batch: Batch, noise: Tensor) -> Tensor:
    """r + γ (1 - terminal) max_k min_i Q'_i(s', a'_k), [*S, B]. noise [*S, N, B, A] of N next actions."""
    count, size = noise.shape[-3], noise.shape[-2]
    obs = repeated(batch.next_obs, count)
    action, _ = actor.sample(obs, noise.flatten(-3, -2))
    value = target_critics(obs, action).amin(-2).unflatten(-1, (count, size)).amax(-2)
    return batch.reward + batch.discount * ~batch.terminated * value


def repeated(obs: Tensor, count: int) -> Tensor:
    """[*S, B, O] -> [*S, count B, O], one whole batch after the other."""
    return obs.unsqueeze(-3).expand(*obs.shape[:-2], count, *obs.shape[-2:]).flatten(-3, -2)


@torch.no_grad()
def proposals(actor: sac.StochasticActor, batch: Batch, uniform: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions of all three kinds [*S, 3 N B, A] and their log-densities [*S, 3 N B].

    uniform [*S, N, B, A] in [-1, 1]; noise [*S, 2, N, B, A], of the policy at s and at s'.
    """
    count = uniform.shape[-3]
    plain = uniform.flatten(-3, -2)
    density = torch.full(plain.shape[:-1], -plain.shape[-1] * math.log(2), device=plain.device)
    found = [
        actor.sample(repeated(obs, count), of_kind.flatten(-3, -2))
        for obs, of_kind in zip((batch.obs, batch.next_obs), noise.unbind(-4), strict=True)
    ]
    actions, densities = zip((plain, density), *found, strict=True)
    return torch.cat(actions, -2), torch.cat(densities, -1)


def critic_loss(
    critics: Critics,
    batch: Batch,
    target: Tensor,
    actions: Tensor,
    log_density: Tensor,
    log_multiplier: Tensor | None,
    config: Config,
) -> tuple[Tensor, Metrics]:
    """TD error and conservative term, summed over the critics. Equation 4. log_multiplier [*S], if one is learnt."""
    size = batch.reward.shape[-1]
    value = critics(batch.obs, batch.action)
    td = (value - target.unsqueeze(-2)).square().mean(-1).sum(-1)
    many = repeated(batch.obs, actions.shape[-2] // size)
    elsewhere = critics(many, actions) - log_density.unsqueeze(-2)
    spread = elsewhere.unflatten(-1, (-1, size)).logsumexp(-2) - value  # [*S, K, B]
    difference = spread.clamp(min=-config.clip_below).mean(-1)
    if log_multiplier is None:
        conservative = config.conservatism * difference.sum(-1)
    else:
        multiplier = log_multiplier.detach().exp().clamp(max=LARGEST_MULTIPLIER)
        conservative = multiplier * config.conservatism * (difference - config.gap).sum(-1)
    loss = td + conservative
    metrics = {"loss/critic": td, "loss/conservative": conservative, "value/mean": value.mean((-2, -1))}
    metrics["cql/difference"] = difference.mean(-1)
    return loss, {name: metric.detach() for name, metric in metrics.items()}


def multiplier_loss(log_multiplier: Tensor, difference: Tensor, config: Config) -> Tensor:
    """Raises the multiplier while the mean difference [*S] is above the gap. Appendix F."""
    return -log_multiplier.exp().clamp(max=LARGEST_MULTIPLIER) * config.conservatism * (difference - config.gap)


class Agent(OfflineAgent):
    """CQL: owns the networks, the temperature and their optimisers; the data are the base's."""

    name = "cql"
    config: Config

    def _build(self, make: Plasticity, initialisation: RandomStream) -> None:
        config, o, a = self.config, self.observation_size, self.action_size
        self.actor = make.network(lambda: _policy(o, a, config.hidden), initialisation)
        self.critics = make.network(lambda: _critics(o, a, config.critic_hidden), initialisation)
        self.target_critics = copy.deepcopy(self.critics)
        self.critic_parameters: list[Tensor] = list(self.critics.parameters())
        self.target_parameters: list[Tensor] = list(self.target_critics.parameters())
        start = math.log(config.initial_temperature)
        self.log_temperature = torch.full(self.lead, start, device=self.device, requires_grad=True)
        self.log_multiplier = torch.ones(self.lead, device=self.device, requires_grad=True)
        self.actor_optimizer = make.optimizer(self.actor, config.actor_learning_rate)
        self.critic_optimizer = make.optimizer(self.critics, config.critic_learning_rate, target=self.target_critics)
        self.temperature_optimizer = make.scheduled(Adam([self.log_temperature], config.actor_learning_rate))
        self.multiplier_optimizer = make.scheduled(Adam([self.log_multiplier], config.critic_learning_rate))
        self.target_entropy = config.target_entropy_per_action * a
        self.td_target = compiled_if(self.compiled, td_target)
        self.proposals = compiled_if(self.compiled, proposals)
        self.critic_loss = compiled_if(self.compiled, critic_loss)
        self.actor_loss = compiled_if(self.compiled, sac.actor_loss)

    def value(self, obs: Tensor) -> Tensor:
        return policy_value(self, obs)

    @property
    def update_variant(self) -> bool:
        """All updates are alike, see `agents.graphs`."""
        return True

    def _update_once(self) -> Metrics:
        config, batch, draw = self.config, self.sample(), self.noise
        size, count, a = batch.reward.shape[-1], config.sampled_actions, self.action_size
        target = self.td_target(self.actor, self.target_critics, batch, draw.normal(config.backup_actions, size, a))
        uniform = draw.uniform(count, size, a) * 2 - 1
        actions, log_density = self.proposals(self.actor, batch, uniform, draw.normal(2, count, size, a))
        loss, metrics = self.actor_loss(self.actor, self.critics, self.log_temperature, batch, draw.normal(size, a))
        gradient_step(self.actor_optimizer, loss)
        loss = sac.temperature_loss(self.log_temperature, metrics["policy/entropy"], self.target_entropy)
        gradient_step(self.temperature_optimizer, loss)
        multiplier = self.log_multiplier if config.lagrange else None
        loss, more = self.critic_loss(self.critics, batch, target, actions, log_density, multiplier, config)
        if config.lagrange:
            gradient_step(
                self.multiplier_optimizer, multiplier_loss(self.log_multiplier, more["cql/difference"], config)
            )
        gradient_step(self.critic_optimizer, loss)
        lerp_(self.target_parameters, self.critic_parameters, config.target_rate)
        self.updates += 1
        return metrics | more | {"policy/temperature": self.log_temperature.detach().exp()}

    def _networks(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critics": self.critics,
            "target_critics": self.target_critics,
            "log_temperature": self.log_temperature,
            "log_multiplier": self.log_multiplier,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "temperature_optimizer": self.temperature_optimizer,
            "multiplier_optimizer": self.multiplier_optimizer,
        }


def _policy(observations: int, actions: int, hidden: tuple[int, ...]) -> sac.StochasticActor:
    net = mlp(observations, hidden, 2 * actions, layer_norm=False)
    for layer in net:
        if isinstance(layer, torch.nn.Linear):
            layer.orthogonal_gain = 1.0  # type: ignore[assignment]
    return sac.StochasticActor(net)


def _critics(observations: int, actions: int, hidden: tuple[int, ...]) -> Critics:
    critics = Critics(2, observations, actions, hidden, False)
    for layer in [*critics.layers, critics.head]:
        layer.law = "orthogonal"  # type: ignore[assignment]
    return critics
