"""Symphony, a deterministic actor-critic in one loss and one backward pass (Ishuov et al. 2025, arXiv:2512.10477).

    explore     the untrained actor and bounded noise for N_exp steps; fill a fading replay with it  (`agents.fading`)
    action      a = tanh(σ A + N),  N = s clip(ε, ± 1/s);  A, σ = |S|, β = |B| from one head                fig. 3, 6
    value       q' = Σ_j ω_j q_(j): the nodes of three target critics at (s', a'), sorted, optimists faded      table I
    critic      L_Q = ReHSE(Q(s, a) - (r + γ (1 - terminated) q'*)) for every node                               eq. 1
    actor       L_π = -ReHAE((q' - Q_T) / |Q_T|),  Q_T = α Q̄ + (1 - α) q'*,  Q̄ <- mean Q_T                      eq. 2
    swaddling   L_S = mean Ω(σ^(1/β*)) + β σ ln σ + Ω(β²)                                                        eq. 3
    step        all three at once by AdamW without bias correction; Polyak average of the critics               eq. 6

x* is x without gradient; ReHSE(x) = mean x tanh(x/2); ReHAE(x) = mean |x| tanh(x/2); Ω(x) = ln((1 + x)/(1 - x)). There
is no target actor, no delay, no learned entropy and no minimum over critics. Variants differ by numbers alone: presets
S3 (the defaults), SE, S2, ED. Where paper and code differ, the code holds (specs/symphony.md, section 13). Networks are
in `agents.symphony_networks`.

The successor of August 2026, "Saya" (section 15), is a preset, and each of its changes a switch:

    weights     of replay and nodes: a bell instead of a fade                                              weighting
    average     Q̄ <- α Q̄ + (1 - α) mean q'*, then (q' - Q̄) / |Q̄| with one Q̄ for the batch                  batch_average
    target      r + γ (1 - terminated) (q'* - H*), H = mean Ω(σ^(1/β)) + β σ ln σ over dimensions          soft_target
    networks    ReSine's slope is trained, blocks have a bottleneck, all read an encoder that predicts
                rewards                                          trained_slope, bottleneck, encoder_features
    optimiser   ε_t = β2 ε_(t-1) + (1 - β2) 1e-8 from ε_0 = 1 - 1e-8                                   annealed_epsilon
    noise       one matrix a step, for the action and the update                                           shared_noise
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from agents.agent import (
    ActionScale,
    Metrics,
    Streams,
    check_config,
    compiled_if,
    joint_step,
    lerp_,
    load_parts_state,
    parts_state,
    require_continuous,
    require_flat,
    take_pending,
    updates_due,
)
from agents.fading import FadingReplay
from agents.networks import new_network
from agents.plastic import AgentOptimizer, Plasticity
from agents.population import common_lead
from agents.replay import Batch, bell, fade
from agents.symphony_networks import Actor, Critics, Encoder
from envs.runner import ActionSpec, ObservationSpec, Step
from plasticity.adam import Adam

GOLDEN = (math.sqrt(5) - 1) / 2  # 1/φ
CLIP = 1e-3  # of σ and β, in the regulariser alone
EPSILON = 1e-8  # of the optimiser
WEIGHTS = {"fade": fade, "bell": bell}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of Symphony S3, section IV; those of SE, S2 and ED are presets."""

    discount: float = 0.99
    """γ"""
    learning_rate: float = 1e-4
    batch_size: int = 384
    """three times the nodes"""
    target_rate: float = 0.005
    """τ, Polyak rate of the target critics"""
    warmup_steps: int = 10_240
    """N_exp, steps of exploration before the first update, by the untrained actor"""
    replay_capacity: int = 512_000
    """N, a multiple of N_exp; for short runs, the planned number of steps"""
    updates_per_step: int = 3
    """G, for each transition"""
    hidden: tuple[int, ...] = (512, 512)
    nodes: int = 128
    """outputs of each critic"""
    noise_std: float = 1 / math.e
    """s, of exploration, acting and updates; the noise ends at ± 1"""
    advantage_rate: float = GOLDEN
    """α, share of the old average in Q_T"""
    first_moment_rate: float = GOLDEN
    """β1 of the optimiser"""
    second_moment_rate: float = 0.995
    """β2 of the optimiser, 1 - τ"""
    weight_decay: float = 0.01
    gradient_dropout: bool = False
    """half of the outputs of all networks pass no gradient (S2)"""
    fall_window: int = 50
    """training steps before the end of a full episode in which the actor rests, to fall"""
    episode_limit: int = 1_000
    """full length of an episode, for the fall window"""
    terminal_lives: float = math.inf
    """how often a terminal transition is kept from being overwritten"""
    half_precision_replay: bool = False
    """observations and actions rest as float16 (ED)"""
    swaddling_sum: bool = False
    """sum over the action's dimensions, instead of their mean"""
    weighting: Literal["fade", "bell"] = "fade"
    """of the replay's rows by age, and of the critics' nodes by rank"""
    batch_average: bool = False
    """Q_T of all samples is one moving average, not each sample's own"""
    soft_target: bool = False
    """the target lacks what the regulariser adds at s', as with a learned entropy"""
    trained_slope: bool = False
    """of ReSine's sigmoid, instead of 1.5"""
    bottleneck: int = 0
    """outputs of one more linear layer in each block, for gradient dropout; 0: none"""
    encoder_features: int = 0
    """of the encoder that actor and critics read; 0: they read observations"""
    annealed_epsilon: bool = False
    """the optimiser's ε falls from 1 with rate β2"""
    shared_noise: bool = False
    """the update repeats the noise that was drawn for the action, instead of its own"""
    aggregation: Literal["fading", "mean", "min"] = "fading"
    """of the target critics' nodes; the last two for ablations"""
    temporal_advantage: bool = True
    """without, the actor maximises q' itself; for ablations"""
    swaddling: bool = True
    """for ablations"""

    def __post_init__(self) -> None:
        check_config(self)
        if len(self.hidden) != 2:
            raise ValueError(f"hidden must list two layers for symphony, got {self.hidden}")
        if self.replay_capacity % max(1, self.warmup_steps) or self.warmup_steps < 1:
            raise ValueError(
                f"replay_capacity must be a multiple of warmup_steps, which fill it, got {self.replay_capacity} and "
                f"{self.warmup_steps}"
            )


