"""Normalisation before every nonlinearity, put into a network that has none.

`Normalise` is the intervention (`layernorm`, `rmsnorm`); `plasticity.nap` builds on `convert`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plasticity.intervention import Intervention
from plasticity.networks import dataflow, stacked, tracing
from plasticity.networks.rewriting import explicit_nonlinearities

Kind = Literal["layer", "rms"]


class ImageRMSNorm(nn.Module):
    """Each image divided by its root mean square over channels and pixels: [..., C, H, W] keeps its shape.

    weight: gains [C], [K, C] of a population; None without.
    """

    normaliser = True
    own_axes = 1

    def __init__(self, channels: int, epsilon: float, gain: bool, dtype: torch.dtype | None = None):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(channels, dtype=dtype)) if gain else None

    def reset_parameters(self) -> None:
        """Gains of 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, x.shape[-3:], eps=self.epsilon)
        if self.weight is None:
            return y
        channels = self.weight.unsqueeze(-2) if self.weight.dim() == 2 else self.weight
        return y * channels[..., None, None]

    @staticmethod
    def stacked(layers: Sequence[nn.Module]) -> nn.Module:
        """Of K layers, for [K, B, C, H, W]."""
        first = cast(ImageRMSNorm, layers[0])
        whole = ImageRMSNorm(1, first.epsilon, gain=False)
        if first.weight is not None:
            whole.weight = nn.Parameter(torch.stack([cast(Tensor, layer.weight).detach() for layer in layers]))
        return whole


def convert(
    network: nn.Module,
    kind: Kind = "layer",
    gains: bool = False,
    epsilon: float = 1e-5,
    replace_batch_norm: bool = False,
) -> nn.Module:
    """A copy of the network with a normaliser before each nonlinearity that has none, and without the biases in front.

    Behind a linear layer it is LayerNorm or RMSNorm over the features, behind a convolution the same for each sample
    over channels and pixels (GroupNorm with one group). Normalisers that the network has stay, those in front of
    nonlinearities without their gains and offsets unless `gains`. In an `nn.Sequential` the normaliser of the
    nonlinearity NAME is NAME_norm; elsewhere the nonlinearity becomes `Sequential(norm, act)`. Where it is a function
    call the result is a `torch.fx.GraphModule`, see `explicit_nonlinearities`.
    replace_batch_norm: put GroupNorm(1) in the place of each BatchNorm.

    Raises ValueError if `find_structure` does, and for a population: convert its members.
    """
    if any(isinstance(module, stacked.Vmapped) for module in network.modules()):
        raise ValueError("a population cannot be converted: convert the network, then stack it")
    network = explicit_nonlinearities(copy.deepcopy(network))
    if replace_batch_norm:
        _replace_batch_norm(network, epsilon)
    for site in dataflow.analyse(network).hidden:
        if site.bare:
            _insert(network, site, kind, gains, epsilon)
    flow = dataflow.analyse(network)
    for name in flow.biases(layer for group in flow.groups() for layer in group.layers):
        owner, _, last = name.rpartition(".")
        if tracing.is_linear(network.get_submodule(owner)):
            network.get_submodule(owner).register_parameter(last, None)
    modules = dict(network.named_modules())
    for norm in () if gains else (site.norm for site in flow.hidden):
        if norm is not None and norm.name in modules:
            _without_gain(modules[norm.name])
    return network


def _insert(network: nn.Module, site: dataflow.Site, kind: Kind, gains: bool, epsilon: float) -> None:
    weight = network.get_parameter(site.weight)
    owner = network.get_submodule(site.weight.rpartition(".")[0])
    norm: nn.Module
    with weight.device:
        if not site.pixel_axes:
            layer = nn.LayerNorm if kind == "layer" else nn.RMSNorm
            norm = layer(site.units, epsilon, gains, dtype=weight.dtype)
        elif kind == "layer":
            norm = nn.GroupNorm(1, site.units, epsilon, gains, dtype=weight.dtype)
        else:
            norm = ImageRMSNorm(site.units, epsilon, gains, weight.dtype)
    if isinstance(owner, stacked.StackedLinear | stacked.StackedConv2d):
        norm = stacked.stack([norm] * weight.shape[0])
    put_before(network, site.name, norm)


def put_before(network: nn.Module, name: str, norm: nn.Module) -> None:
    """Let `norm` act in front of the nonlinearity `name`, see `convert`."""
    act = network.get_submodule(name)
    norm.train(act.training)
    parent, _, last = name.rpartition(".")
    holder = network.get_submodule(parent)
    if type(holder) is nn.Sequential:
        children = list(holder.named_children())
        place = [name for name, _ in children].index(last)
        holder._modules = dict([*children[:place], (f"{last}_norm", norm), *children[place:]])
    else:
        holder.add_module(last, nn.Sequential(OrderedDict(norm=norm, act=act)).train(act.training))


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    network.get_submodule(parent).add_module(last, module)


def _replace_batch_norm(network: nn.Module, epsilon: float) -> None:
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            norm = nn.GroupNorm(1, module.num_features, epsilon, module.affine).train(module.training)
            _put(network, name, norm if module.weight is None else norm.to(module.weight))


def _without_gain(norm: nn.Module) -> None:
    for name in ("weight", "bias"):
        if getattr(norm, name, None) is not None:
            norm.register_parameter(name, None)
    for flag in ("affine", "elementwise_affine"):
        if hasattr(norm, flag):
            setattr(norm, flag, False)


class Normalise(Intervention):
    """Normalisation before every nonlinearity, with free gains and (LayerNorm) offsets, and nothing else."""

    def __init__(self, kind: Kind = "layer", epsilon: float = 1e-5):
        self.kind: Kind = kind
        self.epsilon = epsilon

    def build(self, network: nn.Module) -> nn.Module:
        return convert(network, self.kind, gains=True, epsilon=self.epsilon)
