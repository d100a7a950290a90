"""K networks of one architecture as one network: every parameter and buffer gets a leading axis of K members.

`stack` turns K ordinary networks into one `nn.Module` that maps [K, B, ...] to [K, B, ...]. Parameters keep their
names, so what is written for the parameters of one network (`structure`) holds for the stacked ones. Known
layers run as one batched product or one grouped convolution, a layer of one's own through the module that its static
method `stacked` makes of K such layers, anything else through `torch.func.vmap`. Members never mix: member k of the
result is what network k alone would give.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F


def stack(networks: Sequence[nn.Module]) -> nn.Module:
    """One network of K members out of K of the same architecture, whose values it copies.

    Maps x [K, B, *inputs] to [K, B, *outputs]. Raises ValueError if there is none or if their parameters differ in name
    or shape.
    """
    if not networks:
        raise ValueError("stack needs at least one network")
    shapes = [{name: t.shape for name, t in _tensors(network).items()} for network in networks]
    different = next((k for k, shape in enumerate(shapes) if shape != shapes[0]), None)
    if different is not None:
        raise ValueError(f"networks 0 and {different} have other parameters; stack needs one architecture")
    return _stacked(list(networks))


def member(network: nn.Module, template: nn.Module, index: int) -> nn.Module:
    """An ordinary network with the values of one member of `network`. template: a network of that architecture."""
    single = copy.deepcopy(template)
    own, all_members = _tensors(single), _tensors(network)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(all_members[name][index])
    return single


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _stacked(networks: list[nn.Module]) -> nn.Module:
    first = networks[0]
    if type(first) in (nn.Sequential, nn.ModuleList):
        names = [name for name, _ in first.named_children()]
        children = {name: _stacked([network.get_submodule(name) for network in networks]) for name in names}
        whole = type(first)()
        for name, child in children.items():
            whole.add_module(name, child)
        return whole.train(first.training)
    make = _LAYERS.get(type(first)) or getattr(type(first), "stacked", None)
    if make is not None:
        return make(networks).train(first.training)
    if isinstance(first, ELEMENTWISE) and not _tensors(first):
        whole = copy.deepcopy(first)
        if getattr(whole, "inplace", False):
            # Layers before it return views, and autograd copies a view that is written to, and its gradient.
            whole.inplace = False  # type: ignore[assignment]
        return whole
    return Vmapped(networks).train(first.training)


def _parameter(tensors: Sequence[Any]) -> nn.Parameter | None:
    """The same parameter of all members, stacked; None where a layer goes without it."""
    if tensors[0] is None:
        return None
    frozen = not tensors[0].requires_grad
    return nn.Parameter(torch.stack([t.detach() for t in tensors]), requires_grad=not frozen)


# Layers that do the same to each number wherever it stands, and so need no stacked form.
ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Mish,
)  # fmt: skip


class StackedLinear(nn.Module):
    """K linear layers: weight [K, out, in], bias [K, out]; [K, B, ..., in] -> [K, B, ..., out]."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.weight = cast(nn.Parameter, _parameter([layer.weight for layer in layers]))
        self.bias = _parameter([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """K linear maps: x [K, B, ..., in], weight [K, out, in], bias [K, out] -> [K, B, ..., out]."""
    rows = x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
    # W xᵀ, not x Wᵀ: its gradient then has the layout of W, and adding the one to the other takes half the time.
    if bias is None:
        y = torch.bmm(weight, rows.mT).mT
    else:
        y = torch.baddbmm(bias.unsqueeze(2), weight, rows.mT).mT
    return y if x.dim() == 3 else y.reshape(*x.shape[:-1], y.shape[-1])


class StackedConv2d(nn.Module):
    """K convolutions as one grouped one: weight [K, O, I, h, w], bias [K, O]; [K, B, I, H, W] -> [K, B, O, H', W']."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        first = cast(nn.Conv2d, layers[0])
        if first.padding_mode != "zeros" or isinstance(first.padding, str):
            raise ValueError("a stacked convolution needs zeros as padding, given as numbers")
        self.weight = cast(nn.Parameter, _parameter([layer.weight for layer in layers]))
        self.bias = _parameter([layer.bias for layer in layers])
        self.stride, self.padding = first.stride, cast(tuple[int, int], first.padding)
        self.dilation, self.groups = first.dilation, first.groups

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """K convolutions as one grouped one: x [K, B, I, H, W], weight [K, O, I, h, w], bias [K, O] -> [K, B, O, ...]."""
    members, batch = x.shape[:2]
    images = x.transpose(0, 1).reshape(batch, -1, *x.shape[3:])
    bias = None if bias is None else bias.flatten()
    y = F.conv2d(images, weight.flatten(0, 1), bias, stride, padding, dilation, groups * members)
    return y.view(batch, members, -1, *y.shape[2:]).transpose(0, 1)


class StackedLayerNorm(nn.Module):
    """K layer normalisations: gain and offset [K, *normalised]; [K, B, ..., *normalised] keeps its shape."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        first = cast(nn.LayerNorm, layers[0])
        self.normalized_shape, self.eps = first.normalized_shape, first.eps
        self.weight = _parameter([layer.weight for layer in layers])
        self.bias = _parameter([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        return _affine(y, self.weight, self.bias, x.dim() - 1 - len(self.normalized_shape))


class StackedRMSNorm(nn.Module):
    """K root-mean-square normalisations: gain [K, *normalised]."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        first = cast(nn.RMSNorm, layers[0])
        self.normalized_shape, self.eps = first.normalized_shape, first.eps
        self.weight = _parameter([layer.weight for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, list(self.normalized_shape), eps=self.eps)
        return _affine(y, self.weight, None, x.dim() - 1 - len(self.normalized_shape))


class StackedGroupNorm(nn.Module):
    """K group normalisations: gain and offset [K, C]; [K, B, C, ...] keeps its shape."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        first = cast(nn.GroupNorm, layers[0])
        self.num_groups, self.eps = first.num_groups, first.eps
        self.weight = _parameter([layer.weight for layer in layers])
        self.bias = _parameter([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(x.flatten(0, 1), self.num_groups, eps=self.eps).view(x.shape)
        gain, offset = (None if t is None else t.view(*t.shape, *[1] * (x.dim() - 3)) for t in (self.weight, self.bias))
        return _affine(y, gain, offset, 1)


def _affine(y: Tensor, gain: Tensor | None, offset: Tensor | None, batch_axes: int) -> Tensor:
    """y [K, *batch, *rest] times gain [K, *rest], plus offset."""
    shaped = [t if t is None else t.view(t.shape[0], *[1] * batch_axes, *t.shape[1:]) for t in (gain, offset)]
    y = y if shaped[0] is None else y * shaped[0]
    return y if shaped[1] is None else y + shaped[1]


class StackedBatchNorm(nn.Module):
    """K batch normalisations, each over its own batch: gain, offset and running statistics [K, C]; [K, B, C, ...]."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        first = cast(nn.BatchNorm2d, layers[0])
        if first.momentum is None:
            raise ValueError("a stacked BatchNorm needs a momentum")
        self.eps, self.momentum = first.eps, first.momentum
        self.weight = _parameter([layer.weight for layer in layers])
        self.bias = _parameter([layer.bias for layer in layers])
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffers = [getattr(layer, name) for layer in layers]
            self.register_buffer(name, None if buffers[0] is None else torch.stack(buffers))

    def forward(self, x: Tensor) -> Tensor:
        members, batch = x.shape[:2]
        channels = x.transpose(0, 1).reshape(batch, -1, *x.shape[3:])
        mean, var = cast(Tensor | None, self.running_mean), cast(Tensor | None, self.running_var)
        if self.training and mean is not None:
            cast(Tensor, self.num_batches_tracked).add_(1)
        mean, var = (None if t is None else t.view(-1) for t in (mean, var))
        gain, offset = (None if t is None else t.reshape(-1) for t in (self.weight, self.bias))
        y = F.batch_norm(channels, mean, var, gain, offset, self.training or mean is None, self.momentum, self.eps)
        return y.view(batch, members, -1, *y.shape[2:]).transpose(0, 1)


class StackedFlatten(nn.Module):
    """`nn.Flatten` behind the axis of members."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        first = cast(nn.Flatten, layers[0])
        self.start = first.start_dim + 1 if first.start_dim >= 0 else first.start_dim
        self.end = first.end_dim + 1 if first.end_dim >= 0 else first.end_dim

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(self.start, self.end)


class PerImage(nn.Module):
    """A layer without parameters that takes [B, C, H, W], such as a pooling, on [K, B, C, H, W]."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layer = copy.deepcopy(layers[0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.flatten(0, 1))
        return y.unflatten(0, x.shape[:2])


class Vmapped(nn.Module):
    """Any module of which K exist, run through `torch.func.vmap`. Parameters and buffers keep their names.

    Its submodules only hold parameters, but a forward hook on one of them is called with the stacked output.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        tensors = [_tensors(network) for network in networks]
        values = {name: torch.stack([t[name].detach() for t in tensors]) for name in tensors[0]}
        trains = dict(networks[0].named_parameters())
        skeleton = copy.deepcopy(networks[0]).to("meta")
        self._skeleton = [skeleton]  # in a list, so that its own parameters do not count
        holders: dict[str, nn.Module] = {"": self}
        for name, module in networks[0].named_modules():
            if name:
                holders[name] = nn.Module()
                parent, _, last = name.rpartition(".")
                holders[parent].add_module(last, holders[name])
            del module
        for name, value in values.items():
            parent, _, last = name.rpartition(".")
            if name in trains:
                parameter = nn.Parameter(value, requires_grad=trains[name].requires_grad)
                holders[parent].register_parameter(last, parameter)
            else:
                holders[parent].register_buffer(last, value)

    @property
    def skeleton(self) -> nn.Module:
        """An ordinary network without values: the architecture."""
        return self._skeleton[0]

    def forward(self, x: Tensor) -> Tensor:
        skeleton = self.skeleton.train(self.training)
        hooked = {name: module for name, module in self.named_modules() if name and module._forward_hooks}

        def one(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            outputs: dict[str, Tensor] = {}
            with ExitStack() as hooks:
                for name in hooked:
                    keep = functools.partial(_keep_output, outputs, name)
                    hooks.callback(skeleton.get_submodule(name).register_forward_hook(keep).remove)
                return functional_call(skeleton, tensors, (x,)), outputs

        y, outputs = vmap(one, randomness="different")(_tensors(self), x)
        for name, module in hooked.items():
            for hook in module._forward_hooks.values():
                hook(module, (), outputs[name])
        return y


def _keep_output(outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    outputs[name] = output


_LAYERS: dict[type[nn.Module], Callable[[Sequence[nn.Module]], nn.Module]] = {
    nn.Linear: StackedLinear,
    nn.Conv2d: StackedConv2d,
    nn.LayerNorm: StackedLayerNorm,
    nn.RMSNorm: StackedRMSNorm,
    nn.GroupNorm: StackedGroupNorm,
    nn.BatchNorm1d: StackedBatchNorm,
    nn.BatchNorm2d: StackedBatchNorm,
    nn.Flatten: StackedFlatten,
    nn.MaxPool2d: PerImage,
    nn.AvgPool2d: PerImage,
    nn.AdaptiveAvgPool2d: PerImage,
}
