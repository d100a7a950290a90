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
S3 (the defaults), SE, S2, ED. Where paper and code differ, the code holds (specs/symphony.md, section 13).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
from agents.networks import Liftable, StackedLayerNorm, StackedLinear
from agents.plastic import Plasticity
from agents.population import common_lead
from agents.replay import Batch, fade
from envs.runner import ActionSpec, ObservationSpec, Step

GOLDEN = (math.sqrt(5) - 1) / 2  # 1/φ
CLIP = 1e-3  # of σ and β, in the regulariser alone


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


class ReSine(Liftable):
    """f sigmoid(1.5 f / σ_s), f = σ_s sin(x / σ_s), with a trained scale σ_s = sigmoid(s) for each unit (table III).

    [*S, K, B, H] keeps its shape.
    """

    nonlinearity, own_axes = "resine", 2  # for plasticity.networks.tracing

    def __init__(self, count: int, features: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(count, 1, features))

    @torch.no_grad()
    def draw_(self, generator: torch.Generator) -> None:
        """Uniform in ± 1 / √H."""
        bound = 1 / math.sqrt(self.scale.shape[-1])
        self.scale.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.sigmoid()
        sine = torch.sin(x / scale)
        return scale * sine * torch.sigmoid(1.5 * sine)


def gradient_dropout(x: Tensor, passes: Tensor | None) -> Tensor:
    """x itself, whose gradient passes only where `passes` is true, unscaled (eq. 7); everywhere if it is None."""
    return x if passes is None else torch.where(passes, x, x.detach())


