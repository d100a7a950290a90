"""Who takes part in `neoteny bench`: our runner, other libraries on the same tasks, and the bare simulators.

A contestant opens a `Case` as a context that yields a function: run for about so many seconds, return the steps taken
(rows counted). All get random actions, the same ones where the action spaces agree, seeds 0 .. N - 1, and the settings
of our tasks. Peers hand out their own NumPy arrays and are not charged for tensors; ours hands out tensors.
Heavy libraries are imported in the process that runs a contestant, so only by the functions below.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any

import numpy as np

ACTIONS = 1000  # drawn in advance and taken in a circle
STICKY = 0.25  # ALE v5's probability that the console sees the previous action again
BENCH_EXTRA = "pip install 'neoteny[bench]'"

Advance = Callable[[float], int]


class NotOffered(Exception):
    """This contestant does not have the environment; the message says so in one sentence."""


@dataclass(frozen=True)
class Case:
    """One environment at one number of rows. threads: simulator threads of whoever has a setting for them."""

    env: str
    num_envs: int
    threads: int

    @property
    def family(self) -> str:
        return self.env.partition("/")[0]

    @property
    def name(self) -> str:
        return self.env.partition("/")[2]

    @property
    def used_threads(self) -> int:
        """More threads than rows would idle."""
        return min(self.threads, self.num_envs)


def repeat(step: Callable[[int], object], num_envs: int) -> Advance:
    """Call step(0), step(1), ... step(ACTIONS - 1), step(0), ... ; each is one action in every row."""
    times = itertools.cycle(range(ACTIONS))

    def advance(seconds: float) -> int:
        calls, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            step(next(times))
            calls += 1
        return calls * num_envs

    return advance


def random_actions(num_envs: int, *bounds: np.ndarray, count: int = 0) -> np.ndarray:
    """[ACTIONS, N, A] float32 between two bounds [A], or without bounds [ACTIONS, N] int64 below `count`."""
    generator = np.random.default_rng(0)
    if not bounds:
        return generator.integers(count, size=(ACTIONS, num_envs))
    low, high = bounds
    return generator.uniform(low, high, (ACTIONS, num_envs, *low.shape)).astype(np.float32)


def actions_in(space: Any, num_envs: int) -> np.ndarray:
    """Random actions of a Gymnasium space, Box or Discrete."""
    if hasattr(space, "n"):
        return random_actions(num_envs, count=int(space.n))
    return random_actions(num_envs, space.low, space.high)


@contextlib.contextmanager
def neoteny(case: Case) -> Iterator[Advance]:
    """Ours, with tensors on the CPU."""
    import torch

    import envs
    from envs.runner import DiscreteActionSpec

    torch.set_num_threads(1)
    rows = range(case.num_envs)
    with closing(envs.make(case.env, case.num_envs, threads=case.threads, row_seeds=list(rows))) as runner:
        spec = runner.action_spec
        if isinstance(spec, DiscreteActionSpec):
            actions = random_actions(case.num_envs, count=spec.count)
        else:
            actions = random_actions(case.num_envs, spec.low, spec.high)
        tensors = torch.from_numpy(actions).unbind(0)
        runner.reset()
        yield repeat(lambda t: runner.step(tensors[t]), case.num_envs)


def gymnasium_id(case: Case) -> str:
    """`atari/Pong` is `ALE/Pong-v5` there; the other names are the same."""
    return f"ALE/{case.name}-v5" if case.family == "atari" else case.name


def gymnasium_settings(case: Case) -> tuple[dict[str, Any], tuple[Callable[[Any], Any], ...]]:
    """Keywords and wrappers that make Gymnasium's environment the same task as ours."""
    if case.family != "atari":
        return {}, ()
    import ale_py  # noqa: F401  (registers the ALE/ ids)
    import cv2
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    cv2.setNumThreads(0)  # its threads would fight for the cores with the rows
    wrappers = (
        lambda env: AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84),
        lambda env: FrameStackObservation(env, 4, padding_type="zero"),
    )
    return {"frameskip": 1, "repeat_action_probability": STICKY}, wrappers


@contextlib.contextmanager
def gymnasium_single(case: Case) -> Iterator[Advance]:
    """One environment and the loop that a user would write."""
    import gymnasium

    settings, wrappers = gymnasium_settings(case)
    env = gymnasium.make(gymnasium_id(case), **settings)
    for wrapper in wrappers:
        env = wrapper(env)
    actions = list(actions_in(env.action_space, 1)[:, 0])
    with closing(env):
        env.reset(seed=0)

        def step(t: int) -> None:
            _, _, terminated, truncated, _ = env.step(actions[t])
            if terminated or truncated:
                env.reset()

        yield repeat(step, 1)


