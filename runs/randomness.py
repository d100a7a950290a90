"""From a seed to a stream of random numbers for each purpose; nothing else in a run draws random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from agents.agent import PURPOSES
from plasticity.population import RandomStream

# New purposes go to the end, so that old runs keep their numbers.
STREAMS = (*PURPOSES, "environment", "evaluation_environment", "diagnostics")


def spawn_streams(seeds: int | Sequence[int], device: torch.device) -> dict[str, RandomStream]:
    """One stream on `device` for each purpose of an agent, of one seed or of a population of several.

    Streams are spawned from the seed, so none overlap.
    """

    def generator(seed: int, name: str) -> torch.Generator:
        return torch.Generator(device).manual_seed(stream_seed(seed, name))

    if isinstance(seeds, int):
        return {name: RandomStream(generator(seeds, name)) for name in PURPOSES}
    return {name: RandomStream([generator(seed, name) for seed in seeds]) for name in PURPOSES}


def stream_seed(seed: int, name: str, *index: int) -> int:
    """A 63-bit seed for stream `name` of a run's seed; `index` tells apart several uses of one stream."""
    sequence = np.random.SeedSequence((seed, STREAMS.index(name), *index))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
