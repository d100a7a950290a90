"""How much a network can stretch distances: a bound that holds for all inputs, and layers that have a good one.

Distances are root mean squares over the features of a token (a row, a pixel, a position of a sequence), the largest
over tokens. Newhouse et al. 2025, arXiv:2507.13338, sections 4.4 and 4.5 of whose bounds for attention are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plasticity.networks import stacked
from plasticity.optimisers.spectral import leading

GELU_SLOPE = 1.1289042  # the largest slope of GELU


class DividedGELU(nn.Module):
    """GELU / 1.1289042, whose slope is at most 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) / GELU_SLOPE


class Multiply(nn.Module):
    """x times a fixed number."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class ConvexResidual(nn.Module):
    """(1 - share) x + share f(x), which stretches no more than x and f do."""

    def __init__(self, inner: nn.Module, share: float):
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        self.inner, self.share = inner, share

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.inner(x), self.share)


class Attention(nn.Module):
    """softmax(scale q.k / d_head) v / 3 in `heads` heads, causal: with norms and inputs of 1 it stretches by 1 at most.

    x [B, T, width] -> [B, T, width].
    """

    def __init__(self, width: int, heads: int, softmax_scale: float = 1.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads, self.softmax_scale = heads, softmax_scale
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for layer in (self.query, self.key, self.value)
        )
        scale = self.softmax_scale / q.shape[-1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return self.out(mixed.transpose(-3, -2).flatten(-2)) / 3


def lipschitz_transformer(
    vocabulary: int,
    width: int,
    blocks: int,
    heads: int,
    residual_scale: float = 1.0,
    softmax_scale: float = 1.0,
    final_scale: float = 1.0,
) -> nn.Sequential:
    """A language model without normalisation whose Lipschitz bound is a product of its norms: [B, T] -> [B, T, V]."""
    share = residual_scale / (2 * blocks)
    layers: list[nn.Module] = [nn.Embedding(vocabulary, width)]
    for _ in range(blocks):
        wide = nn.Linear(width, 4 * width, bias=False), DividedGELU(), nn.Linear(4 * width, width, bias=False)
        layers.append(ConvexResidual(Attention(width, heads, softmax_scale), share))
        layers.append(ConvexResidual(nn.Sequential(*wide), share))
    return nn.Sequential(*layers, nn.Linear(width, vocabulary, bias=False), Multiply(final_scale))


@torch.no_grad()
def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Every linear layer an orthogonal matrix of norm 1 between root mean squares, embeddings of root mean square 1."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            matrix = module.weight.flatten(1)
            nn.init.orthogonal_(matrix, math.sqrt(matrix.shape[0] / matrix.shape[1]), generator)
            module.weight.copy_(matrix.view_as(module.weight))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(generator=generator)
            module.weight.div_(module.weight.square().mean(-1, keepdim=True).sqrt())


def operator_norm(weights: Tensor, blocks: int = 1) -> Tensor:
    """The norm of each member's matrix as a map between root mean squares: [K, out, in, ...] -> [K], float64.

    blocks: the rows are so many matrices, of which it takes the largest norm. Exact up to 1024 rows or columns; beyond
    that from 50 power iterations, plus one percent.
    """
    matrices = weights.detach().double().flatten(2)
    matrices = matrices.unflatten(1, (blocks, -1))
    rows, columns = matrices.shape[2:]
    if min(rows, columns) <= 1024:
        largest = torch.linalg.matrix_norm(matrices, ord=2)
    else:
        largest = 1.01 * leading(matrices.flatten(0, 1), 50)[0].view(matrices.shape[:2])
    return largest.amax(1) * math.sqrt(columns / rows)


def lipschitz_bound(network: nn.Module, input_rms: float | None = None, strict: bool = True) -> Tensor:
    """A number L with rms(f(x) - f(x')) <= L rms(x - x') for all x, x'; 0-d, or [K] for a stacked population, float64.

    The network is taken in evaluation mode. Between l2 norms the bound is L sqrt(outputs / inputs). input_rms: a bound
    on the inputs, which an attention needs to have one; behind an embedding none is needed, and L is then with respect
    to the embedded tokens. strict: refuse layer normalisations, whose constant, max|gain| / sqrt(eps), is useless.
    Raises ValueError for layers without a known bound.
    """
    bound, _ = _through(network, torch.ones(()).double(), None if input_rms is None else _number(input_rms), strict)
    return bound


Bounds = tuple[Tensor, Tensor | None]  # of the stretch so far, and of the root mean square of what comes out


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _through(module: nn.Module, stretch: Tensor, rms: Tensor | None, strict: bool) -> Bounds:
    """The bounds behind `module`, given those in front of it."""
    if isinstance(module, nn.Sequential):
        for layer in module:
            stretch, rms = _through(layer, stretch, rms, strict)
        return stretch, rms
    if isinstance(module, nn.Linear | nn.Conv2d | stacked.StackedLinear | stacked.StackedConv2d):
        return _linear(module, stretch, rms)
    if isinstance(module, nn.Embedding):
        largest = module.weight.detach().double().square().mean(-1).sqrt().max()
        return torch.ones_like(largest), largest
    if isinstance(module, ConvexResidual):
        inner_stretch, inner_rms = _through(module.inner, torch.ones_like(stretch), rms, strict)
        out = None if rms is None or inner_rms is None else (1 - module.share) * rms + module.share * inner_rms
        return stretch * (1 - module.share + module.share * inner_stretch), out
    if isinstance(module, Attention):
        return _attention(module, stretch, rms)
    if isinstance(module, _NORMS):
        return _normalisation(module, stretch, strict)
    constant = _CONSTANTS.get(type(module))
    if constant is None:
        raise ValueError(f"no Lipschitz constant is known for {type(module).__name__}")
    slope, at_zero = constant(module)
    return stretch * slope, None if rms is None else rms * slope + at_zero


def _linear(module: Any, stretch: Tensor, rms: Tensor | None) -> Bounds:
    population = isinstance(module, _STACKED)
    if getattr(module, "groups", 1) != 1:
        raise ValueError("no Lipschitz constant is known for a grouped convolution")
    weight: Tensor = module.weight
    norm = operator_norm(weight) if population else operator_norm(weight.unsqueeze(0)).squeeze(0)
    offset = 0.0 if module.bias is None else module.bias.detach().double().square().mean(-1).sqrt()
    return stretch * norm, None if rms is None else rms * norm + offset


def _attention(module: Attention, stretch: Tensor, rms: Tensor | None) -> Bounds:
    """The Jacobian of a softmax has norm at most 1 from largest to summed change, so L <= A_o A_v (1 + 2 s A_q A_k B^2)
    / 3 with the largest norms A over heads, the softmax's scale s and inputs of root mean square at most B."""
    if rms is None:
        raise ValueError("an attention has a Lipschitz constant for bounded inputs only; give input_rms")
    q, k, v = (
        operator_norm(layer.weight.unsqueeze(0), module.heads).squeeze(0)
        for layer in (module.query, module.key, module.value)
    )
    passed = operator_norm(module.out.weight.unsqueeze(0)).squeeze(0) * v / 3
    return stretch * passed * (1 + 2 * module.softmax_scale * q * k * rms.square()), passed * rms


_STACKED = (
    stacked.StackedLinear, stacked.StackedConv2d,
    stacked.StackedBatchNorm, stacked.StackedLayerNorm, stacked.StackedRMSNorm, stacked.StackedGroupNorm,
)  # fmt: skip
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, stacked.StackedBatchNorm)
_LAYER_NORMS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, stacked.StackedLayerNorm, stacked.StackedRMSNorm, stacked.StackedGroupNorm,
)  # fmt: skip
_NORMS = (*_BATCH_NORMS, *_LAYER_NORMS)


