"""SeeDNorm (arXiv:2510.22777): RMS normalisation whose gain depends on the input's size and direction.

y = (tanh(x . beta) alpha + gamma) x / rms(x)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plasticity.intervention import Intervention
from plasticity.networks import dataflow
from plasticity.networks.normalisation import put_before
from plasticity.networks.rewriting import explicit_nonlinearities


def seednorm(x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor, heads: int, eps: float) -> Tensor:
    """x [..., D]; gamma, alpha, beta broadcast against it. heads: groups of features with an x . beta of their own.

    At least single precision inside; the result has the type of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    score = torch.tanh((wide * beta).unflatten(-1, (heads, -1)).sum(-1, keepdim=True))
    gain = (score * alpha.unflatten(-1, (heads, -1))).flatten(-2) + gamma
    return (F.rms_norm(wide, wide.shape[-1:], eps=eps) * gain).to(x.dtype)


class SeeDNorm(nn.Module):
    """[..., features] keeps its shape. At the start it is RMSNorm, and learns to differ through beta.

    axis: of the features; 1 for images [B, C, H, W], where each pixel is a token. weight: gamma, in the place of other
    normalisers' gain. Raises ValueError if heads do not divide the features, or if alpha and beta both begin at 0:
    neither would ever get a gradient.
    """

    normaliser = keeps_scale = True  # for `find_structure`: x . beta sees the scale
    own_axes = 1

    def __init__(
        self,
        features: int,
        heads: int = 1,
        alpha_init: float = 1.0,
        beta_init: float = 0.0,
        eps: float = 1e-6,
        axis: int = -1,
    ):
        super().__init__()
        if features % heads:
            raise ValueError(f"{heads} heads do not divide {features} features")
        if alpha_init == 0 and beta_init == 0:
            raise ValueError("alpha and beta cannot both begin at 0: neither would get a gradient")
        self.heads, self.alpha_init, self.beta_init, self.eps, self.axis = heads, alpha_init, beta_init, eps, axis
        self.weight, self.alpha, self.beta = (nn.Parameter(torch.empty(features)) for _ in range(3))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """gamma = 1, alpha and beta as asked for."""
        self.weight.fill_(1.0)
        self.alpha.fill_(self.alpha_init)
        self.beta.fill_(self.beta_init)

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -1)
        y = seednorm(x, self.weight, self.alpha, self.beta, self.heads, self.eps)
        return y.movedim(-1, self.axis)

    @staticmethod
    def stacked(layers: Sequence[nn.Module]) -> nn.Module:
        """Of K layers, for a population."""
        return StackedSeeDNorm(cast(Sequence[SeeDNorm], layers))


class StackedSeeDNorm(nn.Module):
    """K of them: weight, alpha, beta [K, features]; [K, B, ..., features] keeps its shape."""

    normaliser = keeps_scale = True
    own_axes = 1

    def __init__(self, layers: Sequence[SeeDNorm]):
        super().__init__()
        first = layers[0]
        self.heads, self.eps = first.heads, first.eps
        self.axis = first.axis + 1 if first.axis >= 0 else first.axis
        for name in ("weight", "alpha", "beta"):
            values = [getattr(layer, name) for layer in layers]
            stacked = torch.stack([value.detach() for value in values])
            self.register_parameter(name, nn.Parameter(stacked, requires_grad=values[0].requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -1)
        shape = x.shape[0], *[1] * (x.dim() - 2), x.shape[-1]
        gamma, alpha, beta = (cast(Tensor, getattr(self, name)).view(shape) for name in ("weight", "alpha", "beta"))
        return seednorm(x, gamma, alpha, beta, self.heads, self.eps).movedim(-1, self.axis)


def seednorm_param_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices and for the alpha and beta of every SeeDNorm, none for gammas,
    biases and other vectors."""
    decayed = set()
    for module in network.modules():
        if isinstance(module, SeeDNorm | StackedSeeDNorm):
            decayed |= {id(module.alpha), id(module.beta)}
        own = "stacked" in type(module).__module__ or isinstance(module, StackedSeeDNorm)
        decayed |= {id(p) for p in module.parameters(recurse=False) if p.dim() - own > 1}
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


@dataclass
class WithSeeDNorm(Intervention):
    """SeeDNorm in place of every layer and RMS normalisation; without any, before every nonlinearity."""

    heads: int = 1
    alpha_init: float = 1.0
    beta_init: float = 0.0

    def build(self, network: nn.Module) -> nn.Module:
        network = explicit_nonlinearities(copy.deepcopy(network))
        norms = [name for name, module in network.named_modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
        for name in norms:
            norm = cast(nn.LayerNorm, network.get_submodule(name))
            if len(norm.normalized_shape) != 1:
                raise ValueError(f"SeeDNorm normalises one axis; '{name}' normalises {list(norm.normalized_shape)}")
            network.set_submodule(name, self._norm(norm.normalized_shape[0], -1))
        if not norms:
            for site in dataflow.analyse(network).hidden:
                put_before(network, site.name, self._norm(site.units, 1 if site.pixel_axes else -1))
        return network

    def _norm(self, features: int, axis: int) -> SeeDNorm:
        return SeeDNorm(features, self.heads, self.alpha_init, self.beta_init, axis=axis)
