"""What a network is made of, as those who intervene see it: hidden units, the weights in front of them and behind them.

Names are those of `named_parameters()` and `named_modules()`, the same for one network and for a stacked population.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reader:
    """A layer that reads hidden units: weight [out, in, ...].

    Unit i is read at the inputs i * inputs_per_unit + j for j < inputs_per_unit (H * W behind a flattened convolution,
    else 1), and where the activation makes `copies` of the units (CReLU: 2) again at every further H * inputs_per_unit.
    """

    weight: str
    bias: str | None
    inputs_per_unit: int = 1
    copies: int = 1


@dataclass(frozen=True)
class Hidden:
    """One layer of hidden units: weights -> [normaliser ->] nonlinearity -> readers.

    name: of the nonlinearity's module; its output [B, H] or [B, H, h, w] are the activations (with CReLU [B, 2 H]).
    weights: parameters [H, in, ...] that are summed into the pre-activation, nearly always one. biases: those added.
    gain, offset: the normaliser's own parameters, if it has them.
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


@dataclass(frozen=True)
class Structure:
    """All hidden layers in the order of computation, and the weights that no nonlinearity follows (heads)."""

    hidden: tuple[Hidden, ...]
    heads: tuple[str, ...]
