"""CrossQ: soft actor-critic with batch normalisation and without target networks (Bhatt, Palenicek et al. 2024,
arXiv:1902.05605).

    joint   Q_i(s, a), Q_i(s', a') = critic i on the batch [s; s'], [a; a'],  a' ~ π(s')
    target  y = r + γ (1 - terminated) (min_i Q_i(s', a') - α log π(a'|s')), without gradient
    critic  L = Σ_i mean ½ (Q_i(s, a) - y)²
    actor   L = mean α log π(a|s) - min_i Q_i(s, a), and α as in SAC, every `policy_delay` critic steps

Both halves of the joint batch share one set of statistics: the policy's actions are as much in them as the replayed
ones, so the critic may be asked about either, and needs no slower copy of itself. Batch normalisation (Ioffe & Szegedy
2015) is on the inputs and behind every ReLU, of actor and critics; after `renormalise_after` steps it is batch
renormalisation (Ioffe 2017, arXiv:1702.03275, algorithm 1):

    in training   x̂ = (x - μ_B) / σ_B · r + d,  r = clip(σ_B / σ, 1/3, 3),  d = clip((μ_B - μ) / σ, ± 5), no gradient
    elsewhere     x̂ = (x - μ) / σ
    statistics    μ, σ² <- m (μ, σ²) + (1 - m) (μ_B, σ_B²)

Training passes are the critic in the critic's loss and the actor in its own; they alone move the statistics. Settings
are those of the authors' code (adityab/CrossQ), which puts ε where r and d meet σ_B a little differently, and draws
first weights by another law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.agent import (
    ActionScale,
    Metrics,
    Streams,
    check_config,
    compiled_if,
    gradient_step,
    load_parts_state,
    parts_state,
    require_continuous,
    require_flat,
    take_pending,
    updates_due,
)
from agents.networks import Liftable, StackedLinear, squashed_sample
from agents.plastic import Plasticity
from agents.population import common_lead
from agents.replay import Batch, Replay
from agents.sac import temperature_loss
from envs.runner import ActionSpec, ObservationSpec, Step
from plasticity.adam import Adam

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
R_MAX, D_MAX = 3.0, 5.0
EPSILON = 1e-3

# Mean and variance of one batch at one normalisation.
Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of CrossQ; the paper's table and released code."""

    discount: float = 0.99
    """γ"""
    learning_rate: float = 1e-3
    """of Adam, for actor, critics and temperature"""
    first_moment_rate: float = 0.5
    """β_1 of Adam, for actor and critics"""
    batch_size: int = 256
    policy_delay: int = 3
    """critic steps for each step of actor and temperature"""
    batch_norm_momentum: float = 0.99
    """m, of the running statistics"""
    renormalise_after: int = 100_000
    """gradient steps of a network after which its normalisations are renormalisations"""
    initial_temperature: float = 1.0
    """α at the start"""
    target_entropy_per_action: float = -1.0
    """H̄ divided by the number of action dimensions"""
    warmup_steps: int = 5_000
    """uniformly random environment steps before the first update"""
    replay_capacity: int = 1_000_000
    """slots; one transition each, and one more for each episode"""
    replay: Literal["uniform", "fading"] = "uniform"
    """which transitions a batch is of: all alike, or old ones less often, as Symphony does"""
    n_step: int = 1
    """length of multi-step returns; intermediate entropies are left out"""
    update_every: int = 1
    """environment steps for each critic step"""
    hidden: tuple[int, ...] = (256, 256)
    """layers of the actor"""
    critic_hidden: tuple[int, ...] = (2048, 2048)
    """layers of each critic; none: as the actor"""

    def __post_init__(self) -> None:
        check_config(self)


