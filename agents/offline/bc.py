"""Behaviour cloning, BC, and that of the best episodes alone, x %-BC (Pomerleau 1991; Chen et al. 2021, section 5.1).

    actor   L = mean (π(s) - a)²

With `fraction` below 1 only the episodes with the highest discounted returns are cloned; episodes are those of the
data, not cut where the reference implementation cuts them (at every 1000 rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from agents.agent import Metrics, compiled_if, gradient_step
from agents.networks import DeterministicActor
from agents.offline.learner import OfflineAgent, OfflineConfig
from agents.offline.transitions import Transitions
from agents.plastic import Plasticity
from agents.replay import Batch
from plasticity.population import RandomStream


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """Hyper-parameters of BC; those of CORL."""

    fraction: float = 1.0
    """of whole episodes that are cloned, the best by discounted return; 0.1 is 10 %-BC"""
    learning_rate: float = 3e-4
    hidden: tuple[int, ...] = (256, 256)


def actor_loss(actor: DeterministicActor, batch: Batch) -> tuple[Tensor, Metrics]:
    """Mean squared distance to the action of the data."""
    loss = (actor(batch.obs) - batch.action).square().mean((-2, -1))
    return loss, {"loss/actor": loss.detach()}


class Agent(OfflineAgent):
    """BC: owns the policy and its optimiser; the data are the base's."""

    name = "bc"
    config: Config

    def _build(self, make: Plasticity, initialisation: RandomStream) -> None:
        sizes = self.observation_size, self.action_size, self.config.hidden, False
        self.actor = make.network(lambda: DeterministicActor(*sizes), initialisation)
        self.actor_optimizer = make.optimizer(self.actor, self.config.learning_rate)
        self.actor_loss = compiled_if(self.compiled, actor_loss)

    def usable_rows(self, transitions: Transitions) -> Tensor | None:
        config = self.config
        return None if config.fraction == 1 else transitions.rows_of_best(config.fraction, config.discount)

    @property
    def update_variant(self) -> bool:
        """All updates are alike, see `agents.graphs`."""
        return True

    def _update_once(self) -> Metrics:
        loss, metrics = self.actor_loss(self.actor, self.sample())
        gradient_step(self.actor_optimizer, loss)
        self.updates += 1
        return metrics

    def _networks(self) -> dict[str, Any]:
        return {"actor": self.actor, "actor_optimizer": self.actor_optimizer}
