"""Plasticity injection (Nikishin et al. 2023, arXiv:2305.15555, section 4).

    h(x) = h_θ(x) + h_θ1(x) - sg(h_θ2(x)),   θ frozen, θ1 a new draw that is trained, θ2 its frozen copy

The head's own parameters become θ1, so they stay with the optimiser (their state is cleared) and nothing else has to
learn of them; θ and θ2 are buffers, 0 until the injection, so until then the head is the ordinary one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.interventions.scope import bias_of
from plasticity.networks.redraw import fresh_parameters, redraw_tensors
from plasticity.networks.stacked import StackedLinear
from plasticity.networks.structure import find_structure
from plasticity.optimisers.proposing import at_least

FROZEN, OFFSET = "frozen", "offset"


@dataclass
class Injection(Intervention):
    """Gives the heads a new, trainable branch once. Heads are the linear layers behind which no nonlinearity stands."""

    at: int = 0
    """optimiser step of the injection; 0: at the first task boundary"""

    def __post_init__(self) -> None:
        at_least("at of injection", self.at, 0)
        self.uses_boundaries = self.at == 0
        self.injected = False

    def build(self, network: nn.Module) -> nn.Module:
        for weight in find_structure(network).heads:
            name = weight.rpartition(".")[0]
            head = network.get_submodule(name)
            if type(head) is not nn.Linear:
                raise ValueError(f"injection needs linear heads, and '{name}' is a {type(head).__name__}")
            if not name:
                raise ValueError("injection needs a network with hidden layers in front of its head")
            network.set_submodule(name, InjectedLinear(head))
        return network

    def after_step(self, learner: Learner, batch: Batch) -> None:
        if self.at and learner.steps == self.at:
            self._inject(learner)

    def at_boundary(self, learner: Learner) -> None:
        if not self.at and not self.injected:
            self._inject(learner)

    @torch.no_grad()
    def _inject(self, learner: Learner) -> None:
        self.injected = True
        fresh = fresh_parameters(learner)
        for weight in learner.structure.heads:
            names = [name for name in (weight, bias_of(learner.network, weight)) if name is not None]
            for name in names:
                self._buffer(learner, name, FROZEN).copy_(learner.parameter(name))
                self._buffer(learner, name, OFFSET).copy_(fresh[name])
            redraw_tensors(learner, {name: fresh[name] for name in names})

    @staticmethod
    def _buffer(learner: Learner, name: str, kind: str) -> Tensor:
        prefix, _, own = name.rpartition(".")
        buffer = learner.network.get_buffer(f"{prefix}.{kind}_{own}")
        return buffer if learner.members is not None else buffer.unsqueeze(0)

    def state_dict(self) -> dict[str, bool]:
        return {"injected": self.injected}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        self.injected = state["injected"]


class InjectedLinear(nn.Linear):
    """A linear head [B, ..., in] -> [B, ..., out] with its two frozen branches."""

    def __init__(self, head: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias
        for kind in (FROZEN, OFFSET):
            for name, parameter in head.named_parameters():
                self.register_buffer(f"{kind}_{name}", torch.zeros_like(parameter, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        branches = [F.linear(x, *_branch(self, kind)) for x, kind in ((input, FROZEN), (input.detach(), OFFSET))]
        return super().forward(input) + branches[0] - branches[1]

    @staticmethod
    def stacked(layers: Sequence[nn.Module]) -> nn.Module:
        """Of K heads, for [K, B, ..., in]."""
        return StackedInjectedLinear(layers)


class StackedInjectedLinear(StackedLinear):
    """K such heads: [K, B, ..., in] -> [K, B, ..., out]."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__(layers)
        for name, _ in layers[0].named_buffers():
            self.register_buffer(name, torch.stack([layer.get_buffer(name) for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        branches = [_rows(x, *_branch(self, kind)) for x, kind in ((x, FROZEN), (x.detach(), OFFSET))]
        return super().forward(x) + branches[0] - branches[1]


def _branch(head: nn.Module, kind: str) -> tuple[Tensor, Tensor | None]:
    return head.get_buffer(f"{kind}_weight"), head.get_buffer(f"{kind}_bias") if head.bias is not None else None


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[K, B, ..., in] -> [K, B, ..., out]."""
    y = torch.bmm(x.flatten(1, -2), weight.mT)
    y = y if bias is None else y + bias.unsqueeze(1)
    return y.view(*x.shape[:-1], -1)
