"""Pictures a second of pixel observations against a plain loop of dm_control's `step` and `physics.render`.

Every contestant has a process of its own, because Mesa's driver settles its threads once a process; they take turns of
a short block each, in changing order, and a ratio is taken inside a round, so that a noisy machine cancels out. The
median over rounds is shown. A ratio above 1 means faster than the loop. Rates are given by the wall clock and by the
processor time of all threads; the latter stays true where other programs keep the cores busy.

    python scripts/benchmark_pixels.py --tasks dmc/cheetah-run dmc/walker-walk --num-envs 8 --threads 1 2
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np


class Stopwatch:
    """Frames a second, and frames a second of processor time, since it was made."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def rates(self, frames: int) -> tuple[float, float]:
        return frames / (time.perf_counter() - self.wall), frames / (time.process_time() - self.processor)


def draw_with_us(orders: Connection, task: str, num_envs: int, size: int, profile: str, threads: int) -> None:
    import torch

    import envs
    from envs import ContinuousActionSpec

    torch.set_num_threads(1)
    settings = {"obs": "pixels", "image_size": size, "render_profile": profile}
    runner = envs.make(task, num_envs, threads=threads, **settings)
    runner.reset()
    assert isinstance(runner.action_spec, ContinuousActionSpec)
    action = torch.zeros(num_envs, runner.action_spec.size)
    while (steps := orders.recv()) is not None:
        watch = Stopwatch()
        for _ in range(steps):
            runner.step(action)
        orders.send(watch.rates(steps * num_envs))
    runner.close()


def draw_in_a_loop(orders: Connection, task: str, num_envs: int, size: int) -> None:
    from envs.graphics import choose_platform

    choose_platform()
    from dm_control import suite

    domain, name = task.removeprefix("dmc/").split("-", 1)
    loop = [suite.load(domain, name, task_kwargs={"random": seed}) for seed in range(num_envs)]
    action = np.zeros(loop[0].action_spec().shape)
    for env in loop:
        env.reset()
    while (steps := orders.recv()) is not None:
        watch = Stopwatch()
        for _ in range(steps):
            for env in loop:
                env.step(action)
                env.physics.render(size, size, camera_id=0)
        orders.send(watch.rates(steps * num_envs))


def _start(function: Callable[..., None], *arguments: Any) -> tuple[Connection, BaseProcess]:
    """A process of its own for `function(orders, *arguments)`, and the other end of `orders`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *arguments), daemon=True)
    process.start()
    return ours, process


def measure(task: str, num_envs: int, size: int, threads: list[int], rounds: int, seconds: float) -> None:
    work: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {}
    work["dm_control loop"] = draw_in_a_loop, (task, num_envs, size)
    for profile in ("reference", "fast"):
        for count in threads:
            work[f"{profile}, {count} threads"] = (draw_with_us, (task, num_envs, size, profile, count))
    orders, processes = {}, []
    for name, (function, arguments) in work.items():
        orders[name], process = _start(function, *arguments)
        processes.append(process)

    def rate(name: str, steps: int) -> tuple[float, float]:
        orders[name].send(steps)
        return orders[name].recv()

    blocks = {}
    for name in work:
        rate(name, 2)
        blocks[name] = max(2, int(seconds * rate(name, 3)[0] / num_envs))
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    order, shuffle = list(work), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            rates[name].append(rate(name, blocks[name]))
    for name in work:
        shown = f"{task:22} {num_envs:3} x {size:3}  {name:20}"
        for kind, width in ((0, 8), (1, 10)):
            pairs = zip(rates[name], rates["dm_control loop"], strict=True)
            ratio = statistics.median(ours[kind] / loops[kind] for ours, loops in pairs)
            shown += f" {statistics.median(pair[kind] for pair in rates[name]):{width}.0f} {ratio:7.2f}"
        print(shown, flush=True)
        orders[name].send(None)
    for process in processes:
        process.join()


def show_difference(orders: Connection, task: str, size: int) -> None:
    """Print how far the fast pictures of 50 random steps are from those at reference quality."""
    import torch

    import envs
    from envs import ContinuousActionSpec

    both = [
        envs.make(task, obs="pixels", image_size=size, frame_stack=1, render_profile=p) for p in ("reference", "fast")
    ]
    spec = both[0].action_spec
    assert isinstance(spec, ContinuousActionSpec)
    actions = np.random.default_rng(0).uniform(spec.low, spec.high, (50, 1, spec.size))
    for runner in both:
        runner.reset()
    pictures = [torch.stack([runner.step(torch.from_numpy(a)).obs.clone() for a in actions]).int() for runner in both]
    mean = (pictures[0] - pictures[1]).abs().float().mean()
    print(f"{task:22} fast pictures differ from reference by {mean:.1f} of 255 on average", flush=True)
    orders.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["dmc/cheetah-run", "dmc/walker-walk", "dmc/reacher-easy"])
    parser.add_argument("--num-envs", nargs="+", type=int, default=[8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--size", type=int, default=84, help="height and width in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    options = parser.parse_args()
    print(
        f"{'task':22} {'N x size':9}  {'contestant':20} {'frames/s':>8} {'/ loop':>7} {'per CPU s':>10} {'/ loop':>7}"
    )
    for task in options.tasks:
        for num_envs in options.num_envs:
            measure(task, num_envs, options.size, options.threads, options.rounds, options.seconds)
        _start(show_difference, task, options.size)[1].join()


if __name__ == "__main__":
    main()
