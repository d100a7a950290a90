"""Deep Q-network, DQN (Mnih et al. 2015, doi:10.1038/nature14236).

    target  y = r + γ (1 - terminated) max_a' Q'(s', a')
    loss    L = mean (Q(s, a) - y)²                                 algorithm 1
    target network θ' <- θ every `target_update_every` environment steps

Images go through the Nature CNN (input bytes / 255, four stacked frames), vectors through a multilayer perceptron.
Defaults are CleanRL's for Atari, which learn with Adam instead of RMSProp; `runs/presets.py` has the others.
Exploration is ε-greedy, ε falling linearly from the first step on.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.agent import (
    Metrics,
    Streams,
    check_config,
    compiled_if,
    gradient_step,
    lerp_,
    load_parts_state,
    parts_state,
    require_discrete,
    take_pending,
    updates_due,
)
from agents.networks import Liftable, NatureCNN, mlp
from agents.plastic import Plasticity
from agents.population import common_lead
from agents.replay import Batch, Replay
from agents.representation import Kind, needed_gradients, penalty
from envs.runner import ActionSpec, ObservationSpec, Step


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of DQN; CleanRL's for Atari (one step is one decision, four frames)."""

    discount: float = 0.99
    """γ"""
    learning_rate: float = 1e-4
    """of Adam"""
    adam_epsilon: float = 1e-8
    batch_size: int = 32
    replay_capacity: int = 1_000_000
    """slots; one frame (or vector) each"""
    replay: Literal["uniform", "fading"] = "uniform"
    """which transitions a batch is of: all alike, or old ones less often, as Symphony does"""
    warmup_steps: int = 80_000
    """environment steps before the first update"""
    update_every: int = 4
    """environment steps between rounds of updates"""
    updates_per_round: int = 1
    target_update_every: int = 1_000
    """environment steps between copies to the target network"""
    epsilon_start: float = 1.0
    epsilon_end: float = 0.01
    epsilon_decay_steps: int = 1_000_000
    """environment steps over which ε falls"""
    epsilon_evaluation: float = 0.001
    """ε when evaluated (Dopamine)"""
    n_step: int = 1
    """length of multi-step returns"""
    huber: bool = False
    """Huber loss (threshold 1) instead of the squared error"""
    max_gradient_norm: float = math.inf
    """the gradient is scaled down to this norm"""
    hidden: tuple[int, ...] = (256, 256)
    """layers of the network for vector observations"""
    layer_norm: bool = False
    """LayerNorm before every ReLU (ours)"""
    representation: Kind = "none"
    """penalty on the features; BEER's takes the head of the action taken, an approximation"""
    representation_weight: float = 1e-3
    """of that penalty; BEER's β"""

    def __post_init__(self) -> None:
        check_config(self)


class QNetwork(Liftable):
    """Action values Q(s, ·): obs [*S, B, *obs_shape] -> [*S, B, number of actions]."""

    def __init__(self, observation_spec: ObservationSpec, actions: int, hidden: tuple[int, ...], layer_norm: bool):
        super().__init__()
        if observation_spec.dtype == torch.uint8:
            encoder = NatureCNN(observation_spec.shape, layer_norm)
            self.net = nn.Sequential(encoder, nn.Linear(encoder.features, actions))
        else:
            self.net = mlp(math.prod(observation_spec.shape), hidden, actions, layer_norm)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs)

    def features(self, obs: Tensor) -> Tensor:
        """What the head reads, [*S, B, D]."""
        return cast(nn.Sequential, self.net)[:-1](obs)

    def head_norm(self, action: Tensor) -> Tensor:
        """Norm of the head's weight for each action [*S, B], without gradient, [*S, B]."""
        head = cast(nn.Sequential, self.net)[-1].get_parameter("weight")
        return torch.linalg.vector_norm(head.detach(), dim=-1).gather(-1, action)


@torch.no_grad()
def td_target(target_net: QNetwork, batch: Batch) -> Tensor:
    """r + γ (1 - terminated) max_a' Q'(s', a'), [*S, B]."""
    return batch.reward + batch.discount * ~batch.terminated * target_net(batch.next_obs).amax(-1)


def td_loss(net: QNetwork, batch: Batch, target: Tensor, huber: bool) -> tuple[Tensor, Metrics]:
    """Mean squared (or Huber) TD error of the actions taken. target [*S, B]."""
    value = net(batch.obs).gather(-1, batch.action[..., None]).squeeze(-1)
    assert value.shape == target.shape, value.shape
    error = F.smooth_l1_loss if huber else F.mse_loss
    loss = error(value, target, reduction="none").mean(-1)
    return loss, {"loss/critic": loss.detach(), "value/mean": value.detach().mean(-1)}


