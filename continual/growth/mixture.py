"""Layers whose weights are mixtures of templates (Pham et al., MixtureGrowth, WACV 2024, arXiv:2311.04251).

A weight W of the target is made of blocks, each of a member's size:

    W_b = Σ_j c_{b,j} T_{set(b),j}          n templates in each of two sets, one set a member
    W = [[W_0, W_2],                        members on the diagonal, new combinations off it
         [W_3, W_1]]

The first layer, whose inputs are nobody's, is [W_0; W_1]; the last, whose outputs are everybody's, [W_0, W_1]. All
tensors have an axis of K networks in front. What is not in the abstract follows specs/growclip-and-growth.md, part B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from plasticity.networks.stacked import StackedBatchNorm, StackedConv2d, StackedLinear, convolve, linear
from plasticity.population import RandomStream

Stage = Literal[0, 1, "grown"]  # which member computes, or both grown together
Place = Literal["first", "inner", "last"]
Coefficients = Literal["orthogonal", "copy", "zero", "random", "none"]
COEFFICIENTS: tuple[Coefficients, ...] = ("orthogonal", "copy", "zero", "random", "none")


@dataclass(frozen=True)
class Recipe:
    """templates: n, in each set. sets: which set each of the four blocks is made of, (0, 1, 0, 1) or (0, 1, 1, 0)."""

    templates: int = 2
    sets: tuple[int, ...] = (0, 1, 0, 1)

    def __post_init__(self) -> None:
        if self.templates < 1:
            raise ValueError(f"templates must be at least 1, got {self.templates}")
        if self.sets not in ((0, 1, 0, 1), (0, 1, 1, 0)):
            raise ValueError(f"sets must be 0 1 0 1 or 0 1 1 0, got {' '.join(map(str, self.sets))}")


class Templates(nn.Module):
    """What the weight of one layer is made of: two sets of templates [K, n, o, i, ...], coefficients [K, n] a block.

    shape: of the target's weight, (O, I, ...). inputs: of a member; None: half of I, rounded up. Odd sizes: the target
    is cut to its shape. Templates are Kaiming normal, coefficients rows of an orthogonal matrix.
    """

    def __init__(self, shape: Sequence[int], place: Place, recipe: Recipe, random: RandomStream, inputs: int | None):
        super().__init__()
        self.outputs, self.inputs, *kernel = shape
        self.place, self.layout = place, recipe.sets
        rows = self.outputs if place == "last" else halved(self.outputs)
        columns = self.inputs if place == "first" else inputs or halved(self.inputs)
        blocks, n = (4 if place == "inner" else 2), recipe.templates
        deviation = math.sqrt(2 / (columns * math.prod(kernel)))
        drawn = [deviation * random.normal(n, rows, columns, *kernel) for _ in (0, 1)]
        self.sets = nn.ParameterList(nn.Parameter(t) for t in drawn)
        rows_of_one = _orthogonal(random.normal(max(blocks, n), min(blocks, n)))
        mixed = rows_of_one if blocks >= n else rows_of_one.mT
        self.coefficients = nn.ParameterList(nn.Parameter(c.clone()) for c in mixed.unbind(1))

    def block(self, index: int) -> Tensor:
        """W_b, [K, o, i, ...]."""
        templates = self.sets[self.layout[index]]
        mixed = torch.bmm(self.coefficients[index].unsqueeze(1), templates.flatten(2))
        return mixed.view(len(mixed), *templates.shape[2:])

    def weight(self, stage: Stage) -> Tensor:
        """That of a member, [K, o, i, ...], or of the target, [K, O, I, ...]."""
        if stage != "grown":
            return self.block(stage)
        blocks = [self.block(index) for index in range(len(self.coefficients))]
        return self.assembled(*blocks)

    def assembled(self, first: Tensor, second: Tensor, *others: Tensor) -> Tensor:
        """The target's weight of its blocks."""
        if self.place == "inner":
            third, fourth = others
            whole = torch.cat([torch.cat([first, third], 2), torch.cat([fourth, second], 2)], 1)
        else:
            whole = torch.cat([first, second], 1 if self.place == "first" else 2)
        return whole[:, : self.outputs, : self.inputs]

    @torch.no_grad()
    def grow(self, how: Coefficients, scale: float, random: RandomStream) -> None:
        """Set the coefficients of the new blocks."""
        if len(self.coefficients) == 4:
            new = new_coefficients(how, torch.stack(list(self.coefficients), 1), scale, random)
            for own, value in zip(list(self.coefficients)[2:], new, strict=True):
                own.copy_(value)


def halved(size: int) -> int:
    """Half, rounded up."""
    return -(-size // 2)


def _orthogonal(numbers: Tensor) -> Tensor:
    """Orthonormal columns of Gaussian numbers [K, m, n], uniform among all such (`torch.nn.init.orthogonal_`)."""
    q, r = torch.linalg.qr(numbers)
    return q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)


def new_coefficients(how: Coefficients, drawn: Tensor, scale: float, random: RandomStream) -> tuple[Tensor, Tensor]:
    """c_2 and c_3 at growth, [K, n] each. drawn: all four rows as they are, [K, 4, n].

    orthogonal: c_2 as it was drawn, c_3 the direction that c_0 .. c_2 excite least, times scale; orthogonal to them if
    n >= 4. copy: c_0 and c_1, and the same uniform noise of length `scale` on both. random: uniform in [0, scale).
    none: both as they were drawn.
    """
    first, second, third, fourth = drawn.unbind(1)
    if how == "orthogonal":
        least = torch.linalg.svd(drawn[:, :3], full_matrices=True).Vh[:, -1]
        return third, scale * least
    if how == "copy":
        noise = random.uniform(drawn.shape[2])
        noise = scale * noise / noise.norm(dim=1, keepdim=True)
        return first + noise, second + noise
    if how == "random":
        uniform = scale * random.uniform(2, drawn.shape[2])
        return uniform[:, 0], uniform[:, 1]
    if how == "zero":
        return torch.zeros_like(third), torch.zeros_like(fourth)
    return third, fourth


