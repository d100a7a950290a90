"""Rainbow (Hessel et al. 2018, arXiv:1710.02298): DQN with six additions, each of which can be switched off.

    double          a* by the online network, judged by the target network    van Hasselt et al. 2016
    dueling         q = v(s) + a(s, ·) - mean_a a(s, ·), of every atom        Wang et al. 2016
    n_step          y = Σ_k γ^k r_k + γ^n q(s_n, a*)                          Sutton 1988
    replay          prioritised, by the divergence below                      Schaul et al. 2016
    distributional  C51: p(s, a) over atoms z_i in [v_min, v_max]             Bellemare et al. 2017, arXiv:1707.06887
    noisy           noise on the weights explores, instead of ε               Fortunato et al. 2018

    loss     D_KL(Φ y ‖ p(s, a)),  y: atoms r + γ^n (1 - terminated) z_i with p'(s_n, a*)                    section 3
    Φ        gives each atom's probability to its two neighbours among the z_i, in proportion to nearness    C51, eq. 7

Without `distributional` the loss is DQN's squared error, and priorities go by its root. Defaults are the paper's and
those of DeepMind's DQN Zoo, whose uniform draws in one of a thousand cases are left out. The published code takes the
cross-entropy as priority, which has the gradient of the divergence, but never becomes small where returns are random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.agent import Metrics, Streams, check_config, compiled_if
from agents.networks import Liftable, NatureCNN, NoisyLinear, mlp
from agents.replay import Batch
from agents.value_based import ValueBased, of_action, weighted_mean
from envs.runner import ActionSpec, ObservationSpec
from plasticity.population import RandomStream


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of Rainbow (table 1), the additions first; one step is one decision, four frames."""

    double: bool = True
    """the online network chooses the next action, the target network values it"""
    dueling: bool = True
    """a stream for the state's value and one for the actions' advantages"""
    n_step: int = 3
    """length of multi-step returns"""
    replay: Literal["uniform", "fading", "prioritised"] = "prioritised"
    """draws all transitions alike, old ones less often, or those of large errors more often"""
    distributional: bool = True
    """learn the distribution of returns over atoms (C51), not only its mean"""
    noisy: bool = True
    """explore by noise on the weights of the last layers, not by ε"""
    atoms: int = 51
    v_min: float = -10.0
    """the lowest atom"""
    v_max: float = 10.0
    """the highest atom"""
    noise_scale: float = 0.5
    """σ₀ of the noise at first (0.1 in DQN Zoo)"""
    priority_exponent: float = 0.5
    """ω of prioritised replay"""
    importance_start: float = 0.4
    """β of its importance weights at the start; it rises to 1"""
    importance_steps: int = 50_000_000
    """environment steps over which β rises"""
    discount: float = 0.99
    """γ"""
    learning_rate: float = 6.25e-5
    """of Adam"""
    adam_epsilon: float = 1.5e-4
    batch_size: int = 32
    replay_capacity: int = 1_000_000
    """slots; one frame (or vector) each"""
    warmup_steps: int = 20_000
    """environment steps before the first update"""
    update_every: int = 4
    """environment steps between rounds of updates"""
    updates_per_round: int = 1
    target_update_every: int = 8_000
    """environment steps between copies to the target network"""
    max_gradient_norm: float = 10.0
    """the gradient is scaled down to this norm"""
    epsilon_start: float = 1.0
    """chance of a random action at first, without noise"""
    epsilon_end: float = 0.01
    epsilon_decay_steps: int = 250_000
    """environment steps over which ε falls"""
    epsilon_evaluation: float = 0.001
    """ε when evaluated, with or without noise in training"""
    hidden: tuple[int, ...] = (256, 256)
    """layers for vector observations; the last is that of each stream"""
    layer_norm: bool = False
    """LayerNorm before every ReLU (ours)"""

    def __post_init__(self) -> None:
        check_config(self)
        if not self.v_min < self.v_max:
            raise ValueError(f"v_min must be below v_max, got {self.v_min} and {self.v_max}")
        if self.atoms < 2:
            raise ValueError(f"atoms must be at least 2, got {self.atoms}")


