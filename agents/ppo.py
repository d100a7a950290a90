"""Proximal policy optimisation, PPO (Schulman et al. 2017, arXiv:1707.06347).

    advantage  Â_t = Σ_l (γ λ)^l δ_{t+l},  δ_t = r_t + γ (1 - terminated_t) V(s_{t+1}) - V(s_t)           eq. 11, 12
    policy     L_π = - mean min(ρ Â, clip(ρ, 1 - ε, 1 + ε) Â),  ρ = π(a|s) / π_old(a|s)                   eq. 7
    value      L_V = ½ mean max((V - R)², (V_old + clip(V - V_old, ± ε) - R)²),  R = Â + V_old
    loss       L_π + c_1 L_V - c_2 entropy                                                                eq. 9

Sums of δ end with the episode; where it was truncated, V of the true last observation stands for what would have come.
Details are CleanRL's (specs/beer-and-online-rl.md, section 9): orthogonal weights, advantages normalised in each
minibatch, running scales of observations and rewards for vectors. The published learning rates fall to 0 over the run:
`--lr-schedule linear`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

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
    take_pending,
)
from agents.moments import Moments, as_seen
from agents.networks import Liftable, NatureCNN
from agents.plastic import Plasticity
from agents.population import common_lead
from envs.runner import ActionSpec, ContinuousActionSpec, ObservationSpec, Step
from plasticity.population import Axes, RandomStream


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of PPO for vectors of observations; CleanRL's for MuJoCo. Those for Atari are a preset."""

    discount: float = 0.99
    """γ"""
    gae_lambda: float = 0.95
    """λ of the advantages"""
    learning_rate: float = 3e-4
    adam_epsilon: float = 1e-5
    rollout_steps: int = 2_048
    """steps of each environment between rounds of updates"""
    epochs: int = 10
    """passes over a rollout"""
    minibatches: int = 32
    """into which each pass is cut"""
    clip: float = 0.2
    """ε, of the ratio of probabilities and of the value"""
    clip_value: bool = True
    value_weight: float = 0.5
    """c_1"""
    entropy_weight: float = 0.0
    """c_2"""
    max_gradient_norm: float = 0.5
    """the gradient is scaled down to this norm"""
    normalise_observations: bool = True
    """vectors, by running mean and variance, cut off at ± 10"""
    normalise_rewards: bool = True
    """by the running deviation of discounted returns, cut off at ± 10"""
    hidden: tuple[int, ...] = (64, 64)
    """layers of policy and value, for vectors"""
    layer_norm: bool = False
    """LayerNorm before every nonlinearity (ours)"""
    deterministic_evaluation: bool = True
    """evaluated by the likeliest action, not by draws from the policy"""

    def __post_init__(self) -> None:
        check_config(self)


def _orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    layer.orthogonal_gain = gain  # type: ignore[assignment] - read by agents.networks.initialise_
    return layer