def _normalisation(module: Any, stretch: Tensor, strict: bool) -> Bounds:
    gain = None if module.weight is None else module.weight.detach().double().abs()
    population = isinstance(module, _STACKED)
    if isinstance(module, _BATCH_NORMS):
        if module.running_var is None:
            raise ValueError("a batch normalisation without running statistics has no Lipschitz constant")
        scale = (cast(Tensor, module.running_var).double() + module.eps).rsqrt()
        scale = scale if gain is None else scale * gain
        return stretch * (scale.amax(-1) if population else scale.max()), None
    if strict:
        raise ValueError(
            f"{type(module).__name__} has no useful Lipschitz constant (gain / sqrt(eps)); strict=False counts that one"
        )
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    largest = torch.ones(()).double() if gain is None else gain.flatten(1).amax(1) if population else gain.max()
    return stretch * largest / math.sqrt(eps), None


def _max_pool(module: Any) -> tuple[float, float]:
    """A window's maximum changes by at most the root of the sum of squares over its pixels."""
    sides = module.kernel_size if isinstance(module.kernel_size, tuple) else (module.kernel_size,) * 2
    return math.sqrt(sides[0] * sides[1]), 0.0


def _per_image(module: Any) -> tuple[float, float]:
    return _CONSTANTS[type(module.layer)](module.layer)


# The largest slope of a layer and the size of what it makes of zeros.
_CONSTANTS: dict[type[nn.Module], Callable[[Any], tuple[float, float]]] = {
    nn.Identity: lambda m: (1.0, 0.0),
    nn.Flatten: lambda m: (1.0, 0.0),
    stacked.StackedFlatten: lambda m: (1.0, 0.0),
    nn.Dropout: lambda m: (1.0, 0.0),
    nn.AvgPool2d: lambda m: (1.0, 0.0),
    nn.AdaptiveAvgPool2d: lambda m: (1.0, 0.0),
    nn.MaxPool2d: _max_pool,
    stacked.PerImage: _per_image,
    nn.ReLU: lambda m: (1.0, 0.0),
    nn.LeakyReLU: lambda m: (max(1.0, abs(m.negative_slope)), 0.0),
    nn.ELU: lambda m: (max(1.0, m.alpha), 0.0),
    nn.Tanh: lambda m: (1.0, 0.0),
    nn.Sigmoid: lambda m: (0.25, 0.5),
    nn.Softplus: lambda m: (1.0, math.log(2) / m.beta),
    nn.GELU: lambda m: (1.1291, 0.0),
    nn.SiLU: lambda m: (1.0999, 0.0),
    nn.Mish: lambda m: (1.0885, 0.0),
    DividedGELU: lambda m: (1.0, 0.0),
    Multiply: lambda m: (abs(m.factor), 0.0),
}
