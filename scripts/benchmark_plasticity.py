"""How much faster ten seeds are as one population than one after another in eager PyTorch, at the same arithmetic.

    .venv/bin/python scripts/benchmark_plasticity.py [--rounds 7] [--threads 1]

Both take turns; the ratio is taken inside each round, per network update, and its median printed with the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from plasticity.harness import Trial
from plasticity.measures.diagnostics import Diagnostics
from plasticity.problems import datasets
from plasticity.problems.changes import Permuted
from plasticity.problems.published import Problem
from runs.compute import keep_freed_memory

MEMBERS, SHAPE, HIDDEN = 10, (1, 28, 28), (100, 100, 100)


def images(folder: object = None) -> datasets.Images:
    """10 000 random images of MNIST's shape: speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (10_000, *SHAPE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (10_000,), generator=generator)
    return datasets.Images("random", pixels, labels, pixels[:0], labels[:0], 255, "drawn")


def population(problem: Problem, every: int | None) -> Callable[[int], None]:
    """Steps of all members at once, as `neoteny plasticity` takes them. every: steps between cheap diagnostics."""
    diagnostics = None if every is None else Diagnostics(every, curvature=False)
    trial = Trial(problem, [], range(MEMBERS), diagnostics=diagnostics, costly_every=10**9)

    def run(steps: int) -> None:
        trial.advance(steps)
        trial.measurements.clear()

    return run


def one_after_another(problem: Problem) -> Callable[[int], None]:
    """The loop that a paper's script has: one network, `nn.Sequential`, `torch.optim`, online accuracy kept."""
    found = images()
    pixels, labels = found.train_images.flatten(1).float() / 255, found.train_labels
    sizes = [784, *problem.hidden]
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(sizes[-1], 10))
    optimizer: torch.optim.Optimizer
    if problem.optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters(), problem.learning_rate)
    else:
        optimizer = torch.optim.SGD(network.parameters(), problem.learning_rate)
    permuted = pixels[:, torch.randperm(784)]
    order = torch.randperm(len(labels))
    accuracies = torch.zeros(100_000)
    state = {"step": 0}

    def run(steps: int) -> None:
        for _ in range(steps):
            step = state["step"]
            start = step * problem.batch_size % (len(labels) - problem.batch_size)
            rows = order[start : start + problem.batch_size]
            x, y = permuted[rows], labels[rows]
            outputs = network(x)
            loss = F.cross_entropy(outputs, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                accuracies[step % 100_000] = (outputs.argmax(1) == y).float().mean()
            state["step"] += 1

    return run


def seconds(run: Callable[[int], None], steps: int) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    run(steps)
    return (time.perf_counter() - wall) / steps, (time.process_time() - processor) / steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    datasets.LOADERS["random"] = images
    print(
        f"{MEMBERS} members, 784-{'-'.join(map(str, HIDDEN))}-10, {options.threads} threads, ratios by processor time"
    )
    for optimizer in ("sgd", "adam"):
        for batch in (1, 32):
            problem = Problem(
                data="random", change=Permuted(), tasks=10**6, steps=10**6, batch_size=batch, hidden=HIDDEN,
                optimizer=optimizer, learning_rate=1e-3,
            )  # fmt: skip
            ours, measured, eager = population(problem, None), population(problem, 100), one_after_another(problem)
            contestants, steps = (ours, measured, eager), 400 if batch == 1 else 200
            for run in contestants:
                run(20)
            rounds = [[seconds(run, steps) for run in contestants] for _ in range(options.rounds)]
            faster = sorted(r[2][1] / (r[0][1] / MEMBERS) for r in rounds)
            by_clock = statistics.median(r[2][0] / (r[0][0] / MEMBERS) for r in rounds)
            cost = statistics.median(r[1][1] / r[0][1] - 1 for r in rounds)
            low, high = faster[len(faster) // 4], faster[-1 - len(faster) // 4]
            rate = statistics.median(MEMBERS / r[0][1] for r in rounds)
            print(
                f"{optimizer:<5} batch {batch:<3} {statistics.median(faster):5.1f} x [{low:.1f}, {high:.1f}] "
                f"(by the clock {by_clock:.1f} x), {rate:,.0f} updates a second of processor time, "
                f"diagnostics every 100 steps: {100 * cost:+.1f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
