"""A network of two members of half its width that grow into it (`continual.growth.mixture`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from continual.growth.mixture import (
    Coefficients,
    MemberBatchNorm,
    Place,
    Recipe,
    Stage,
    TemplateConv2d,
    TemplateLayer,
    TemplateLinear,
    Templates,
    halved,
)  # fmt: skip
from continual.networks.classifier import Classifier
from continual.networks.residual import LinearBottleneck, Residual
from continual.networks.wide_residual import WideBlock
from plasticity.networks.stacked import (
    ELEMENTWISE,
    PerImage,
    StackedBatchNorm,
    StackedConv2d,
    StackedFlatten,
    StackedLinear,
)  # fmt: skip
from plasticity.population import RandomStream

_CONTAINERS = (nn.Sequential, Residual, LinearBottleneck, WideBlock)
Blocks = Callable[[TemplateLayer], Tensor]  # the target's weight [K, O, I, ...] of a layer


@dataclass
class _Walk:
    """From the first layer to the last. width: outputs of the layer before, 0 in front of the first."""

    recipe: Recipe
    random: RandomStream
    width: int = field(default=0)

    def templated(self, module: nn.Module) -> nn.Module:
        """The same with templates. Raises ValueError for a module that half a network cannot have."""
        if isinstance(module, _CONTAINERS):
            for name, child in module.named_children():
                setattr(module, name, self.templated(child))
            return module
        if isinstance(module, StackedLinear | StackedConv2d):
            return self.layer(module, "inner" if self.width else "first")
        if isinstance(module, StackedBatchNorm):
            return MemberBatchNorm(module, self.width)
        if isinstance(module, (*ELEMENTWISE, PerImage, StackedFlatten)):
            return module
        name = type(module).__name__
        raise ValueError(f"MixtureGrowth splits linear layers, convolutions and batch normalisations, not {name}")

    def layer(self, module: StackedLinear | StackedConv2d, place: Place) -> TemplateLinear | TemplateConv2d:
        shape = module.weight.shape[1:]
        inputs = None
        if isinstance(module, StackedLinear) and self.width and shape[1] % self.width == 0:
            inputs = halved(self.width) * (shape[1] // self.width)  # whole channels of an image that was flattened
        templates = Templates(shape, place, self.recipe, self.random, inputs)
        self.width = shape[0]
        if isinstance(module, StackedLinear):
            return TemplateLinear(templates, module.bias is not None)
        if module.groups != 1:
            raise ValueError("MixtureGrowth cannot split a convolution of several groups")
        return TemplateConv2d(templates, module)


class MixtureNetwork(Classifier):
    """K networks, each of two members. target: K of the full width, whose architecture this has; it is left alone.

    In stages 0 and 1 it is a member, in stage "grown" the target. Raises ValueError for an architecture that cannot be
    split, or that has no hidden layer.
    """

    stage: Stage = 0

    def __init__(self, target: Classifier, recipe: Recipe, random: RandomStream):
        if not isinstance(target.head, StackedLinear):
            raise ValueError("MixtureGrowth needs a linear head")
        walk = _Walk(recipe, random)
        features = walk.templated(copy.deepcopy(target.features))
        if not walk.width:
            raise ValueError("MixtureGrowth needs a network with a hidden layer")
        head = walk.layer(target.head, "last")
        super().__init__(features, cast(StackedLinear, head))
        self.mixes_samples = target.mixes_samples

    def set_stage(self, stage: Stage) -> None:
        """Compute as a member, or as the target."""
        self.stage = stage
        for module in self.modules():
            if isinstance(module, TemplateLayer | MemberBatchNorm):
                module.stage = stage

    @property
    def layers(self) -> Iterator[TemplateLinear | TemplateConv2d]:
        return (module for module in self.modules() if isinstance(module, TemplateLinear | TemplateConv2d))

    @property
    def normalisations(self) -> Iterator[MemberBatchNorm]:
        return (module for module in self.modules() if isinstance(module, MemberBatchNorm))

    def weights(self, stage: Stage) -> list[Tensor]:
        """What is trained in a stage beside coefficients: templates, biases, normalisations."""
        own = [w for layer in self.layers for w in layer.weights(stage)]
        return own + [p for norm in self.normalisations for p in norm.of(stage).parameters()]

    def coefficients(self, stage: Stage) -> list[Tensor]:
        """The coefficients that are trained in a stage."""
        return [c for layer in self.layers for c in layer.coefficients(stage)]

    @torch.no_grad()
    def start_second(self, noise: float, random: RandomStream) -> None:
        """Begin member 1 as a copy of member 0, with Gaussian noise of that deviation on its templates."""
        for layer in self.layers:
            first, second = layer.templates.sets
            second.copy_(first + noise * random.normal(*first.shape[1:]))
            own = list(layer.templates.coefficients)
            own[1].copy_(own[0])
            for a, b in zip(layer.biases[:1], layer.biases[1:], strict=True):
                b.copy_(a)
        for norm in self.normalisations:
            norm.of(1).load_state_dict(norm.of(0).state_dict())

    def grow(self, how: Coefficients, scale: float, random: RandomStream) -> None:
        """From two members to the target."""
        for layer in self.layers:
            layer.templates.grow(how, scale, random)
        for norm in self.normalisations:
            norm.grow()
        self.set_stage("grown")

    def export(self) -> Classifier:
        """The network of the present stage, of plain layers that share no memory with this one."""
        return self.exported(lambda layer: layer.weight, lambda layer: layer.bias)

    @torch.no_grad()
    def exported(self, weight: Blocks, bias: Callable[[TemplateLayer], Tensor | None]) -> Classifier:
        """A network of plain layers with these weights, normalised as in the present stage."""

        def plain(module: nn.Module) -> nn.Module:
            if isinstance(module, TemplateLinear | TemplateConv2d):
                return module.export(weight(module), bias(module))
            if isinstance(module, MemberBatchNorm):
                return copy.deepcopy(module.of(module.stage))
            made = copy.copy(module)
            made._modules = {name: plain(child) for name, child in module.named_children()}
            return made

        whole = Classifier(plain(self.features), cast(StackedLinear, plain(self.head)))
        return cast(Classifier, whole.train(self.training))


@torch.no_grad()
def with_blocks(network: MixtureNetwork, random: RandomStream | None) -> Classifier:
    """Both members side by side in plain layers; off the diagonal Kaiming normal numbers, or, without random, 0."""

    def weight(layer: TemplateLayer) -> Tensor:
        templates = layer.templates
        diagonal = [templates.block(0), templates.block(1)]
        if templates.place != "inner":
            return templates.assembled(*diagonal)
        shape = diagonal[0].shape[1:]
        deviation = (2 / (2 * shape[1:].numel())) ** 0.5
        others = [
            torch.zeros_like(block) if random is None else deviation * random.normal(*shape) for block in diagonal
        ]
        return templates.assembled(*diagonal, *others)

    for norm in network.normalisations:
        norm.grow()
    network.set_stage("grown")
    return network.exported(weight, lambda layer: layer.bias)


@torch.no_grad()
def net2wider(network: MixtureNetwork, random: RandomStream) -> Classifier:
    """Member 0 with each unit twice, in plain layers (Chen et al. 2016, arXiv:1511.05641).

    What reads a unit shares its weight out between the two, in random parts, so that they learn differently. With odd
    sizes, where one unit has no second, outputs change.
    """

    def weight(layer: TemplateLayer) -> Tensor:
        templates, block = layer.templates, layer.templates.block(0)
        if templates.place == "first":
            return templates.assembled(block, block)
        rows = block if templates.place == "last" else torch.cat([block, block], 1)
        share = random.uniform(*rows.shape[1:])
        return torch.cat([rows * share, rows * (1 - share)], 2)[:, : templates.outputs, : templates.inputs]

    for norm in network.normalisations:
        norm.join(norm.of(0), norm.of(0))
    network.set_stage("grown")
    return network.exported(
        weight, lambda layer: layer.joined(layer.biases[0], layer.biases[0]) if layer.biases else None
    )


@torch.no_grad()
def draw_kaiming_(network: Classifier, random: RandomStream) -> None:
    """Draw K plain networks as templates are drawn: Kaiming normal weights, biases of 0."""
    for module in network.modules():
        if isinstance(module, StackedLinear | StackedConv2d):
            shape = module.weight.shape[1:]
            module.weight.copy_((2 / shape[1:].numel()) ** 0.5 * random.normal(*shape))
            if module.bias is not None:
                module.bias.zero_()