def bounded_noise(noise: Tensor, std: float) -> Tensor:
    """Standard normal noise of standard deviation `std`, cut off at ± 1."""
    return std * noise.clamp(-1 / std, 1 / std)


def node_weights(nodes: int, weighting: Literal["fade", "bell"] = "fade") -> Tensor:
    """ω_j of the nodes of all critics together, lowest first, float32 [N_q]: as the replay fades, turned around."""
    weights = WEIGHTS[weighting](1 - torch.arange(nodes, dtype=torch.float64) / nodes)
    return (weights / weights.sum()).float()


def aggregate(nodes: Tensor, weights: Tensor | Literal["mean", "min"]) -> Tensor:
    """q' = Σ_j ω_j q_(j) over the sorted nodes of all critics: [*S, 3, B, n] -> [*S, B]. Table I."""
    together = nodes.transpose(-3, -2).flatten(-2)
    if isinstance(weights, str):
        return together.mean(-1) if weights == "mean" else together.amin(-1)
    return (together.sort(-1).values * weights).sum(-1)


def rehse(x: Tensor) -> Tensor:
    """x tanh(x/2), elementwise; the loss is its mean."""
    return x * (x / 2).tanh()


def rehae(x: Tensor) -> Tensor:
    """|x| tanh(x/2), elementwise; the loss is its mean."""
    return x.abs() * (x / 2).tanh()


