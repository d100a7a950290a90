"""Learning without forgetting (Li & Hoiem 2016, arXiv:1606.09282): old answers to new images are kept.

    L = CE over B + λ Σ_h mean over B of -Σ_c p_c log q_c

p is the answer of the network as it was before the task, q that of the present one, both softmax(outputs / T) within
the outputs h of each task before where a sample's task is told, else within all classes seen before. Not done: the
paper's warm-up, in which only the new outputs move at first. Works with: task, class, domain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from continual.memory import Batch
from continual.strategy import Metrics, Setting, Strategy
from continual.streams import Task
from plasticity.networks.functional import evaluating
from plasticity.population import copy_state_


@dataclass(frozen=True, kw_only=True)
class Config:
    """λ and T of the paper."""

    distillation: float = 1.0
    """λ, of the old answers"""
    temperature: float = 2.0
    """T, by which outputs are divided"""

    def __post_init__(self) -> None:
        if self.distillation < 0 or not self.temperature > 0:
            raise ValueError(
                "distillation must not be negative, temperature positive, got "
                f"{self.distillation} and {self.temperature}"
            )


def distillation(now: Tensor, then: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of softened answers, outputs now and then [K, B, C], summed over groups bool [K, G, C]: [K].

    A group without outputs adds nothing.
    """
    within = (groups | ~groups.any(2, keepdim=True)).unsqueeze(2)  # [K, G, 1, C]
    p, log_q = (
        (outputs.unsqueeze(1) / temperature).masked_fill(~within, -torch.inf).log_softmax(3).masked_fill(~within, 0)
        for outputs in (then, now)
    )
    p = p.exp() * groups.unsqueeze(2)
    return -(p * log_q).sum(3).mean(2).sum(1)


class LwF(Strategy):
    """Distillation from the network before the task."""

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting)
        self.config = config
        self.teacher = {name: value.clone() for name, value in self._values().items()}
        # Groups of outputs with an old answer: those of each task, or of kinds without labels all of them in the first.
        count = setting.tasks if setting.labelled else 1
        self.groups = torch.zeros(setting.members, count, setting.outputs, dtype=torch.bool, device=self.seen.device)
        self.finished = 0  # tasks

    def _values(self) -> dict[str, Tensor]:
        named = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        return {name: value.detach() for name, value in named.items()}

    def observe(self, batch: Batch, task: Task) -> Metrics:
        if not self.finished:
            return super().observe(batch, task)
        with torch.no_grad(), evaluating(self.network):
            then = functional_call(self.network, self.teacher, (batch.x,))
        (now,) = self.network.outputs_of(batch.x)
        current = self.cross_entropy(now, batch.y)
        groups = self.groups[:, : self.finished] if self.setting.labelled else self.groups
        old = self.config.distillation * distillation(now, then, groups, self.config.temperature)
        self.descend(current + old)
        return {"loss/current": current.detach(), "loss/distillation": old.detach()}

    def end_task(self, task: Task) -> None:
        """What the network says now is what the next task has to keep."""
        copy_state_(self.teacher, self._values(), "teacher")
        if self.setting.labelled:
            self.groups[:, task.index] = task.outputs
        else:
            self.groups[:, 0] = self.seen
        self.finished = task.index + 1

    def state_dict(self) -> dict[str, Any]:
        own = {"teacher": self.teacher, "groups": self.groups, "finished": self.finished}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        copy_state_(self.teacher, state["teacher"], "teacher")
        self.groups.copy_(state["groups"])
        self.finished = state["finished"]
