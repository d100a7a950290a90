"""How fast tasks are learned online with replay: ours, avalanche-lib, and a loop over a DataLoader, in turns.

python scripts/benchmark_continual.py [ROUNDS]        default 3 rounds over five tasks each

Everyone trains the same network (784-100-100-10, SGD 0.1) on the same data (random bytes of MNIST's shape, five tasks
of two classes), ten new samples and ten of a memory of 500 in a step, on one thread. Avalanche replays nothing within
its first experience, so the first task is a warm-up for all. Time is that of the processor; a ratio is taken in each
turn.
Then: whether a task takes longer the more there were before it. Needs the extra `avalanche`.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from continual import datasets
from continual.catalogue import STRATEGIES, Benchmark, open_learner
from continual.learner import Learner
from runs import compute

TASKS, PER_CLASS, BATCH, MEMORY = 5, 1000, 10, 500
ONLINE = 40  # updates of the online template in a turn: it takes long
FLAT_TASKS = 40

Turn = Callable[[int], int]  # trains a task, returns how many updates of a network it took


def random_data() -> Any:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    images = torch.randint(0, 256, (len(labels), 1, 28, 28), dtype=torch.uint8, generator=generator)
    return datasets.from_tensors((images, labels), (images[::100], labels[::100]))


def network() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(*layers)


def task_rows(data: Any, task: int) -> Tensor:
    return torch.arange(2 * task * PER_CLASS, 2 * (task + 1) * PER_CLASS)


def our_learner(data: Any, strategy: str, seeds: int, **changes: Any) -> Learner:
    settings = {"data": "tensors", "hidden": (100, 100), "memory": MEMORY, "class_order": tuple(range(10))}
    benchmark = Benchmark(**{**settings, **changes})
    return open_learner(benchmark, strategy, STRATEGIES[strategy][1](), range(seeds), data=data)


def train_task(learner: Learner) -> int:
    """One task without its evaluation, which the others do not do either."""
    task = learner.tasks[learner.index]
    learner.strategy.begin_task(task)
    learner.learn(task.steps)
    learner.strategy.end_task(task)
    learner.index, learner.step = learner.index + 1, 0
    return task.steps * learner.members


def ours(data: Any, strategy: str, seeds: int) -> Turn:
    learner = our_learner(data, strategy, seeds)

    def turn(task: int) -> int:
        if seeds > 1:
            compute.choose_matmul_precision()
        try:
            return train_task(learner)
        finally:
            torch.set_float32_matmul_precision("highest")

    return turn


def data_loader(data: Any) -> Turn:
    """What one writes by hand: a DataLoader, tensors as memory, a reservoir."""
    model, memory_x, memory_y, seen = network(), torch.zeros(MEMORY, 1, 28, 28), torch.zeros(MEMORY).long(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = data.train_images.float() / 255

    def turn(task: int) -> int:
        nonlocal seen
        rows = task_rows(data, task)
        updates = 0
        for x, y in DataLoader(TensorDataset(images[rows], data.train_labels[rows]), BATCH, shuffle=True):
            loss = nn.functional.cross_entropy(model(x), y)
            if seen:
                picked = torch.randperm(min(seen, MEMORY))[:BATCH]
                loss = loss + nn.functional.cross_entropy(model(memory_x[picked]), memory_y[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for image, label in zip(x, y, strict=True):
                place = seen if seen < MEMORY else int(torch.randint(seen + 1, ()))
                if place < MEMORY:
                    memory_x[place], memory_y[place] = image, label
                seen += 1
            updates += 1
        return updates

    return turn


def avalanche(data: Any, online: bool) -> Turn:
    """avalanche-lib's SupervisedTemplate with its replay plugin, on experiences of a task, or of ten samples each."""
    from avalanche.benchmarks import benchmark_from_datasets, split_online_stream
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.benchmarks.utils.data_attribute import DataAttribute
    from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
    from avalanche.training.templates import SupervisedTemplate

    images = data.train_images.float() / 255

    def of_task(task: int) -> Any:
        rows = task_rows(data, task)
        plain = TensorDataset(images[rows], data.train_labels[rows])
        targets = DataAttribute(data.train_labels[rows].tolist(), "targets")
        return AvalancheDataset([plain], data_attributes=[targets])

    benchmark: Any = benchmark_from_datasets(train=[of_task(task) for task in range(TASKS)])
    stream = benchmark.train_stream
    model = network()
    strategy = SupervisedTemplate(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH, train_epochs=1, evaluator=EvaluationPlugin(),
        plugins=[ReplayPlugin(mem_size=MEMORY, batch_size=BATCH, batch_size_mem=BATCH)],
    )  # fmt: skip
    parts: Iterator[Any] = iter(
        split_online_stream(stream, experience_size=BATCH, drop_last=True) if online else stream
    )

    def turn(task: int) -> int:
        if not online:
            strategy.train(next(parts), num_workers=0)
            return 2 * PER_CLASS // BATCH
        for _ in range(ONLINE):
            strategy.train(next(parts), num_workers=0)
        return ONLINE

    return turn


