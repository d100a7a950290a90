"""Soft actor-critic with twin critics and learned temperature, SAC (Haarnoja et al. 2018, arXiv:1812.05905).

    target  y = r + γ (1 - terminated) (min_i Q'_i(s', a') - α log π(a'|s')),  a' ~ π(s')      eq. 3, 5
    critic  L = Σ_i mean ½ (Q_i(s, a) - y)²                                                    eq. 5
    actor   L = mean α log π(a|s) - min_i Q_i(s, a),  a = tanh(μ(s) + σ(s) ε)                  eq. 7, 9
    α       L = - mean α (log π(a|s) + H̄),  H̄ = - dim(A)                                       eq. 18
    targets θ' <- (1 - τ) θ' + τ θ after every step

The log-probability includes the correction of the tanh (appendix C). log σ is squashed into [-5, 2] as CleanRL and
pytorch_sac do. One optimiser step of critics, actor and temperature each; α's gradient is taken with respect to log α.
Actor and critics are multilayer perceptrons, or the residual networks of SimBa (`agents.simba`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents import simba
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
from agents.moments import Moments, as_seen
from agents.networks import ActionValues, Critics, Liftable, mlp, squashed_sample
from agents.plastic import Plasticity
from agents.population import common_lead
from agents.replay import Batch, Replay
from agents.representation import Kind, critic_penalty
from envs.runner import ActionSpec, ObservationSpec, Step
from plasticity.adam import Adam

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of SAC; the paper's table 1 unless said."""

    discount: float = 0.99
    """γ"""
    learning_rate: float = 3e-4
    """of Adam, for actor, critics and temperature"""
    weight_decay: float = 0.0
    """of AdamW, for actor and critics"""
    batch_size: int = 256
    target_rate: float = 0.005
    """τ, Polyak rate of the target critics"""
    initial_temperature: float = 1.0
    """α at the start (CleanRL's autotune)"""
    target_entropy_per_action: float = -1.0
    """H̄ divided by the number of action dimensions"""
    warmup_steps: int = 5_000
    """uniformly random environment steps before the first update (CleanRL)"""
    replay_capacity: int = 1_000_000
    """slots; one transition each, and one more for each episode"""
    replay: Literal["uniform", "fading"] = "uniform"
    """which transitions a batch is of: all alike, or old ones less often, as Symphony does"""
    n_step: int = 1
    """length of multi-step returns; intermediate entropies are left out"""
    update_every: int = 1
    """environment steps for each gradient step"""
    normalise_observations: bool = False
    """by running mean and variance of what was seen in training"""
    critics: int = 2
    """how many, of which the least value counts"""
    architecture: Literal["mlp", "simba"] = "mlp"
    """of actor and critics"""
    hidden: tuple[int, ...] = (256, 256)
    """layers of the actor; of SimBa's, residual blocks"""
    critic_hidden: tuple[int, ...] = ()
    """the same of each critic; none: as the actor"""
    layer_norm: bool = False
    """LayerNorm before every ReLU of multilayer perceptrons (ours)"""
    log_std_min: float = LOG_STD_MIN
    """lower end of log σ"""
    representation: Kind = "none"
    """penalty on the critics' features"""
    representation_weight: float = 1e-3
    """of that penalty; BEER's β"""

    def __post_init__(self) -> None:
        check_config(self)
        if self.architecture == "simba" and self.layer_norm:
            raise ValueError("layer_norm is for multilayer perceptrons; SimBa's networks have LayerNorm already")


