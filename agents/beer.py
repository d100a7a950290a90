"""BEER: deterministic policy gradient whose critic keeps its representation rank (He et al. 2024, arXiv:2404.12754).

    target  y = r + γ (1 - terminated) Q'(s', π'(s'))
    critic  L = mean (Q(s, a) - y)² + β mean max(0, cos(φ, φ⁻) - U)                 eq. 12, see `agents.representation`
    actor   L = - mean Q(s, π(s)), after every critic step
    targets θ' <- (1 - τ) θ' + τ θ after every actor step

The base is a plain deterministic policy gradient: one critic, no smoothing, no delay. `representation` puts DR3, PEER
or InFeR in the place of BEER, or nothing; TD3, SAC and DQN offer BEER, DR3 and PEER as well. Settings are those of the
released code (specs/beer-and-online-rl.md, sections 2 and 3).
"""

from __future__ import annotations

import copy
import dataclasses
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
    gradient_step,
    joint_step,
    lerp_,
    load_parts_state,
    parts_state,
    require_continuous,
    require_flat,
    take_pending,
    updates_due,
)
from agents.networks import Critics, DeterministicActor
from agents.plastic import Plasticity
from agents.population import common_lead
from agents.replay import Batch, Replay
from agents.representation import FirstFeatures, critic_penalty, infer
from envs.runner import ActionSpec, ObservationSpec, Step
from plasticity.adam import Adam


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of BEER; the released code's values."""

    discount: float = 0.99
    """γ"""
    learning_rate: float = 3e-4
    """of Adam, for actor and critic"""
    batch_size: int = 256
    target_rate: float = 0.005
    """τ, Polyak rate of the target networks"""
    exploration_noise: float = 0.1
    """standard deviation added to actions in [-1, 1]"""
    representation: Literal["beer", "peer", "dr3", "infer", "none"] = "beer"
    """what the critic's features are kept by"""
    representation_weight: float = 1e-3
    """β; InFeR's α, published as 0.1"""
    form: Literal["cosine", "inner"] = "cosine"
    """of BEER's inequality"""
    matched: bool = False
    """BEER's bound takes target features throughout, not online ones as the code does"""
    mask_terminal: bool = False
    """BEER leaves out terminal transitions; the released code does not"""
    feature_heads: int = 10
    """InFeR's extra heads"""
    feature_scale: float = 100.0
    """InFeR's β₀, of the frozen heads' outputs"""
    warmup_steps: int = 25_000
    """uniformly random environment steps before the first update"""
    replay_capacity: int = 1_000_000
    """slots; one transition each, and one more for each episode"""
    replay: Literal["uniform", "fading"] = "uniform"
    """which transitions a batch is of: all alike, or old ones less often, as Symphony does"""
    n_step: int = 1
    """length of multi-step returns"""
    update_every: int = 1
    """environment steps for each critic step"""
    hidden: tuple[int, ...] = (256, 256)
    layer_norm: bool = False
    """LayerNorm before every ReLU of actor and critic (ours)"""

    def __post_init__(self) -> None:
        check_config(self)


@torch.no_grad()
def td_target(target_actor: DeterministicActor, target_critic: Critics, batch: Batch) -> Tensor:
    """r + γ (1 - terminated) Q'(s', π'(s')), [*S, B]. Algorithm 1."""
    value = target_critic.first(batch.next_obs, target_actor(batch.next_obs))
    return batch.reward + batch.discount * ~batch.terminated * value


@dataclass(frozen=True)
class Others:
    """The networks that the penalty looks at beside the critic; first for InFeR alone."""

    actor: DeterministicActor
    target_actor: DeterministicActor
    target_critic: Critics
    first: FirstFeatures | None = None


def critic_loss(
    critic: Critics, others: Others, batch: Batch, target: Tensor, config: Config
) -> tuple[Tensor, Metrics]:
    """Mean squared TD error and the penalty on features, [*S]. target [*S, B]. Equation 12."""
    features = critic.features(batch.obs, batch.action)
    value = critic.head_values(features).squeeze(-2)
    assert value.shape == target.shape, value.shape
    td_loss = (value - target).square().mean(-1)
    metrics = {"loss/critic": td_loss.detach(), "value/mean": value.detach().mean(-1)}
    if config.representation == "none":
        return td_loss, metrics
    extra, more = penalty(critic, others, batch, features, config)
    metrics |= more | {"loss/representation": extra.detach()}
    return td_loss + config.representation_weight * extra, metrics


