"""QR-DQN: DQN that learns quantiles of the return (Dabney et al. 2018, arXiv:1710.10044).

    θ_i(s, a)   the quantile at τ_i = (2 i - 1) / 2N,  i = 1 ... N;  Q(s, a) = mean_i θ_i(s, a)      lemma 2
    target      y_j = r + γ (1 - terminated) θ'_j(s', a*),  a* = argmax_a Q'(s', a)                  algorithm 1
    loss        Σ_i mean_j ρ_i(y_j - θ_i(s, a))                                                      algorithm 1
                ρ_i(u) = |τ_i - 1{u < 0}| L_κ(u) / κ,  L_κ: Huber's loss;  κ = 0: |τ_i - 1{u < 0}| |u|    eqs. 9, 10

Defaults are the paper's and, for what it leaves to DQN, those of DeepMind's DQN Zoo (one step is one decision, four
frames).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from agents.agent import Metrics, check_config, compiled_if
from agents.dqn import QNetwork
from agents.replay import Batch
from agents.value_based import ValueBased, of_action, weighted_mean
from envs.runner import ActionSpec, ObservationSpec
from plasticity.population import RandomStream


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of QR-DQN; one step is one decision, four frames."""

    quantiles: int = 200
    """N"""
    huber_threshold: float = 1.0
    """κ; 0 is the loss of exact quantile regression"""
    double: bool = False
    """the online network chooses the next action (not the paper's)"""
    discount: float = 0.99
    """γ"""
    learning_rate: float = 5e-5
    """of Adam"""
    adam_epsilon: float = 0.01 / 32
    batch_size: int = 32
    replay_capacity: int = 1_000_000
    """slots; one frame (or vector) each"""
    replay: Literal["uniform", "fading", "prioritised"] = "uniform"
    """draws all transitions alike, old ones less often, or those of large errors more often"""
    priority_exponent: float = 0.5
    """α of prioritised replay, by the error of the mean"""
    importance_start: float = 0.4
    """β of its importance weights at the start; it rises to 1"""
    importance_steps: int = 50_000_000
    """environment steps over which β rises"""
    warmup_steps: int = 50_000
    """environment steps before the first update"""
    update_every: int = 4
    """environment steps between rounds of updates"""
    updates_per_round: int = 1
    target_update_every: int = 10_000
    """environment steps between copies to the target network"""
    epsilon_start: float = 1.0
    epsilon_end: float = 0.01
    epsilon_decay_steps: int = 1_000_000
    """environment steps over which ε falls"""
    epsilon_evaluation: float = 0.001
    """ε when evaluated"""
    n_step: int = 1
    """length of multi-step returns"""
    max_gradient_norm: float = 10.0
    """the gradient is scaled down to this norm"""
    hidden: tuple[int, ...] = (256, 256)
    """layers of the network for vector observations"""
    layer_norm: bool = False
    """LayerNorm before every ReLU (ours)"""

    def __post_init__(self) -> None:
        check_config(self)


def action_values(output: Tensor, quantiles: int) -> Tensor:
    """Q(s, ·), [*S, B, A], from what the network gives, [*S, B, A N]."""
    return output.unflatten(-1, (-1, quantiles)).mean(-1)


@torch.no_grad()
def target(net: QNetwork, target_net: QNetwork, batch: Batch, quantiles: int, double: bool) -> Tensor:
    """y_j, [*S, B, N]."""
    output = target_net(batch.next_obs)
    selected = action_values(net(batch.next_obs) if double else output, quantiles).argmax(-1)
    factor = batch.discount * ~batch.terminated
    return batch.reward.unsqueeze(-1) + factor.unsqueeze(-1) * of_action(output, selected, quantiles)


def quantile_huber(quantile: Tensor, target: Tensor, threshold: float) -> Tensor:
    """Σ_i mean_j ρ_i(y_j - θ_i), [*S, B]. quantile θ [*S, B, N], target y [*S, B, any number]; threshold: κ."""
    count = quantile.shape[-1]
    tau = (torch.arange(count, dtype=quantile.dtype, device=quantile.device) + 0.5) / count
    error = target.unsqueeze(-2) - quantile.unsqueeze(-1)  # [*S, B, i, j]
    if threshold > 0:
        size = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=threshold) / threshold
    else:
        size = error.abs()
    return ((tau.unsqueeze(-1) - (error.detach() < 0).float()).abs() * size).mean(-1).sum(-1)


def loss(
    net: QNetwork, batch: Batch, target: Tensor, threshold: float, weight: Tensor | None = None
) -> tuple[Tensor, Metrics, Tensor]:
    """The quantiles' loss of the actions taken, metrics, and the errors of their means [*S, B].

    target [*S, B, N]; weight: of importance, [*S, B].
    """
    quantile = of_action(net(batch.obs), batch.action, target.shape[-1])
    whole = weighted_mean(quantile_huber(quantile, target, threshold), weight)
    value = quantile.detach().mean(-1)
    metrics = {"loss/critic": whole.detach(), "value/mean": value.mean(-1)}
    return whole, metrics, value - target.mean(-1)


class Agent(ValueBased):
    """QR-DQN: owns the networks, the optimiser and the replay ring."""

    name = "qrdqn"
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
        **common: Any,
    ):
        super().__init__(observation_spec, action_spec, config, **common)
        self.target = compiled_if(compiled, target)
        self.loss = compiled_if(compiled, loss)

    def _network(self, observation_spec: ObservationSpec) -> QNetwork:
        outputs = self.actions * self.config.quantiles
        return QNetwork(observation_spec, outputs, self.config.hidden, self.config.layer_norm)

    def _values(self, obs: Tensor, stream: RandomStream | None) -> Tensor:
        return action_values(self.net(obs), self.config.quantiles)

    def _loss(self, batch: Batch, weight: Tensor | None) -> tuple[Tensor, Metrics, Tensor]:
        config = self.config
        wanted = self.target(self.net, self.target_net, batch, config.quantiles, config.double)
        return self.loss(self.net, batch, wanted, config.huber_threshold, weight)
