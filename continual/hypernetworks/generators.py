"""What generators have in common, and the chunked hypernetwork of von Oswald et al. 2020 (arXiv:1906.00695), HNET.

Weights are made in chunks, each from the embedding of the task and one of its own; the last chunk is cut off where the
target network ends. Matrices are stored as rows multiply them, [in, out], so that gradients have their layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

Theta = Mapping[str, Tensor]
Activation = Literal["relu", "elu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "elu": torch.nn.functional.elu}


class Generator(Protocol):
    """h(e, θ).

    shapes: of one member's θ, chunk embeddings included, task embeddings not. grown: those of θ of which a copy is
    kept for each task; frozen: those that learn in the first task only; head: those of the last layer.
    """

    shapes: dict[str, tuple[int, ...]]
    grown: tuple[str, ...]
    frozen: tuple[str, ...]
    head: tuple[str, ...]

    def draw(self, source: torch.Generator) -> dict[str, Tensor]:
        """One member's θ."""
        ...

    def __call__(self, theta: Theta, embeddings: Tensor) -> Tensor:
        """Weights [K, B, N] of B tasks from their embeddings [K, B, d_e]."""
        ...


def sized_chunks(weights: int, count: Callable[[int], int], most: float, chunk: int | None) -> int:
    """The size of a chunk. weights: N. count: parameters of the hypernetwork for a size. chunk: as asked for, or None.

    None: the largest with which there are at most `most` parameters; where none has so few, that with the fewest.
    """
    if chunk is not None:
        return chunk
    fewest, best = math.inf, weights
    for chunks in range(1, weights + 1):
        size = math.ceil(weights / chunks)
        found = count(size)
        if found <= most:
            return size
        if found < fewest:
            fewest, best = found, size
        if found > 2 * fewest:  # there is one minimum, between a large head and many embeddings
            break
    return best


def parameter_count(generator: Generator, names: Iterable[str] | None = None) -> int:
    """How many numbers θ has, of one member. names: only those."""
    return sum(math.prod(shape) for name, shape in generator.shapes.items() if names is None or name in names)


def uniform(source: torch.Generator, bound: float, *shape: int) -> Tensor:
    """Numbers in ± bound."""
    return torch.empty(shape, device=source.device).uniform_(-bound, bound, generator=source)


def normal(source: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, device=source.device, generator=source)


class ChunkedGenerator:
    """A small network that makes every chunk for itself: chunk i = MLP([e; c_i]).

    weights: N. layers: sizes of hidden layers; none: a linear map. head_scale: of the last layer's first values.
    """

    grown: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    head: tuple[str, ...] = ("head_weight", "head_bias")

    def __init__(
        self,
        weights: int,
        chunk: int,
        layers: Sequence[int],
        activation: Activation,
        task_embedding: int,
        chunk_embedding: int,
        head_scale: float,
    ):
        self.weights, self.head_scale, self.activation = weights, head_scale, ACTIVATIONS[activation]
        self.chunks = math.ceil(weights / chunk)
        self.shapes: dict[str, tuple[int, ...]] = {"chunk_embeddings": (self.chunks, chunk_embedding)}
        inputs = task_embedding + chunk_embedding
        self._layers = [("head_weight", "head_bias")]
        for index, size in enumerate(layers):
            names = f"weight_{index}", f"bias_{index}"
            self.shapes |= {names[0]: (inputs, size), names[1]: (size,)}
            self._layers.insert(-1, names)
            inputs = size
        self.shapes |= {"head_weight": (inputs, chunk), "head_bias": (chunk,)}

    def draw(self, source: torch.Generator) -> dict[str, Tensor]:
        """Embeddings standard normal, layers by PyTorch's law for linear ones."""
        theta = {"chunk_embeddings": normal(source, *self.shapes["chunk_embeddings"])}
        for weight, bias in self._layers:
            scale = self.head_scale if weight == "head_weight" else 1.0
            bound = scale / math.sqrt(self.shapes[weight][0])
            theta |= {name: uniform(source, bound, *self.shapes[name]) for name in (weight, bias)}
        return theta

    def __call__(self, theta: Theta, embeddings: Tensor) -> Tensor:
        members, tasks = embeddings.shape[:2]
        first = theta[self._layers[0][0]]
        width = embeddings.shape[2]
        of_task = torch.bmm(embeddings, first[:, :width]).unsqueeze(2)
        of_chunk = torch.bmm(theta["chunk_embeddings"], first[:, width:]).unsqueeze(1)
        x = (of_task + of_chunk).flatten(1, 2) + theta[self._layers[0][1]].unsqueeze(1)  # [K, B M, ...]
        for weight, bias in self._layers[1:]:
            x = torch.baddbmm(theta[bias].unsqueeze(1), self.activation(x), theta[weight])
        return x.reshape(members, tasks, -1)[..., : self.weights]
