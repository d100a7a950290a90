"""Training steps a second of our TD3 and SAC against stable-baselines3, on HalfCheetah-v5, at equal hyper-parameters.

Every contestant is a living process; one trains at a time for a short block, in random order, several rounds. Ratios
are taken inside a round, so that a noisy machine cancels out. Warm-up and start are outside the blocks.

    python scripts/benchmark_training.py --rounds 7 --threads 1
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ENV = "HalfCheetah-v5"
WARMUP = 500
CONTESTANTS = ("sb3 stock", "sb3 medium", "neoteny", "neoteny bf16")


def ours(agent: str, threads: int, bf16: bool) -> Callable[[int], None]:
    """The loop of `neoteny train`, without evaluation and checkpoints. Settings are the agent's defaults."""
    from runs.catalogue import preset_config
    from runs.config import RunConfig
    from runs.training import Training

    class Silent:
        def rows(self, seed: int, rows: list[Any]) -> None: ...
        def progress(self, seed: int, step: int, return_: float | None) -> None: ...
        def weights(self, seed: int, step: int, weights: dict[str, Any]) -> None: ...
        def lost(self, seed: int) -> None: ...
        def saved(self, seed: int, label: str, part: Any) -> None: ...

    agent_config = dataclasses.replace(preset_config(agent, None), warmup_steps=WARMUP)
    config = RunConfig(
        agent=agent,
        env=f"mujoco/{ENV}",
        steps=1_000_000,
        seeds=(0,),
        num_envs=1,
        eval_every=1_000_000,
        eval_episodes=1,
        checkpoint_every=1_000_000,
        log_every=1_000,
        device="cpu",
        threads=threads,
        compiled=False,
        overlap=False,
        bf16=bf16,
        tensorboard=False,
        preset=None,
        agent_config=agent_config,
    )
    training = Training(config, (0,), Path(tempfile.mkdtemp()), Silent())

    def block(steps: int) -> None:
        for _ in range(steps):
            training.advance()
        training.episodes.drain()

    return block


def stable_baselines3(agent: str, threads: int, precision: str) -> Callable[[int], None]:
    import stable_baselines3
    import torch

    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    learner = {"td3": stable_baselines3.TD3, "sac": stable_baselines3.SAC}[agent]
    settings = {"learning_rate": 3e-4, "batch_size": 256, "train_freq": 1, "gradient_steps": 1, "device": "cpu"}
    model = learner(
        "MlpPolicy", ENV, learning_starts=WARMUP, seed=0, policy_kwargs={"net_arch": [256, 256]}, **settings
    )

    def block(steps: int) -> None:
        model.learn(steps, reset_num_timesteps=False)

    return block


def serve(name: str, agent: str, threads: int, connection: Connection) -> None:
    """Build one contestant, then time the blocks that are asked for: wall seconds and CPU seconds."""
    block = (
        ours(agent, threads, bf16=name == "neoteny bf16")
        if name.startswith("neoteny")
        else stable_baselines3(agent, threads, "medium" if name == "sb3 medium" else "highest")
    )
    block(WARMUP + 200)
    connection.send("ready")
    while steps := connection.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        block(steps)
        connection.send((time.perf_counter() - wall, time.process_time() - cpu))


def measure(agent: str, threads: int, rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds (wall, CPU) of one block for each contestant and round."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in CONTESTANTS:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, agent, threads, theirs), daemon=True).start()
        assert pipes[name].recv() == "ready"
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(CONTESTANTS, len(CONTESTANTS)):
            pipes[name].send(steps)
            seconds[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(0)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", default=["td3", "sac"], choices=["td3", "sac"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=600, help="training steps in one block")
    options = parser.parse_args()
    print(f"{ENV}, batch 256, [256, 256], one update a step, {options.threads} thread(s); median of rounds")
    for agent in options.agents:
        seconds = measure(agent, options.threads, options.rounds, options.steps)
        for name in CONTESTANTS:
            rate = statistics.median(options.steps / wall for wall, _ in seconds[name])
            line = f"{agent}  {name:<10}  {rate:6.0f} steps/s"
            for base in CONTESTANTS[:2]:
                pairs = list(zip(seconds[base], seconds[name], strict=True))
                wall = statistics.median(theirs[0] / own[0] for theirs, own in pairs)
                cpu = statistics.median(theirs[1] / own[1] for theirs, own in pairs)
                line += f"   {wall:5.2f} x {base} ({cpu:.2f} x per CPU second)"
            print(line, flush=True)


if __name__ == "__main__":
    main()
