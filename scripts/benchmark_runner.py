"""Environment steps a second of the MuJoCo runner against other libraries, on the same tasks, seeds and actions.

Contestants take turns of a short block each, in changing order; a ratio is taken inside a round, so that a noisy
machine cancels out, and the median over rounds is shown. A ratio above 1 means that ours is faster. Peers hand out
their own NumPy arrays and are not charged for tensors; ours hands out tensors, resets and counts returns.

    python scripts/benchmark_runner.py --rounds 9 --threads 2
    python scripts/benchmark_runner.py --tasks mujoco/Ant-v5 dmc/walker-walk --num-envs 1 64
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

import envs
from envs.runner import ContinuousActionSpec

TASKS = ("mujoco/HalfCheetah-v5", "mujoco/Hopper-v5", "mujoco/Ant-v5", "mujoco/Humanoid-v5", "dmc/cheetah-run")
Block = Callable[[int], None]  # take that many steps of all rows


def random_actions(spec: ContinuousActionSpec, num_envs: int) -> np.ndarray:
    """[1000, N, A] float32, taken in a circle."""
    uniform = np.random.default_rng(0).uniform(spec.low, spec.high, (1000, num_envs, spec.size))
    return uniform.astype(np.float32)


def ours(task: str, num_envs: int, threads: int) -> tuple[Block, np.ndarray]:
    runner = envs.make(task, num_envs, threads=threads, row_seeds=list(range(num_envs)))
    assert isinstance(runner.action_spec, ContinuousActionSpec)
    actions = random_actions(runner.action_spec, num_envs)
    tensors = list(torch.from_numpy(actions).unbind(0))
    runner.reset()

    def block(steps: int) -> None:
        for t in range(steps):
            runner.step(tensors[t % 1000])

    return block, actions


def gymnasium_single(task: str, actions: np.ndarray) -> Block:
    import gymnasium

    env = gymnasium.make(task.removeprefix("mujoco/"))
    rows = list(actions[:, 0])
    env.reset(seed=0)

    def block(steps: int) -> None:
        for t in range(steps):
            _, _, terminated, truncated, _ = env.step(rows[t % 1000])
            if terminated or truncated:
                env.reset()

    return block


def gymnasium_sync(task: str, actions: np.ndarray) -> Block:
    import gymnasium

    name, num_envs = task.removeprefix("mujoco/"), actions.shape[1]
    env = gymnasium.make_vec(name, num_envs, vectorization_mode="sync")
    env.reset(seed=0)  # row i gets seed i

    def block(steps: int) -> None:
        for t in range(steps):
            env.step(actions[t % 1000])

    return block


def control_loop(task: str, actions: np.ndarray) -> Block:
    """dm_control has no vector environment: a loop over N of its own."""
    from dm_control import suite

    domain, name = task.removeprefix("dmc/").split("-", 1)
    loop = [suite.load(domain, name, task_kwargs={"random": seed}) for seed in range(actions.shape[1])]
    for env in loop:
        env.reset()

    def block(steps: int) -> None:
        for t in range(steps):
            for row, env in enumerate(loop):
                env.step(actions[t % 1000, row])

    return block


def envpool_name(task: str) -> str:
    """`dmc/cheetah-run` is `CheetahRun-v1` there; Gymnasium's names are the same."""
    family, name = task.split("/", 1)
    if family == "mujoco":
        return name
    return "".join(part.capitalize() for part in name.replace("_", "-").split("-")) + "-v1"


def envpool_sync(task: str, actions: np.ndarray, threads: int) -> Block:
    import envpool

    num_envs = actions.shape[1]
    env = envpool.make(envpool_name(task), env_type="gymnasium", num_envs=num_envs, num_threads=threads)
    env.reset()

    def block(steps: int) -> None:
        for t in range(steps):
            env.step(actions[t % 1000])

    return block


def peers(task: str, actions: np.ndarray, threads: int) -> dict[str, Block]:
    """Every peer that runs this task with this many rows."""
    num_envs, found = actions.shape[1], {}
    if task.startswith("mujoco/"):
        if num_envs == 1:
            found["gymnasium.make"] = gymnasium_single(task, actions)
        else:
            found["SyncVectorEnv"] = gymnasium_sync(task, actions)
    else:
        found["dm_control" if num_envs == 1 else "dm_control loop"] = control_loop(task, actions)
    if importlib.util.find_spec("envpool") is not None:
        found["envpool sync"] = envpool_sync(task, actions, threads)
    return found


def measure(task: str, num_envs: int, threads: int, rounds: int, seconds: float) -> list[tuple[str, float, float]]:
    """Name, median steps a second over rounds (rows counted), and median of ours to it, of each contestant."""
    mine, actions = ours(task, num_envs, threads)
    contestants = {"neoteny": mine, **peers(task, actions, threads)}
    steps = {}
    for name, block in contestants.items():
        block(20)
        start = time.perf_counter()
        block(50)
        steps[name] = max(20, int(50 * seconds / (time.perf_counter() - start)))
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            contestants[name](steps[name])
            rates[name].append(steps[name] * num_envs / (time.perf_counter() - start))
    result = []
    for name, rate in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["neoteny"], rate, strict=True))
        result.append((name, statistics.median(rate), ratio))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="environment ids with a native task")
    parser.add_argument("--num-envs", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--threads", type=int, default=0, help="simulator threads, ours and EnvPool's; 0 = all cores")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if importlib.util.find_spec("envpool") is None:
        print("envpool is not installed; its rows are left out (pip install envpool==1.2.5)")
    print(f"{'task':24} {'N':>4}  {'contestant':16} {'steps/s':>10} {'ours / it':>10}")
    for task in options.tasks:
        for num_envs in options.num_envs:
            for name, rate, ratio in measure(task, num_envs, options.threads, options.rounds, options.seconds):
                print(f"{task:24} {num_envs:4}  {name:16} {rate:10.0f} {ratio:10.2f}", flush=True)


if __name__ == "__main__":
    main()
