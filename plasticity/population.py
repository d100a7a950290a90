"""What every population shares, whoever trains it: its random numbers, and how its state is put back.

A population trains several seeds at once; every tensor has one more axis in front, of length S. Each seed draws from
generators of its own, what it would draw alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Axes = tuple[int, ...]


class RandomStream:
    """Random numbers for one purpose: of one seed, or of a population with a generator for each seed.

    generators: one, or a sequence of them. device: where numbers are drawn, by default the generators'. lead: () or
    (S,), the axes in front of everything that is drawn.
    """

    def __init__(self, generators: torch.Generator | Sequence[torch.Generator], device: torch.device | None = None):
        single = isinstance(generators, torch.Generator)
        self.generators: list[torch.Generator] = [generators] if single else list(generators)
        self.lead: Axes = () if single else (len(self.generators),)
        self.device = device or self.generators[0].device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers [*S, *shape]."""
        return self._draw(lambda generator: torch.randn(shape, device=self.device, generator=generator))

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers in [0, 1), [*S, *shape]."""
        return self._draw(lambda generator: torch.rand(shape, dtype=dtype, device=self.device, generator=generator))

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in 0 .. high - 1, int64 [*S, *shape]."""
        return self._draw(lambda generator: torch.randint(high, shape, device=self.device, generator=generator))

    def manual_seed(self, seeds: Sequence[int]) -> None:
        """Begin each seed's generator anew."""
        for generator, seed in zip(self.generators, seeds, strict=True):
            generator.manual_seed(seed)

    def _draw(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        if not self.lead:
            return draw(self.generators[0])
        return torch.stack([draw(generator) for generator in self.generators])


@torch.no_grad()
def copy_state_(own: Any, saved: Any, name: str) -> None:
    """Copy the tensors of a saved nested state into those of `own`. Raises ValueError if they do not fit, naming one.

    name: of the state, for the message.
    """
    for path, target, source in _pairs(own, saved, name):
        if not isinstance(source, Tensor) or target.shape != source.shape:
            found = list(source.shape) if isinstance(source, Tensor) else type(source).__name__
            raise ValueError(f"the saved '{path}' is {found}, here it is {list(target.shape)}")
    for _, target, source in _pairs(own, saved, name):
        target.copy_(source)


def _pairs(own: Any, saved: Any, path: str) -> Iterator[tuple[str, Tensor, Any]]:
    if isinstance(own, Tensor):
        yield path, own.detach(), saved
        return
    keys = list(own) if isinstance(own, Mapping) else list(range(len(own)))
    found = list(saved) if isinstance(saved, Mapping) else list(range(len(saved)))
    if keys != found:
        differing = sorted({str(key) for key in set(keys) ^ set(found)}) or [str(found)]
        raise ValueError(f"the saved '{path}' does not fit: '{differing[0]}' is in one of the two only")
    for key in keys:
        yield from _pairs(own[key], saved[key], f"{path}.{key}")
