"""From one seed of a run to one generator for each purpose; nothing else in a run draws random numbers."""

from __future__ import annotations

import numpy as np
import torch

from agents.agent import PURPOSES

# New purposes go to the end, so that old runs keep their numbers.
STREAMS = (*PURPOSES, "environment", "evaluation_environment")


def spawn_generators(seed: int, device: torch.device) -> dict[str, torch.Generator]:
    """One generator on `device` for each purpose of an agent. Streams are spawned from the seed, so none overlap."""
    return {name: torch.Generator(device).manual_seed(stream_seed(seed, name)) for name in PURPOSES}


def stream_seed(seed: int, name: str, *index: int) -> int:
    """A 63-bit seed for stream `name` of a run's seed; `index` tells apart several uses of one stream."""
    sequence = np.random.SeedSequence((seed, STREAMS.index(name), *index))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
