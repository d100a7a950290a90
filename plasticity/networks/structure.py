"""What a network is made of, as those who intervene see it: hidden units, the weights in front of them and behind them.

Names are those of `named_parameters()` and `named_modules()`, the same for one network and for a stacked population.
`find_structure` reads them off the traced forward pass (`dataflow`), `activations` watches the units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from plasticity.networks import dataflow, rewriting


@dataclass(frozen=True)
class Reader:
    """A layer that reads hidden units: weight [out, in, ...].

    Unit i is read at the inputs offset + i * inputs_per_unit + j for j < inputs_per_unit (H * W behind a flattened
    convolution, else 1), and where the activation makes `copies` of the units (CReLU: 2) again at every further
    H * inputs_per_unit. offset is not 0 where the layer reads a concatenation in which the units do not come first.
    """

    weight: str
    bias: str | None
    inputs_per_unit: int = 1
    copies: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Hidden:
    """One layer of hidden units: weights -> [normaliser ->] nonlinearity -> readers.

    name: of the nonlinearity's module; its output are the activations: [B, H], of tokens [B, T, H], of convolutions
    [B, H, h, w]; with CReLU 2 H.
    weights: parameters [H, in, ...] that are summed into the pre-activation, nearly always one. biases: those added.
    normaliser: the last one before the nonlinearity, if all weights go through it. gain, offset: its own parameters.
    unit_axis: of the activations, counted from the end: -1 behind a linear layer, -3 behind a 2-d convolution.
    residual: the units are also added to later ones as they are, so their readers are not all that sees them.
    """

    name: str
    units: int
    nonlinearity: str  # "relu", "leaky_relu", "tanh", "gelu", "crelu", ...
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    normaliser: str | None
    gain: str | None
    offset: str | None
    readers: tuple[Reader, ...]
    residual: bool = False
    unit_axis: int = -1


@dataclass(frozen=True)
class Normalised:
    """Weights whose common scale normalisers remove: all multiplied by one c > 0, the network computes the same.

    weights: one, or several that are summed in front of a normaliser. biases: added there too; they must share c.
    batch: a normaliser is a BatchNorm.
    exact: False if what is normalised holds something that c does not reach (an activation or input in a residual sum),
    or if something else reads the sum before it is normalised.
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...]
    normalisers: tuple[str, ...]
    exact: bool
    batch: bool = False


@dataclass(frozen=True)
class Structure:
    """All hidden layers in the order of computation, and the weights that no nonlinearity follows (heads).

    inner: weights between which and the next weights no nonlinearity stands (attention, factorised layers). tables:
    looked up or added, not multiplied (embeddings, positions). normalised: the scale-invariant groups; a weight may be
    there and in one of the other lists. transposed: weights stored as [..., in, out], in layers of one's own.
    """

    hidden: tuple[Hidden, ...]
    heads: tuple[str, ...]
    inner: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    normalised: tuple[Normalised, ...] = ()
    transposed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A table: one line a hidden layer, then the heads."""
        rows: list[tuple[str, ...]] = [
            ("hidden layer", "units", "nonlinearity", "weights", "biases", "normaliser", "read by")
        ]
        for layer in self.hidden:
            readers = [_reader_text(reader) for reader in layer.readers] + ["(residual)"] * layer.residual
            texts = (layer.weights, layer.biases, (layer.normaliser or "",), readers)
            rows.append((layer.name, str(layer.units), layer.nonlinearity, *(", ".join(t) or "-" for t in texts)))
        others = {"heads": self.heads, "inner": self.inner, "tables": self.tables}
        return "\n".join([table(rows), *(f"{name}: {', '.join(names)}" for name, names in others.items() if names)])


def _reader_text(reader: Reader) -> str:
    times = f" x{reader.copies}" if reader.copies > 1 else ""
    per_unit = f" ({reader.inputs_per_unit} inputs a unit)" if reader.inputs_per_unit > 1 else ""
    return f"{reader.weight}{times}{per_unit}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of equal length as lines of aligned columns, the first row as the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def find_structure(network: nn.Module, example: Tensor | tuple[Tensor, ...] | None = None) -> Structure:
    """The structure of any network that `torch.fx` can trace: one or a stacked population.

    example: inputs of the forward pass, only needed where hidden units are concatenated with something whose width the
    layers do not tell. A nonlinearity that is a function call, or a module called twice, is named as
    `explicit_nonlinearities` would name it. Raises ValueError, naming the module, if it cannot be traced, if a layer or
    operation between weights is not known, or if there is no nonlinearity between weights.
    """
    flow = dataflow.analyse(network, example)
    hidden = tuple(
        Hidden(
            name=site.name,
            units=site.units,
            nonlinearity=site.nonlinearity,
            weights=flow.weights(site.layers),
            biases=flow.biases(site.layers),
            normaliser=None if site.norm is None else site.norm.name,
            gain=None if site.norm is None else site.norm.gain,
            offset=None if site.norm is None else site.norm.offset,
            readers=tuple(Reader(*reader) for reader in site.readers),
            residual=site.residual,
            unit_axis=-1 - site.pixel_axes,
        )
        for site in flow.hidden
    )
    normalised = tuple(
        Normalised(flow.weights(group.layers), flow.biases(group.layers), group.normalisers, group.exact, group.batch)
        for group in flow.groups()
    )
    known = {name for layer in hidden for name in layer.weights}
    heads = tuple(name for name in flow.weights(flow.heads) if name not in known)
    tables = tuple(name for layer in flow.layers if layer.table for name in layer.weights)
    rest = flow.weights(range(len(flow.layers)))
    inner = tuple(name for name in rest if name not in known.union(heads, tables))
    return Structure(hidden, heads, inner, tables, normalised, tuple(sorted(flow.transposed)))


@contextmanager
def activations(network: nn.Module, structure: Structure) -> Iterator[dict[str, Tensor]]:
    """Within the context each forward pass of `network` leaves the outputs of its nonlinearities in the dict, by
    `Hidden.name`, detached: [B, H, ...], of a population [K, B, H, ...].

    Raises ValueError if a nonlinearity is no module of its own: see `explicit_nonlinearities`.
    """
    seen: dict[str, Tensor] = {}
    handles = watch(network, structure, seen)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def watch(
    network: nn.Module, structure: Structure, seen: dict[str, Tensor], only_with_gradients: bool = False
) -> list[RemovableHandle]:
    """As `activations`, into `seen`, until the handles are removed.

    only_with_gradients: not in forward passes under `torch.no_grad`.
    """
    modules = dict(network.named_modules())
    missing = [layer.name for layer in structure.hidden if layer.name not in modules]
    if missing:
        raise ValueError(
            f"the nonlinearity '{missing[0]}' is no module of its own, so its output cannot be watched; "
            "pass the network through explicit_nonlinearities first"
        )

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if torch.is_grad_enabled() or not only_with_gradients:
                seen[name] = output.detach()

        return keep

    return [modules[layer.name].register_forward_hook(keeper(layer.name)) for layer in structure.hidden]


def explicit_nonlinearities(network: nn.Module) -> nn.Module:
    """The same network, in which every nonlinearity is a module of its own and called once.

    Returns `network` itself if that is so already. Else a `torch.fx.GraphModule` with the same parameters and modules
    (shared, not copied) in which each functional nonlinearity, and each further call of a module, has become a module;
    it has the forward pass only, no other methods. Raises ValueError if the network cannot be traced.
    """
    return rewriting.explicit_nonlinearities(network)
