"""A network, alone or stacked, as a function of its parameters: what derivatives of any order are taken of.

Parameters are dicts by name. Those of a population have a leading axis of K members; an ordinary network counts as
K = 1. Networks are called in whatever mode they are in: wrap the calls in `evaluating`, and no statistic of a
normalisation moves and nothing is dropped out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

Parameters = Mapping[str, Tensor]
Function = Callable[[Parameters, Tensor], Tensor]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode again behind."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def trainable(network: nn.Module, members: int | None) -> dict[str, Tensor]:
    """The parameters that require a gradient, without one, [K, *shape]. They share the network's memory."""
    found = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    return found if members is not None else {name: p.unsqueeze(0) for name, p in found.items()}


def population_function(network: nn.Module, members: int | None) -> Function:
    """(parameters [K, *shape], x [K, B, ...]) -> outputs [K, B, ...]. Parameters left out are the network's own."""
    if members is not None:
        return lambda parameters, x: functional_call(network, dict(parameters), (x,))

    def alone(parameters: Parameters, x: Tensor) -> Tensor:
        single = {name: p.squeeze(0) for name, p in parameters.items()}
        return functional_call(network, single, (x.squeeze(0),)).unsqueeze(0)

    return alone


def member_function(network: nn.Module, members: int | None, index: int) -> Function:
    """(parameters [*shape], x [B, ...]) -> outputs [B, ...] of one member."""
    if members is None:
        return lambda parameters, x: functional_call(network, dict(parameters), (x,))
    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    own = {name: tensor.detach()[index : index + 1] for name, tensor in own.items()}

    def alone(parameters: Parameters, x: Tensor) -> Tensor:
        tensors = own | {name: p.unsqueeze(0) for name, p in parameters.items()}
        return functional_call(network, tensors, (x.unsqueeze(0),)).squeeze(0)

    return alone


def count(parameters: Parameters) -> int:
    """How many numbers there are, in all members together."""
    return sum(p.numel() for p in parameters.values())


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [K, *shape] as one vector for each member, [K, P]."""
    return torch.cat([t.flatten(1) for t in tensors], 1)


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo `flatten`: pieces of `vector` [K, P] in the shapes of `like`."""
    pieces = vector.split([t[0].numel() for t in like], 1)
    return [piece.view_as(t) for piece, t in zip(pieces, like, strict=True)]