class StochasticActor(Liftable):
    """Tanh-squashed Gaussian policy. net: gives means and log standard deviations before both are squashed."""

    def __init__(self, net: nn.Module, log_std_min: float = LOG_STD_MIN):
        super().__init__()
        self.net, self.log_std_min = net, log_std_min

    def distribution(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [*S, B, O] -> mean and log standard deviation before the tanh, [*S, B, A] each."""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, self.log_std_min + 0.5 * (LOG_STD_MAX - self.log_std_min) * (log_std.tanh() + 1)

    def forward(self, obs: Tensor) -> Tensor:
        """The most probable action before the tanh, squashed: obs [*S, B, O] -> [*S, B, A]."""
        return self.distribution(obs)[0].tanh()

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs [*S, B, O], standard normal noise [*S, B, A] -> action [*S, B, A] and its log-probability [*S, B]."""
        return squashed_sample(*self.distribution(obs), noise)


def make_actor(observations: int, actions: int, config: Config) -> StochasticActor:
    """The policy's network."""
    net = (
        simba.Network(observations, config.hidden, 2 * actions)
        if config.architecture == "simba"
        else mlp(observations, config.hidden, 2 * actions, config.layer_norm)
    )
    return StochasticActor(net, config.log_std_min)


def make_critics(observations: int, actions: int, config: Config) -> Critics | simba.ResidualCritics:
    """The networks of Q."""
    hidden = config.critic_hidden or config.hidden
    if config.architecture == "simba":
        return simba.ResidualCritics(config.critics, observations, actions, hidden)
    return Critics(config.critics, observations, actions, hidden, config.layer_norm)


@torch.no_grad()
def td_target(
    actor: StochasticActor, target_critics: ActionValues, log_temperature: Tensor, batch: Batch, noise: Tensor
) -> Tensor:
    """r + γ (1 - terminated) (min_i Q'_i(s', a') - α log π(a'|s')), [*S, B]. Equations 3 and 5. noise [*S, B, A]."""
    action, log_probability = actor.sample(batch.next_obs, noise)
    value = target_critics(batch.next_obs, action).amin(-2) - log_temperature[..., None].exp() * log_probability
    return batch.reward + batch.discount * ~batch.terminated * value


def critic_loss(critics: ActionValues, batch: Batch, target: Tensor) -> tuple[Tensor, Metrics]:
    """Half the mean squared TD error, summed over the critics. Equation 5. target [*S, B]."""
    value = critics(batch.obs, batch.action)
    assert value.shape == (*target.shape[:-1], critics.count, target.shape[-1]), value.shape
    loss = 0.5 * (value - target.unsqueeze(-2)).square().mean(-1).sum(-1)
    return loss, {"loss/critic": loss.detach(), "value/mean": value.detach().mean((-2, -1))}


def actor_loss(
    actor: StochasticActor, critics: ActionValues, log_temperature: Tensor, batch: Batch, noise: Tensor
) -> tuple[Tensor, Metrics]:
    """mean α log π(a|s) - min_i Q_i(s, a). Equation 7. noise [*S, B, A]. Its metrics include the entropy, [*S] each."""
    action, log_probability = actor.sample(batch.obs, noise)
    value = critics(batch.obs, action).amin(-2)
    loss = (log_temperature.detach()[..., None].exp() * log_probability - value).mean(-1)
    return loss, {"loss/actor": loss.detach(), "policy/entropy": -log_probability.detach().mean(-1)}


def temperature_loss(log_temperature: Tensor, entropy: Tensor, target_entropy: float) -> Tensor:
    """α (H - H̄): raises α while the mean entropy H [*S] of the policy is below its target. Equation 18."""
    return log_temperature.exp() * (entropy - target_entropy)


class Agent:
    """SAC: owns the networks, the optimisers and the replay ring."""

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
        observations = require_flat("sac", observation_spec)
        action_spec = require_continuous("sac", action_spec)
        self.config, self.num_envs, self.device, self.lead = config, num_envs, device, common_lead(streams)
        self.plasticity = make = plasticity or Plasticity()
        self.exploration, self.noise = streams["exploration"], streams["update"]
        self.scale = ActionScale(action_spec, device)
        self.action_size = action_spec.size
        sizes = observations, self.action_size, config
        self.actor = make.network(lambda: make_actor(*sizes), streams["initialisation"])
        self.critics = make.network(lambda: make_critics(*sizes), streams["initialisation"])
        self.target_critics = copy.deepcopy(self.critics)
        self.target_parameters: list[Tensor] = list(self.target_critics.parameters())
        self.log_temperature = torch.full(
            self.lead, math.log(config.initial_temperature), device=device, requires_grad=True
        )
        self.target_entropy = config.target_entropy_per_action * self.action_size
        rate, decay = config.learning_rate, config.weight_decay
        self.actor_optimizer = make.optimizer(self.actor, rate, weight_decay=decay)
        self.critic_optimizer = make.optimizer(self.critics, rate, self.target_critics, weight_decay=decay)
        self.temperature_optimizer = make.scheduled(Adam([self.log_temperature], config.learning_rate))
        self.replay = Replay(
            config.replay_capacity,
            num_envs,
            observation_spec,
            action_spec,
            device,
            streams["sampling"],
            fading=config.replay == "fading",
        )
        self.observation_moments = (
            Moments(self.lead, observation_spec.shape, device) if config.normalise_observations else None
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
            return self.scale.to_environment(self.actor(as_seen(self, obs)))
        if self.observation_moments is not None:
            self.observation_moments.update(obs)
        shape = (obs.shape[-2], self.action_size)
        if self.steps < self.config.warmup_steps:
            action = self.exploration.uniform(*shape) * 2 - 1
        else:
            noise = self.exploration.normal(*shape)
            action, _ = self.actor.sample(as_seen(self, obs), noise)
        self.pending = obs, action
        return self.scale.to_environment(action)

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        obs = as_seen(self, obs)
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
    def update_variant(self) -> str:
        """Of the next update, see `agents.graphs`: all are alike."""
        return "every"

    def _update_once(self) -> Metrics:
        config = self.config
        batch = self.replay.sample(config.batch_size, config.discount, config.n_step)
        if config.normalise_observations:
            seen = {"obs": as_seen(self, batch.obs), "next_obs": as_seen(self, batch.next_obs)}
            batch = dataclasses.replace(batch, **seen)
        noise, next_noise = self.noise.normal(2, config.batch_size, self.action_size).unbind(-3)
        target = self.td_target(self.actor, self.target_critics, self.log_temperature, batch, next_noise)
        loss, metrics = self.critic_loss(self.critics, batch, target)
        if config.representation != "none":
            soft, *following = self._next(batch, next_noise)
            extra, more = self.penalty(config.representation, self.critics, soft, *following)
            loss, metrics = loss + config.representation_weight * extra, metrics | more
        gradient_step(self.critic_optimizer, loss)
        loss, more = self.actor_loss(self.actor, self.critics, self.log_temperature, batch, noise)
        gradient_step(self.actor_optimizer, loss)
        loss = temperature_loss(self.log_temperature, more["policy/entropy"], self.target_entropy)
        gradient_step(self.temperature_optimizer, loss)
        lerp_(self.target_parameters, self.critic_optimizer.parameters, config.target_rate)
        self.updates += 1
        return metrics | more | {"policy/temperature": self.log_temperature.detach().exp()}

    @torch.no_grad()
    def _next(self, batch: Batch, noise: Tensor) -> tuple[Batch, Tensor, Tensor]:
        """The batch with the soft Bellman equation's reward, r - γ α log π(a'|s'), and a' with its target features."""
        action, log_probability = self.actor.sample(batch.next_obs, noise)
        bonus = batch.discount * ~batch.terminated * self.log_temperature[..., None].exp() * log_probability
        soft = dataclasses.replace(batch, reward=batch.reward - bonus)
        return soft, action, self.target_critics.features(batch.next_obs, action)

    def _parts(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critics": self.critics,
            "target_critics": self.target_critics,
            "log_temperature": self.log_temperature,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "temperature_optimizer": self.temperature_optimizer,
            "replay": self.replay,
            "exploration": self.exploration,
            "noise": self.noise,
            **({} if self.observation_moments is None else {"observation_moments": self.observation_moments}),
        }

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        parts = parts_state(self._parts(), seed, self.lead)
        return {"parts": parts, "steps": self.steps, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        load_parts_state(self._parts(), state["parts"], seed, self.lead)
        self.steps, self.updates, self.pending = state["steps"], state["updates"], None
