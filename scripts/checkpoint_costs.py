"""What a checkpoint costs: bytes and milliseconds at replays of 1e5 and 1e6 rows, and how much it slows training down.

The slow-down is measured inside one process: blocks of 10,000 steps with a checkpoint at the end and blocks without
take turns. Processor seconds count both the training thread and the one that writes, so they are an upper bound where a
second core is free; the time for which training stood still is the lower one.

    python scripts/checkpoint_costs.py --rounds 5
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from runs import checkpoint
from runs.catalogue import preset_config
from runs.checkpoint import SeedPart
from runs.config import RunConfig
from runs.training import Training

EVERY = 10_000


class Completer:
    """A `Listener` that turns what a seed has written into a checkpoint, as a session does, and keeps nothing else."""

    def __init__(self, run: Path):
        self.run = run

    def rows(self, seed: int, rows: list[Any]) -> None: ...
    def progress(self, seed: int, step: int, return_: float | None) -> None: ...
    def weights(self, seed: int, step: int, weights: dict[str, Any]) -> None: ...
    def lost(self, seed: int) -> None: ...

    def saved(self, seed: int, label: str, part: SeedPart) -> None:
        checkpoint.complete(self.run, label, {seed: part}, {"table_bytes": 0})


def open_training(agent: str, env: str, capacity: int, run: Path, **changes: Any) -> Training:
    """One seed with the agent's published settings, its replay of `capacity` rows filled to the last slot."""
    agent_config = dataclasses.replace(preset_config(agent, None), replay_capacity=capacity, warmup_steps=0, **changes)
    config = RunConfig(
        agent=agent,
        env=env,
        steps=10**9,
        seeds=(0,),
        num_envs=1,
        eval_every=10**9,
        eval_episodes=1,
        checkpoint_every=EVERY,
        log_every=1_000,
        device="cpu",
        threads=1,
        compiled=False,
        tensorboard=False,
        preset=None,
        agent_config=agent_config,
    )
    run.mkdir()
    training = Training(config, (0,), run, Completer(run))
    replay: Any = training.agent.replay  # type: ignore[attr-defined]
    # Noise does not compress and does not repeat: no chunk is like another.
    content = replay.frame.view(torch.uint8) if replay.frame.dtype != torch.uint8 else replay.frame
    content.copy_(torch.empty_like(content).random_(generator=torch.Generator().manual_seed(0)))
    if replay.frame.is_floating_point():
        replay.frame.copy_(torch.randn(replay.frame.shape, generator=torch.Generator().manual_seed(1)))
    replay.is_transition.fill_(True)
    replay.is_transition[0] = False  # at the head, where an observation waits for its action
    replay.head.fill_(replay.slots)
    replay.load_state_dict(replay.state_dict())  # which lists the transitions
    training.agent.steps = replay.slots
    return training


def add_rows(training: Training, count: int) -> None:
    """Act and observe without learning."""
    for _ in range(count):
        action = training.agent.act(training.obs, explore=True)
        step = training.runners.step(action)
        training.agent.observe(step)
        training.obs = step.obs


def save(training: Training) -> tuple[float, float]:
    """Make a checkpoint. Returns for how many seconds training stood still, and when the checkpoint was complete."""
    began = time.perf_counter()
    training._save(f"step_{training.agent.steps}")
    stood_still = time.perf_counter() - began
    training.members[0].writer.wait()
    return stood_still, time.perf_counter() - began


def written_bytes(run: Path) -> tuple[int, int]:
    """Of the newest checkpoint: bytes in files of its own, and altogether."""
    files = [path.stat() for path in checkpoint.newest(run).iterdir()]
    return sum(file.st_size for file in files if file.st_nlink == 1), sum(file.st_size for file in files)


def measure_costs(name: str, agent: str, env: str, capacity: int, folder: Path) -> None:
    """Print what the first checkpoint costs and what one costs after 10,000 more rows, median of three."""
    run = folder / f"{agent}-{capacity}"
    training = open_training(agent, env, capacity, run)
    first = (*save(training), *written_bytes(run))
    later = []
    for _ in range(3):
        add_rows(training, EVERY)
        later.append((*save(training), *written_bytes(run)))
    training.runners.close()
    for what, found in (
        ("first", first),
        (f"after {EVERY:,} rows", tuple(map(statistics.median, zip(*later, strict=True)))),
    ):
        stood_still, complete, own, total = found
        times = f"{1000 * stood_still:.0f} ms | {1000 * complete:.0f} ms"
        print(f"| {name}, {capacity:,} | {what} | {own / 1e6:.1f} MB of {total / 1e6:.1f} | {times} |", flush=True)


def measure_slow_down(name: str, agent: str, env: str, capacity: int, rounds: int, folder: Path) -> None:
    """Print the slow-down of training by a checkpoint every 10,000 steps."""
    run = folder / f"{agent}-slow-down"
    training = open_training(agent, env, capacity, run)
    for _ in range(200):
        training.advance()
    save(training)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    still = []
    for number in range(2 * rounds):
        saving = number % 2 == 0
        cpu = time.process_time()
        for _ in range(EVERY):
            training.advance()
        if saving:
            wall = save(training)[0]
            still.append(wall)
        seconds[saving].append(time.process_time() - cpu)
        training.episodes.drain()
    training.runners.close()
    ratios = [with_ / without - 1 for with_, without in zip(seconds[True], seconds[False], strict=True)]
    ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
    block = statistics.median(seconds[False])
    print(
        f"| {name}, {capacity:,} | {block:.1f} s | {100 * ratio:+.2f} % ({100 * low:+.2f} to {100 * high:+.2f}) | "
        f"{1000 * statistics.median(still):.0f} ms, {100 * statistics.median(still) / block:.2f} % |",
        flush=True,
    )


def measure_help(rounds: int) -> None:
    """Print how long `neoteny --help` takes."""
    found = []
    for _ in range(rounds):
        began, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, "-m", "runs.cli", "--help"], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        found.append((time.perf_counter() - began, cpu))
    walls, cpus = zip(*found, strict=True)
    print(
        f"\n`neoteny --help`, {rounds} times: {statistics.median(walls):.2f} s (best {min(walls):.2f}, worst "
        f"{max(walls):.2f}), {statistics.median(cpus):.2f} s of processor time"
    )


HALFCHEETAH, PONG = ("td3", "mujoco/HalfCheetah-v5"), ("dqn", "atari/Pong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="blocks of either kind")
    parser.add_argument("--folder", type=Path, help="disk to write to; default: the system's temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        print("| replay | checkpoint | written | training stands still | complete after |\n|---|---|---|---|---|")
        measure_costs("HalfCheetah", *HALFCHEETAH, 100_000, folder)
        measure_costs("HalfCheetah", *HALFCHEETAH, 1_000_000, folder)
        measure_costs("Pong, 84 x 84", *PONG, 100_000, folder)
        print(f"\n| training | {EVERY:,} steps without | with a checkpoint, processor time | stands still |")
        print("|---|---|---|---|")
        measure_slow_down("TD3 on HalfCheetah", *HALFCHEETAH, 1_000_000, options.rounds, folder)
    measure_help(20)


if __name__ == "__main__":
    main()
