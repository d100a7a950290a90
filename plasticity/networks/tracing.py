"""The forward pass of a network as a graph of calls, by `torch.fx`, and which calls are what."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from plasticity.networks import stacked

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, stacked.StackedLinear, stacked.StackedConv2d)
NORMALISERS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    stacked.StackedLayerNorm, stacked.StackedRMSNorm, stacked.StackedGroupNorm, stacked.StackedBatchNorm,
)  # fmt: skip
# Layers behind which unit i is still unit i.
PASSING = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.Upsample,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.ZeroPad2d, stacked.StackedFlatten, stacked.PerImage,
)  # fmt: skip
NONLINEARITIES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.LeakyReLU: "leaky_relu", nn.PReLU: "prelu", nn.ELU: "elu", nn.SELU: "selu",
    nn.CELU: "celu", nn.GELU: "gelu", nn.SiLU: "silu", nn.Mish: "mish", nn.Softplus: "softplus", nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid", nn.Hardtanh: "hardtanh", nn.Hardswish: "hardswish", nn.Softsign: "softsign",
    nn.LogSigmoid: "logsigmoid", nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax",
}  # fmt: skip
_NONLINEAR_NAMES = {*NONLINEARITIES.values(), "sin", "cos"}
FUNCTIONS: dict[Any, str] = {
    getattr(module, name + ending): name
    for module in (torch, F)
    for name in _NONLINEAR_NAMES
    for ending in ("", "_")
    if hasattr(module, name + ending)
}
METHODS = {name + ending: name for name in _NONLINEAR_NAMES for ending in ("", "_") if hasattr(Tensor, name + ending)}
FUNCTIONAL_NORMALISERS = {F.layer_norm, F.rms_norm, F.group_norm, F.instance_norm, F.batch_norm}
# Where a weight stands among the arguments of a product, and whether it must be transposed to be [out, in].
PRODUCTS: dict[Any, tuple[int, int, int | None, bool]] = {  # data, weight, bias, weight is [in, out]
    F.linear: (0, 1, 2, False), F.conv1d: (0, 1, 2, False), F.conv2d: (0, 1, 2, False), F.conv3d: (0, 1, 2, False),
    torch.matmul: (0, 1, None, True), operator.matmul: (0, 1, None, True), torch.mm: (0, 1, None, True),
    torch.bmm: (0, 1, None, True), torch.addmm: (1, 2, 0, True), torch.baddbmm: (1, 2, 0, True),
    torch.linalg.vecdot: (0, 1, None, False), "matmul": (0, 1, None, True), "mm": (0, 1, None, True),
    "bmm": (0, 1, None, True),
}  # fmt: skip


def nonlinearity_of(module: nn.Module) -> str | None:
    """Its name, or None. A module of one's own is one if it has an attribute `nonlinearity` with the name."""
    return getattr(module, "nonlinearity", None) or NONLINEARITIES.get(type(module))


def _encoder_layer(m: nn.TransformerEncoderLayer, x: Tensor, **masks: Any) -> Tensor:
    """What `nn.TransformerEncoderLayer` computes without masks; its own forward pass cannot be traced."""
    _without_masks(masks)

    def attend(x: Tensor) -> Tensor:
        return m.dropout1(m.self_attn(x, x, x, need_weights=False)[0])

    def feed_forward(x: Tensor) -> Tensor:
        return m.dropout2(m.linear2(m.dropout(m.activation(m.linear1(x)))))  # type: ignore[operator]

    if m.norm_first:
        x = x + attend(m.norm1(x))
        return x + feed_forward(m.norm2(x))
    x = m.norm1(x + attend(x))
    return m.norm2(x + feed_forward(x))


def _encoder(m: nn.TransformerEncoder, x: Tensor, **masks: Any) -> Tensor:
    """What `nn.TransformerEncoder` computes without masks."""
    _without_masks(masks)
    for layer in m.layers:
        x = layer(x)
    return x if m.norm is None else m.norm(x)


def _without_masks(masks: dict[str, Any]) -> None:
    if any(mask is not None and mask is not False for mask in masks.values()):
        raise ValueError("a transformer encoder can be read without masks only")


# A module whose forward pass depends on shapes may offer one that does not, for a single network, under this name.
_STRAIGHT = "straight_forward"
_PLAIN_FORWARD: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
}


def is_normaliser(module: nn.Module) -> bool:
    """A module of one's own is one if it has an attribute `normaliser` that is true: it removes its input's scale, but
    for what depends on it nevertheless if it has `keeps_scale`."""
    return isinstance(module, NORMALISERS) or getattr(module, "normaliser", False)


