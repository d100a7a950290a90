"""Classifiers of a population: features and a linear head, each for K members at once.

Each member's network is drawn from that member's own generator (`draw`), and they are stacked
(`plasticity.networks.stacked`), so member k is what it would be alone, batch normalisation included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from continual.growth.transformers import vit
from continual.networks.dst import cnn_bn, lenet5, mlp_bn, mobilenet_v2, resnet18, vgg_like
from continual.networks.hypernet import Dropout, resnet32, zenkenet
from continual.networks.residual import basic_block
from continual.networks.wide_residual import wrn10, wrn28
from plasticity.intervention import Intervention
from plasticity.networks.architectures import ARCHITECTURES, draw_
from plasticity.networks.mlp_gradients import MLPGradients, gradients_through
from plasticity.networks.stacked import StackedBatchNorm, StackedLinear, stack


class Classifier(nn.Module):
    """K networks: features [K, B, *shape] -> [K, B, d], head [K, B, d] -> [K, B, C] with weights [K, C, d].

    Or a single one, without the axis K, to be stacked.
    """

    def __init__(self, features: nn.Module, head: nn.Linear | StackedLinear):
        super().__init__()
        self.features, self.head = features, head
        # Statistics of a batch then decide what a sample becomes, so it matters which samples share a pass.
        self.mixes_samples = any(isinstance(module, StackedBatchNorm) for module in features.modules())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    @staticmethod
    def stacked(members: Sequence[nn.Module]) -> nn.Module:
        """K classifiers as one."""
        same = cast(Sequence[Classifier], members)
        head = cast(StackedLinear, stack([member.head for member in same]))
        return Classifier(stack([member.features for member in same]), head)

    def features_of(self, *batches: Tensor) -> list[Tensor]:
        """Features of each batch [K, B_i, *shape]: a pass for each if samples of a pass mix, else one for all."""
        if self.mixes_samples or len(batches) == 1:
            return [self.features(x) for x in batches]
        return list(self.features(torch.cat(batches, 1)).split([x.shape[1] for x in batches], 1))

    def outputs_of(self, *batches: Tensor) -> list[Tensor]:
        """The same for outputs [K, B_i, C]."""
        return list(self.outputs_together(*batches).split([x.shape[1] for x in batches], 1))

    def outputs_together(self, *batches: Tensor) -> Tensor:
        """Outputs of all batches behind one another, [K, sum of B_i, C]."""
        if self.mixes_samples or len(batches) == 1:
            outputs = [self._differentiable(x) for x in batches]
            return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        return self._differentiable(torch.cat(batches, 1))

    def _differentiable(self, x: Tensor) -> Tensor:
        """Outputs of which a loss is differentiated once: by hand where that can be."""
        by_hand = self.by_hand() if torch.is_grad_enabled() else None
        return self(x) if by_hand is None else by_hand(x)

    def by_hand(self) -> MLPGradients | None:
        """Gradients by hand of a plain perceptron into which nobody looks; else None."""
        if any(module._forward_hooks for module in self.modules()):
            return None
        layers = self.features.named_children() if isinstance(self.features, nn.Sequential) else ()
        return gradients_through((*layers, ("head", self.head)))


def strided_cnn(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """3 x 3 convolutions with stride 2, BatchNorm and ReLU, one for each size of `hidden`, then their average."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for size in hidden:
        layers += [nn.Conv2d(channels, size, 3, 2, 1, bias=False), nn.BatchNorm2d(size), nn.ReLU()]
        channels = size
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


def reduced_resnet18(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """ResNet-18 of 20, 40, 80, 160 channels with a 3 x 3 stem and no pooling before the end (Lopez-Paz & Ranzato 2017).

    Features are averages over 4 x 4 windows: 160 for images of 32 x 32, 640 for 84 x 84. hidden: the channels, if
    others. 1 094 740 parameters for 3 x 32 x 32 and ten outputs without bias.
    """
    sizes = tuple(hidden) or (20, 40, 80, 160)
    layers: list[nn.Module] = [nn.Conv2d(shape[0], sizes[0], 3, 1, 1, bias=False), nn.BatchNorm2d(sizes[0]), nn.ReLU()]
    channels, side = sizes[0], shape[-1]
    for index, size in enumerate(sizes):
        for stride in (1 if index == 0 else 2, 1):
            layers.append(basic_block(channels, size, stride))
            channels, side = size, -(-side // stride)
    if side < 4:
        raise ValueError(f"images of {list(shape)} are too small for this ResNet")
    features = channels * (side // 4) ** 2
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(features, outputs))


Builder = Callable[[Sequence[int], Sequence[int], int], nn.Module]
NETWORKS: dict[str, Builder] = {
    **ARCHITECTURES,
    "cnn": strided_cnn,
    "resnet18-reduced": reduced_resnet18,
    "mlp-bn": mlp_bn,
    "cnn-bn": cnn_bn,
    "lenet5": lenet5,
    "resnet18": resnet18,
    "vgg-like": vgg_like,
    "mobilenetv2": mobilenet_v2,
    "resnet32": resnet32,
    "zenkenet": zenkenet,
    "wrn10": wrn10,
    "wrn28": wrn28,
    "vit": vit,
}


def draw(
    name: str,
    shape: Sequence[int],
    hidden: Sequence[int],
    outputs: int,
    head_bias: bool,
    interventions: Sequence[Intervention],
    generator: torch.Generator,
) -> nn.Module:
    """A single `Classifier` of NETWORKS with what interventions build in, on the generator's device, drawn from it.

    Weights follow PyTorch's own law. Raises ValueError for an unknown name, images that are too small for it, or an
    intervention that cannot act there.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network '{name}', it is one of {', '.join(NETWORKS)}")
    layers = cast(nn.Sequential, NETWORKS[name](shape, hidden, outputs))
    head = cast(nn.Linear, layers[-1])
    head = head if head_bias else nn.Linear(head.in_features, outputs, bias=False)
    network: nn.Module = Classifier(layers[:-1], head)
    for intervention in interventions:
        network = intervention.build(network)
    for module in network.modules():
        if isinstance(module, Dropout):
            module.draw_from(generator)
    return draw_(network.to(generator.device), "torch", generator)
