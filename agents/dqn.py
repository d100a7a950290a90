"""Deep Q-network, DQN (Mnih et al. 2015, doi:10.1038/nature14236).

    target  y = r + γ (1 - terminated) max_a' Q'(s', a')
    loss    L = mean (Q(s, a) - y)²                                 algorithm 1
    target network θ' <- θ every `target_update_every` environment steps

Images go through the Nature CNN (input bytes / 255, four stacked frames), vectors through a multilayer perceptron.
Defaults are CleanRL's for Atari, which learn with Adam instead of RMSProp; `runs/catalogue.py` has the other presets.
Exploration is ε-greedy, ε falling linearly from the first step on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.agent import Metrics, Streams, check_config, compiled_if
from agents.networks import Liftable, NatureCNN, mlp
from agents.replay import Batch
from agents.representation import FirstFeatures, Kind, infer, needed_gradients, penalty
from agents.value_based import ValueBased, weighted_mean
from envs.runner import ActionSpec, ObservationSpec
from plasticity.adam import Adam
from plasticity.population import RandomStream


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
    replay: Literal["uniform", "fading", "prioritised"] = "uniform"
    """draws all transitions alike, old ones less often, or those of large errors more often"""
    priority_exponent: float = 0.6
    """α of prioritised replay (Schaul et al. 2016)"""
    importance_start: float = 0.4
    """β of its importance weights at the start; it rises to 1"""
    importance_steps: int = 10_000_000
    """environment steps over which β rises"""
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
    representation: Literal["beer", "peer", "dr3", "infer", "none"] = "none"
    """penalty on the features; BEER's takes the head of the action taken, an approximation"""
    representation_weight: float = 1e-3
    """of that penalty; BEER's β; InFeR's α, published as 0.1"""
    feature_heads: int = 10
    """InFeR's extra heads"""
    feature_scale: float = 100.0
    """InFeR's β₀, of the frozen heads' outputs"""

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

    @property
    def feature_count(self) -> int:
        """D"""
        return cast(nn.Sequential, self.net)[-1].get_parameter("weight").shape[-1]

    def head_norm(self, action: Tensor) -> Tensor:
        """Norm of the head's weight for each action [*S, B], without gradient, [*S, B]."""
        head = cast(nn.Sequential, self.net)[-1].get_parameter("weight")
        return torch.linalg.vector_norm(head.detach(), dim=-1).gather(-1, action)


@torch.no_grad()
def td_target(target_net: QNetwork, batch: Batch) -> Tensor:
    """r + γ (1 - terminated) max_a' Q'(s', a'), [*S, B]."""
    return batch.reward + batch.discount * ~batch.terminated * target_net(batch.next_obs).amax(-1)


def td_loss(
    net: QNetwork, batch: Batch, target: Tensor, huber: bool, weight: Tensor | None = None
) -> tuple[Tensor, Metrics, Tensor]:
    """Mean squared (or Huber) TD error of the actions taken, metrics, and the errors Q - y [*S, B].

    target [*S, B]; weight: of importance, [*S, B].
    """
    value = net(batch.obs).gather(-1, batch.action[..., None]).squeeze(-1)
    assert value.shape == target.shape, value.shape
    error = F.smooth_l1_loss if huber else F.mse_loss
    loss = weighted_mean(error(value, target, reduction="none"), weight)
    metrics = {"loss/critic": loss.detach(), "value/mean": value.detach().mean(-1)}
    return loss, metrics, value.detach() - target


def dqn_loss(
    net: QNetwork, target_net: QNetwork, batch: Batch, huber: bool, weight: Tensor | None = None
) -> tuple[Tensor, Metrics, Tensor]:
    """`td_loss` against `td_target`: one graph where it is compiled."""
    return td_loss(net, batch, td_target(target_net, batch), huber, weight)


def infer_penalty(net: QNetwork, first: FirstFeatures, batch: Batch, scale: float) -> tuple[Tensor, Metrics]:
    """On the features of states, [*S], and metrics."""
    with torch.no_grad():
        features_then = first.first_network.features(batch.obs).unsqueeze(-3)
    value = infer(first, net.features(batch.obs).unsqueeze(-3), features_then, scale)
    return value, {"loss/representation": value.detach()}


def representation_penalty(kind: Kind, net: QNetwork, target_net: QNetwork, batch: Batch) -> tuple[Tensor, Metrics]:
    """On the features of states, [*S], and metrics. The theorem wants one head for both sides; this takes w_a of a."""
    with torch.no_grad():
        target_next = target_net.features(batch.next_obs)
    with needed_gradients(kind):
        online_next = net.features(batch.next_obs)
    features, target_next, online_next = (x.unsqueeze(-3) for x in (net.features(batch.obs), target_next, online_next))
    norm = net.head_norm(batch.action).unsqueeze(-2)
    return penalty(kind, features, target_next, online_next, norm, batch.reward, batch.discount)


class Agent(ValueBased):
    """DQN: owns the networks, the optimiser and the replay ring."""

    name = "dqn"
    config: Config
    net: QNetwork
    target_net: QNetwork

    def __init__(
        self,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        config: Config,
        *,
        compiled: bool = False,
        streams: Streams,
        **common: Any,
    ):
        super().__init__(observation_spec, action_spec, config, streams=streams, **common)
        self.dqn_loss = compiled_if(compiled, dqn_loss)
        self.penalty = compiled_if(compiled, representation_penalty)
        self.infer_penalty = compiled_if(compiled, infer_penalty)
        self.infer_parts: dict[str, Any] = {}
        if config.representation == "infer":
            features, heads = self.net.feature_count, config.feature_heads
            self.first = FirstFeatures.of(self.net, features, heads, streams["initialisation"])
            parameters = list(self.first.heads.parameters())
            optimizer = self.plasticity.scheduled(Adam(parameters, config.learning_rate, epsilon=config.adam_epsilon))
            self.optimizers.append(optimizer)
            self.infer_parts = {**self.first.parts(), "heads_optimizer": optimizer}

    def _network(self, observation_spec: ObservationSpec) -> QNetwork:
        return QNetwork(observation_spec, self.actions, self.config.hidden, self.config.layer_norm)

    def _values(self, obs: Tensor, stream: RandomStream | None) -> Tensor:
        return self.net(obs)

    def _loss(self, batch: Batch, weight: Tensor | None) -> tuple[Tensor, Metrics, Tensor]:
        config = self.config
        loss, metrics, error = self.dqn_loss(self.net, self.target_net, batch, config.huber, weight)
        if config.representation == "none":
            return loss, metrics, error
        if config.representation == "infer":
            extra, more = self.infer_penalty(self.net, self.first, batch, config.feature_scale)
        else:
            extra, more = self.penalty(config.representation, self.net, self.target_net, batch)
        return loss + config.representation_weight * extra, metrics | more, error

    def _parts(self) -> dict[str, Any]:
        return super()._parts() | self.infer_parts