def is_batch_normaliser(module: nn.Module) -> bool:
    """Its statistics are those of a batch. A module of one's own is one if it has a true `normalises_batch`."""
    return "BatchNorm" in type(module).__name__ or getattr(module, "normalises_batch", False)


_AXES: dict[type[nn.Module], int] = {
    nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5, nn.Embedding: 2, nn.GroupNorm: 1,
    stacked.StackedLinear: 2, stacked.StackedConv2d: 4, stacked.StackedGroupNorm: 1,
}  # fmt: skip


def own_axes(layer: nn.Module, name: str) -> int | None:
    """How many axes a parameter of a single layer of this type has; None if neither the type nor an attribute
    `own_axes` tells."""
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm | stacked.StackedLayerNorm | stacked.StackedRMSNorm):
        return len(layer.normalized_shape)
    if isinstance(layer, nn.MultiheadAttention):
        return 2 if name.endswith("weight") else 1
    axes = next((axes for kind, axes in _AXES.items() if isinstance(layer, kind)), getattr(layer, "own_axes", None))
    return 1 if axes is not None and name.endswith("bias") else axes


def leading_axes(network: nn.Module, members: int | None = None) -> dict[str, int]:
    """How many axes of members stand in front of each parameter, by name: those beyond what its layer has.

    Where the layer does not tell: one in a population, none (members None) of an ordinary network.
    """
    modules = dict(opened(network).named_modules())
    found = {}
    for name, parameter in network.named_parameters():
        owner, _, last = name.rpartition(".")
        own = own_axes(modules[owner], last)
        found[name] = (0 if members is None else 1) if own is None else parameter.dim() - own
    return found


def is_linear(module: nn.Module) -> bool:
    """A module of one's own is one if it has an attribute `inputs_axis`: the axis of `weight` that is read, from the
    end; the other of the last two are outputs."""
    return isinstance(module, LINEAR) or hasattr(module, "inputs_axis")


class _Tracer(fx.Tracer):
    """Knows our leaf modules, and remembers the innermost module in which tracing failed."""

    failed: str | None = None

    def __init__(self, root: nn.Module):
        super().__init__()
        self.traced_func_name = _STRAIGHT if hasattr(root, _STRAIGHT) else "forward"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in _PLAIN_FORWARD:
            return False
        known = is_linear(m) or isinstance(m, PASSING) or is_normaliser(m) or nonlinearity_of(m) is not None
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        plain = _PLAIN_FORWARD.get(type(m)) or getattr(type(m), _STRAIGHT, None)
        try:
            return super().call_module(m, forward if plain is None else partial(plain, m), args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def trace(network: nn.Module, example: Tensor | tuple[Tensor, ...] | None = None) -> fx.GraphModule:
    """The calls of the forward pass; with `example`, each node knows its output's shape (`meta["tensor_meta"]`).

    Raises ValueError naming the module that cannot be traced.
    """
    network = opened(network)
    tracer = _Tracer(network)
    try:
        graph = tracer.trace(network, _settings(network))
    except Exception as error:
        where = f"module '{tracer.failed}'" if tracer.failed else f"the forward pass of {type(network).__name__}"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{where} cannot be traced by torch.fx: {reason}") from error
    module = fx.GraphModule(network, graph)
    if example is not None:
        inputs = example if isinstance(example, tuple) else (example,)
        training = [part for part in network.modules() if part.training]
        for part in training:  # running statistics stay as they are
            part.training = False
        with torch.no_grad(), torch.random.fork_rng():
            ShapeProp(module).propagate(*inputs)
        for part in training:
            part.training = True
    return module


def _settings(network: nn.Module) -> dict[str, Any]:
    """Arguments of the forward pass that are switches, at their defaults: a graph cannot branch on them."""
    parameters = inspect.signature(getattr(network, _STRAIGHT, network.forward)).parameters.values()
    return {
        p.name: p.default for p in parameters if p.default is None or isinstance(p.default, bool | int | float | str)
    }


def opened(network: nn.Module) -> nn.Module:
    """The network with each member-wise run part of a population replaced by the one network that it runs."""
    if isinstance(network, stacked.Vmapped):
        return network.skeleton
    if not any(isinstance(module, stacked.Vmapped) for module in network.modules()):
        return network
    whole = nn.Sequential()
    for name, child in network.named_children():  # `stacked.stack` nests them in nn.Sequential only
        whole.add_module(name, opened(child))
    return whole


def argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument of a call given by position or by name; None if it was left out."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)
