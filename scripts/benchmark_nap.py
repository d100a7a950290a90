"""What projection costs: steps of NaP against the same network without it, in turns, by processor time.

python scripts/benchmark_nap.py [SEEDS ...]        default 1 5 20
The network is that of shared/specs/nap-and-plasticity.md, section 8.1: 64-64-64-10, batch 64, Adam.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from plasticity.harness import Trial
from plasticity.nap import ARMS, NaP
from plasticity.problems.published import PROBLEMS

ROUNDS, STEPS = 15, 100


def seconds_per_step(trial: Trial) -> float:
    start = time.process_time()
    trial.advance(STEPS)
    return (time.process_time() - start) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    for seeds in [int(text) for text in sys.argv[1:]] or [1, 5, 20]:
        trials = [Trial(PROBLEMS["random-label-digits"], [NaP(**ARMS[arm])], range(seeds)) for arm in ("norm", "nap")]
        for trial in trials:
            trial.advance(STEPS)
        rounds = [[seconds_per_step(trial) for trial in trials] for _ in range(ROUNDS)]
        norm, nap = (statistics.median(column) * 1e6 for column in zip(*rounds, strict=True))
        ratios = sorted(after / before for before, after in rounds)
        print(
            f"{seeds} seeds: {norm:.0f} us a step without, {nap:.0f} us with projection; "
            f"ratio {ratios[ROUNDS // 2]:.3f} (quartiles {ratios[ROUNDS // 4]:.3f} to {ratios[-1 - ROUNDS // 4]:.3f})"
        )


if __name__ == "__main__":
    main()