def representation_penalty(kind: Kind, net: QNetwork, target_net: QNetwork, batch: Batch) -> tuple[Tensor, Metrics]:
    """On the features of states, [*S], and metrics. The theorem wants one head for both sides; this takes w_a of a."""
    with torch.no_grad():
        target_next = target_net.features(batch.next_obs)
    with needed_gradients(kind):
        online_next = net.features(batch.next_obs)
    features, target_next, online_next = (x.unsqueeze(-3) for x in (net.features(batch.obs), target_next, online_next))
    norm = net.head_norm(batch.action).unsqueeze(-2)
    return penalty(kind, features, target_next, online_next, norm, batch.reward, batch.discount)


class Agent:
    """DQN: owns the networks, the optimiser and the replay ring."""

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
        action_spec = require_discrete("dqn", action_spec)
        self.config, self.num_envs, self.device, self.lead = config, num_envs, device, common_lead(streams)
        self.plasticity = make = plasticity or Plasticity()
        self.actions = action_spec.count
        self.exploration, self.evaluation = streams["exploration"], streams["evaluation"]
        self.net = make.network(
            lambda: QNetwork(observation_spec, self.actions, config.hidden, config.layer_norm),
            streams["initialisation"],
        )
        self.target_net = copy.deepcopy(self.net)
        self.target_parameters: list[Tensor] = list(self.target_net.parameters())
        self.optimizer = make.optimizer(
            self.net, config.learning_rate, target=self.target_net, epsilon=config.adam_epsilon
        )
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
        self.td_loss = compiled_if(compiled, td_loss)
        self.penalty = compiled_if(compiled, representation_penalty)

    @property
    def epsilon(self) -> float:
        """Chance of a random action at the present step."""
        done = min(1.0, self.steps / self.config.epsilon_decay_steps)
        return self.config.epsilon_start + done * (self.config.epsilon_end - self.config.epsilon_start)

    @torch.no_grad()
    def act(self, obs: Tensor, explore: bool) -> Tensor:
        stream, count = self.exploration if explore else self.evaluation, obs.shape[len(self.lead)]
        random = stream.integers(self.actions, count)
        if explore and self.steps < self.config.warmup_steps and self.epsilon == 1:
            action = random
        else:
            epsilon = self.epsilon if explore else self.config.epsilon_evaluation
            action = torch.where(stream.uniform(count) < epsilon, random, self.net(obs).argmax(-1))
        if explore:
            self.pending = obs, action
        return action

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        return self.net(obs).amax(-1)

    def observe(self, step: Step) -> None:
        obs, action = take_pending(self.pending)
        self.replay.add(obs, action, step)
        self.pending = None
        self.steps += self.num_envs

    def update(self) -> Metrics:
        config, metrics = self.config, {}
        self.plasticity.at(self.steps)
        rounds = updates_due(self.steps, self.num_envs, config.warmup_steps, config.update_every)
        for _ in range(rounds * config.updates_per_round):
            metrics = self._update_once()
        if updates_due(self.steps, self.num_envs, config.warmup_steps, config.target_update_every):
            lerp_(self.target_parameters, self.optimizer.parameters, 1.0)
        return metrics

    def _update_once(self) -> Metrics:
        config = self.config
        batch = self.replay.sample(config.batch_size, config.discount, config.n_step)
        target = self.td_target(self.target_net, batch)
        loss, metrics = self.td_loss(self.net, batch, target, config.huber)
        if config.representation != "none":
            extra, more = self.penalty(config.representation, self.net, self.target_net, batch)
            loss, metrics = loss + config.representation_weight * extra, metrics | more
        gradient_step(self.optimizer, loss, config.max_gradient_norm)
        self.updates += 1
        return metrics

    def _parts(self) -> dict[str, Any]:
        return {
            "net": self.net,
            "target_net": self.target_net,
            "optimizer": self.optimizer,
            "replay": self.replay,
            "exploration": self.exploration,
            "evaluation": self.evaluation,
        }

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        parts = parts_state(self._parts(), seed, self.lead)
        return {"parts": parts, "steps": self.steps, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        load_parts_state(self._parts(), state["parts"], seed, self.lead)
        self.steps, self.updates, self.pending = state["steps"], state["updates"], None
