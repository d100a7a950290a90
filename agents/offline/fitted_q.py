"""Fitted-Q evaluation: what a fixed policy is worth, learnt from data alone (Le et al. 2019, arXiv:1903.08738).

    L = mean (Q(s, a) - r - γ (1 - terminal) Q'(s', π(s')))²,   value = mean over first states of Q(s_0, π(s_0))

For choosing between policies without an environment. Q is of the rewards that the policy's agent learns from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from agents.agent import Metrics, gradient_step, lerp_
from agents.networks import Critics, new_network
from agents.offline.transitions import FixedReplay
from agents.replay import Batch
from plasticity.adam import Adam
from plasticity.population import RandomStream

Policy = Callable[[Tensor], Tensor]  # observations as the data give them in batches -> actions in [-1, 1]


def fitted_q_loss(critic: Critics, batch: Batch, target: Tensor) -> tuple[Tensor, Metrics]:
    """Mean squared error to the target [*S, B]."""
    value = critic(batch.obs, batch.action).squeeze(-2)
    assert value.shape == target.shape, value.shape
    loss = (value - target).square().mean(-1)
    return loss, {"loss/fitted_q": loss.detach()}


@torch.no_grad()
def fitted_q_target(critic: Critics, policy: Policy, batch: Batch) -> Tensor:
    """r + γ (1 - terminal) Q'(s', π(s')), [*S, B]."""
    value = critic(batch.next_obs, policy(batch.next_obs)).squeeze(-2)
    return batch.reward + batch.discount * ~batch.terminated * value


class FittedQ:
    """Learns Q of one policy from fixed data; `update` is one gradient step."""

    def __init__(
        self,
        policy: Policy,
        data: FixedReplay,
        initialisation: RandomStream,
        hidden: tuple[int, ...] = (256, 256),
        learning_rate: float = 3e-4,
        target_rate: float = 0.005,
        batch_size: int = 256,
    ):
        found = data.transitions
        sizes = found.observations, found.actions, hidden, False
        self.policy, self.data, self.batch_size, self.target_rate = policy, data, batch_size, target_rate
        self.critic = new_network(lambda: Critics(1, *sizes), initialisation)
        self.target = copy.deepcopy(self.critic)
        self.optimizer = Adam(list(self.critic.parameters()), learning_rate)

    def update(self) -> Metrics:
        """One gradient step."""
        batch = self.data.sample(self.batch_size)
        loss, metrics = fitted_q_loss(self.critic, batch, fitted_q_target(self.target, self.policy, batch))
        gradient_step(self.optimizer, loss)
        lerp_(list(self.target.parameters()), list(self.critic.parameters()), self.target_rate)
        return metrics

    @torch.no_grad()
    def initial_value(self) -> Tensor:
        """Mean of Q(s_0, π(s_0)) over the first states of all episodes, [*S]."""
        obs = first_states(self.data)
        return self.critic(obs, self.policy(obs)).squeeze(-2).mean(-1)


def first_states(data: FixedReplay) -> Tensor:
    """The first observation of every episode as networks see it, [*S, E, O]."""
    starts = data.transitions.starts[:-1].to(data.device)
    return data.gather(starts.expand(*data.lead, -1)).obs