def _tanh_mlp(inputs: int, hidden: tuple[int, ...], outputs: int, gain: float, layer_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        norm = [nn.LayerNorm(size)] if layer_norm else []
        layers += [_orthogonal(nn.Linear(inputs, size), math.sqrt(2)), *norm, nn.Tanh()]
        inputs = size
    return nn.Sequential(*layers, _orthogonal(nn.Linear(inputs, outputs), gain))


class ActorCritic(Liftable):
    """Policy and value: two tanh networks for vectors, two heads on one Nature CNN for images."""

    own_axes = 2  # of log_std, for plasticity.networks.tracing

    def __init__(self, observation_spec: ObservationSpec, action_spec: ActionSpec, config: Config):
        super().__init__()
        continuous = isinstance(action_spec, ContinuousActionSpec)
        outputs = action_spec.size if continuous else action_spec.count
        if observation_spec.dtype == torch.uint8:
            self.encoder: nn.Module = NatureCNN(observation_spec.shape, config.layer_norm)
            for module in self.encoder.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.orthogonal_gain = math.sqrt(2)  # type: ignore[assignment]
            self.policy: nn.Module = _orthogonal(nn.Linear(NatureCNN.features, outputs), 0.01)
            self.value: nn.Module = _orthogonal(nn.Linear(NatureCNN.features, 1), 1.0)
        else:
            size = math.prod(observation_spec.shape)
            self.encoder = nn.Identity()
            self.policy = _tanh_mlp(size, config.hidden, outputs, 0.01, config.layer_norm)
            self.value = _tanh_mlp(size, config.hidden, 1, 1.0, config.layer_norm)
        self.log_std = nn.Parameter(torch.zeros(1, outputs)) if continuous else None

    def straight_forward(self, obs: Tensor) -> Tensor:
        """Outputs of both, for tracing."""
        features = self.encoder(obs)
        return torch.cat([self.policy(features), self.value(features)], -1)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [*S, B, *obs_shape] -> means or logits [*S, B, A], values [*S, B]."""
        features = self.encoder(obs)
        return self.policy(features), self.value(features).squeeze(-1)


def log_probability(net: ActorCritic, outputs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """log π(a|s) and the policy's entropy, [*S, B] each. outputs: the policy's; action [*S, B, A] or [*S, B] int64."""
    if net.log_std is None:
        logs = outputs.log_softmax(-1)
        return logs.gather(-1, action[..., None]).squeeze(-1), -(logs.exp() * logs).sum(-1)
    scaled = (action - outputs) * (-net.log_std).exp()
    constant = 0.5 * math.log(2 * math.pi)
    log = (-0.5 * scaled.square() - net.log_std - constant).sum(-1)
    return log, (net.log_std + 0.5 + constant).sum(-1).expand_as(log)


def advantages(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, ended: Tensor, discount: float, lam: float
) -> Tensor:
    """Generalised advantage estimates, [*S, T, N]. Equations 11 and 12.

    All [*S, T, N]; next_value: V of the true successor, also where the episode ended; ended: terminated or truncated.
    """
    delta = reward + discount * next_value.masked_fill(terminated, 0) - value
    found, later = torch.empty_like(delta), torch.zeros_like(delta[..., 0, :])
    for t in range(delta.shape[-2] - 1, -1, -1):
        later = delta[..., t, :] + discount * lam * later.masked_fill(ended[..., t, :], 0)
        found[..., t, :] = later
    return found


@dataclass(frozen=True)
class Samples:
    """Of a rollout, [*S, B, ...]. log_probability and value are those of the policy that acted."""

    obs: Tensor
    action: Tensor
    log_probability: Tensor
    value: Tensor
    advantage: Tensor


def loss(net: ActorCritic, samples: Samples, config: Config) -> tuple[Tensor, Metrics]:
    """Equation 9, [*S], and metrics [*S]. Advantages are normalised over the batch."""
    outputs, value = net(samples.obs)
    log, entropy = log_probability(net, outputs, samples.action)
    log_ratio = log - samples.log_probability
    ratio, advantage = log_ratio.exp(), samples.advantage
    scaled = (advantage - advantage.mean(-1, keepdim=True)) / (advantage.std(-1, keepdim=True) + 1e-8)
    surrogate = torch.minimum(ratio * scaled, ratio.clamp(1 - config.clip, 1 + config.clip) * scaled)
    policy_loss = -surrogate.mean(-1)

    target = advantage + samples.value
    error = (value - target).square()
    if config.clip_value:
        near = samples.value + (value - samples.value).clamp(-config.clip, config.clip)
        error = torch.maximum(error, (near - target).square())
    value_loss = 0.5 * error.mean(-1)
    total = policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy.mean(-1)
    metrics = {
        "loss/policy": policy_loss,
        "loss/critic": value_loss,
        "value/mean": value.mean(-1),
        "policy/entropy": entropy.mean(-1),
        "policy/approximate_kl": (ratio - 1 - log_ratio).mean(-1),
        "policy/clip_fraction": ((ratio - 1).abs() > config.clip).float().mean(-1),
    }
    return total, {name: metric.detach() for name, metric in metrics.items()}


class Rollout:
    """What happened since the last round of updates: tensors [*S, T, N, ...], filled one step at a time."""

    def __init__(self, lead: Axes, steps: int, num_envs: int, obs: Tensor, action: Tensor):
        def room(like: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
            shape = () if like is None else like.shape[len(lead) + 1 :]
            dtype = dtype if like is None else like.dtype
            return torch.zeros((*lead, steps, num_envs, *shape), dtype=dtype, device=obs.device)

        self.obs, self.final_obs, self.action = room(obs), room(obs), room(action)
        self.log_probability, self.value, self.reward = room(None), room(None), room(None)
        self.terminated, self.ended = room(None, torch.bool), room(None, torch.bool)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(vars(self))


class Agent:
    """PPO: owns the networks, the optimiser, the rollout and the running scales."""

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
        if config.rollout_steps * num_envs < 2 * config.minibatches:
            raise ValueError(
                f"ppo cuts rollouts of {config.rollout_steps} steps in {num_envs} environments into "
                f"{config.minibatches} minibatches, which leaves less than two samples for each"
            )
        self.config, self.num_envs, self.device, self.lead = config, num_envs, device, common_lead(streams)
        self.plasticity = make = plasticity or Plasticity()
        self.exploration, self.order, self.evaluation = (
            streams[purpose] for purpose in ("exploration", "update", "evaluation")
        )
        self.scale = ActionScale(action_spec, device) if isinstance(action_spec, ContinuousActionSpec) else None
        self.net = make.network(lambda: ActorCritic(observation_spec, action_spec, config), streams["initialisation"])
        self.optimizer = make.optimizer(self.net, config.learning_rate, epsilon=config.adam_epsilon)
        images = observation_spec.dtype == torch.uint8
        self.observation_moments = (
            Moments(self.lead, observation_spec.shape, device, limit=10)
            if config.normalise_observations and not images
            else None
        )
        self.return_moments = Moments(self.lead, (), device) if config.normalise_rewards else None
        self.discounted_return = torch.zeros(*self.lead, num_envs, device=device)
        obs = torch.zeros(*self.lead, num_envs, *observation_spec.shape, dtype=observation_spec.dtype, device=device)
        if isinstance(action_spec, ContinuousActionSpec):
            action = torch.zeros(*self.lead, num_envs, action_spec.size, device=device)
        else:
            action = torch.zeros(*self.lead, num_envs, dtype=torch.int64, device=device)
        self.rollout = Rollout(self.lead, config.rollout_steps, num_envs, obs, action)
        self.at = 0  # steps of the rollout that are filled
        self.steps = self.updates = 0
        self.pending: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # obs, action, log-probability, value
        self.loss = compiled_if(compiled, loss)
        self._first_sample = torch.arange(math.prod(self.lead), device=device)[:, None]

    @torch.no_grad()
    def act(self, obs: Tensor, explore: bool) -> Tensor:
        if not explore:
            outputs, _ = self.net(as_seen(self, obs))
            if self.config.deterministic_evaluation:
                return self._played(outputs.argmax(-1) if self.scale is None else outputs)
            return self._played(self._drawn(outputs, self.evaluation))
        if self.observation_moments is not None:
            self.observation_moments.update(obs)
        obs = as_seen(self, obs)
        outputs, value = self.net(obs)
        action = self._drawn(outputs, self.exploration)
        log, _ = log_probability(self.net, outputs, action)
        self.pending = obs, action, log, value
        return self._played(action)

    def _drawn(self, outputs: Tensor, stream: RandomStream) -> Tensor:
        if self.net.log_std is not None:
            return outputs + self.net.log_std.exp() * stream.normal(*outputs.shape[-2:])
        uniform = stream.uniform(*outputs.shape[-2:])  # the Gumbel-max trick
        return (outputs - (-(uniform + 1e-20).log()).log()).argmax(-1)

    def _played(self, action: Tensor) -> Tensor:
        return action if self.scale is None else self.scale.to_environment(action.clamp(-1, 1))

    @torch.no_grad()
    def observe(self, step: Step) -> None:
        obs, action, log, value = take_pending(self.pending)
        rollout, ended = self.rollout, step.terminated | step.truncated
        entries = {
            "obs": obs,
            "final_obs": as_seen(self, step.final_obs),
            "action": action,
            "log_probability": log,
            "value": value,
            "reward": self._scaled(step.reward, ended),
            "terminated": step.terminated,
            "ended": ended,
        }
        for name, entry in entries.items():
            getattr(rollout, name).select(len(self.lead), self.at).copy_(entry)
        self.pending = None
        self.at += 1
        self.steps += self.num_envs

    def _scaled(self, reward: Tensor, ended: Tensor) -> Tensor:
        if self.return_moments is None:
            return reward
        self.discounted_return = self.discounted_return * self.config.discount + reward
        self.return_moments.update(self.discounted_return)
        self.discounted_return = self.discounted_return * ~ended
        return (reward / self.return_moments.deviation()).clamp(-10, 10)

    def update(self) -> Metrics:
        self.plasticity.at(self.steps)
        if self.at < self.config.rollout_steps:
            return {}
        samples, metrics = self._samples(), {}
        rows = samples.value.shape[-1]
        for _ in range(self.config.epochs):
            order = self.order.uniform(rows, dtype=torch.float64).argsort(-1)
            for chosen in order.tensor_split(self.config.minibatches, -1):
                total, metrics = self.loss(self.net, self._chosen(samples, chosen), self.config)
                gradient_step(self.optimizer, total, self.config.max_gradient_norm)
                self.updates += 1
        self.at = 0
        return metrics

    @torch.no_grad()
    def _samples(self) -> Samples:
        """The rollout with its advantages, steps and environments as one axis."""
        config, rollout, axis = self.config, self.rollout, len(self.lead)
        next_value = self._next_value()
        advantage = advantages(
            rollout.reward,
            rollout.value,
            next_value,
            rollout.terminated,
            rollout.ended,
            config.discount,
            config.gae_lambda,
        )
        kept = (rollout.obs, rollout.action, rollout.log_probability, rollout.value, advantage)
        return Samples(*(tensor.flatten(axis, axis + 1) for tensor in kept))

    def _next_value(self) -> Tensor:
        """V of the true successors, [*S, T, N]. Where the episode went on it is known: the next observation's."""
        rollout, axis = self.rollout, len(self.lead)
        asked = rollout.ended & ~rollout.terminated
        asked[..., -1, :] = True
        asked = asked.flatten(axis)
        # Which ones are asked must not be read from a GPU; and running scales move on between a step and the next.
        few = self.device.type == "cpu" and self.observation_moments is None
        count = int(asked.sum(-1).amax()) if few else asked.shape[-1]
        rows = asked.float().argsort(dim=-1, descending=True, stable=True)[..., :count]
        pieces = rows.tensor_split(-(-count * self.config.minibatches // asked.shape[-1]), -1)
        successors = rollout.final_obs.flatten(axis, axis + 1)
        # In pieces no larger than minibatches, so that it needs no more memory than they do.
        found = torch.cat([self.net(self._picked(successors, piece))[1] for piece in pieces], -1)
        # Half-precision networks answer in their own type.
        value = rollout.value.roll(-1, -2).flatten(axis).scatter(-1, rows, found.to(rollout.value.dtype))
        return value.view_as(rollout.value)

    def _chosen(self, samples: Samples, rows: Tensor) -> Samples:
        """Some rows [*S, M] of each seed."""
        return Samples(*(self._picked(getattr(samples, field.name), rows) for field in fields(samples)))

    def _picked(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """Rows [*S, M] of each seed, of tensor [*S, B, ...]: [*S, M, ...]."""
        count = tensor.shape[len(self.lead)]
        at = (rows.reshape(-1, rows.shape[-1]) + self._first_sample * count).flatten()
        flat = tensor.flatten(0, 1) if self.lead else tensor
        return flat.index_select(0, at).unflatten(0, rows.shape)

    def _parts(self) -> dict[str, Any]:
        moments = {"observation_moments": self.observation_moments, "return_moments": self.return_moments}
        return {
            "net": self.net,
            "optimizer": self.optimizer,
            "rollout": self.rollout,
            "discounted_return": self.discounted_return,
            "exploration": self.exploration,
            "order": self.order,
            "evaluation": self.evaluation,
            **{name: part for name, part in moments.items() if part is not None},
        }

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        parts = parts_state(self._parts(), seed, self.lead)
        return {"parts": parts, "steps": self.steps, "updates": self.updates, "at": self.at}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        load_parts_state(self._parts(), state["parts"], seed, self.lead)
        self.steps, self.updates, self.at, self.pending = state["steps"], state["updates"], state["at"], None
