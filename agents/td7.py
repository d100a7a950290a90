"""TD7: TD3 with state-action representation learning (Fujimoto et al. 2023, arXiv:2306.02451).

    encoder  z^s = f(s), z^sa = g(z^s, a);  L = mean (g(f(s), a) - f(s'))², f(s') without gradient
    fixed    z are those of the encoder at the last copy (for Q and π), and at the one before (for targets)
    target   y = r + γ (1 - terminated) clip(min_i Q'_i(s', a'; z'), y_min, y_max),  a' = clip(π'(s') + ε)
    critic   L = Σ_i mean LAP(|Q_i(s, a; z) - y|), priorities max_i |Q_i - y|
    actor    L = - mean_i Q_i(s, π(s, z^s); z), every `policy_delay` critic steps
    copies   every `target_update_every` steps: Q' <- Q, π' <- π, fixed z' <- fixed z <- encoder

LAP (Fujimoto et al. 2020, arXiv:2007.06049) draws a transition with probability ∝ max(|δ|, p_min)^α. Its loss is ½ δ²
where |δ| < p_min, else p_min |δ|, so that nothing needs to be weighted back. A new transition has the largest priority
since the last copy, and a batch takes one number from each of B equal parts of the sum (`agents.prioritised`).

y_min and y_max are the least and greatest y up to the last copy, 0 before the first. Layers that read s or (s, a)
beside embeddings bring them to the embeddings' scale: AvgL1Norm(x) = x / mean |x|.

Checkpoints. The policy is not trained while it is being judged: it plays up to so many episodes, and for each step
taken there is a training step afterwards. The judged policy becomes the checkpoint if its worst episode is at least as
good as the checkpoint's was; as soon as one is worse, judging ends. First one episode judges, later
`checkpoint_episodes`, and then the checkpoint's mark is scaled once by `checkpoint_reset`. Actions without exploration
are the checkpoint's. Whether an episode has ended must be known here, so each step is waited for.

Settings are those of the authors' code (sfujim/TD7). Seeds end their episodes at times of their own, so they cannot be
trained as a population.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
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
    require_continuous,
    require_flat,
    take_pending,
    updates_due,
)
from agents.networks import Liftable, StackedLinear
from agents.plastic import Plasticity
from agents.population import common_lead, require_one_seed
from agents.prioritised import PrioritisedReplay
from agents.replay import Batch
from envs.runner import ActionSpec, ObservationSpec, Step


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of TD7; the paper's table and released code."""

    discount: float = 0.99
    """γ"""
    learning_rate: float = 3e-4
    """of Adam, for encoder, actor and critics"""
    batch_size: int = 256
    target_update_every: int = 250
    """training steps between copies to all targets"""
    exploration_noise: float = 0.1
    """standard deviation added to actions in [-1, 1]"""
    target_noise: float = 0.2
    """standard deviation of target policy smoothing"""
    target_noise_clip: float = 0.5
    policy_delay: int = 2
    """critic steps for each step of the actor"""
    priority_exponent: float = 0.4
    """α of LAP"""
    smallest_priority: float = 1.0
    """p_min of LAP"""
    checkpoints: bool = True
    """judge each policy before training goes on, and keep the best; else train at every step"""
    checkpoint_episodes: int = 20
    """most episodes that judge a policy, later on"""
    checkpoint_after: int = 750_000
    """training steps until that is so; one episode before"""
    checkpoint_reset: float = 0.9
    """what the checkpoint's mark is multiplied by then"""
    warmup_steps: int = 25_000
    """uniformly random environment steps before the first update, and to their episode's end"""
    replay_capacity: int = 1_000_000
    """slots; one transition each, and one more for each episode"""
    embedding: int = 256
    """size of z^s and z^sa, and of the layer that reads beside them"""
    hidden: tuple[int, ...] = (256, 256)
    """layers of encoder, actor and critics"""

    def __post_init__(self) -> None:
        check_config(self)


def lap(error: Tensor, smallest: float) -> Tensor:
    """LAP's loss of absolute TD errors, elementwise; it jumps at p_min, as in the code."""
    return torch.where(error < smallest, 0.5 * error.square(), smallest * error)


class AvgL1Norm(nn.Module):
    """x / mean |x| over the last axis."""

    normaliser = True  # for plasticity.networks.tracing

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().mean(-1, keepdim=True).clamp(min=1e-8)


def layers(count: int, sizes: tuple[int, ...], nonlinearity: type[nn.Module]) -> nn.Sequential:
    """`count` perceptrons side by side, linear at their ends."""
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        parts += [StackedLinear(count, inputs, outputs), nonlinearity()]
    return nn.Sequential(*parts[:-1])