class Head(Liftable):
    """One hidden layer and one linear layer, both noisy or not: [*S, B, in] -> [*S, B, out]."""

    def __init__(self, inputs: int, width: int, outputs: int, noise_scale: float | None, layer_norm: bool):
        super().__init__()

        def linear(inputs: int, outputs: int) -> nn.Module:
            return nn.Linear(inputs, outputs) if noise_scale is None else NoisyLinear(inputs, outputs, noise_scale)

        self.hidden, self.last = linear(inputs, width), linear(width, outputs)
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, hidden_noise: Tensor | None, last_noise: Tensor | None) -> Tensor:
        if hidden_noise is None:
            return self.last(self.act(self.norm(self.hidden(x))))
        return self.last(self.act(self.norm(self.hidden(x, hidden_noise))), last_noise)

    def straight_forward(self, x: Tensor) -> Tensor:
        """The same without noise, for tracing."""
        return self.last(self.act(self.norm(self.hidden(x))))


class RainbowNetwork(Liftable):
    """Logits of the atoms of every action, or its value: obs [*S, B, *obs_shape] -> [*S, B, number of actions K].

    K atoms of the first action come first; without distributions K is 1.
    """

    def __init__(self, observation_spec: ObservationSpec, actions: int, config: Config):
        super().__init__()
        self.outputs = config.atoms if config.distributional else 1
        scale = config.noise_scale if config.noisy else None
        if observation_spec.dtype == torch.uint8:
            self.torso: nn.Module = NatureCNN(observation_spec.shape, config.layer_norm, dense=False)
            inputs, width = self.torso.features, NatureCNN.features
        else:
            *before, width = config.hidden
            inputs = before[-1] if before else math.prod(observation_spec.shape)
            layers = mlp(math.prod(observation_spec.shape), before, 1, config.layer_norm)
            self.torso = layers[:-1]
        self.advantage = Head(inputs, width, actions * self.outputs, scale, config.layer_norm)
        self.value = Head(inputs, width, self.outputs, scale, config.layer_norm) if config.dueling else None

    @property
    def noise_sizes(self) -> list[int]:
        """How many numbers of noise each noisy layer takes; empty if there is none."""
        heads = [self.advantage] if self.value is None else [self.advantage, self.value]
        layers = [layer for head in heads for layer in (head.hidden, head.last)]
        return [sum(layer.noise_sizes) for layer in layers if isinstance(layer, NoisyLinear)]

    def forward(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """noise: of all noisy layers [*S, sum of `noise_sizes`], the same for the whole batch; None: none."""
        x = self.torso(obs)
        of_layers = [None] * 4 if noise is None else list(noise.split(self.noise_sizes, -1))
        advantage = self.advantage(x, *of_layers[:2])
        if self.value is None:
            return advantage
        advantage = advantage.unflatten(-1, (-1, self.outputs))
        value = self.value(x, *of_layers[2:]).unsqueeze(-2)
        return (value + advantage - advantage.mean(-2, keepdim=True)).flatten(-2)

    def straight_forward(self, obs: Tensor) -> Tensor:
        """What the weights make, not yet put together, for tracing."""
        x = self.torso(obs)
        advantage = self.advantage.straight_forward(x)
        return advantage if self.value is None else torch.cat([advantage, self.value.straight_forward(x)], -1)


Noise = Tensor | None
Support = Tensor | None  # the atoms z [K]; None where values are learned without distributions


def action_values(output: Tensor, support: Support) -> Tensor:
    """Q(s, ·) = Σ_i z_i p_i(s, ·), [*S, B, A], from what the network gives."""
    if support is None:
        return output
    return (output.unflatten(-1, (-1, len(support))).softmax(-1) * support).sum(-1)


def project(probability: Tensor, reward: Tensor, factor: Tensor, support: Tensor) -> Tensor:
    """Φ: the distribution of reward + factor Z on the atoms, [*S, B, K]; C51, eq. 7.

    probability: of Z at each atom [*S, B, K]; reward, factor [*S, B]. Beyond the ends it is put on them.
    """
    low, high, last = support[0], support[-1], len(support) - 1
    moved = (reward.unsqueeze(-1) + factor.unsqueeze(-1) * support).clamp(low, high)
    place = (moved - low) * (last / (high - low))  # among the atoms, 0 ... K - 1
    atoms = torch.arange(last + 1, dtype=place.dtype, device=place.device)
    # Without a scatter, whose sums would come in any order on a GPU. In place: these are the largest tensors.
    share = (1 - (place.unsqueeze(-2) - atoms.unsqueeze(-1)).abs_()).clamp_(min=0)  # [*S, B, to, from]
    return share.mul_(probability.unsqueeze(-2)).sum(-1)


@torch.no_grad()
def target(
    net: RainbowNetwork,
    target_net: RainbowNetwork,
    batch: Batch,
    selecting: Noise,
    judging: Noise,
    support: Support,
    double: bool,
) -> Tensor:
    """What the return of the actions taken should be: probabilities [*S, B, K], or values [*S, B].

    selecting, judging: noise of the online network, if it selects the next action, and of the target network.
    """
    output = target_net(batch.next_obs, judging)
    selected = action_values(net(batch.next_obs, selecting) if double else output, support).argmax(-1)
    factor = batch.discount * ~batch.terminated
    if support is None:
        return batch.reward + factor * of_action(output, selected, 1).squeeze(-1)
    probability = of_action(output, selected, len(support)).softmax(-1)
    return project(probability, batch.reward, factor, support)


def loss(
    net: RainbowNetwork, batch: Batch, target: Tensor, noise: Noise, support: Support, weight: Tensor | None = None
) -> tuple[Tensor, Metrics, Tensor]:
    """Cross-entropy to the target, or squared error; metrics; the divergences, or errors, of each row [*S, B].

    target: as `target` gives it; weight: of importance, [*S, B].
    """
    output = net(batch.obs, noise)
    if support is None:
        value = of_action(output, batch.action, 1).squeeze(-1)
        errors = value.detach() - target
        per_row = (value - target).square()
    else:
        logarithm = of_action(output, batch.action, len(support)).log_softmax(-1)
        value = (logarithm.detach().exp() * support).sum(-1)
        per_row = -(target * logarithm).sum(-1)
        errors = per_row.detach() + torch.xlogy(target, target).sum(-1)
    whole = weighted_mean(per_row, weight)
    return whole, {"loss/critic": whole.detach(), "value/mean": value.detach().mean(-1)}, errors


class Agent(ValueBased):
    """Rainbow: owns the networks, the optimiser and the replay ring."""

    name = "rainbow"
    config: Config
    net: RainbowNetwork
    target_net: RainbowNetwork

    def __init__(
        self,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        config: Config,
        *,
        device: torch.device,
        streams: Streams,
        compiled: bool = False,
        **common: Any,
    ):
        super().__init__(observation_spec, action_spec, config, device=device, streams=streams, **common)
        self.noise = streams["update"]
        self.support: Support = None
        if config.distributional:
            self.support = torch.linspace(config.v_min, config.v_max, config.atoms, device=device)
        self.target = compiled_if(compiled, target)
        self.loss = compiled_if(compiled, loss)

    @property
    def epsilon(self) -> float:
        """Chance of a random action at the present step: with noise, none once the warm-up is over."""
        if self.config.noisy:
            return 1.0 if self.steps < self.config.warmup_steps else 0.0
        return super().epsilon

    def _network(self, observation_spec: ObservationSpec) -> RainbowNetwork:
        return RainbowNetwork(observation_spec, self.actions, self.config)

    def _values(self, obs: Tensor, stream: RandomStream | None) -> Tensor:
        return action_values(self.net(obs, self._draw_noise(stream)), self.support)

    def _draw_noise(self, stream: RandomStream | None) -> Noise:
        """f(ε) = sgn(ε) √|ε| of standard normal ε, for all noisy layers; from no stream, none."""
        if stream is None or not self.config.noisy:
            return None
        noise = stream.normal(sum(self.net.noise_sizes))
        return noise.sign() * noise.abs().sqrt()

    def _loss(self, batch: Batch, weight: Tensor | None) -> tuple[Tensor, Metrics, Tensor]:
        own, selecting, judging = (self._draw_noise(self.noise) for _ in range(3))
        wanted = self.target(self.net, self.target_net, batch, selecting, judging, self.support, self.config.double)
        return self.loss(self.net, batch, wanted, own, self.support, weight)

    def _parts(self) -> dict[str, Any]:
        return super()._parts() | {"noise": self.noise}
