"""Microseconds for one batch from a full replay of 512 000 rows: uniform, fading, prioritised, and Symphony's buffer.

Prioritised: a draw, its importance weights, and the new priorities of the batch.

Contestants take turns, ratios are taken inside a round. HalfCheetah's shapes.

    python scripts/benchmark_replay.py --rounds 9
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from agents.fading import FadingReplay
from agents.prioritised import PrioritisedReplay
from agents.replay import Batch, Replay
from envs import ContinuousActionSpec, ObservationSpec, Step
from plasticity.population import RandomStream

ROWS, BATCH, BLOCK = 512_000, 256, 300
CPU = torch.device("cpu")
ONES = np.ones(6, np.float32)
SPECS = ObservationSpec((17,)), ContinuousActionSpec(-ONES, ONES)


def fill(replay: Replay | FadingReplay, rounds: int, num_envs: int) -> None:
    """Add random transitions of `num_envs` environments, episodes of 1 000 steps."""
    source = torch.Generator().manual_seed(0)
    for t in range(rounds):
        obs, following = torch.randn(2, num_envs, 17, generator=source)
        ended = torch.full((num_envs,), t % 1_000 == 999)
        zeros, never = torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.bool)
        step = Step(following, zeros + 1, never, ended, following, zeros, zeros.long(), ended)
        replay.add(obs, torch.zeros(num_envs, 6), step)


def contestants() -> dict[str, Callable[[], Batch]]:
    """What draws one batch, by name."""

    def stream() -> RandomStream:
        return RandomStream(torch.Generator().manual_seed(0))

    uniform, fading = (Replay(ROWS, 512, *SPECS, CPU, stream(), fading=f) for f in (False, True))
    prioritised = PrioritisedReplay(ROWS, 512, *SPECS, CPU, stream(), exponent=0.5)
    for replay in (uniform, fading, prioritised):
        fill(replay, 1_000, 512)
    symphony = FadingReplay(10_240, ROWS // 10_240, 512, *SPECS, CPU, stream())
    fill(symphony, 20, 512)
    symphony.normalise_and_fill()
    errors = torch.rand(BATCH, generator=torch.Generator().manual_seed(0))

    def prioritised_batch() -> Batch:
        batch = prioritised.sample(BATCH, 0.99)
        prioritised.importance_weights(0.4)
        prioritised.set_priorities(errors)
        return batch

    return {
        "uniform": lambda: uniform.sample(BATCH, 0.99),
        "fading (--replay fading)": lambda: fading.sample(BATCH, 0.99),
        "prioritised (--replay prioritised)": prioritised_batch,
        "Symphony's buffer": lambda: symphony.sample(BATCH, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    draw = contestants()
    seconds: dict[str, list[float]] = {name: [] for name in draw}
    for _ in range(rounds):
        for name, batch in draw.items():
            start = time.perf_counter()
            for _ in range(BLOCK):
                batch()
            seconds[name].append(time.perf_counter() - start)
    print("| replay of 512 000 rows, batch 256 | µs | against uniform |")
    print("|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["uniform"], strict=True))
        print(f"| {name} | {1e6 * statistics.median(times) / BLOCK:.0f} | {ratio:.2f} x |")


if __name__ == "__main__":
    main()
