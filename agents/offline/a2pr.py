"""Adaptive advantage-guided policy regularisation, A2PR (Liu et al. 2024, arXiv:2405.19909).

TD3+BC whose target of cloning is chosen for each sample: the action of the data, or one of a VAE that learns from
actions of positive advantage alone, whichever has the higher advantage; and no cloning where neither has any.

    critic  y = r + γ n min_i Q'_i(s', ã'),  ã' = clip(π'(s') + clip(σ ε, ±c), ±1),  L = Σ_i mean (Q_i(s, a) - y)²
    value   t = min(y, r + γ n min_i Q_i(s', ã')) with the critics after their step;  L = mean (V(s) - t)²
    VAE     w = β 1[Q_1(s, a) - V(s) > 0];  L = mean w (â - a)² + ½ mean KL
    actor   p = π(s),  v = VAE(s, p);  target = v if Q_1(s, v) >= Q_1(s, a) else a;
            on = (Q_1(s, v) >= V(s)) or (Q_1(s, a) > V(s))
            L = -α mean Q_1(s, p) / mean |Q_1(s, p)| + κ mean on (p - target)²
    targets θ' <- (1 - τ) θ' + τ θ, with the actor, every `policy_delay` steps

n = 1 - terminal. All networks learn from the same batch, in this order; V is that before its step. The authors' code
(ltlhuuu/A2PR @f92a2a4) is the authority: the paper's symbols for its loss weights could not be matched to `alpha`
(α), `mask` (κ) and `vae_weight` (β), so these are the code's names. The target is not detached: where it is the VAE's
action, a gradient flows through the VAE into p. Actions are in [-1, 1] here, as D4RL's are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.agent import Metrics, compiled_if, gradient_step, lerp_
from agents.networks import Critics, DeterministicActor, Liftable, mlp
from agents.offline.learner import FineTuning, OfflineAgent, OfflineConfig, policy_value
from agents.plastic import Plasticity
from agents.replay import Batch
from agents.td3 import critic_loss
from plasticity.population import RandomStream

LOG_STD_MIN, LOG_STD_MAX = -4.0, 15.0
PRIOR_CLIP = 0.5  # of latents that are drawn instead of encoded


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig, FineTuning):
    """Hyper-parameters of A2PR; the authors' code unless said. Presets hold what they chose for each data set."""

    alpha: float = 2.5
    """α, weight of the Q term"""
    mask: float = 1.0
    """κ, weight of the cloning term (their command line: 0.5)"""
    vae_weight: float = 1.0
    """β, weight of the VAE's reconstruction"""
    learning_rate: float = 3e-4
    """of actor, critics and value"""
    vae_learning_rate: float = 1e-3
    target_rate: float = 0.005
    """τ, Polyak rate of the target networks"""
    target_noise: float = 0.2
    """σ of target policy smoothing"""
    target_noise_clip: float = 0.5
    """c"""
    policy_delay: int = 2
    """critic steps for each step of actor and targets"""
    hidden: tuple[int, ...] = (256, 256, 256)
    """of the actor"""
    critic_hidden: tuple[int, ...] = (256, 256, 256, 256)
    """of critics and value"""
    vae_hidden: tuple[int, ...] = (750, 750)
    """of encoder and decoder"""
    vae_candidate: Literal["policy_recon", "prior", "data_recon"] = "policy_recon"
    """the VAE's action: what it makes of the policy's, of a latent drawn, of the data's"""
    detach_candidate: bool = False
    """no gradient through the VAE into the actor"""
    adv_threshold: float = 0.0
    """advantage that an action of the data must pass"""
    bc_gate: Literal["or", "always", "data_only"] = "or"
    """where to clone: either action has an advantage, everywhere, the data's has"""
    target_choice: Literal["best", "data", "vae"] = "best"
    """what to clone"""
    vae_indicator: bool = True
    """the VAE learns from actions of positive advantage alone"""
    value_target: Literal["min_both", "target"] = "min_both"
    """of V: the smaller of the backups by online and target critics, or the latter"""


