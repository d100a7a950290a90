"""Other nonlinearities between the weights, in the same network.

crelu         [relu(x), relu(-x)]         Abbas et al. 2023, arXiv:2303.07507; all hidden layers narrower by one
                                          factor, so that the number of parameters stays (Kumar et al. 2023)
fourier       [sin x, cos x]              Lewandowski et al. 2024, arXiv:2410.20634; half the units
activation    tanh, gelu, elu, ...        torch's own
leaky-relu    max(x, a x)
smooth-leaky  a x + (1 - a) x sigmoid(c x / p)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from plasticity.intervention import Intervention
from plasticity.networks.nonlinearities import CReLU, Fourier, SmoothLeakyReLU
from plasticity.networks.structure import Hidden, Structure, explicit_nonlinearities, find_structure
from plasticity.networks.tracing import is_normaliser

KINDS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "elu": nn.ELU, "selu": nn.SELU, "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish,
    "softplus": nn.Softplus, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
}  # fmt: skip


@dataclass
class WithActivation(Intervention):
    """Torch's own nonlinearity instead of the network's."""

    kind: str = "tanh"
    """relu, elu, selu, gelu, silu, mish, softplus, tanh or sigmoid"""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of activation must be one of {', '.join(KINDS)}, got {self.kind}")

    def build(self, network: nn.Module) -> nn.Module:
        return replace_nonlinearities(network, lambda axis: KINDS[self.kind]())


@dataclass
class WithLeakyReLU(Intervention):
    """Units that learn on both sides of 0."""

    slope: float = 0.01
    """a, below 0; up to 0.1"""

    def build(self, network: nn.Module) -> nn.Module:
        return replace_nonlinearities(network, lambda axis: nn.LeakyReLU(self.slope))


@dataclass
class WithSmoothLeakyReLU(Intervention):
    """A leaky ReLU without its corner."""

    slope: float = 0.1
    """a"""
    sharpness: float = 5.0
    """c"""
    width: float = 3.0
    """p"""

    def build(self, network: nn.Module) -> nn.Module:
        return replace_nonlinearities(network, lambda axis: SmoothLeakyReLU(self.slope, self.sharpness, self.width))


@dataclass
class WithCReLU(Intervention):
    """Both halves of each unit; one of them always learns."""

    keep: Literal["parameters", "units"] = "parameters"
    """what stays as it was: about the number of parameters, with fewer units; or the units, with more parameters"""

    def __post_init__(self) -> None:
        if self.keep not in ("parameters", "units"):
            raise ValueError(f"keep of crelu must be parameters or units, got {self.keep}")

    def build(self, network: nn.Module) -> nn.Module:
        network = explicit_nonlinearities(network)
        plan = _Resizing(network, copies=2)
        plan.apply(plan.scale_keeping_parameters() if self.keep == "parameters" else 1.0)
        return replace_nonlinearities(network, CReLU)


@dataclass
class WithFourier(Intervention):
    """Sine and cosine of each unit; half as many units, so that the next layer reads as much as before."""

    def build(self, network: nn.Module) -> nn.Module:
        network = explicit_nonlinearities(network)
        _Resizing(network, copies=2).apply(0.5)
        return replace_nonlinearities(network, Fourier)


def replace_nonlinearities(network: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """The network with `make(axis of units)` for each nonlinearity between weights. Changes it in place if it can."""
    network = explicit_nonlinearities(network)
    for layer in find_structure(network).hidden:
        axis = 1 if network.get_parameter(layer.weights[0]).dim() > 2 else -1
        network.set_submodule(layer.name, make(axis))
    return network


class _Resizing:
    """All hidden layers of a network to be made narrower by one factor, each unit to be read `copies` times.

    Raises ValueError if widths cannot be told apart.
    """

    def __init__(self, network: nn.Module, copies: int):
        self.network, self.copies = network, copies
        self.structure: Structure = find_structure(network)
        known = {layer.normaliser for layer in self.structure.hidden}
        for name, module in network.named_modules():
            if is_normaliser(module) and name not in known:
                raise ValueError(f"normaliser '{name}' does not stand before a nonlinearity, so its width is not known")
        for layer in self.structure.hidden:
            if layer.residual:
                raise ValueError(f"the units of '{layer.name}' enter a residual sum, which cannot take them twice")
            for weight in (*layer.weights, *(reader.weight for reader in layer.readers)):
                owner = network.get_submodule(weight.rpartition(".")[0])
                if type(owner) not in (nn.Linear, nn.Conv2d) or getattr(owner, "groups", 1) != 1:
                    raise ValueError(f"the width of '{weight}' cannot be changed: only ordinary Linear and Conv2d can")

    def scale_keeping_parameters(self) -> float:
        """The common factor of all widths with the number of parameters nearest to the present one."""
        widest = max(layer.units for layer in self.structure.hidden)
        before = sum(p.numel() for p in self.network.parameters())
        return min((i / widest for i in range(1, widest + 1)), key=lambda scale: abs(self.count(scale) - before))

    def count(self, scale: float) -> int:
        """Number of parameters with all widths scaled."""
        total: dict[str, tuple[int, ...]] = {name: tuple(p.shape) for name, p in self.network.named_parameters()}
        for name, module, outputs, inputs in self._changes(scale):
            total.update({f"{name}.{own}": shape for own, shape in _shapes(module, outputs, inputs).items()})
        return sum(math.prod(shape) for shape in total.values())

    def apply(self, scale: float) -> None:
        """Change the layers in place, with new parameters."""
        for _, module, outputs, inputs in self._changes(scale):
            _resize(module, outputs, inputs)

    def _changes(self, scale: float) -> Iterator[tuple[str, nn.Module, int, int]]:
        """Layers and normalisers with their new numbers of outputs and inputs."""
        outputs: dict[str, int] = {}
        inputs: dict[str, int] = {}
        for layer in self.structure.hidden:
            units = max(1, round(scale * layer.units))
            owners = [weight.rpartition(".")[0] for weight in layer.weights]
            outputs.update(dict.fromkeys([*owners, *self._normaliser(layer)], units))
            for reader in layer.readers:
                name = reader.weight.rpartition(".")[0]
                change = (self.copies * units - reader.copies * layer.units) * reader.inputs_per_unit
                inputs[name] = inputs.get(name, 0) + change
        for name in {**outputs, **inputs}:
            module: Any = self.network.get_submodule(name)
            weight = getattr(module, "weight", None)
            has = weight.shape if weight is not None else (outputs.get(name, 0),)
            yield name, module, outputs.get(name, has[0]), (has[1] if len(has) > 1 else 0) + inputs.get(name, 0)

    @staticmethod
    def _normaliser(layer: Hidden) -> list[str]:
        return [layer.normaliser] if layer.normaliser is not None else []


def _shapes(module: Any, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """The parameters of a layer or normaliser with other numbers of outputs and inputs."""
    is_layer = isinstance(module, nn.Linear | nn.Conv2d)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    return {
        name: (outputs, inputs, *shape[2:]) if is_layer and name == "weight" else (outputs, *shape[1:])
        for name, shape in shapes.items()
    }


def _resize(module: Any, outputs: int, inputs: int) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = outputs, inputs
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = outputs, inputs
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = (outputs, *module.normalized_shape[1:])
    elif isinstance(module, nn.GroupNorm):
        if outputs % module.num_groups:
            raise ValueError(f"{outputs} units cannot be normalised in {module.num_groups} groups")
        module.num_channels = outputs
    elif not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        raise ValueError(f"the width of a {type(module).__name__} cannot be changed")
    else:
        module.num_features = outputs
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.dim():
                setattr(module, name, buffer.new_zeros(outputs))
    for name, shape in _shapes(module, outputs, inputs).items():
        setattr(module, name, nn.Parameter(getattr(module, name).new_empty(shape)))
    with torch.random.fork_rng():  # valid values until the real ones are drawn
        module.reset_parameters()
