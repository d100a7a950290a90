"""Training steps of several seeds: a process each, one population, or one population for each core; a Markdown table.

Every way is a set of living processes; one way trains at a time for a block of steps, in random order, several rounds.
Ratios are taken inside a round, so that a noisy machine cancels out. Steps are whole: policy, environment, replay and
update, without evaluation and checkpoints. The clock counts on a quiet machine only: on a shared one, a way of more
processes is given more of it. --shared puts in its place what two idle cores would take, from the processor seconds.

    python scripts/benchmark_population.py --seeds 3 5 10 --rounds 5
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

WAYS = ("processes", "population", "a population per core")
CORES = 2


@dataclass(frozen=True)
class Case:
    """What is trained. steps: of one seed in one block."""

    agent: str
    env: str
    preset: str | None
    changes: dict[str, Any]
    steps: int


SMALL = {"hidden": (64, 64), "batch_size": 64, "warmup_steps": 500, "replay_capacity": 100_000}
FULL = {"warmup_steps": 500, "replay_capacity": 100_000}
PIXELS = {"warmup_steps": 500, "replay_capacity": 2_000, "update_every": 1, "updates_per_round": 1}
CASES = {
    "td3, 256 256, batch 256": Case("td3", "mujoco/HalfCheetah-v5", "small", FULL, 40),
    "sac, 256 256, batch 256": Case("sac", "mujoco/HalfCheetah-v5", "small", FULL, 40),
    "dqn, 256 256, batch 64": Case("dqn", "gym/CartPole-v1", "cartpole", {"warmup_steps": 500}, 256),
    "td3, 64 64, batch 64": Case("td3", "mujoco/HalfCheetah-v5", "small", SMALL, 100),
    "sac, 64 64, batch 64": Case("sac", "mujoco/HalfCheetah-v5", "small", SMALL, 100),
    "dqn, 64 64, batch 64": Case("dqn", "gym/CartPole-v1", "cartpole", SMALL, 256),
    "dqn, pictures of Pong": Case("dqn", "atari/Pong", "small", PIXELS, 10),
}


class Silent:
    """A listener that hears nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def new_training(case: Case, group: tuple[int, ...], threads: int) -> Any:
    """The loop of `neoteny train` for one group of seeds."""
    from runs.catalogue import preset_config
    from runs.config import RunConfig
    from runs.training import Listener, Training

    never = 10**9
    config = RunConfig(
        agent=case.agent,
        env=case.env,
        steps=never,
        seeds=group,
        seed_groups=(group,),
        num_envs=1,
        eval_every=never,
        eval_episodes=1,
        checkpoint_every=never,
        log_every=never,
        device="cpu",
        threads=threads,
        compiled=False,
        tensorboard=False,
        preset=case.preset,
        agent_config=dataclasses.replace(preset_config(case.agent, case.preset), **case.changes),
    )
    return Training(config, group, Path(tempfile.mkdtemp()), cast(Listener, Silent()))


def serve(case: Case, group: tuple[int, ...], threads: int, connection: Connection) -> None:
    """Train one group in blocks of as many steps as are asked for; answer with processor seconds."""
    training = new_training(case, group, threads)

    def block(steps: int) -> None:
        for _ in range(steps):
            training.advance()
        for index in range(len(group)):
            training.episodes.drain(index)

    block(500 + case.steps)
    connection.send(None)
    while steps := connection.recv():
        started = time.process_time()
        block(steps)
        connection.send(time.process_time() - started)


def groups_of(way: str, seeds: int) -> list[tuple[int, ...]]:
    """The seeds that train together."""
    if way == "processes":
        return [(seed,) for seed in range(seeds)]
    groups = 1 if way == "population" else min(CORES, seeds)
    return [tuple(range(seeds))[number::groups] for number in range(groups)]


@dataclass(frozen=True)
class Block:
    """Seconds for all seeds: by the clock, of the processors, and of two idle cores that share the processes out."""

    wall: float
    cpu: float
    ideal: float


def measure(case: Case, seeds: int, rounds: int, threads: int) -> dict[str, list[Block]]:
    """The blocks of every way, one a round."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs.training"])
    pipes: dict[str, list[Connection]] = {way: [] for way in WAYS}
    children = []
    for way in WAYS:
        for group in groups_of(way, seeds):
            ours, theirs = context.Pipe()
            children.append(context.Process(target=serve, args=(case, group, threads, theirs), daemon=True))
            children[-1].start()
            pipes[way].append(ours)
        for pipe in pipes[way]:
            pipe.recv()
    blocks: dict[str, list[Block]] = {way: [] for way in WAYS}
    order = random.Random(0)
    for _ in range(rounds):
        for way in order.sample(WAYS, len(WAYS)):
            started = time.perf_counter()
            for pipe in pipes[way]:
                pipe.send(case.steps)
            cpu = [pipe.recv() for pipe in pipes[way]]
            wall = time.perf_counter() - started
            blocks[way].append(Block(wall, sum(cpu), max(max(cpu) / threads, sum(cpu) / CORES)))
    for pipe in sum(pipes.values(), []):
        pipe.send(0)
    for child in children:
        child.join()
    return blocks


def table_row(name: str, seeds: int, blocks: dict[str, list[Block]], clock: str) -> str:
    """Medians over rounds. clock: which field of `Block` is shown beside processor seconds."""
    base = blocks["processes"]
    cells = [name, str(seeds), f"{statistics.median(seeds * CASES[name].steps / block.cpu for block in base):.0f}"]
    for way in WAYS[1:]:
        pairs = list(zip(base, blocks[way], strict=True))
        for field in ("cpu", clock):
            ratio = statistics.median(getattr(theirs, field) / getattr(own, field) for theirs, own in pairs)
            cells.append(f"{ratio:.2f} x")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 5, 10])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--shared", action="store_true", help="the clock of two idle cores, from processor seconds")
    options = parser.parse_args()
    columns = ["agent and networks", "seeds", "steps per CPU second as processes"]
    columns += [f"{way}, {unit}" for way in WAYS[1:] for unit in ("per CPU second", "by the clock")]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in options.cases:
        for seeds in options.seeds:
            blocks = measure(CASES[name], seeds, options.rounds, options.threads)
            print(table_row(name, seeds, blocks, "ideal" if options.shared else "wall"), flush=True)
    print(f"load {os.getloadavg()}", file=sys.stderr)


if __name__ == "__main__":
    main()