def gymnasium_vector(mode: str) -> Callable[[Case], AbstractContextManager[Advance]]:
    """mode: "sync" (one process) or "async" (one process a row, shared memory)."""

    @contextlib.contextmanager
    def opened(case: Case) -> Iterator[Advance]:
        import gymnasium

        settings, wrappers = gymnasium_settings(case)
        env = gymnasium.make_vec(gymnasium_id(case), case.num_envs, mode, wrappers=wrappers, **settings)
        actions = actions_in(env.single_action_space, case.num_envs)
        with closing(env):
            env.reset(seed=0)  # row i gets seed i
            yield repeat(lambda t: env.step(actions[t]), case.num_envs)

    return opened


@contextlib.contextmanager
def dm_control_loop(case: Case) -> Iterator[Advance]:
    """dm_control has no vector environment: its own in a loop."""
    from envs.dm_control_env import SUITE
    from envs.graphics import choose_platform, load_compiler_first

    choose_platform()
    load_compiler_first()
    from dm_control import suite

    domain, _, task = case.name.partition("-")
    if task not in SUITE.get(domain, ()):
        raise NotOffered(f"dm_control's suite has no {case.name}")
    loop = [suite.load(domain, task, task_kwargs={"random": seed}) for seed in range(case.num_envs)]
    spec = loop[0].action_spec()
    low, high = (np.broadcast_to(bound, spec.shape) for bound in (spec.minimum, spec.maximum))
    actions = random_actions(case.num_envs, low, high)
    for env in loop:
        env.reset()

    def step(t: int) -> None:
        for env, action in zip(loop, actions[t], strict=True):
            env.step(action)

    yield repeat(step, case.num_envs)
    for env in loop:
        env.close()


def envpool_id(case: Case) -> str:
    """`dmc/cheetah-run` is `CheetahRun-v1` there, `atari/Pong` is `Pong-v5`; Gymnasium's names are the same."""
    if case.family == "atari":
        return f"{case.name}-v5"
    if case.family == "dmc":
        return "".join(part[:1].upper() + part[1:] for part in case.name.replace("_", "-").split("-")) + "-v1"
    return case.name


@contextlib.contextmanager
def envpool_sync(case: Case) -> Iterator[Advance]:
    """EnvPool's synchronous mode: all rows in every step."""
    import envpool

    name = envpool_id(case)
    if name not in envpool.list_all_envs():
        raise NotOffered(f"EnvPool has no {name}")
    atari = {"noop_max": 1, "use_fire_reset": False, "repeat_action_probability": STICKY, "reward_clip": True}
    env = envpool.make(
        name,
        env_type="gymnasium",
        num_envs=case.num_envs,
        num_threads=case.used_threads,
        seed=0,
        **(atari if case.family == "atari" else {}),
    )
    actions = actions_in(env.action_space, case.num_envs)
    with closing(env):
        env.reset()
        yield repeat(lambda t: env.step(actions[t]), case.num_envs)


def rom_name(case: Case) -> str:
    """ALE's name of the cartridge. NotOffered for a game it does not have."""
    import ale_py  # noqa: F401  (registers the ALE/ ids)
    import gymnasium

    spec = gymnasium.registry.get(gymnasium_id(case))
    if spec is None:
        raise NotOffered(f"ALE has no {case.name}")
    return spec.kwargs["game"]


@contextlib.contextmanager
def ale_vector(case: Case) -> Iterator[Advance]:
    """ALE's own vector environment, which our Atari runner is built on."""
    from ale_py.vector_env import AtariVectorEnv

    env = AtariVectorEnv(
        rom_name(case),
        case.num_envs,
        num_threads=case.used_threads,
        repeat_action_probability=STICKY,
        noop_max=0,
        use_fire_reset=False,
    )
    actions = actions_in(env.single_action_space, case.num_envs)
    with closing(env):
        env.reset(seed=0)
        yield repeat(lambda t: env.step(actions[t]), case.num_envs)


@contextlib.contextmanager
def raw_simulator(case: Case) -> Iterator[Advance]:
    """The limit: the simulator in a bare loop on as many cores, without observation, reward or reset in time.

    One process for each thread, because a loop in Python cannot use two cores and the emulator keeps the lock.
    """
    advance = raw_emulator(case) if case.family == "atari" else raw_physics(case)
    context = multiprocessing.get_context("fork")  # simulators have no pickled form; this process has no threads
    pipes, processes = [], []
    try:
        for _ in range(case.used_threads):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_answer, args=(advance, theirs), daemon=True))
            processes[-1].start()
            pipes.append(ours)

        def all_at_once(seconds: float) -> int:
            for pipe in pipes:
                pipe.send(seconds)
            return sum(pipe.recv() for pipe in pipes)

        yield all_at_once
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _answer(advance: Advance, pipe: Any) -> None:
    while True:
        pipe.send(advance(pipe.recv()))


