"""One training of a dual encoder of a fixed architecture: loss, gradients, clipping, AdamW, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from continual.growth.contrastive import contrastive_loss
from continual.growth.dual_encoder import DualEncoder
from continual.growth.slots import SlotMap
from continual.pairs.batch import PairBatch
from continual.strategy import Metrics
from plasticity.adam import Adam


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW on what has two axes or more, Adam on the rest; from a warm-up to a rate of 0 at the last step.

    The values are of this house; at the size of the paper 5e-4 is its learning rate.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    weight_decay: float = 0.05
    clip: float = 1.0
    """largest norm of a gradient"""
    warm_up: float = 0.05
    """part of the steps, but at least 10 steps"""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not self.clip > 0:
            raise ValueError("learning_rate and clip must be positive")
        if self.weight_decay < 0 or not 0 <= self.warm_up < 1:
            raise ValueError("weight_decay must not be negative, warm_up in [0, 1)")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, of so many."""
        warm = min(max(10, math.ceil(self.warm_up * steps)), steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


class Training:
    """A model on its way through so many steps; step: of those, taken."""

    def __init__(self, model: DualEncoder, settings: Optimisation, steps: int):
        self.model, self.settings, self.steps, self.step = model, settings, steps, 0
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters: list[nn.Parameter] = list(model.parameters())
        decays = [p.dim() >= 2 for p in self.parameters]
        self._parts = [[i for i, d in enumerate(decays) if d == wanted] for wanted in (True, False)]
        self.optimizers = tuple(
            Adam([self.parameters[i] for i in part], settings.learning_rate, settings.betas, settings.epsilon,
                 weight_decay=decay)
            for part, decay in zip(self._parts, (settings.weight_decay, 0.0), strict=True)
        )  # fmt: skip

    def learn(self, batch: PairBatch) -> Metrics:
        """Take a step. Returns the loss of the batch before it, []."""
        loss = loss_of(self.model, batch)
        self.descend(loss)
        return {"loss/contrastive": loss.detach()}

    def descend(self, loss: Tensor) -> None:
        """A step of the optimiser. Parameters that the loss does not depend on have a gradient of 0."""
        gradients = list(torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True))
        clip_(gradients, self.settings.clip)
        rate = self.settings.rate(self.step, self.steps)
        for part, optimizer in zip(self._parts, self.optimizers, strict=True):
            optimizer.learning_rate = rate
            optimizer.step([gradients[i] for i in part])
        self.step += 1

    @torch.no_grad()
    def carry(self, before: Training, slots: SlotMap) -> None:
        """Take over the moments of the model that this one grew from.

        In new places of a parameter the running mean is 0, that of squares the mean of the inherited ones: zeros there,
        with a step count that is not, would make first steps several times too long. Parameters that are all new begin
        as those of a new optimiser.
        """
        old = before._moments()
        for name, (mean, square, count) in self._moments().items():
            source = slots[name].source
            if source is None:
                continue
            old_mean, old_square, old_count = old[source]
            slots[name].fill_(mean, old_mean)
            square.fill_(slots[name].gather(old_square)[slots[name].inherited].mean())
            slots[name].fill_(square, old_square)
            count.copy_(old_count)

    def _moments(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Of each parameter, by name: running means of gradient and square, steps."""
        found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for part, optimizer in zip(self._parts, self.optimizers, strict=True):
            moments = zip(optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.step_count, strict=True)
            found |= zip((self.names[i] for i in part), moments, strict=True)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, and how far it is."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "steps": self.steps,
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly, on a model of the same genome."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps, self.step = state["steps"], state["step"]


def loss_of(model: DualEncoder, batch: PairBatch) -> Tensor:
    """The contrastive loss of a batch, []."""
    images, texts = model(batch.images, batch.tokens)
    return contrastive_loss(images, texts, model.logit_scale, batch.concepts)


def clip_(gradients: list[Tensor], largest: float) -> None:
    """Scale all gradients together, in place, so that their norm is at most `largest`."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