def temporal_advantage(value: Tensor, average: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """(q' - Q_T) / |Q_T| and Q_T = α Q̄ + (1 - α) q'*: value [*S, B], average [*S] -> [*S, B] each. Equation 2."""
    reference = rate * average[..., None] + (1 - rate) * value.detach()
    return (value - reference) / reference.abs().clamp(min=1e-8), reference


def batch_advantage(value: Tensor, average: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """(q' - Q̄) / |Q̄| with Q̄ <- α Q̄ + (1 - α) mean q'*, and that Q̄: value [*S, B], average [*S] -> [*S, B], [*S, 1].

    Section 15 b.
    """
    reference = (rate * average + (1 - rate) * value.detach().mean(-1))[..., None]
    return (value - reference) / reference.abs().clamp(min=1e-8), reference


def swaddling(scale: Tensor, temperature: Tensor) -> Tensor:
    """Ω(σ^(1/β*)) + β σ ln σ + Ω(β²), elementwise. Equation 3. At rest where σ = 0.3639, β = 0.0920."""
    return swaddled_scale(scale, temperature) + _omega(temperature.clamp(CLIP, 1 - CLIP).square())


def swaddled_scale(scale: Tensor, temperature: Tensor) -> Tensor:
    """Ω(σ^(1/β*)) + β σ ln σ, elementwise: its mean over an action is H of section 15 c."""
    scale, temperature = scale.clamp(CLIP, 1 - CLIP), temperature.clamp(CLIP, 1 - CLIP)
    power = (scale.log() / temperature.detach()).exp()
    return _omega(power) + temperature * scale * scale.log()


def _omega(x: Tensor) -> Tensor:
    return x.log1p() - (-x).log1p()


def annealed_epsilon(steps: int, rate: float) -> float:
    """ε_t after t steps of ε <- β2 ε + (1 - β2) 1e-8 from 1 - 1e-8; section 15 g."""
    return EPSILON + rate**steps * (1 - 2 * EPSILON)


@dataclass(frozen=True)
class Passes:
    """Where gradients pass: of the actor's outputs [*S, B, 3 A], and of both critics' nodes [*S, 3, B, n].

    Or of the outputs of the blocks' bottleneck, those of the target critics excepted.
    """

    actor: Tensor | None = None
    critics: Tensor | None = None
    target_critics: Tensor | None = None


def loss(
    actor: Actor,
    critics: Critics,
    target_critics: Critics,
    batch: Batch,
    average: Tensor,
    noise: Tensor,
    passes: Passes,
    scale_action: ActionScale,
    weights: Tensor | Literal["mean", "min"],
    config: Config,
    encoder: Encoder | None = None,
) -> tuple[Tensor, Tensor, Metrics]:
    """-ReHAE(TA) + ReHSE(Q - y) + swaddling, [*S], the new average Q̄ [*S], and metrics [*S]. Equations 1 to 3.

    average: Q̄ [*S]. noise: bounded, [*S, B, A]. encoder: adds ReHSE of the rewards that it predicts. What the target
    critics read of s' has no gradient but the action's: the encoder is not to make values look large.
    """
    next_state = batch.next_obs if encoder is None else encoder.state(batch.next_obs)
    # Losses are float32, also where the networks multiply in bfloat16.
    direction, scale, temperature = (output.float() for output in actor(next_state, passes.actor))
    action = scale_action.to_environment((scale * direction + noise).tanh())
    next_pair = (next_state, action) if encoder is None else encoder.pair(next_state.detach(), action)[:2]
    value = aggregate(target_critics(*next_pair, passes.target_critics).float(), weights)
    advance = batch_advantage if config.batch_average else temporal_advantage
    advantage, reference = advance(value, average, config.advantage_rate)
    actor_loss = -(rehae(advantage) if config.temporal_advantage else value).mean(-1)

    next_value = value.detach()
    if config.soft_target:
        next_value = next_value - swaddled_scale(scale, temperature).detach().mean(-1)
    target = batch.reward + batch.discount * ~batch.terminated * next_value
    critic_loss, more = online_loss(critics, batch, target, passes, encoder)

    regulariser = swaddling(scale, temperature)
    regulariser = (regulariser.sum(-1) if config.swaddling_sum else regulariser.mean(-1)).mean(-1)
    total = actor_loss + critic_loss + (regulariser if config.swaddling else 0)
    metrics = more | {
        "loss/actor": actor_loss,
        "loss/swaddling": regulariser,
        "advantage/mean": advantage.mean(-1),
        "advantage/magnitude": advantage.abs().mean(-1),
        "advantage/smallest_reference": reference.abs().amin(-1),
        "policy/scale": scale.mean((-2, -1)),
        "policy/temperature": temperature.mean((-2, -1)),
    }
    return total, reference.mean(-1), {name: metric.detach() for name, metric in metrics.items()}


def online_loss(
    critics: Critics, batch: Batch, target: Tensor, passes: Passes, encoder: Encoder | None
) -> tuple[Tensor, Metrics]:
    """ReHSE(Q - y) of all nodes, and with an encoder ReHSE of its reward, [*S]; and metrics. target [*S, B]."""
    if encoder is None:
        nodes = critics(batch.obs, batch.action, passes.critics)
    else:
        *pair, predicted = encoder.pair(encoder.state(batch.obs), batch.action)
        nodes = critics(*pair, passes.critics)
    nodes = nodes.float()
    loss = rehse(nodes - target[..., None, :, None]).mean((-3, -2, -1))
    metrics = {
        "loss/critic": loss,
        "value/mean": nodes.mean((-3, -2, -1)),
        "value/node_spread": nodes.std(-1).mean((-2, -1)),
    }
    if encoder is not None:
        metrics["loss/reward"] = rehse(predicted - batch.reward).mean(-1)
        loss = loss + metrics["loss/reward"]
    return loss, metrics


class Agent:
    """Symphony: owns the networks, their optimisers and the fading replay."""

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
        observations = require_flat("symphony", observation_spec)
        action_spec = require_continuous("symphony", action_spec)
        self.config, self.num_envs, self.device, self.lead = config, num_envs, device, common_lead(streams)
        self.plasticity = plasticity or Plasticity()
        self.exploration, self.noise = streams["exploration"], streams["update"]
        self.scale = ActionScale(action_spec, device)
        self.action_size = action_spec.size
        self._make_networks(observations, streams)
        self.value_average = torch.zeros(self.lead, device=device)  # Q̄
        self.weights: Tensor | Literal["mean", "min"] = (
            node_weights(Critics.count * config.nodes, config.weighting).to(device)
            if config.aggregation == "fading"
            else config.aggregation
        )
        self.replay = FadingReplay(
            config.warmup_steps,
            config.replay_capacity // config.warmup_steps,
            num_envs,
            observation_spec,
            action_spec,
            device,
            streams["sampling"],
            terminal_lives=config.terminal_lives,
            half_precision=config.half_precision_replay,
            weight=WEIGHTS[config.weighting],
        )
        if config.shared_noise and num_envs > config.batch_size:
            raise ValueError(f"shared_noise needs a batch_size of at least the {num_envs} environments")
        self.drawn: Tensor | None = None  # noise of the last action and of the update after it, if they share it
        self.episode_steps = torch.zeros((*self.lead, num_envs), dtype=torch.int64, device=device)
        self.steps = self.updates = 0
        self.pending: tuple[Tensor, Tensor] | None = None  # obs and action that wait for their outcome
        self.loss = compiled_if(compiled, loss)

    def _make_networks(self, observations: int, streams: Streams) -> None:
        config, make, drawn_from = self.config, self.plasticity, streams["initialisation"]
        optimizer = {
            "betas": (config.first_moment_rate, config.second_moment_rate),
            "weight_decay": config.weight_decay,
            "bias_correction": False,
        }
        state, pair = observations, observations
        self.encoding: list[Any] = []  # the encoder and its optimiser, which interventions leave alone
        if config.encoder_features:
            sizes = observations, self.action_size, config.hidden[0], config.encoder_features
            encoder = new_network(lambda: Encoder(*sizes), drawn_from)
            state, pair = encoder.state_size, encoder.pair_size
            own = Adam(list(encoder.parameters()), config.learning_rate, **optimizer)
            self.encoding = [encoder, make.scheduled(own)]
        block = config.bottleneck, config.trained_slope
        self.actor = make.network(lambda: Actor(state, self.action_size, config.hidden, *block), drawn_from)
        self.critics = make.network(
            lambda: Critics(pair, self.action_size, config.hidden, config.nodes, *block), drawn_from
        )
        self.target_critics = copy.deepcopy(self.critics)
        self.target_parameters: list[Tensor] = list(self.target_critics.parameters())
        self.actor_optimizer = make.optimizer(self.actor, config.learning_rate, **optimizer)
        self.critic_optimizer = make.optimizer(
            self.critics, config.learning_rate, target=self.target_critics, **optimizer
        )
        self.optimizers: list[Any] = [self.actor_optimizer, self.critic_optimizer, *self.encoding[1:]]

    @property
    def encoder(self) -> Encoder | None:
        """What actor and critics read observations through, if anything."""
        return self.encoding[0] if self.encoding else None

    @torch.no_grad()
    def act(self, obs: Tensor, explore: bool) -> Tensor:
        direction, scale, _ = self.actor(obs if self.encoder is None else self.encoder.state(obs))
        push = scale * direction
        if not explore:
            return self.scale.to_environment(push.tanh())
        config = self.config
        if config.fall_window and self.steps >= config.warmup_steps:
            push = push * (self.episode_steps < config.episode_limit - config.fall_window)[..., None]
        if config.shared_noise:
            drawn = self.exploration.normal(config.batch_size, self.action_size)
            self.drawn = bounded_noise(drawn, config.noise_std)
            noise = self.drawn[..., : push.shape[-2], :]
        else:
            noise = bounded_noise(self.exploration.normal(*push.shape[-2:]), config.noise_std)
        action = self.scale.to_environment((push + noise).tanh())
        self.pending = obs, action
        return action

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        nodes = self.critics(*self.inputs_of(obs, self.act(obs, explore=False))["critics"])
        return aggregate(nodes, self.weights) * self.replay.reward_scale.view(*self.lead, 1)

    @torch.no_grad()
    def inputs_of(self, obs: Tensor, action: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """What actor and critics read of pairs obs [*S, B, O], action [*S, B, A]; for diagnostics and probe."""
        if self.encoder is None:
            return {"actor": (obs,), "critics": (obs, action)}
        state = self.encoder.state(obs)
        return {"actor": (state,), "critics": self.encoder.pair(state, action)[:2]}

    def observe(self, step: Step) -> None:
        obs, action = take_pending(self.pending)
        self.replay.add(obs, action, step)
        self.pending = None
        self.episode_steps = (self.episode_steps + 1) * ~(step.terminated | step.truncated)
        self.steps += self.num_envs
        if self.replay.explored == self.config.warmup_steps:
            self.replay.normalise_and_fill()

    def update(self) -> Metrics:
        metrics: Metrics = {}
        self.plasticity.at(self.steps)
        transitions = updates_due(self.replay.explored, self.num_envs, self.config.warmup_steps, 1)
        for _ in range(self.config.updates_per_step * transitions):
            metrics = metrics | self._update_once()
        return metrics

    def _update_once(self) -> Metrics:
        config = self.config
        rank = self.replay.draw(config.batch_size)
        batch = self.replay.gather(rank, config.discount)
        noise = self.drawn
        if noise is None:
            noise = bounded_noise(self.noise.normal(config.batch_size, self.action_size), config.noise_std)
        total, self.value_average, metrics = self.loss(
            self.actor,
            self.critics,
            self.target_critics,
            batch,
            self.value_average,
            noise,
            self._passes(),
            self.scale,
            self.weights,
            config,
            self.encoder,
        )
        if config.annealed_epsilon:
            for optimizer in self.optimizers:
                adam: Any = optimizer.inner if isinstance(optimizer, AgentOptimizer) else optimizer
                adam.epsilon = annealed_epsilon(self.updates + 1, config.second_moment_rate)
        joint_step(self.optimizers, total)
        lerp_(self.target_parameters, self.critic_optimizer.parameters, config.target_rate)
        self.updates += 1
        return metrics | {
            "value/average": self.value_average,
            "replay/terminal_share": batch.terminated.float().mean(-1),
            "replay/age": (self.replay.slots - 1 - rank).float().mean(-1),
        }

    def _passes(self) -> Passes:
        if not self.config.gradient_dropout:
            return Passes()
        config, rows, count = self.config, self.config.batch_size, Critics.count
        if config.bottleneck:
            shapes = [(rows, config.bottleneck), (count, rows, config.bottleneck)]
        else:
            shapes = [(rows, 3 * self.action_size), (count, rows, config.nodes), (count, rows, config.nodes)]
        return Passes(*(self.noise.uniform(*shape) < 0.5 for shape in shapes))

    def _parts(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critics": self.critics,
            "target_critics": self.target_critics,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "value_average": self.value_average,
            "episode_steps": self.episode_steps,
            "replay": self.replay,
            "exploration": self.exploration,
            "noise": self.noise,
            **dict(zip(("encoder", "encoder_optimizer"), self.encoding, strict=False)),
        }

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        parts = parts_state(self._parts(), seed, self.lead)
        return {"parts": parts, "steps": self.steps, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        load_parts_state(self._parts(), state["parts"], seed, self.lead)
        self.steps, self.updates, self.pending = state["steps"], state["updates"], None
