"""Simulation while something else happens: in the background, and in two halves that take turns.

Both are deterministic: rows keep their seeds and their order, and a result does not depend on how long anything takes.
They pay where the caller leaves the processor to the simulator meanwhile: while a GPU thinks, or other cores are free.
"""

from __future__ import annotations

import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.registry import make
from envs.runner import Runner, Step, row_seeds


class InBackground:
    """A runner that simulates in a thread of its own between `send` and `recv`; fulfils `envs.runner.Runner`."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.num_envs, self.device = runner.num_envs, runner.device
        self.observation_spec, self.action_spec, self.spec = runner.observation_spec, runner.action_spec, runner.spec
        executor = ThreadPoolExecutor(1, thread_name_prefix="simulation")
        self._submit = executor.submit
        self._stop = weakref.finalize(self, executor.shutdown, wait=True)
        self._coming: Future[Step] | None = None

    @property
    def diverged_episodes(self) -> int:
        return self.runner.diverged_episodes

    def reset(self) -> Tensor:
        self._finish()
        return self.runner.reset()

    def step(self, action: Tensor) -> Step:
        self.send(action)
        return self.recv()

    def send(self, action: Tensor) -> None:
        """Take a copy of the actions and begin to simulate. Raises what the runner's own `send` raises."""
        if self._coming is not None:
            raise RuntimeError("send: call recv first")
        self.runner.send(action)
        self._coming = self._submit(self.runner.recv)

    def recv(self) -> Step:
        """Wait for the simulation, and raise what it raised."""
        if self._coming is None:
            raise RuntimeError("recv: call send first")
        coming, self._coming = self._coming, None
        return coming.result()

    def render(self, row: int = 0, height: int = 480, width: int = 480) -> np.ndarray:
        return self.runner.render(row, height, width)

    def state_dict(self) -> dict[str, Any]:
        """The runner's own. Raises RuntimeError between `send` and `recv`."""
        if self._coming is not None:
            raise RuntimeError("state_dict: call recv first")
        return self.runner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._finish()
        self.runner.load_state_dict(state)

    def close(self) -> None:
        self._finish()
        self._stop()
        self.runner.close()

    def _finish(self) -> None:
        """Let what was sent come to its end; nobody asks for it any more."""
        if self._coming is not None:
            self._coming.exception()
            self._coming = None


class TwoHalves:
    """N environments in two halves, so that one simulates while the caller is busy with the other's observations.

        obs = list(halves.reset_halves())
        halves.send(0, policy(obs[0]))
        while True:
            for half in (1, 0):
                halves.send(half, policy(obs[half]))  # while the other half simulates
                step = halves.recv(1 - half)
                obs[1 - half] = step.obs

    Rows are those of `envs.make(env_id, num_envs, seed, ...)`, the first half of them in half 0, bit for bit. A Step of
    one half has N / 2 rows.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        threads: int = 0,
        **task_args: Any,
    ):
        """As `envs.make`; ValueError for an odd number of environments."""
        if num_envs < 2 or num_envs % 2:
            raise ValueError(f"two halves need an even number of environments, got {num_envs}")
        self.num_envs, self.device = num_envs, torch.device(device)
        seeds = task_args.pop("row_seeds", None) or row_seeds(seed, num_envs)
        middle = num_envs // 2
        self.halves = tuple(
            InBackground(make(env_id, middle, seed, device, threads, row_seeds=part, **task_args))
            for part in (seeds[:middle], seeds[middle:])
        )
        first = self.halves[0]
        self.observation_spec, self.action_spec, self.spec = first.observation_spec, first.action_spec, first.spec

    def reset_halves(self) -> tuple[Tensor, Tensor]:
        """Start a new episode in every row: obs [N / 2, *obs_shape] of each half."""
        return self.halves[0].reset(), self.halves[1].reset()

    def send(self, half: int, action: Tensor) -> None:
        """Begin to simulate one half. action: [N / 2, A] or [N / 2]."""
        self.halves[half].send(action)

    def recv(self, half: int) -> Step:
        """The outcome of the actions sent to that half."""
        return self.halves[half].recv()

    @property
    def diverged_episodes(self) -> int:
        return self.halves[0].diverged_episodes + self.halves[1].diverged_episodes

    def state_dict(self) -> dict[str, Any]:
        """Of both halves. Raises RuntimeError while one simulates."""
        return {"halves": [half.state_dict() for half in self.halves]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for half, saved in zip(self.halves, state["halves"], strict=True):
            half.load_state_dict(saved)

    def close(self) -> None:
        for half in self.halves:
            half.close()
