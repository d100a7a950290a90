"""Changes of all weights with or after each step: decoupled decay, noise, clipping.

weight-decay  θ <- (1 - η λ) θ, after the step of any optimiser
adamw         the same before the step, as torch's AdamW does it      Loshchilov & Hutter 2019, arXiv:1711.05101
noise         θ <- θ + N(0, σ²); with weight-decay: Shrink and Perturb as in Dohare et al. 2024, Nature 632
weight-clip   |θ| <= κ s_l, s_l the bound of the layer's first draw   Elsayed et al. 2024, RLJ 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.interventions.regularisers import copy_values, decayed
from plasticity.interventions.scope import all_weights, bias_of, learning_rate, normaliser_parameters, regularised
from plasticity.optimisers.proposing import at_least


@dataclass
class WeightDecay(Intervention):
    """Decoupled decay towards 0 at the optimiser's current learning rate η."""

    strength: float = 1e-2
    """λ; published sweep 0.1 to 1e-4"""
    hidden: bool | None = None
    """whether hidden weights decay; None: unless they are projected, where decay would only change the rate"""

    stage = "decay"

    def __post_init__(self) -> None:
        at_least("strength of weight-decay", self.strength, 0)

    def begin(self, learner: Learner) -> None:
        self.names = decayed(learner, self.hidden)

    @torch.no_grad()
    def after_step(self, learner: Learner, batch: Batch) -> None:
        weights = [learner.parameter(name) for name in self.names]
        torch._foreach_mul_(weights, 1 - learning_rate(learner) * self.strength)


@dataclass
class AdamW(Intervention):
    """Adam with decoupled decay of weights and biases, not of gains and offsets."""

    strength: float = 1e-2
    """λ; published sweep 0.1 to 1e-4"""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    hidden: bool | None = None
    """whether hidden weights decay; None: unless they are projected, where decay would only change the rate"""

    def __post_init__(self) -> None:
        at_least("strength of adamw", self.strength, 0)

    def optimizer(
        self, network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
    ) -> torch.optim.Optimizer:
        spared = normaliser_parameters(network)
        if self.hidden is False:
            from plasticity.networks.structure import find_structure

            spared |= {name for layer in find_structure(network).hidden for name in layer.weights}
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, p in parameters.items():
            groups[name not in spared].append(p)
        return torch.optim.AdamW(
            [{"params": own, "weight_decay": self.strength * decays} for decays, own in groups.items() if own],
            lr=learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            fused=True,
        )


@dataclass
class Noise(Intervention):
    """Gaussian noise on every weight and bias after each step."""

    std: float = 1e-5
    """σ; published values 1e-4 to 1e-6"""

    def __post_init__(self) -> None:
        at_least("std of noise", self.std, 0)

    def begin(self, learner: Learner) -> None:
        self.names = regularised(learner)

    @torch.no_grad()
    def after_step(self, learner: Learner, batch: Batch) -> None:
        for name in self.names:
            for weight, generator in zip(learner.parameter(name), learner.generators, strict=True):
                weight.add_(torch.empty_like(weight).normal_(generator=generator), alpha=self.std)


@dataclass
class WeightClip(Intervention):
    """Clamps weights and biases after each step to a multiple of the range in which they started."""

    factor: float = 3.0
    """κ; published sweep 1 to 5"""
    bound: Literal["fan-in", "initial"] = "fan-in"
    """s_l: 1/√fan_in, the bound of torch's own draw; or the largest initial weight, for other draws"""
    clip_last: bool = True
    """whether heads are clipped too"""

    stage = "clip"

    def __post_init__(self) -> None:
        at_least("factor of weight-clip", self.factor, 0)
        if self.bound not in ("fan-in", "initial"):
            raise ValueError(f"bound of weight-clip must be fan-in or initial, got {self.bound}")

    @torch.no_grad()
    def begin(self, learner: Learner) -> None:
        heads = set() if self.clip_last else set(learner.structure.heads)
        self.limits: dict[str, Tensor] = {}
        for name in all_weights(learner):
            if name not in heads:
                weight = learner.parameter(name).flatten(1)
                fan_in = learner.parameter(name)[0, 0].numel()
                start = weight.abs().amax(1) if self.bound == "initial" else torch.full_like(weight[:, 0], fan_in**-0.5)
                bias = bias_of(learner.network, name)
                self.limits.update({own: self.factor * start for own in (name, bias) if own is not None})

    @torch.no_grad()
    def after_step(self, learner: Learner, batch: Batch) -> None:
        for name, limit in self.limits.items():
            tensor = learner.parameter(name)
            limit = limit.view(-1, *[1] * (tensor.dim() - 1))
            torch.clamp(tensor, -limit, limit, out=tensor)

    def state_dict(self) -> dict[str, Any]:
        return {"limits": self.limits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_values(self.limits, state["limits"])
