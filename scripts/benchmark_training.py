"""Training steps a second against stable-baselines3 at equal hyper-parameters.

TD3 and SAC on HalfCheetah-v5, PPO with 8 and 16 environments and DQN with one on Pong.

Every contestant is a living process; one trains at a time for a short block, in random order, several rounds. Ratios
are taken inside a round, so that a noisy machine cancels out. Warm-up and start are outside the blocks. Processor
seconds are those of the whole process tree: SubprocVecEnv pays for its workers.

    python scripts/benchmark_training.py --cases td3 sac --rounds 7 --threads 1
    python scripts/benchmark_training.py --cases "ppo 8" "ppo 16" dqn --rounds 5 --threads 2
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

WARMUP = 500
Block = Callable[[int], None]


@dataclass(frozen=True)
class Case:
    """What is trained; a block of `steps` environment steps, counted over all environments."""

    agent: str
    env: str
    num_envs: int
    changes: dict[str, Any]  # of our agent's preset
    theirs: dict[str, Any]  # arguments of stable-baselines3's agent
    contestants: tuple[str, ...]
    steps: int
    preset: str | None = None


@dataclass(frozen=True)
class Contestant:
    """One way to train. precision: `torch.set_float32_matmul_precision`, where its user sets it."""

    ours: bool = False
    overlap: bool = False
    bf16: bool = False
    precision: str = "highest"
    environments: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


CONTESTANTS = {
    "sb3 stock": Contestant(),
    "sb3 medium": Contestant(precision="medium"),
    "sb3 dummy": Contestant(environments="dummy"),
    "sb3 subproc": Contestant(environments="subproc"),
    "sb3 on our runner": Contestant(environments="runner"),
    "neoteny": Contestant(ours=True),
    "neoteny overlap": Contestant(ours=True, overlap=True),
    "neoteny bf16": Contestant(ours=True, bf16=True),
}
VECTORS = ("sb3 stock", "sb3 medium", "neoteny", "neoteny bf16")
FRAMES = ("sb3 dummy", "sb3 subproc", "sb3 on our runner", "neoteny", "neoteny overlap", "neoteny bf16")
ONE_ROW = tuple(name for name in FRAMES if name != "sb3 subproc")


def continuous(agent: str) -> Case:
    theirs = {"learning_rate": 3e-4, "batch_size": 256, "train_freq": 1, "gradient_steps": 1}
    theirs |= {"learning_starts": WARMUP, "policy_kwargs": {"net_arch": [256, 256]}}
    return Case(agent, "mujoco/HalfCheetah-v5", 1, {"warmup_steps": WARMUP}, theirs, VECTORS, 600)


def ppo(num_envs: int) -> Case:
    theirs = {"n_steps": 128, "n_epochs": 4, "batch_size": 128 * num_envs // 4, "learning_rate": 2.5e-4}
    theirs |= {"clip_range": 0.1, "clip_range_vf": 0.1, "ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5}
    return Case("ppo", "atari/Pong", num_envs, {}, theirs, FRAMES, 128 * num_envs, "atari")


def dqn() -> Case:
    """With a constant chance of random actions, because stable-baselines3 asks no network for those."""
    ours = {"warmup_steps": WARMUP, "replay_capacity": 10_000, "epsilon_start": 0.1, "epsilon_end": 0.1}
    theirs = {"learning_starts": WARMUP, "buffer_size": 10_000, "exploration_initial_eps": 0.1}
    theirs |= {"exploration_final_eps": 0.1, "learning_rate": 1e-4, "batch_size": 32, "train_freq": 4}
    theirs |= {"gradient_steps": 1, "target_update_interval": 1_000}
    return Case("dqn", "atari/Pong", 1, ours, theirs, ONE_ROW, 400, "atari")


CASES = {"td3": continuous("td3"), "sac": continuous("sac"), "ppo 8": ppo(8), "ppo 16": ppo(16), "dqn": dqn()}


class Silent:
    """A listener that hears nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def ours(case: Case, contestant: Contestant, threads: int) -> Block:
    """The loop of `neoteny train`, without evaluation and checkpoints."""
    from runs.catalogue import preset_config
    from runs.config import RunConfig
    from runs.training import Listener, Training

    never = 10**9
    config = RunConfig(
        agent=case.agent,
        env=case.env,
        steps=never,
        seeds=(0,),
        num_envs=case.num_envs,
        eval_every=never,
        eval_episodes=1,
        checkpoint_every=never,
        log_every=never,
        device="cpu",
        threads=threads,
        compiled=False,
        overlap=contestant.overlap,
        bf16=contestant.bf16,
        tensorboard=False,
        preset=case.preset,
        agent_config=dataclasses.replace(preset_config(case.agent, case.preset), **case.changes),
    )
    training = Training(config, (0,), Path(tempfile.mkdtemp()), cast(Listener, Silent()))

    def block(steps: int) -> None:
        for _ in range(steps // case.num_envs):
            training.advance()
        training.episodes.drain()

    return block


def stable_baselines3(case: Case, contestant: Contestant, threads: int) -> Block:
    """Its agent with its own environments, or with our runner as its environment."""
    import stable_baselines3
    import torch

    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(contestant.precision)
    learner = getattr(stable_baselines3, case.agent.upper())
    frames = case.env.startswith("atari/")
    policy = "CnnPolicy" if frames else "MlpPolicy"
    env = atari(case, contestant, threads) if frames else case.env.split("/")[1]
    model = learner(policy, env, seed=0, device="cpu", **case.theirs)

    def block(steps: int) -> None:
        model.learn(steps, reset_num_timesteps=False)

    return block


def atari(case: Case, contestant: Contestant, threads: int) -> Any:
    """84 x 84 grey frames, the newest four, four console frames an action."""
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack

    if contestant.environments == "runner":
        import envs
        from envs.stable_baselines3_adapter import as_stable_baselines3

        return as_stable_baselines3(envs.make(case.env, case.num_envs, 0, threads=threads))
    # Its workers start without the games unless the module that registers them is named with the id.
    game = f"ale_py:{case.env.split('/')[1]}NoFrameskip-v4"
    kind = SubprocVecEnv if contestant.environments == "subproc" else DummyVecEnv
    return VecFrameStack(make_atari_env(game, case.num_envs, seed=0, vec_env_cls=kind), 4)


def serve(name: str, case: Case, threads: int, connection: Connection) -> None:
    """Build one contestant, then time the blocks that are asked for: wall seconds and processor seconds."""
    from runs.turns import tree_cpu_seconds

    contestant = CONTESTANTS[name]
    block = (ours if contestant.ours else stable_baselines3)(case, contestant, threads)
    block(max(WARMUP + 200, case.steps))
    connection.send(None)
    with contextlib.suppress(EOFError):
        while True:
            steps = connection.recv()
            wall, cpu = time.perf_counter(), tree_cpu_seconds() or 0.0
            block(steps)
            connection.send((time.perf_counter() - wall, (tree_cpu_seconds() or 0.0) - cpu))


def measure(case: Case, threads: int, rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds (wall, processor) of one block for each contestant and round."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in case.contestants}
    try:
        for name in case.contestants:
            pipes[name], theirs = context.Pipe()
            context.Process(target=serve, args=(name, case, threads, theirs)).start()
            theirs.close()
            pipes[name].recv()
        order = random.Random(0)
        for _ in range(rounds):
            for name in order.sample(case.contestants, len(case.contestants)):
                pipes[name].send(steps)
                seconds[name].append(pipes[name].recv())
    finally:
        for pipe in pipes.values():
            pipe.close()  # at which the contestants end
    return seconds


def report(title: str, case: Case, steps: int, seconds: dict[str, list[tuple[float, float]]]) -> None:
    """One line for each contestant: its rate and its ratios to those of stable-baselines3, medians of rounds."""
    bases = [name for name in case.contestants if not CONTESTANTS[name].ours]
    for name in case.contestants:
        rate = statistics.median(steps / wall for wall, _ in seconds[name])
        line = f"{title:<7} {name:<18} {rate:6.0f} steps/s"
        for base in bases:
            pairs = list(zip(seconds[base], seconds[name], strict=True))
            wall = statistics.median(theirs[0] / own[0] for theirs, own in pairs)
            cpu = statistics.median(theirs[1] / own[1] for theirs, own in pairs)
            line += f"   {wall:5.2f} x {base} ({cpu:.2f} x per CPU second)"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["td3", "sac"], choices=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=None, help="environment steps in one block")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), help="these contestants alone")
    options = parser.parse_args()
    print(f"{options.threads} thread(s); medians of {options.rounds} rounds; load {os.getloadavg()[0]:.1f}")
    for title in options.cases:
        case = CASES[title]
        if options.only:
            case = dataclasses.replace(case, contestants=tuple(n for n in case.contestants if n in options.only))
        steps = options.steps or case.steps
        report(title, case, steps, measure(case, options.threads, options.rounds, steps))
    print(f"load {os.getloadavg()}", file=sys.stderr)


if __name__ == "__main__":
    main()