class FeedForward(Liftable):
    """K blocks Linear, LayerNorm, Linear, ReSine, Linear side by side (fig. 8): [*S, K, B, in] -> [*S, K, B, out]."""

    def __init__(self, count: int, inputs: int, hidden: tuple[int, ...], outputs: int):
        super().__init__()
        self.count = count
        self.net = nn.Sequential(
            StackedLinear(count, inputs, hidden[0]),
            StackedLayerNorm(count, hidden[0]),
            StackedLinear(count, hidden[0], hidden[1]),
            ReSine(count, hidden[1]),
            StackedLinear(count, hidden[1], outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Actor(Liftable):
    """One block with three groups of outputs, each through tanh(z/2): direction A, scale S, temperature B (fig. 3)."""

    def __init__(self, observations: int, actions: int, hidden: tuple[int, ...]):
        super().__init__()
        self.block = FeedForward(1, observations, hidden, 3 * actions)

    def straight_forward(self, obs: Tensor) -> Tensor:
        """The outputs of the block, for tracing."""
        return self.block(obs.unsqueeze(-3)).squeeze(-3)

    def forward(self, obs: Tensor, passes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """obs [*S, B, O] -> A in (-1, 1), σ = |S| and β = |B| in [0, 1), each [*S, B, A]. passes: [*S, B, 3 A]."""
        outputs = gradient_dropout(self.straight_forward(obs), passes)
        direction, scale, temperature = (outputs / 2).tanh().chunk(3, -1)
        return direction, scale.abs(), temperature.abs()


class Critics(Liftable):
    """Three blocks on the observation and the action: values at n nodes each, all of them plain regressions."""

    count = 3

    def __init__(self, observations: int, actions: int, hidden: tuple[int, ...], nodes: int):
        super().__init__()
        self.block = FeedForward(self.count, observations + actions, hidden, nodes)

    def straight_forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """The same without a look at shapes, for tracing."""
        return self.block(torch.cat([obs, action], -1).expand(self.count, -1, -1))

    def forward(self, obs: Tensor, action: Tensor, passes: Tensor | None = None) -> Tensor:
        """obs [*S, B, O], action [*S, B, A] -> nodes [*S, 3, B, n], as `passes` is."""
        x = torch.cat([obs, action], -1).unsqueeze(-3)
        return gradient_dropout(self.block(x.expand(*x.shape[:-3], self.count, -1, -1)), passes)


def bounded_noise(noise: Tensor, std: float) -> Tensor:
    """Standard normal noise of standard deviation `std`, cut off at ± 1."""
    return std * noise.clamp(-1 / std, 1 / std)


def node_weights(nodes: int) -> Tensor:
    """ω_j of the nodes of all critics together, lowest first, float32 [N_q]: as the replay fades, turned around."""
    weights = fade(1 - torch.arange(nodes, dtype=torch.float64) / nodes)
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


def swaddling(scale: Tensor, temperature: Tensor) -> Tensor:
    """Ω(σ^(1/β*)) + β σ ln σ + Ω(β²), elementwise. Equation 3. At rest where σ = 0.3639, β = 0.0920."""
    scale, temperature = scale.clamp(CLIP, 1 - CLIP), temperature.clamp(CLIP, 1 - CLIP)
    power = (scale.log() / temperature.detach()).exp()
    return _omega(power) + temperature * scale * scale.log() + _omega(temperature.square())


def _omega(x: Tensor) -> Tensor:
    return x.log1p() - (-x).log1p()


@dataclass(frozen=True)
class Passes:
    """Where gradients pass: of the actor's outputs [*S, B, 3 A], and of both critics' nodes [*S, 3, B, n]."""

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
) -> tuple[Tensor, Tensor, Metrics]:
    """-ReHAE(TA) + ReHSE(Q - y) + swaddling, [*S], the new average Q̄ [*S], and metrics [*S]. Equations 1 to 3.

    average: Q̄ [*S]. noise: bounded, [*S, B, A].
    """
    direction, scale, temperature = actor(batch.next_obs, passes.actor)
    action = scale_action.to_environment((scale * direction + noise).tanh())
    value = aggregate(target_critics(batch.next_obs, action, passes.target_critics), weights)
    advantage, reference = temporal_advantage(value, average, config.advantage_rate)
    actor_loss = -(rehae(advantage) if config.temporal_advantage else value).mean(-1)

    target = batch.reward + batch.discount * ~batch.terminated * value.detach()
    nodes = critics(batch.obs, batch.action, passes.critics)
    critic_loss = rehse(nodes - target[..., None, :, None]).mean((-3, -2, -1))

    regulariser = swaddling(scale, temperature)
    regulariser = (regulariser.sum(-1) if config.swaddling_sum else regulariser.mean(-1)).mean(-1)
    total = actor_loss + critic_loss + (regulariser if config.swaddling else 0)
    metrics = {
        "loss/critic": critic_loss,
        "loss/actor": actor_loss,
        "loss/swaddling": regulariser,
        "value/mean": nodes.mean((-3, -2, -1)),
        "value/node_spread": nodes.std(-1).mean((-2, -1)),
        "advantage/mean": advantage.mean(-1),
        "advantage/magnitude": advantage.abs().mean(-1),
        "advantage/smallest_reference": reference.abs().amin(-1),
        "policy/scale": scale.mean((-2, -1)),
        "policy/temperature": temperature.mean((-2, -1)),
    }
    return total, reference.mean(-1), {name: metric.detach() for name, metric in metrics.items()}


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
        self.plasticity = make = plasticity or Plasticity()
        self.exploration, self.noise = streams["exploration"], streams["update"]
        self.scale = ActionScale(action_spec, device)
        self.action_size = action_spec.size
        sizes = observations, self.action_size, config.hidden
        self.actor = make.network(lambda: Actor(*sizes), streams["initialisation"])
        self.critics = make.network(lambda: Critics(*sizes, config.nodes), streams["initialisation"])
        self.target_critics = copy.deepcopy(self.critics)
        self.target_parameters: list[Tensor] = list(self.target_critics.parameters())
        optimizer = {
            "betas": (config.first_moment_rate, config.second_moment_rate),
            "weight_decay": config.weight_decay,
            "bias_correction": False,
        }
        self.actor_optimizer = make.optimizer(self.actor, config.learning_rate, **optimizer)
        self.critic_optimizer = make.optimizer(
            self.critics, config.learning_rate, target=self.target_critics, **optimizer
        )
        self.value_average = torch.zeros(self.lead, device=device)  # Q̄
        self.weights: Tensor | Literal["mean", "min"] = (
            node_weights(Critics.count * config.nodes).to(device)
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
        )
        self.episode_steps = torch.zeros((*self.lead, num_envs), dtype=torch.int64, device=device)
        self.steps = self.updates = 0
        self.pending: tuple[Tensor, Tensor] | None = None  # obs and action that wait for their outcome
        self.loss = compiled_if(compiled, loss)

    @torch.no_grad()
    def act(self, obs: Tensor, explore: bool) -> Tensor:
        direction, scale, _ = self.actor(obs)
        push = scale * direction
        if not explore:
            return self.scale.to_environment(push.tanh())
        config = self.config
        if config.fall_window and self.steps >= config.warmup_steps:
            push = push * (self.episode_steps < config.episode_limit - config.fall_window)[..., None]
        noise = bounded_noise(self.exploration.normal(*push.shape[-2:]), config.noise_std)
        action = self.scale.to_environment((push + noise).tanh())
        self.pending = obs, action
        return action

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        nodes = self.critics(obs, self.act(obs, explore=False))
        return aggregate(nodes, self.weights) * self.replay.reward_scale.view(*self.lead, 1)

    def observe(self, step: Step) -> None:
        obs, action = take_pending(self.pending)
        self.replay.add(obs, action, step)
        self.pending = None
        self.episode_steps = (self.episode_steps + 1) * ~(step.terminated | step.truncated)
        self.steps += self.num_envs
        if self.steps == self.config.warmup_steps:
            self.replay.normalise_and_fill()

    def update(self) -> Metrics:
        metrics: Metrics = {}
        self.plasticity.at(self.steps)
        transitions = updates_due(self.steps, self.num_envs, self.config.warmup_steps, 1)
        for _ in range(self.config.updates_per_step * transitions):
            metrics = metrics | self._update_once()
        return metrics

    def _update_once(self) -> Metrics:
        config = self.config
        rank = self.replay.draw(config.batch_size)
        batch = self.replay.gather(rank, config.discount)
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
        )
        joint_step([self.actor_optimizer, self.critic_optimizer], total)
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
        rows, nodes = self.config.batch_size, (Critics.count, self.config.batch_size, self.config.nodes)
        shapes = (rows, 3 * self.action_size), nodes, nodes
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
        }

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        parts = parts_state(self._parts(), seed, self.lead)
        return {"parts": parts, "steps": self.steps, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        load_parts_state(self._parts(), state["parts"], seed, self.lead)
        self.steps, self.updates, self.pending = state["steps"], state["updates"], None
