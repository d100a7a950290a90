"""Synaptic intelligence (Zenke, Poole & Ganguli 2017, arXiv:1703.04200): importance measured along the way of learning.

    ω_i += -g_i Δθ_i                                    in each step (eq. 3), g the gradient without the penalty
    Ω_i <- max(0, Ω_i + ω_i / ((Δ_i)² + ξ))             at a task's end (eq. 5), Δ_i how far the weight has come in it
    L = CE over B + c Σ_i Ω_i (θ_i - θ̃_i)²              eq. 4, θ̃ the weights at the end of the last task

The rectifier is of the authors' code. They also begin each task with fresh moments of Adam; here the optimiser goes on.
Works with: task, class, domain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from continual.memory import Batch
from continual.strategy import Metrics, Setting, Strategy
from continual.streams import Task
from plasticity.population import copy_state_


@dataclass(frozen=True, kw_only=True)
class Config:
    """c and ξ of the paper's permuted MNIST; its split MNIST has 1 and 0.001, with Adam."""

    strength: float = 0.1
    """c, of the penalty"""
    damping: float = 0.1
    """ξ: keeps importance finite where a weight came back"""

    def __post_init__(self) -> None:
        if self.strength < 0 or not self.damping > 0:
            raise ValueError(f"strength must not be negative, damping positive, got {self.strength} and {self.damping}")


class SI(Strategy):
    """A quadratic penalty by what each weight did for the loss."""

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting)
        self.config = config
        self.importance = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.path = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.anchor = [p.detach().clone() for p in self.parameters]

    def observe(self, batch: Batch, task: Task) -> Metrics:
        (outputs,) = self.network.outputs_of(batch.x)
        loss = self.cross_entropy(outputs, batch.y)
        gradients = self.gradients(loss)
        with torch.no_grad():
            before = [p.detach().clone() for p in self.parameters]
            held, penalty = self.penalty()
            self.optimizer.step(list(torch._foreach_add(gradients, held)))
            moved = torch._foreach_sub(self.parameters, before)
            torch._foreach_addcmul_(self.path, gradients, moved, value=-1)
        return {"loss/current": loss.detach(), "loss/penalty": penalty}

    @torch.no_grad()
    def penalty(self) -> tuple[list[Tensor], Tensor]:
        """Gradients of the penalty, and its value [K]."""
        distance = torch._foreach_sub(self.parameters, self.anchor)
        pull = torch._foreach_mul(torch._foreach_mul(self.importance, 2 * self.config.strength), distance)
        value = sum((0.5 * p * d).flatten(1).sum(1) for p, d in zip(pull, distance, strict=True))
        return list(pull), torch.as_tensor(value)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Turn what was done on the way into importance, and hold the weights where they are."""
        for importance, path, anchor, p in zip(self.importance, self.path, self.anchor, self.parameters, strict=True):
            importance.add_(path / ((p - anchor).square() + self.config.damping)).clamp_(min=0)
            path.zero_()
            anchor.copy_(p)

    def state_dict(self) -> dict[str, Any]:
        own = {"importance": self.importance, "path": self.path, "anchor": self.anchor}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for name in ("importance", "path", "anchor"):
            copy_state_(getattr(self, name), state[name], name)