def raw_emulator(case: Case) -> Advance:
    """Actions of four emulator frames, random ones; the screen is drawn by the console itself but never read."""
    import ale_py
    from ale_py import roms

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    emulator.setInt("random_seed", 0)
    emulator.setFloat("repeat_action_probability", STICKY)
    emulator.setInt("frame_skip", 4)
    emulator.loadROM(str(roms.get_rom_path(rom_name(case))))
    legal = emulator.getMinimalActionSet()
    actions = [legal[index] for index in random_actions(1, count=len(legal))[:, 0]]

    def step(t: int) -> None:
        emulator.act(actions[t])
        if emulator.game_over():
            emulator.reset_game()

    return repeat(step, 1)


def raw_physics(case: Case) -> Advance:
    """`mj_step` through episodes that our runner has played before: the same states, contacts and all.

    The start of an episode is copied in; nothing else is done beside writing the actions.
    """
    import mujoco  # pyright: ignore[reportMissingTypeStubs]

    from envs.mujoco_batch import known_ids, make_task

    if case.env not in known_ids():
        raise NotOffered(f"the bare physics of {case.env} is not known, because it has no native task")
    task: Any = make_task(case.env)
    mj: Any = mujoco
    model, substeps, everything = task.model, task.substeps, mj.mjtState.mjSTATE_INTEGRATION
    data = mj.MjData(model)
    control = data.ctrl
    script = itertools.cycle(played_episodes(case.env))

    def advance(seconds: float) -> int:
        steps, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            start, action = next(script)
            if start is not None:
                mj.mj_setState(model, data, start, everything)
            control[:] = action
            mj.mj_step(model, data, substeps)
            steps += 1
        return steps

    return advance


def played_episodes(env: str, rows: int = 4, steps: int = ACTIONS) -> list[tuple[np.ndarray | None, np.ndarray]]:
    """What `rows` rows do in `steps` steps of random actions, one row after the other.

    Each element is one step: its action, and where an episode begins the simulator's state (mjSTATE_INTEGRATION).
    """
    import torch

    import envs

    with closing(envs.make(env, rows, threads=1, row_seeds=list(range(rows)))) as runner:
        spec: Any = runner.action_spec
        actions = random_actions(rows, spec.low, spec.high)[:steps]
        runner.reset()
        starts: list[dict[int, np.ndarray]] = [{} for _ in range(rows)]
        begun = np.ones(rows, bool)
        for t in range(steps):
            if begun.any():
                states = runner.state_dict()["simulation"].numpy()
                for row in np.flatnonzero(begun):
                    starts[row][t] = states[row].copy()
            begun = runner.step(torch.from_numpy(actions[t])).episode_ended.numpy().copy()
    return [(starts[row].get(t), actions[t, row].astype(np.float64)) for row in range(rows) for t in range(steps)]


@dataclass(frozen=True)
class Contestant:
    """`package`: what it needs beyond our own dependencies, and `install` how to get that."""

    title: str
    families: tuple[str, ...]
    open: Callable[[Case], AbstractContextManager[Advance]]
    rows: Callable[[int], bool] = lambda num_envs: True
    package: str = ""
    install: str = ""

    def takes_part(self, case: Case) -> bool:
        return case.family in self.families and self.rows(case.num_envs)


def _one(num_envs: int) -> bool:
    return num_envs == 1


def _several(num_envs: int) -> bool:
    return num_envs > 1


GYMNASIUM = ("mujoco", "atari", "gym")
CONTESTANTS = {
    "neoteny": Contestant("neoteny", ("mujoco", "dmc", "atari", "gym"), neoteny),
    "gymnasium": Contestant("Gymnasium", GYMNASIUM, gymnasium_single, _one),
    "sync": Contestant("Gymnasium Sync", GYMNASIUM, gymnasium_vector("sync"), _several),
    "async": Contestant("Gymnasium Async", GYMNASIUM, gymnasium_vector("async"), _several),
    "dm_control": Contestant("dm_control loop", ("dmc",), dm_control_loop),
    "ale": Contestant("ALE vector", ("atari",), ale_vector),
    "envpool": Contestant(
        "EnvPool", ("mujoco", "dmc", "atari", "gym"), envpool_sync, package="envpool", install=BENCH_EXTRA
    ),
    "limit": Contestant("limit (simulator alone)", ("mujoco", "dmc", "atari"), raw_simulator),
}