class Encoder(Liftable):
    """State and state-action embeddings."""

    def __init__(self, observations: int, actions: int, config: Config):
        super().__init__()
        size, hidden = config.embedding, config.hidden
        self.state = nn.Sequential(*layers(1, (observations, *hidden, size), nn.ELU), AvgL1Norm())
        self.pair = layers(1, (size + actions, *hidden, size), nn.ELU)

    def zs(self, obs: Tensor) -> Tensor:
        """obs [B, O] -> z^s [B, D]."""
        return self.state(obs.unsqueeze(-3)).squeeze(-3)

    def zsa(self, zs: Tensor, action: Tensor) -> Tensor:
        """z^s [B, D], action [B, A] -> z^sa [B, D]."""
        return self.pair(torch.cat([zs, action], -1).unsqueeze(-3)).squeeze(-3)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """z^sa, which predicts the next z^s: [B, D]."""
        return self.zsa(self.zs(obs), action)


class Actor(Liftable):
    """Policy a = tanh(f(s, z^s))."""

    def __init__(self, observations: int, actions: int, config: Config):
        super().__init__()
        self.embed = nn.Sequential(StackedLinear(1, observations, config.embedding), AvgL1Norm())
        self.net = layers(1, (2 * config.embedding, *config.hidden, actions), nn.ReLU)

    def straight_forward(self, obs: Tensor, zs: Tensor) -> Tensor:
        """f(s, z^s), for tracing."""
        x = torch.cat([self.embed(obs.unsqueeze(-3)), zs.unsqueeze(-3)], -1)
        return self.net(x).squeeze(-3)

    def forward(self, obs: Tensor, zs: Tensor) -> Tensor:
        """obs [B, O], z^s [B, D] -> action [B, A] in [-1, 1]."""
        return self.straight_forward(obs, zs).tanh()


class Critics(Liftable):
    """Two action-value networks Q_k(s, a, z^sa, z^s)."""

    count = 2

    def __init__(self, observations: int, actions: int, config: Config):
        super().__init__()
        self.embed = nn.Sequential(StackedLinear(self.count, observations + actions, config.embedding), AvgL1Norm())
        self.net = layers(self.count, (3 * config.embedding, *config.hidden, 1), nn.ELU)

    def straight_forward(self, obs: Tensor, action: Tensor, zsa: Tensor, zs: Tensor) -> Tensor:
        """The same without a look at shapes, for tracing."""
        own = self.embed(torch.cat([obs, action], -1).expand(self.count, -1, -1))
        x = torch.cat([own, torch.cat([zsa, zs], -1).expand(self.count, -1, -1)], -1)
        return self.net(x).squeeze(-1)

    def forward(self, obs: Tensor, action: Tensor, zsa: Tensor, zs: Tensor) -> Tensor:
        """obs [*S, B, O], action [*S, B, A], z^sa and z^s [*S, B, D] -> values [*S, 2, B]."""
        pair, embeddings = torch.cat([obs, action], -1).unsqueeze(-3), torch.cat([zsa, zs], -1).unsqueeze(-3)
        each = (*pair.shape[:-3], self.count, -1, -1)
        x = torch.cat([self.embed(pair.expand(each)), embeddings.expand(each)], -1)
        return self.net(x).squeeze(-1)


def encoder_loss(encoder: Encoder, batch: Batch) -> Tensor:
    """Mean squared error of z^sa as a prediction of the next z^s."""
    with torch.no_grad():
        following = encoder.zs(batch.next_obs)
    # Losses are float32, also where products are in bfloat16.
    return (encoder(batch.obs, batch.action).float() - following.float()).square().mean()


@torch.no_grad()
def td_target(
    target_actor: Actor, target_critics: Critics, target_encoder: Encoder, batch: Batch, noise: Tensor, clip: float,
    lowest: Tensor, highest: Tensor,
) -> Tensor:  # fmt: skip
    """r + γ (1 - terminated) clip(min_i Q'_i(s', a'), lowest, highest), [B].

    noise [B, A]: of target policy smoothing, not yet clipped. lowest, highest: 0-d.
    """
    zs = target_encoder.zs(batch.next_obs)
    action = (target_actor(batch.next_obs, zs) + noise.clamp(-clip, clip)).clamp(-1, 1)
    value = target_critics(batch.next_obs, action, target_encoder.zsa(zs, action), zs).amin(-2)
    return batch.reward + batch.discount * ~batch.terminated * value.float().clamp(lowest, highest)


def critic_loss(
    critics: Critics, fixed_encoder: Encoder, batch: Batch, target: Tensor, smallest_priority: float
) -> tuple[Tensor, Tensor, Metrics]:
    """LAP's loss summed over the critics, the larger absolute TD error of the two [B], and metrics."""
    with torch.no_grad():
        zs = fixed_encoder.zs(batch.obs)
        zsa = fixed_encoder.zsa(zs, batch.action)
    value = critics(batch.obs, batch.action, zsa, zs).float()
    assert value.shape == (critics.count, *target.shape), value.shape
    error = (value - target).abs()
    loss = lap(error, smallest_priority).mean(-1).sum(-1)
    metrics = {"loss/critic": loss.detach(), "value/mean": value.detach().mean()}
    return loss, error.detach().amax(0), metrics


