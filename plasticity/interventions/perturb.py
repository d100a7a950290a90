"""Shrink and perturb: weights move towards those of a network newly drawn each time.

    shrink-perturb       θ <- α θ + (1 - α) ψ at a task boundary     Ash & Adams 2020, arXiv:1910.08475, with a draw ψ
                                                                     of the initialiser as in D'Oro et al. 2023
    shrink-perturb-step  θ <- (1 - p) θ + q ψ after each step        as in Kumar et al. 2023, arXiv:2308.11958

ψ is fresh each time. With one stored ψ = θ⁰, as some released codes have it, this would be decoupled l2-init.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.interventions.scope import between
from plasticity.networks.redraw import fresh_parameters
from plasticity.optimisers.proposing import at_least


@dataclass
class ShrinkPerturb(Intervention):
    """At each task boundary, or every so many steps."""

    keep: float = 0.5
    """α; 0.2 (Hare and Tortoise), 0.5 (RL, Juliani), 0.8 for encoders (SR-SPR, BBF)"""
    every: int = 0
    """steps between two perturbations; 0: at task boundaries"""

    def __post_init__(self) -> None:
        between("keep of shrink-perturb", self.keep, 0, 1)
        at_least("every of shrink-perturb", self.every, 0)
        self.uses_boundaries = self.every == 0

    def after_step(self, learner: Learner, batch: Batch) -> None:
        if self.every and learner.steps % self.every == 0:
            self._perturb(learner)

    def at_boundary(self, learner: Learner) -> None:
        if not self.every:
            self._perturb(learner)

    @torch.no_grad()
    def _perturb(self, learner: Learner) -> None:
        for name, fresh in fresh_parameters(learner).items():
            learner.parameter(name).lerp_(fresh, 1 - self.keep)


@dataclass
class ShrinkPerturbStep(Intervention):
    """After each step. Without task boundaries."""

    shrink: float = 1e-4
    """p; 1e-2 to 1e-5, with perturb the setting for random labels; 1e-6 both in RL"""
    perturb: float = 1e-2
    """q"""

    def __post_init__(self) -> None:
        between("shrink of shrink-perturb-step", self.shrink, 0, 1)
        at_least("perturb of shrink-perturb-step", self.perturb, 0)

    @torch.no_grad()
    def after_step(self, learner: Learner, batch: Batch) -> None:
        fresh = fresh_parameters(learner)
        weights = [learner.parameter(name) for name in fresh]
        torch._foreach_mul_(weights, 1 - self.shrink)
        torch._foreach_add_(weights, list(fresh.values()), alpha=self.perturb)