def cpu_seconds(turn: Turn, task: int) -> float:
    """Processor time of one update."""
    gc.collect()
    start = time.process_time()
    updates = turn(task)
    return (time.process_time() - start) / updates


def compare(rounds: int) -> None:
    data = random_data()
    contestants: dict[str, Callable[[], Turn]] = {
        "Avalanche, SupervisedTemplate and replay": lambda: avalanche(data, online=False),
        "Avalanche, experiences of ten samples": lambda: avalanche(data, online=True),
        "DataLoader loop": lambda: data_loader(data),
        "ours, er, one seed": lambda: ours(data, "er", 1),
        "ours, er, ten seeds": lambda: ours(data, "er", 10),
        "ours, uer, one seed": lambda: ours(data, "uer", 1),
        "ours, uer, ten seeds": lambda: ours(data, "uer", 10),
    }
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        turns = {name: make() for name, make in contestants.items()}
        for task in range(TASKS):
            for name, turn in turns.items():
                seconds = cpu_seconds(turn, task)
                if task:
                    taken[name].append(seconds)
    columns = ("Avalanche, SupervisedTemplate and replay", "Avalanche, experiences of ten samples", "DataLoader loop")
    print("updates of one network a CPU second; times as fast as: Avalanche, its online experiences, the loop")
    for name, seconds in taken.items():
        ratios = [
            statistics.median(other / own for own, other in zip(seconds, taken[peer], strict=True)) for peer in columns
        ]
        rate = 1 / statistics.median(seconds)
        print(f"  {name:<42} {rate:8.0f}   {ratios[0]:6.2f} {ratios[1]:6.2f} {ratios[2]:6.2f}")


def flatness() -> None:
    """Processor time of a task, in the last fifth of many over the first fifth, its memory being full in both."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(100)
    images = torch.randint(0, 256, (1000, 1, 28, 28), dtype=torch.uint8, generator=generator)
    data = datasets.from_tensors((images, labels), (images[:100], labels[:100]))
    compute.choose_matmul_precision()
    for strategy in ("er", "uer"):
        learner = our_learner(data, strategy, 10, tasks=FLAT_TASKS, change="permuted", kind="domain", class_order=())
        seconds = []
        while not learner.done:
            start = time.process_time()
            train_task(learner)
            seconds.append(time.process_time() - start)
        fifth = FLAT_TASKS // 5
        ratio = statistics.median(seconds[-fifth:]) / statistics.median(seconds[1 : 1 + fifth])
        print(f"  {strategy}: a task of the last fifth of {FLAT_TASKS} takes {ratio:.2f} times one of the first")


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    compute.keep_freed_memory()
    compare(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    print("does a task take longer the more there were before it?")
    flatness()


if __name__ == "__main__":
    main()
