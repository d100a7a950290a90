"""Steps within the convergence radius of the softmax loss ("Ghosts of Softmax", arXiv:2603.13552).

Along a step the logits move at rates a. The series of the loss in the step's length converges for lengths below
pi / (max a - min a), whatever the labels: beyond it a local model of the loss, which is what an optimiser trusts, says
nothing. The controller shortens steps that go further; the optimiser's state is left alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from plasticity.intervention import Batch, Intervention, Learner

IGNORED = -100  # the target of tokens that count in no loss, as in torch.nn.functional.cross_entropy


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode; afterwards every module in the mode that it had."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def logit_rates(
    network: nn.Module, inputs: Tensor, direction: Mapping[str, Tensor], difference: float | None = None
) -> tuple[Tensor, Tensor]:
    """The network's logits z at `inputs` and their rates of change a along `direction`, both of the logits' shape.

    direction: by parameter name. difference: None for the exact derivative (forward mode); a length for the quotient
    (z(p + difference * direction) - z(p)) / difference. The network is in evaluation mode meanwhile; parameters and
    buffers keep their values.
    """
    here = {name: p.detach() for name, p in network.named_parameters() if name in direction}
    if missing := direction.keys() - here.keys():
        raise ValueError(f"the network has no parameter '{min(missing)}'")

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(network, parameters, (inputs,))

    with evaluating(network):
        if difference is None:
            derivative = jvp(logits, (here,), ({name: direction[name] for name in here},))
            return derivative[0], derivative[1]
        z = logits(here)
        there = {name: torch.add(p, direction[name], alpha=difference) for name, p in here.items()}
        return z, (logits(there) - z) / difference


def inverse_radius(rates: Tensor, logits: Tensor) -> Tensor:
    """1 / rho = (max a - min a) / pi of each sample, a lower bound on the radius: [..., classes] -> [...].

    Logits of -inf are masked actions and do not count.
    """
    masked = logits == -math.inf
    largest = rates.masked_fill(masked, -math.inf).amax(-1)
    smallest = rates.masked_fill(masked, math.inf).amin(-1)
    return (largest - smallest) / math.pi


def inverse_radius_of_two(rates: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """1 / rho = |a_y - a_c| / sqrt((z_y - z_c)^2 + pi^2) for the target y and its strongest rival c: [...].

    Exact for two classes. targets: [...], integers.
    """
    index = targets.clamp_min(0).unsqueeze(-1)
    rival = logits.scatter(-1, index, -math.inf).argmax(-1, keepdim=True)
    gap = logits.gather(-1, index) - logits.gather(-1, rival)
    rate = rates.gather(-1, index) - rates.gather(-1, rival)
    return (rate.abs() / (gap.square() + math.pi**2).sqrt()).squeeze(-1)


@dataclass
class SafeStep(Intervention):
    """Scales each proposed step p by min(1, r_target * rho(p / |p|) / |p|), rho the smallest radius of the batch.

    r_target: 0.5 is the authors' safe value; 1 was their best for a ResNet-18. mode: "set" always takes a step of
    r_target * rho, so that the learning rate has no part in it. bound: "spread" is `inverse_radius`, "top2"
    `inverse_radius_of_two`. quantile: of the samples' 1 / rho, in place of the largest. samples: look at the first so
    many of a batch only. fixed: inputs [B, ...] to look at in place of the batch. difference: see `logit_rates`.

    A step along which a logit's rate is not finite is not taken, and counted. Raises ValueError for settings out of
    range, and at the first step if targets are no class labels.
    """

    r_target: float = 0.5
    mode: Literal["cap", "set"] = "cap"
    bound: Literal["spread", "top2"] = "spread"
    quantile: float | None = None
    samples: int | None = None
    fixed: Tensor | None = None
    difference: float | None = None
    last: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    refused: Tensor | None = field(default=None, init=False, repr=False)
    warned: bool = field(default=False, init=False, repr=False)

    scales_steps = True
    needs_inputs = True

    def __post_init__(self):
        if not self.r_target > 0:
            raise ValueError(f"r_target must be positive, got {self.r_target}")
        if self.mode not in ("cap", "set") or self.bound not in ("spread", "top2"):
            raise ValueError(f"unknown mode '{self.mode}' or bound '{self.bound}'")
        if self.quantile is not None and not 0 < self.quantile <= 1:
            raise ValueError(f"quantile must be in (0, 1], got {self.quantile}")
        if self.fixed is not None and self.bound == "top2":
            raise ValueError("bound 'top2' needs targets, which a fixed batch has not")
        for name in ("samples", "difference"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def begin(self, learner: Learner) -> None:
        device = next(learner.network.parameters()).device
        self.refused = torch.zeros(learner.members or 1, device=device)

    @torch.no_grad()
    def scale_step(self, learner: Learner, batch: Batch, proposal: Mapping[str, Tensor]) -> Tensor:
        if batch.targets.is_floating_point():
            raise ValueError("safe-step needs class labels as targets: it is for losses on a softmax of the outputs")
        length = proposal_norm(proposal, learner.members is not None)
        inverse, finite = self._inverse_radius(learner, batch, proposal, length)
        r = length * inverse
        scale = self.r_target / r
        if self.mode == "cap":
            scale = scale.clamp_max(1)
        scale = torch.where((length == 0) | (inverse < 1e-12 / math.pi), 1.0, scale)
        scale = torch.where(finite, scale, 0.0)
        if self.refused is None:
            self.refused = torch.zeros_like(scale)
        self.refused += (~finite).to(self.refused.dtype)
        self.last = {"length": length, "radius": 1 / inverse, "r_before": r, "r_after": r * scale, "scale": scale}
        return scale

    def _inverse_radius(
        self, learner: Learner, batch: Batch, proposal: Mapping[str, Tensor], length: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The batch's 1 / rho along the proposal, and whether it is finite: [K] each."""
        population = learner.members is not None
        unit = {name: step / _spread(length, step, population) for name, step in proposal.items()}
        inputs, targets = batch.inputs[:, : self.samples], batch.targets[:, : self.samples]
        if self.fixed is not None:
            inputs = self.fixed.expand(inputs.shape[0], *self.fixed.shape)
        z, a = logit_rates(learner.network, inputs if population else inputs[0], unit, self.difference)
        z, a = (z, a) if population else (z.unsqueeze(0), a.unsqueeze(0))
        if self.bound == "top2":
            each = inverse_radius_of_two(a, z, targets)
        else:
            each = inverse_radius(a, z)
        if self.fixed is None:
            each = torch.where(targets == IGNORED, 0.0, each)
        each = each.flatten(1)
        inverse = each.amax(1) if self.quantile is None else each.quantile(self.quantile, dim=1)
        return inverse, (inverse.isfinite() & length.isfinite()) | (length == 0)

    def metrics(self, learner: Learner) -> dict[str, Tensor]:
        """Of the last step: its proposed length, the radius, length / radius before and after, the scale; and how many
        steps were refused. Warns once if any was."""
        if not self.last:
            return {}
        if not self.warned and self.refused is not None and bool((self.refused > 0).any()):
            warnings.warn("safe-step refused steps along which the logits' rates were not finite", stacklevel=2)
            self.warned = True
        values = {**self.last, "refused": self.refused}
        return {f"safe_step/{name}": value for name, value in values.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        return {"refused": self.refused, "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.refused, self.warned = state["refused"], state["warned"]


def proposal_norm(proposal: Mapping[str, Tensor], population: bool) -> Tensor:
    """The length of each member's step over all parameters: [K]; K = 1 for an ordinary network."""
    each = [(step if population else step.unsqueeze(0)).flatten(1).norm(dim=1) for step in proposal.values()]
    return torch.stack(each).norm(dim=0)


def _spread(per_member: Tensor, like: Tensor, population: bool) -> Tensor:
    return per_member.view(-1, *[1] * (like.dim() - 1)) if population else per_member.squeeze(0)