def penalty(critic: Critics, others: Others, batch: Batch, features: Tensor, config: Config) -> tuple[Tensor, Metrics]:
    """On the critic's features [*S, 1, B, D] of the batch: [*S], and metrics."""
    if config.representation == "infer":
        assert others.first is not None
        with torch.no_grad():
            features_then = others.first.first_network.features(batch.obs, batch.action)
        return infer(others.first, features, features_then, config.feature_scale), {}
    with torch.no_grad():
        next_action = others.actor(batch.next_obs)
        target_next = others.target_critic.features(batch.next_obs, others.target_actor(batch.next_obs))
    bound = {"form": config.form, "matched": config.matched}
    if config.mask_terminal:
        bound["mask"] = batch.terminated
    return critic_penalty(config.representation, critic, batch, next_action, target_next, features, **bound)


def actor_loss(actor: DeterministicActor, critic: Critics, batch: Batch) -> tuple[Tensor, Metrics]:
    """- mean Q(s, π(s)): the deterministic policy gradient, eq. 6."""
    loss = -critic.first(batch.obs, actor(batch.obs)).mean(-1)
    return loss, {"loss/actor": loss.detach()}


class Agent:
    """BEER: owns the networks, the optimisers and the replay ring."""

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
        observations = require_flat("beer", observation_spec)
        action_spec = require_continuous("beer", action_spec)
        self.config, self.num_envs, self.device, self.lead = config, num_envs, device, common_lead(streams)
        self.plasticity = make = plasticity or Plasticity()
        self.exploration = streams["exploration"]
        self.scale = ActionScale(action_spec, device)
        self.action_size = action_spec.size
        sizes = observations, self.action_size, config.hidden, config.layer_norm
        self.actor = make.network(lambda: DeterministicActor(*sizes), streams["initialisation"])
        self.critic = make.network(lambda: Critics(1, *sizes), streams["initialisation"])
        self.target_actor, self.target_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.online_parameters: list[Tensor] = [*self.actor.parameters(), *self.critic.parameters()]
        self.target_parameters: list[Tensor] = [*self.target_actor.parameters(), *self.target_critic.parameters()]
        self.actor_optimizer = make.optimizer(self.actor, config.learning_rate, target=self.target_actor)
        self.critic_optimizer = make.optimizer(self.critic, config.learning_rate, target=self.target_critic)
        self.others = Others(self.actor, self.target_actor, self.target_critic)
        self.critic_side = [self.critic_optimizer]
        self.infer_parts: dict[str, Any] = {}
        if config.representation == "infer":
            first = FirstFeatures.of(self.critic, config.hidden[-1], config.feature_heads, streams["initialisation"])
            self.others = dataclasses.replace(self.others, first=first)
            self.critic_side.append(make.scheduled(Adam(list(first.heads.parameters()), config.learning_rate)))
            self.infer_parts = {**first.parts(), "heads_optimizer": self.critic_side[-1]}
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
            noise = self.exploration.normal(*shape)
            action = torch.add(self.actor(obs), noise, alpha=self.config.exploration_noise).clamp_(-1, 1)
        self.pending = obs, action
        return self.scale.to_environment(action)

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        return self.critic.first(obs, self.actor(obs))

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
        target = self.td_target(self.target_actor, self.target_critic, batch)
        loss, metrics = self.critic_loss(self.critic, self.others, batch, target, config)
        joint_step(self.critic_side, loss)
        loss, more = self.actor_loss(self.actor, self.critic, batch)
        gradient_step(self.actor_optimizer, loss)
        lerp_(self.target_parameters, self.online_parameters, config.target_rate)
        self.updates += 1
        return metrics | more

    def _parts(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critic": self.critic,
            "target_actor": self.target_actor,
            "target_critic": self.target_critic,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "replay": self.replay,
            "exploration": self.exploration,
            **self.infer_parts,
        }

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        parts = parts_state(self._parts(), seed, self.lead)
        return {"parts": parts, "steps": self.steps, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        load_parts_state(self._parts(), state["parts"], seed, self.lead)
        self.steps, self.updates, self.pending = state["steps"], state["updates"], None
