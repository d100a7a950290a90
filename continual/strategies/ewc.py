"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796): weights that old tasks need are held.

    L = CE over B + λ/2 Σ_t Σ_i F_t,i (θ_i - θ*_t,i)²       separate (eq. 3): a term for each finished task t
    L = CE over B + λ/2 Σ_i γ F*_i (θ_i - θ*_i)²            online (Schwarz et al. 2018, arXiv:1805.06370, eq. 9):
        F* <- γ F* + F_t, θ* the newest weights             one term, which follows the weights

F_t is the diagonal of the Fisher information at the end of task t, a mean over its samples, which are seen once more:

    empirical   squared gradient of a sample's log-likelihood, at its own label
    sampled     the same at a label drawn from the network's answer, which is the Fisher's definition
    batch       squared gradient of a batch's mean, as in Avalanche: about B times too small, and not a Fisher

The separate terms are kept as their sum, a quadratic of weight Σ F_t around the mean of the θ*_t weighted by F_t, so
memory and time do not grow with tasks. Plain gradient descent diverges where learning_rate λ F exceeds 2. Works with:
task, class, domain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from continual.memory import Batch
from continual.strategy import Metrics, Setting, Strategy
from continual.streams import Task
from plasticity.networks.functional import evaluating
from plasticity.population import copy_state_

Fisher = Literal["empirical", "sampled", "batch"]
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Config:
    """λ as for Atari in the paper, which names none for images."""

    strength: float = 400.0
    """λ, of the penalty"""
    mode: Literal["separate", "online"] = "separate"
    """separate: a term for each task; online: one that follows"""
    decay: float = 1.0
    """γ of online: what is left of the old importance"""
    fisher: Fisher = "empirical"
    """empirical, sampled (labels drawn from the network) or batch (of mean gradients)"""

    def __post_init__(self) -> None:
        if self.mode not in ("separate", "online"):
            raise ValueError(f"mode must be separate or online, got '{self.mode}'")
        if self.fisher not in ("empirical", "sampled", "batch"):
            raise ValueError(f"fisher must be empirical, sampled or batch, got '{self.fisher}'")
        if self.strength < 0 or not 0 <= self.decay <= 1:
            raise ValueError(f"strength must not be negative, decay in [0, 1], got {self.strength} and {self.decay}")
        if self.mode == "separate" and self.decay != 1:
            raise ValueError("decay is of --mode online; separate terms do not decay")


class EWC(Strategy):
    """A quadratic penalty by the Fisher information."""

    reviews = True

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting)
        self.config = config
        self.importance = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.anchor = [p.detach().clone() for p in self.parameters]
        self._random = setting.random()

    def observe(self, batch: Batch, task: Task) -> Metrics:
        (outputs,) = self.network.outputs_of(batch.x)
        loss = self.cross_entropy(outputs, batch.y)
        gradients = self.gradients(loss)
        held, penalty = self.penalty()
        torch._foreach_add_(gradients, held)
        self.optimizer.step(gradients)
        return {"loss/current": loss.detach(), "loss/penalty": penalty}

    @torch.no_grad()
    def penalty(self) -> tuple[list[Tensor], Tensor]:
        """Gradients of the penalty, and its value [K], of separate terms but for a part that no weight changes."""
        weight = self.config.strength * self.config.decay
        distance = torch._foreach_sub(self.parameters, self.anchor)
        pull = torch._foreach_mul(torch._foreach_mul(self.importance, weight), distance)
        value = sum((0.5 * p * d).flatten(1).sum(1) for p, d in zip(pull, distance, strict=True))
        return list(pull), torch.as_tensor(value)

    def review(self, batches: Iterable[Batch], task: Task) -> Metrics:
        total, count = [torch.zeros_like(f) for f in self.importance], 0
        for batch in batches:
            torch._foreach_add_(total, self.squared_gradients(batch.x, batch.y))
            count += 1 if self.config.fisher == "batch" else batch.y.shape[1]
        fisher = list(torch._foreach_div(total, count))
        self.consolidate(fisher)
        return {"ewc/fisher": torch.stack([f.flatten(1).sum(1) for f in fisher]).sum(0)}

    def squared_gradients(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Of the cross-entropy of x [K, B, *shape], y [K, B]: summed over samples, or that of their mean."""
        named: dict[str, Tensor] = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        buffers = dict(self.network.named_buffers())

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self.cross_entropy(functional_call(self.network, {**parameters, **buffers}, (x,)), y).sum()

        with evaluating(self.network):
            if self.config.fisher == "batch":
                found = torch.autograd.grad(loss(named, x, y), self.parameters)
                return list(torch._foreach_mul(found, found))
            labels = self._drawn_labels(x, y) if self.config.fisher == "sampled" else y
            detached = {name: p.detach() for name, p in named.items()}
            samples = x.unsqueeze(2), labels.unsqueeze(2)
            each = vmap(grad(loss), (None, 1, 1))(detached, *samples)  # [B, K, ...] by name
        return [gradients.square().sum(0) for gradients in each.values()]

    @torch.no_grad()
    def _drawn_labels(self, x: Tensor, y: Tensor) -> Tensor:
        """Labels [K, B] from the network's answers among the outputs that compete with y."""
        outputs, scopes = self.network(x), self.setting.scopes
        if scopes is not None:
            member = torch.arange(len(y), device=y.device).unsqueeze(1)
            outputs = outputs.masked_fill(~scopes[member, y], -torch.inf)
        chances = outputs.softmax(2).cumsum(2)
        drawn = self._random.uniform(y.shape[1]).unsqueeze(2) * chances[..., -1:]
        return (chances <= drawn).sum(2).clamp(max=chances.shape[2] - 1)

    @torch.no_grad()
    def consolidate(self, fisher: list[Tensor]) -> None:
        """Hold the present weights by the Fisher information of the task that was just learned."""
        if self.config.mode == "online":
            torch._foreach_mul_(self.importance, self.config.decay)
        torch._foreach_add_(self.importance, fisher)
        for anchor, p, f, whole in zip(self.anchor, self.parameters, fisher, self.importance, strict=True):
            if self.config.mode == "online":
                anchor.copy_(p)
            else:
                anchor.lerp_(p.detach(), torch.where(whole > _TINY, f / whole, 1))

    def state_dict(self) -> dict[str, Any]:
        generators = [generator.get_state() for generator in self._random.generators]
        return super().state_dict() | {
            "importance": self.importance, "anchor": self.anchor, "generators": generators,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        copy_state_(self.importance, state["importance"], "importance")
        copy_state_(self.anchor, state["anchor"], "anchor")
        for generator, saved in zip(self._random.generators, state["generators"], strict=True):
            generator.set_state(saved)