class TemplateLayer(nn.Module):
    """A layer with a weight of templates, and a bias [K, o] a member, if it has one, which growth joins.

    stage: which member it is now.
    """

    stage: Stage = 0

    def __init__(self, templates: Templates, has_bias: bool):
        super().__init__()
        self.templates = templates
        shapes = [templates.block(index).shape[:2] for index in (0, 1)] if has_bias else []
        device = templates.sets[0].device
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes)

    @property
    def weight(self) -> Tensor:
        """As it is in the present stage."""
        return self.templates.weight(self.stage)

    @property
    def bias(self) -> Tensor | None:
        """As it is in the present stage."""
        if not self.biases:
            return None
        biases = list(self.biases)
        return self.joined(*biases) if self.stage == "grown" else biases[self.stage]

    def joined(self, first: Tensor, second: Tensor) -> Tensor:
        """The target's bias of those of members."""
        return torch.cat([first, second], 1)[:, : self.templates.outputs]

    def weights(self, stage: Stage) -> list[Tensor]:
        """What is trained in a stage beside coefficients."""
        return [*_of_stage(self.templates.sets, stage), *_of_stage(self.biases, stage)]

    def coefficients(self, stage: Stage) -> list[Tensor]:
        """The coefficients that are trained in a stage."""
        return _of_stage(self.templates.coefficients, stage)


def _of_stage(parts: nn.ParameterList, stage: Stage) -> list[Tensor]:
    """Of one member, or all; none if there are none."""
    found: list[Tensor] = list(parts)
    return found if stage == "grown" else found[stage : stage + 1]


class TemplateLinear(TemplateLayer):
    """[K, B, in] -> [K, B, out], `in` and `out` of a member or of the target."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def export(self, weight: Tensor, bias: Tensor | None) -> StackedLinear:
        """A plain layer of this kind with these values."""
        return StackedLinear(_each(lambda outputs, inputs, **kept: nn.Linear(inputs, outputs, **kept), weight, bias))


class TemplateConv2d(TemplateLayer):
    """[K, B, I, H, W] -> [K, B, O, H', W']. like: the layer whose stride, padding and dilation it has."""

    def __init__(self, templates: Templates, like: StackedConv2d):
        super().__init__(templates, like.bias is not None)
        self.geometry = like.stride, like.padding, like.dilation

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, *self.geometry)

    def export(self, weight: Tensor, bias: Tensor | None) -> StackedConv2d:
        """A plain layer of this kind with these values."""
        stride, padding, dilation = self.geometry

        def plain(outputs: int, inputs: int, *kernel: int, **kept: Any) -> nn.Module:
            return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, **kept)  # type: ignore[arg-type]

        return StackedConv2d(_each(plain, weight, bias))


def _each(plain: Callable[..., nn.Module], weight: Tensor, bias: Tensor | None) -> list[nn.Module]:
    """Layers with the weights [K, out, in, ...] and biases [K, out]."""
    layers = []
    for index, own in enumerate(weight.detach().clone()):
        layer = plain(*own.shape, bias=bias is not None, device="meta")  # nothing is drawn for it
        layer.weight = nn.Parameter(own)
        if bias is not None:
            layer.bias = nn.Parameter(bias[index].detach().clone())
        layers.append(layer)
    return layers


class MemberBatchNorm(nn.Module):
    """Batch normalisation of each member, and of the target: gain, offset and statistics of the members side by side.

    like: that of the target, of C channels, as it is when nothing was learned.
    """

    stage: Stage = 0

    def __init__(self, like: StackedBatchNorm, channels: int):
        super().__init__()
        found = next(t for t in (like.weight, like.running_mean) if t is not None)
        assert isinstance(found, Tensor)
        members, self.channels = found.shape[0], channels
        affine, tracks = like.weight is not None, like.running_mean is not None

        def plain(size: int) -> StackedBatchNorm:
            kept: dict[str, Any] = {"affine": affine, "track_running_stats": tracks, "device": found.device}
            layers = [nn.BatchNorm2d(size, like.eps, like.momentum, **kept) for _ in range(members)]
            return StackedBatchNorm(layers)

        self.members = nn.ModuleList(plain(halved(channels)) for _ in (0, 1))
        self.grown = plain(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.stage)(x)

    def of(self, stage: Stage) -> StackedBatchNorm:
        """That of a stage."""
        return cast(StackedBatchNorm, self.grown if stage == "grown" else self.members[stage])

    @torch.no_grad()
    def grow(self) -> None:
        """Fill the target's with those of both members."""
        self.join(*self.members)

    def join(self, first: nn.Module, second: nn.Module) -> None:
        """Fill the target's with these two."""
        states = first.state_dict(), second.state_dict()
        for name, own in self.grown.state_dict().items():
            parts = [state[name] for state in states]
            own.copy_(torch.maximum(*parts) if own.dim() == 1 else torch.cat(parts, 1)[:, : self.channels])