def actor_loss(actor: Actor, critics: Critics, fixed_encoder: Encoder, batch: Batch) -> tuple[Tensor, Metrics]:
    """- mean Q_i(s, π(s)), over both critics."""
    with torch.no_grad():
        zs = fixed_encoder.zs(batch.obs)
    action = actor(batch.obs, zs)
    loss = -critics(batch.obs, action, fixed_encoder.zsa(zs, action), zs).float().mean()
    return loss, {"loss/actor": loss.detach()}


@dataclass
class Judgement:
    """How the policy in play does, and how the checkpoint did: plain numbers, as they decide what is computed."""

    episodes: int = 0
    steps: int = 0
    worst: float = float("inf")
    best_worst: float = float("-inf")
    limit: int = 1

    def passed(self, episode_return: float) -> bool | None:
        """After one more episode: None while judging goes on, else whether the policy is to be the checkpoint."""
        self.episodes += 1
        self.worst = min(self.worst, episode_return)
        if self.worst < self.best_worst:
            return False
        return True if self.episodes >= self.limit else None

    def begin(self) -> None:
        """With the next policy."""
        self.episodes, self.steps, self.worst = 0, 0, float("inf")


class Agent:
    """TD7: owns the networks, their copies, the optimisers and the prioritised replay."""

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
        action_spec = require_continuous("td7", action_spec)
        sizes = require_flat("td7", observation_spec), action_spec.size, config
        self.config, self.num_envs, self.device, self.lead = config, num_envs, device, common_lead(streams)
        require_one_seed("td7", self.lead)
        self.plasticity = make = plasticity or Plasticity()
        self.exploration, self.noise = streams["exploration"], streams["update"]
        self.scale = ActionScale(action_spec, device)
        self.action_size = action_spec.size
        self.encoder = make.network(lambda: Encoder(*sizes), streams["initialisation"])
        self.actor = make.network(lambda: Actor(*sizes), streams["initialisation"])
        self.critics = make.network(lambda: Critics(*sizes), streams["initialisation"])
        self.fixed_encoder, self.target_encoder = copy.deepcopy(self.encoder), copy.deepcopy(self.encoder)
        self.target_actor, self.target_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.checkpoint_actor, self.checkpoint_encoder = copy.deepcopy(self.actor), copy.deepcopy(self.encoder)
        targets = self.fixed_encoder, self.target_encoder, self.target_actor, self.target_critics
        for network in (*targets, self.checkpoint_actor, self.checkpoint_encoder):
            network.requires_grad_(False)
        self.encoder_optimizer = make.optimizer(self.encoder, config.learning_rate)
        self.actor_optimizer = make.optimizer(self.actor, config.learning_rate, target=self.target_actor)
        self.critic_optimizer = make.optimizer(self.critics, config.learning_rate, target=self.target_critics)
        self.replay = PrioritisedReplay(
            config.replay_capacity,
            num_envs,
            observation_spec,
            action_spec,
            device,
            streams["sampling"],
            config.priority_exponent,
            smallest=0.0,
        )
        # Of y: seen so far, and up to the last copy.
        self.seen = torch.tensor([float("inf"), float("-inf")], device=device)
        self.bounds = torch.zeros(2, device=device)
        self.judgement, self.learning, self.due = Judgement(), False, 0
        self.steps = self.updates = 0
        self.pending: tuple[Tensor, Tensor] | None = None  # obs and action that wait for their outcome
        self.encoder_loss = compiled_if(compiled, encoder_loss)
        self.td_target = compiled_if(compiled, td_target)
        self.critic_loss = compiled_if(compiled, critic_loss)
        self.actor_loss = compiled_if(compiled, actor_loss)

    @torch.no_grad()
    def act(self, obs: Tensor, explore: bool) -> Tensor:
        if not explore:
            kept = self.config.checkpoints
            actor, encoder = (
                (self.checkpoint_actor, self.checkpoint_encoder) if kept else (self.actor, self.fixed_encoder)
            )
            return self.scale.to_environment(actor(obs, encoder.zs(obs)))
        noise_shape = (obs.shape[-2], self.action_size)
        if not self.learning:
            action = self.exploration.uniform(*noise_shape) * 2 - 1
        else:
            action = self.actor(obs, self.fixed_encoder.zs(obs))
            noise = self.exploration.normal(*noise_shape)
            action = torch.add(action, noise, alpha=self.config.exploration_noise).clamp_(-1, 1)
        self.pending = obs, action
        return self.scale.to_environment(action)

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        zs = self.fixed_encoder.zs(obs)
        action = self.actor(obs, zs)
        return self.critics(obs, action, self.fixed_encoder.zsa(zs, action), zs).mean(0)

    @torch.no_grad()
    def inputs_of(self, obs: Tensor, action: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """What each trained network reads of pairs obs [B, O], action [B, A]; for diagnostics and probe."""
        zs = self.fixed_encoder.zs(obs)
        pair = obs, action, self.fixed_encoder.zsa(zs, action), zs
        return {"encoder": (obs, action), "actor": (obs, zs), "critics": pair}

    def observe(self, step: Step) -> None:
        obs, action = take_pending(self.pending)
        self.replay.add(obs, action, step)
        self.pending = None
        self.steps += self.num_envs
        config = self.config
        if not config.checkpoints:
            self.due = updates_due(self.steps, self.num_envs, config.warmup_steps, 1)
            self.learning = self.steps >= config.warmup_steps
            return
        if self.learning:
            self.judgement.steps += self.num_envs
        for episode_return in step.episode_return[step.episode_ended].tolist():
            if self.learning:
                self._judge(episode_return)
            self.learning = self.learning or self.steps >= config.warmup_steps

    def _judge(self, episode_return: float) -> None:
        passed = self.judgement.passed(episode_return)
        if passed is None:
            return
        if passed:
            self.judgement.best_worst = self.judgement.worst
            _copy([self.checkpoint_actor, self.checkpoint_encoder], [self.actor, self.fixed_encoder])
        self.due += self.judgement.steps
        self.judgement.begin()

    def update(self) -> Metrics:
        metrics: Metrics = {}
        self.plasticity.at(self.steps)
        for _ in range(self.due):
            metrics = metrics | self._update_once()
        self.due = 0
        return metrics

    def _update_once(self) -> Metrics:
        config, judgement = self.config, self.judgement
        if config.checkpoints and self.updates == config.checkpoint_after:
            judgement.best_worst *= config.checkpoint_reset
            judgement.limit = config.checkpoint_episodes
        self.updates += 1
        batch = self.replay.sample(config.batch_size, config.discount)
        loss = self.encoder_loss(self.encoder, batch)
        gradient_step(self.encoder_optimizer, loss)
        metrics = {"loss/encoder": loss.detach()}
        noise = self.noise.normal(config.batch_size, self.action_size) * config.target_noise
        targets = self.target_actor, self.target_critics, self.target_encoder
        target = self.td_target(*targets, batch, noise, config.target_noise_clip, *self.bounds)
        self.seen = torch.stack([target.amin().minimum(self.seen[0]), target.amax().maximum(self.seen[1])])
        loss, error, more = self.critic_loss(
            self.critics, self.fixed_encoder, batch, target, config.smallest_priority
        )  # fmt: skip
        gradient_step(self.critic_optimizer, loss)
        self.replay.set_priorities(error.clamp(min=config.smallest_priority))
        metrics |= more
        if self.updates % config.policy_delay == 0:
            loss, more = self.actor_loss(self.actor, self.critics, self.fixed_encoder, batch)
            gradient_step(self.actor_optimizer, loss)
            metrics |= more
        if self.updates % config.target_update_every == 0:
            _copy([self.target_actor, self.target_critics], [self.actor, self.critics])
            _copy([self.target_encoder, self.fixed_encoder], [self.fixed_encoder, self.encoder])
            self.replay.forget_largest()
            self.bounds = self.seen
        return metrics

    def _parts(self) -> dict[str, Any]:
        networks = ("encoder", "fixed_encoder", "target_encoder", "actor", "target_actor", "critics", "target_critics")
        others = ("checkpoint_actor", "checkpoint_encoder", "encoder_optimizer", "actor_optimizer", "critic_optimizer")
        state = ("replay", "seen", "bounds", "exploration", "noise")
        return {name: getattr(self, name) for name in (*networks, *others, *state)}

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        parts = parts_state(self._parts(), seed, self.lead)
        counters = {"steps": self.steps, "updates": self.updates, "learning": self.learning}
        return {"parts": parts, **counters, "judgement": dict(vars(self.judgement))}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        load_parts_state(self._parts(), state["parts"], seed, self.lead)
        self.steps, self.updates, self.learning = state["steps"], state["updates"], state["learning"]
        self.judgement, self.due, self.pending = Judgement(**state["judgement"]), 0, None


@torch.no_grad()
def _copy(targets: list[nn.Module], sources: list[nn.Module]) -> None:
    """In this order, so that a source may be a later target."""
    for target, source in zip(targets, sources, strict=True):
        torch._foreach_copy_(list(target.parameters()), list(source.parameters()))