class ConditionalVAE(Liftable):
    """Variational autoencoder of actions given observations (Kingma & Welling 2014), with latents of 2 A numbers."""

    measured_apart = ("encoder", "decoder")  # between them is no layer, but a draw

    def __init__(self, observations: int, actions: int, hidden: tuple[int, ...]):
        super().__init__()
        self.encoder = mlp(observations + actions, hidden, 4 * actions, layer_norm=False)
        self.decoder = mlp(observations + 2 * actions, hidden, actions, layer_norm=False)

    def encode(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """obs [*S, B, O], action [*S, B, A] -> mean and log standard deviation of the latent, [*S, B, 2 A] each."""
        mean, log_std = self.encoder(torch.cat([obs, action], -1)).chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def decode(self, obs: Tensor, latent: Tensor) -> Tensor:
        """Action [*S, B, A] in [-1, 1]."""
        return self.decoder(torch.cat([obs, latent], -1)).tanh()

    def forward(self, obs: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction of an action, and mean and log standard deviation. noise [*S, B, 2 A], standard normal."""
        mean, log_std = self.encode(obs, action)
        return self.decode(obs, mean + log_std.exp() * noise), mean, log_std


class Value(Liftable):
    """V(s): obs [*S, B, O] -> values [*S, B]."""

    def __init__(self, observations: int, hidden: tuple[int, ...]):
        super().__init__()
        self.net = mlp(observations, hidden, 1, layer_norm=False)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


@torch.no_grad()
def smoothed(target_actor: nn.Module, next_obs: Tensor, noise: Tensor, clip: float) -> Tensor:
    """ã' [*S, B, A]. noise: Gaussian with the standard deviation of target policy smoothing, not yet clipped."""
    return (target_actor(next_obs) + noise.clamp(-clip, clip)).clamp(-1, 1)


@torch.no_grad()
def backup(critics: nn.Module, batch: Batch, next_action: Tensor) -> Tensor:
    """r + γ n min_i Q_i(s', ã'), [*S, B]."""
    return batch.reward + batch.discount * ~batch.terminated * critics(batch.next_obs, next_action).amin(-2)


def value_loss(value: nn.Module, batch: Batch, target: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    """Mean squared error of V(s) to `target` [*S, B]; and V(s), for what comes after the step."""
    found = value(batch.obs)
    assert found.shape == target.shape, found.shape
    loss = (found - target).square().mean(-1)
    return loss, found.detach(), {"loss/value": loss.detach(), "value/state": found.detach().mean(-1)}


def vae_loss(
    vae: ConditionalVAE, batch: Batch, has_advantage: Tensor, noise: Tensor, weight: float
) -> tuple[Tensor, Metrics]:
    """Reconstruction of the actions that have an advantage [*S, B] bool, and half the divergence from the prior.

    Rows without count in the mean of the reconstruction, and fully in the divergence. noise [*S, B, 2 A].
    """
    found, mean, log_std = vae(batch.obs, batch.action, noise)
    of_rows = weight * has_advantage.unsqueeze(-1)
    reconstruction = (of_rows * (found - batch.action).square()).mean((-2, -1))
    divergence = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean((-2, -1))
    loss = reconstruction + 0.5 * divergence
    metrics = {"loss/vae": loss, "loss/reconstruction": reconstruction, "loss/kl": divergence}
    metrics["a2pr/frac_adv_positive"] = has_advantage.float().mean(-1)
    return loss, {name: metric.detach() for name, metric in metrics.items()}


def candidate(kind: str, vae: ConditionalVAE, batch: Batch, action: Tensor, noise: Tensor) -> Tensor:
    """The VAE's action [*S, B, A] for p = `action`. noise [*S, B, 2 A]."""
    if kind == "prior":
        return vae.decode(batch.obs, noise.clamp(-PRIOR_CLIP, PRIOR_CLIP))
    return vae(batch.obs, action if kind == "policy_recon" else batch.action, noise)[0]


def actor_loss(
    actor: nn.Module,
    critics: Critics,
    vae: ConditionalVAE,
    batch: Batch,
    state_value: Tensor,
    data_value: Tensor,
    noise: Tensor,
    mask: float,
    config: Config,
) -> tuple[Tensor, Metrics]:
    """-λ mean Q_1(s, p) + κ mean on (p - target)². state_value V(s), data_value Q_1(s, a), [*S, B], both detached.

    mask: κ of this step. noise [*S, B, 2 A].
    """
    action = actor(batch.obs)
    value = critics.first(batch.obs, action)
    scale = config.alpha / value.detach().abs().mean(-1).clamp(min=1e-8)
    proposed = candidate(config.vae_candidate, vae, batch, action, noise)
    if config.detach_candidate:
        proposed = proposed.detach()
    with torch.no_grad():
        vae_value = critics.first(batch.obs, proposed)
        of_vae, of_data = vae_value - state_value, data_value - state_value
        takes_vae = {
            "best": of_vae >= of_data,
            "data": torch.zeros_like(of_data > 0),
            "vae": torch.ones_like(of_data > 0),
        }
        takes = takes_vae[config.target_choice]
        data_good = of_data > config.adv_threshold
        gates = {"or": (of_vae >= 0) | data_good, "always": torch.ones_like(data_good), "data_only": data_good}
        on = gates[config.bc_gate]
    target = torch.where(takes.unsqueeze(-1), proposed, batch.action)
    cloning = mask * (on.unsqueeze(-1) * (action - target).square()).mean((-2, -1))
    ascent = -scale * value.mean(-1)
    loss = ascent + cloning
    metrics = {"loss/actor": ascent, "loss/bc": cloning, "loss/combined": loss, "a2pr/lambda": scale}
    metrics |= {"a2pr/frac_vae_target": takes.float().mean(-1), "a2pr/frac_bc_on": on.float().mean(-1)}
    return loss, {name: metric.detach() for name, metric in metrics.items()}


class Agent(OfflineAgent):
    """A2PR: owns the networks and their optimisers; the data are the base's."""

    name = "a2pr"
    config: Config

    def _build(self, make: Plasticity, initialisation: RandomStream) -> None:
        config, o, a = self.config, self.observation_size, self.action_size
        self.actor = make.network(lambda: DeterministicActor(o, a, config.hidden, False), initialisation)
        self.critics = make.network(lambda: Critics(2, o, a, config.critic_hidden, False), initialisation)
        self.value_net = make.network(lambda: Value(o, config.critic_hidden), initialisation)
        self.vae = make.network(lambda: ConditionalVAE(o, a, config.vae_hidden), initialisation)
        self.target_actor, self.target_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.online_parameters: list[Tensor] = [*self.actor.parameters(), *self.critics.parameters()]
        self.target_parameters: list[Tensor] = [*self.target_actor.parameters(), *self.target_critics.parameters()]
        rate = config.learning_rate
        self.actor_optimizer = make.optimizer(self.actor, rate, target=self.target_actor)
        self.critic_optimizer = make.optimizer(self.critics, rate, target=self.target_critics)
        self.value_optimizer = make.optimizer(self.value_net, rate)
        self.vae_optimizer = make.optimizer(self.vae, config.vae_learning_rate)
        self.backup = compiled_if(self.compiled, backup)
        self.critic_loss = compiled_if(self.compiled, critic_loss)
        self.value_loss = compiled_if(self.compiled, value_loss)
        self.vae_loss = compiled_if(self.compiled, vae_loss)
        self.actor_loss = compiled_if(self.compiled, actor_loss)

    def value(self, obs: Tensor) -> Tensor:
        return policy_value(self, obs)

    @torch.no_grad()
    def inputs_of(self, obs: Tensor, action: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """What the halves of the VAE read of pairs obs [*S, B, O], action [*S, B, A] as networks see them.

        The decoder's latents are means.
        """
        latent, _ = self.vae.encode(obs, action)
        return {"vae_encoder": (torch.cat([obs, action], -1),), "vae_decoder": (torch.cat([obs, latent], -1),)}

    @property
    def update_variant(self) -> bool | None:
        """Of the next update, see `agents.graphs`; None online, where the pull anneals."""
        return (self.updates + 1) % self.config.policy_delay == 0 if self.phases_alike else None

    def _update_once(self) -> Metrics:
        config, batch = self.config, self.sample()
        size, latent = batch.reward.shape[-1], 2 * self.action_size
        noise = self.noise.normal(size, self.action_size) * config.target_noise
        next_action = smoothed(self.target_actor, batch.next_obs, noise, config.target_noise_clip)
        target = self.backup(self.target_critics, batch, next_action)
        loss, metrics = self.critic_loss(self.critics, batch, target)
        gradient_step(self.critic_optimizer, loss)

        online = self.backup(self.critics, batch, next_action)
        aim = torch.minimum(online, target) if config.value_target == "min_both" else target
        loss, state_value, more = self.value_loss(self.value_net, batch, aim)
        gradient_step(self.value_optimizer, loss)
        metrics |= more | {"value/target_online": online.mean(-1), "value/target": target.mean(-1)}

        with torch.no_grad():
            data_value = self.critics.first(batch.obs, batch.action)
            has_advantage = data_value - state_value > config.adv_threshold
            if not config.vae_indicator:
                has_advantage = torch.ones_like(has_advantage)
        loss, more = self.vae_loss(self.vae, batch, has_advantage, self.noise.normal(size, latent), config.vae_weight)
        gradient_step(self.vae_optimizer, loss)
        metrics |= more

        self.updates += 1
        if self.updates % config.policy_delay == 0:
            noise = self.noise.normal(size, latent)
            mask = config.mask * self.pull
            networks = self.actor, self.critics, self.vae
            loss, more = self.actor_loss(*networks, batch, state_value, data_value, noise, mask, config)
            gradient_step(self.actor_optimizer, loss)
            lerp_(self.target_parameters, self.online_parameters, config.target_rate)
            metrics |= more
        return metrics

    def _networks(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critics": self.critics,
            "value_net": self.value_net,
            "vae": self.vae,
            "target_actor": self.target_actor,
            "target_critics": self.target_critics,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "value_optimizer": self.value_optimizer,
            "vae_optimizer": self.vae_optimizer,
        }
