"""One seed of a training run: the loop in which an agent meets its environments."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import envs
from agents.agent import Agent, Metrics
from envs import Runner, Step
from envs.overlap import InBackground
from runs import checkpoint, compute
from runs.catalogue import find_agent
from runs.config import RunConfig
from runs.evaluation import evaluate
from runs.randomness import spawn_generators, stream_seed
from runs.record import Row


class Diverged(ArithmeticError):
    """A quantity became NaN or infinite; the message names the step and the quantity."""


class Listener(Protocol):
    """Where a seed's loop tells what happens. Calls come in the order of the events."""

    def rows(self, seed: int, rows: list[Row]) -> None: ...

    def progress(self, seed: int, step: int, return_: float | None) -> None: ...

    def saved(self, seed: int, label: str, step: int, digest: str) -> None:
        """The seed's file for checkpoint `label` is written; LAST is the one with which its training ends."""
        ...


LAST = "last"


class Episodes:
    """The episodes that ended since the last look, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.ended: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, step: Step, at: int) -> None:
        """Remember what ended in `step`, which brought the count of environment steps to `at`."""
        self.steps.append(at)
        self.ended.append((step.episode_ended.clone(), step.episode_return.clone(), step.episode_length.clone()))

    def drain(self) -> list[tuple[int, float, float]]:
        """(step, return, length) of every ended episode, oldest first."""
        if not self.ended:
            return []
        ended, returns, lengths = (torch.stack(column).cpu() for column in zip(*self.ended, strict=True))  # [T, N] each
        found = [(self.steps[t], float(returns[t, n]), float(lengths[t, n])) for t, n in ended.nonzero().tolist()]
        self.steps, self.ended = [], []
        return found


def build_agent(config: RunConfig, runner: Runner, seed: int, device: torch.device) -> Agent:
    """The agent of a run, freshly initialised from the seed."""
    return find_agent(config.agent).Agent(
        runner.observation_spec,
        runner.action_spec,
        config.agent_config,
        num_envs=config.num_envs,
        device=device,
        generators=spawn_generators(seed, device),
        compiled=config.compiled,
    )


class SeedTraining:
    """Agent, environments and counters of one seed; `run` is the loop."""

    def __init__(self, config: RunConfig, seed: int, folder: Path, listener: Listener):
        self.config, self.seed, self.folder, self.listener = config, seed, folder, listener
        self.device = torch.device(config.device)
        compute.set_up(self.device, config.threads)
        environment_seed = stream_seed(seed, "environment")
        self.runner: Runner = envs.make(
            config.env, config.num_envs, environment_seed, self.device, config.threads, **config.env_settings
        )
        if config.overlap:
            self.runner = InBackground(self.runner)
        self.agent = build_agent(config, self.runner, seed, self.device)
        self.obs = self.runner.reset()
        self.episodes = Episodes()
        self.metrics: Metrics = {}
        self.last_return: float | None = None

    def run(self, stop: Callable[[], bool]) -> None:
        """Train to the end, or until `stop`; either way the last thing done is a checkpoint.

        Raises Diverged or OSError; checkpoints written before stay.
        """
        try:
            self._loop(stop)
            self._save(LAST)
        except FloatingPointError as error:
            # A broken network soon breaks the simulator; if a loss went first, it is the one to name.
            self._log(None)
            raise Diverged(f"{error}, at step {self.agent.steps} of seed {self.seed}") from error
        finally:
            self.runner.close()

    def _loop(self, stop: Callable[[], bool]) -> None:
        config, agent = self.config, self.agent
        self._evaluate(stop)
        clock, clock_steps = time.perf_counter(), agent.steps
        while agent.steps < config.steps and not stop():
            before = agent.steps
            self.advance()
            if self._due(before, config.log_every):
                seconds = time.perf_counter() - clock
                self._log((agent.steps - clock_steps) / seconds)
                clock, clock_steps = time.perf_counter(), agent.steps
            if self._due(before, config.eval_every):
                paused = time.perf_counter()
                self._evaluate(stop)
                clock += time.perf_counter() - paused
            if self._due(before, config.checkpoint_every) and agent.steps < config.steps:
                self._save(f"step_{agent.steps}")

    def advance(self) -> None:
        """One action in every environment, and the gradient steps it makes due."""
        with compute.small_products(self.config.num_envs):
            action = self.agent.act(self.obs, explore=True)
        if self.config.overlap:
            self.runner.send(action)
            self._learn()
            step = self.runner.recv()
            self.agent.observe(step)
        else:
            step = self.runner.step(action)
            self.agent.observe(step)
            self._learn()
        self.episodes.add(step, self.agent.steps)
        self.obs = step.obs

    def _learn(self) -> None:
        with compute.bfloat16_products(self.device, self.config.bf16):
            self.metrics |= self.agent.update()

    def _due(self, before: int, every: int) -> bool:
        """Whether the last round of steps reached a multiple of `every`, or the end of the run."""
        now = self.agent.steps
        return now // every > before // every or now >= self.config.steps

    def _log(self, steps_per_second: float | None) -> None:
        now, seed = self.agent.steps, self.seed
        rows = []
        for at, return_, length in self.episodes.drain():
            rows += [Row(at, "train/return", return_, seed), Row(at, "train/length", length, seed)]
            self.last_return = return_
        values = {name: float(value) for name, value in self.metrics.items()}
        rows += [Row(now, name, value, seed) for name, value in values.items()]
        self.metrics = {}
        if self.runner.diverged_episodes:
            rows.append(Row(now, "train/diverged_episodes", self.runner.diverged_episodes, seed))
        if steps_per_second is not None:
            rows.append(Row(now, "speed/steps_per_second", steps_per_second, seed))
        self.listener.rows(seed, rows)
        for row in rows:
            if row.value is None:
                raise Diverged(f"{row.name} became {row.missing} at step {row.step} of seed {seed}")
        self.listener.progress(seed, now, self.last_return)

    def _evaluate(self, stop: Callable[[], bool]) -> None:
        config, now = self.config, self.agent.steps
        environment_seed = stream_seed(self.seed, "evaluation_environment", now)
        scores = evaluate(
            self.agent, config.env, config.env_settings, config.eval_episodes, environment_seed, self.device, stop
        )
        if scores is None:
            return
        returns, lengths = scores
        rows = [
            Row(now, "eval/return", float(returns.mean()), self.seed),
            Row(now, "eval/length", float(lengths.float().mean()), self.seed),
        ]
        self.listener.rows(self.seed, rows)

    def _save(self, label: str) -> None:
        # The newest numbers are looked at first, so that no broken agent takes the place of a good checkpoint.
        self._log(None)
        folder = checkpoint.staging(self.folder, label)
        digest = checkpoint.write_seed(folder, self.seed, self.state_dict())
        self.listener.saved(self.seed, label, self.agent.steps, digest)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future of this seed."""
        return {"agent": self.agent.state_dict(), "runner": self.runner.state_dict(), "obs": self.obs.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.agent.load_state_dict(state["agent"])
        self.runner.load_state_dict(state["runner"])
        self.obs = state["obs"].to(self.device)