class BatchRenorm(Liftable):
    """K normalisations side by side over the batch: [*S, K, B, D] keeps its shape."""

    # for plasticity.networks.tracing
    normaliser, normalises_batch, own_axes = True, True, 1
    mean: Tensor
    variance: Tensor

    def __init__(self, count: int, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, 1, features))
        self.bias = nn.Parameter(torch.zeros(count, 1, features))
        self.register_buffer("mean", torch.zeros(count, 1, features))
        self.register_buffer("variance", torch.ones(count, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        """By the running statistics."""
        scale = self.weight / (self.variance + EPSILON).sqrt()
        return torch.addcmul(self.bias - self.mean * scale, x.to(scale.dtype), scale)

    def over_batch(self, x: Tensor, renormalise: bool) -> tuple[Tensor, Moments]:
        """By the batch's own statistics, which are returned, [*S, K, 1, D] each. Algorithm 1."""
        x = x.to(self.mean.dtype)
        variance, mean = torch.var_mean(x, -2, correction=0, keepdim=True)
        deviation = (variance + EPSILON).sqrt()
        scale, shift = 1 / deviation, -mean / deviation
        if renormalise:
            running = (self.variance + EPSILON).sqrt()
            r = (deviation.detach() / running).clamp(1 / R_MAX, R_MAX)
            d = ((mean.detach() - self.mean) / running).clamp(-D_MAX, D_MAX)
            scale, shift = scale * r, shift * r + d
        y = torch.addcmul(self.bias + self.weight * shift, x, self.weight * scale)
        return y, (mean.detach(), variance.detach())


class Body(Liftable):
    """K multilayer perceptrons side by side, normalised at their inputs and behind every ReLU."""

    def __init__(self, count: int, inputs: int, hidden: tuple[int, ...], outputs: int):
        super().__init__()
        sizes = [inputs, *hidden]
        self.norms = nn.ModuleList(BatchRenorm(count, size) for size in sizes)
        self.layers = nn.ModuleList(StackedLinear(count, i, o) for i, o in pairwise(sizes))
        self.acts = nn.ModuleList(nn.ReLU(inplace=True) for _ in hidden)
        self.head = StackedLinear(count, hidden[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """By running statistics: [*S, K, B, in] -> [*S, K, B, out]."""
        first, *norms = self.norms
        x = first(x)
        for layer, act, norm in zip(self.layers, self.acts, norms, strict=True):
            x = norm(act(layer(x)))
        return self.head(x)

    def over_batch(self, x: Tensor, renormalise: bool) -> tuple[Tensor, list[Moments]]:
        """A training pass, and what it saw at each normalisation."""
        first, *norms = self.norms
        x, one = first.over_batch(x, renormalise)  # type: ignore[operator]
        moments = [one]
        for layer, act, norm in zip(self.layers, self.acts, norms, strict=True):
            x, one = norm.over_batch(act(layer(x)), renormalise)  # type: ignore[operator]
            moments.append(one)
        return self.head(x), moments

    @torch.no_grad()
    def move_statistics_(self, moments: list[Moments], momentum: float) -> None:
        """Take in what a training pass saw."""
        running = [buffer for norm in self.norms for buffer in norm.buffers()]  # as their moments: mean, variance
        torch._foreach_lerp_(running, [tensor for pair in moments for tensor in pair], 1 - momentum)


class Critics(Liftable):
    """Two action-value networks Q_k(s, a)."""

    count = 2

    def __init__(self, observations: int, actions: int, hidden: tuple[int, ...]):
        super().__init__()
        self.body = Body(self.count, observations + actions, hidden, 1)

    def straight_forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """`forward` without a look at shapes, for tracing."""
        return self.body(torch.cat([obs, action], -1).expand(self.count, -1, -1)).squeeze(-1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """By running statistics: obs [*S, B, O], action [*S, B, A] -> values [*S, 2, B]."""
        return self.body(self._pairs(obs, action)).squeeze(-1)

    def over_batch(self, obs: Tensor, action: Tensor, renormalise: bool) -> tuple[Tensor, list[Moments]]:
        """The same in a training pass, and what it saw."""
        values, moments = self.body.over_batch(self._pairs(obs, action), renormalise)
        return values.squeeze(-1), moments

    def _pairs(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1).unsqueeze(-3)
        return x.expand(*x.shape[:-3], self.count, -1, -1)


class Actor(Liftable):
    """Tanh-squashed Gaussian policy."""

    def __init__(self, observations: int, actions: int, hidden: tuple[int, ...]):
        super().__init__()
        self.body = Body(1, observations, hidden, 2 * actions)

    def straight_forward(self, obs: Tensor) -> Tensor:
        """Means and log standard deviations by running statistics, for tracing: [*S, B, O] -> [*S, B, 2 A]."""
        return self.body(obs.unsqueeze(-3)).squeeze(-3)

    def forward(self, obs: Tensor) -> Tensor:
        """The most probable action before the tanh, squashed: obs [*S, B, O] -> [*S, B, A]."""
        return _mean_and_log_std(self.straight_forward(obs))[0].tanh()

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs [*S, B, O], standard normal noise [*S, B, A] -> action [*S, B, A] and its log-probability [*S, B]."""
        return squashed_sample(*_mean_and_log_std(self.straight_forward(obs)), noise)

    def sample_over_batch(self, obs: Tensor, noise: Tensor, renormalise: bool) -> tuple[Tensor, Tensor, list[Moments]]:
        """The same in a training pass, and what it saw."""
        outputs, moments = self.body.over_batch(obs.unsqueeze(-3), renormalise)
        return *squashed_sample(*_mean_and_log_std(outputs.squeeze(-3)), noise), moments


def _mean_and_log_std(outputs: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_std = outputs.chunk(2, -1)
    return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


def td_target(next_value: Tensor, log_probability: Tensor, log_temperature: Tensor, batch: Batch) -> Tensor:
    """r + γ (1 - terminated) (min_i Q_i(s', a') - α log π(a'|s')), [*S, B].

    next_value [*S, 2, B], log_probability [*S, B], log_temperature [*S].
    """
    soft_value = next_value.amin(-2) - log_temperature[..., None].exp() * log_probability
    return batch.reward + batch.discount * ~batch.terminated * soft_value


def critic_loss(
    actor: Actor, critics: Critics, log_temperature: Tensor, batch: Batch, noise: Tensor, renormalise: bool
) -> tuple[Tensor, list[Moments], Metrics]:
    """Half the mean squared TD error, summed over the critics, what the joint pass saw, and metrics [*S].

    noise [*S, B, A]: standard normal.
    """
    with torch.no_grad():
        next_action, log_probability = actor.sample(batch.next_obs, noise)
    obs, action = torch.cat([batch.obs, batch.next_obs], -2), torch.cat([batch.action, next_action], -2)
    joint, moments = critics.over_batch(obs, action, renormalise)
    value, next_value = joint.float().chunk(2, -1)  # losses are float32, also where products are in bfloat16
    target = td_target(next_value.detach(), log_probability, log_temperature.detach(), batch)
    assert value.shape == (*target.shape[:-1], critics.count, target.shape[-1]), value.shape
    loss = 0.5 * (value - target.unsqueeze(-2)).square().mean(-1).sum(-1)
    return loss, moments, {"loss/critic": loss.detach(), "value/mean": value.detach().mean((-2, -1))}


def actor_loss(
    actor: Actor, critics: Critics, log_temperature: Tensor, batch: Batch, noise: Tensor, renormalise: bool
) -> tuple[Tensor, list[Moments], Metrics]:
    """mean α log π(a|s) - min_i Q_i(s, a), critics by running statistics; what the actor saw, and metrics [*S]."""
    action, log_probability, moments = actor.sample_over_batch(batch.obs, noise, renormalise)
    value = critics(batch.obs, action).amin(-2).float()
    loss = (log_temperature.detach()[..., None].exp() * log_probability - value).mean(-1)
    return loss, moments, {"loss/actor": loss.detach(), "policy/entropy": -log_probability.detach().mean(-1)}


class Agent:
    """CrossQ: owns the networks, the optimisers and the replay ring."""

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
        observations = require_flat("crossq", observation_spec)
        action_spec = require_continuous("crossq", action_spec)
        self.config, self.num_envs, self.device, self.lead = config, num_envs, device, common_lead(streams)
        self.plasticity = make = plasticity or Plasticity()
        self.exploration, self.noise = streams["exploration"], streams["update"]
        self.scale = ActionScale(action_spec, device)
        self.action_size = actions = action_spec.size
        self.actor = make.network(lambda: Actor(observations, actions, config.hidden), streams["initialisation"])
        critic_hidden = config.critic_hidden or config.hidden
        self.critics = make.network(lambda: Critics(observations, actions, critic_hidden), streams["initialisation"])
        self.log_temperature = torch.full(
            self.lead, math.log(config.initial_temperature), device=device, requires_grad=True
        )
        self.target_entropy = config.target_entropy_per_action * actions
        betas = config.first_moment_rate, 0.999
        self.actor_optimizer = make.optimizer(self.actor, config.learning_rate, betas=betas)
        self.critic_optimizer = make.optimizer(self.critics, config.learning_rate, betas=betas)
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
        self.steps = self.updates = 0
        self.pending: tuple[Tensor, Tensor] | None = None  # obs and action that wait for their outcome
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
            action, _ = self.actor.sample(obs, self.exploration.normal(*shape))
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
    def update_variant(self) -> tuple[bool, bool, bool]:
        """Of the next update, see `agents.graphs`: whether it is the actor's too, and whether critics and actor
        renormalise in it."""
        after, delay, updates = self.config.renormalise_after, self.config.policy_delay, self.updates + 1
        return updates % delay == 0, updates > after, updates > after * delay

    def _update_once(self) -> Metrics:
        config, networks = self.config, (self.actor, self.critics, self.log_temperature)
        batch = self.replay.sample(config.batch_size, config.discount, config.n_step)
        noise, next_noise = self.noise.normal(2, config.batch_size, self.action_size).unbind(-3)
        with_actor, critics_renormalise, actor_renormalises = self.update_variant
        loss, moments, metrics = self.critic_loss(*networks, batch, next_noise, critics_renormalise)
        gradient_step(self.critic_optimizer, loss)
        self.critics.body.move_statistics_(moments, config.batch_norm_momentum)
        self.updates += 1
        if with_actor:
            loss, moments, more = self.actor_loss(*networks, batch, noise, actor_renormalises)
            gradient_step(self.actor_optimizer, loss)
            self.actor.body.move_statistics_(moments, config.batch_norm_momentum)
            loss = temperature_loss(self.log_temperature, more["policy/entropy"], self.target_entropy)
            gradient_step(self.temperature_optimizer, loss)
            metrics |= more
        return metrics | {"policy/temperature": self.log_temperature.detach().exp()}

    def _parts(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critics": self.critics,
            "log_temperature": self.log_temperature,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "temperature_optimizer": self.temperature_optimizer,
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
