"""One seed of a training run: the loop in which an agent meets its environments."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import envs
from agents.agent import Agent, Metrics
from agents.diagnostics import AgentDiagnostics
from agents.population import RandomStream
from envs import Runner, Step
from envs.overlap import InBackground
from envs.sequence import switches
from runs import checkpoint, compute
from runs.catalogue import find_agent
from runs.checkpoint import SeedPart
from runs.checkpoint_writer import CheckpointWriter
from runs.config import RunConfig
from runs.evaluation import evaluate
from runs.keeping import plasticity_of
from runs.randomness import spawn_streams, stream_seed
from runs.record import Row
from runs.settings import made_by


class Diverged(ArithmeticError):
    """A quantity became NaN or infinite; the message names the step and the quantity."""


class CannotContinue(ValueError):
    """A whole checkpoint that this installation cannot load; the message says why."""


class Listener(Protocol):
    """Where a seed's loop tells what happens. Rows and progress come in the order of the events."""

    def rows(self, seed: int, rows: list[Row]) -> None: ...

    def progress(self, seed: int, step: int, return_: float | None) -> None: ...

    def weights(self, seed: int, step: int, weights: dict[str, np.ndarray]) -> None:
        """Every parameter of the agent's networks by its name in TensorBoard; only if the run wants histograms."""
        ...

    def saved(self, seed: int, label: str, part: SeedPart) -> None:
        """The seed's files for checkpoint `label` are written; LAST is the one with which its training ends.

        Called from the thread that wrote them. Every row that `part` counts was told before.
        """
        ...


LAST = "last"
# What agents, networks and environments raise for a state that is another one's.
MISFITS = (ValueError, LookupError, RuntimeError, TypeError, AttributeError)


def one_line(error: BaseException) -> str:
    """An error's message as the first half of a sentence; those of torch span lines."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class Episodes:
    """The episodes that ended since the last look, kept on the device so that no step waits for it."""

    def __init__(self, known: list[tuple[int, float, float]] | None = None) -> None:
        self.known = known or []  # fetched from the device, not drained yet
        self.steps: list[int] = []
        self.ended: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, step: Step, at: int) -> None:
        """Remember what ended in `step`, which brought the count of environment steps to `at`."""
        self.steps.append(at)
        self.ended.append((step.episode_ended.clone(), step.episode_return.clone(), step.episode_length.clone()))

    def fetch(self) -> list[tuple[int, float, float]]:
        """(step, return, length) of every ended episode, oldest first."""
        if self.ended:
            ended, returns, lengths = (torch.stack(column).cpu() for column in zip(*self.ended, strict=True))  # [T, N]
            self.known += [
                (self.steps[t], float(returns[t, n]), float(lengths[t, n])) for t, n in ended.nonzero().tolist()
            ]
            self.steps, self.ended = [], []
        return self.known

    def drain(self) -> list[tuple[int, float, float]]:
        """The same, and forget them."""
        found, self.known = self.fetch(), []
        return found


def build_agent(config: RunConfig, runner: Runner, device: torch.device, streams: Mapping[str, RandomStream]) -> Agent:
    """The agent of a run, freshly initialised from its seed's streams."""
    plasticity = plasticity_of(config)
    agent = find_agent(config.agent).Agent(
        runner.observation_spec,
        runner.action_spec,
        config.agent_config,
        num_envs=config.num_envs,
        device=device,
        streams=streams,
        compiled=config.compiled,
        plasticity=plasticity,
    )
    if plasticity.uses_boundaries and switches(runner) is None:
        raise ValueError(
            f"'{config.interventions}' acts where the task changes, and {config.env} is one task: give it steps of its "
            "own, as in reset(every=20000) or injection(at=100000), or train on a sequence of tasks"
        )
    return agent


def network_weights(agent: Agent) -> dict[str, np.ndarray]:
    """{"weights/actor/layers.0.weight": …} of every network that an agent trains; targets only follow those."""
    networks = {name: part for name, part in vars(agent).items() if isinstance(part, nn.Module)}
    return {
        f"weights/{network}/{name}": parameter.detach().float().cpu().numpy()
        for network, module in networks.items()
        if not network.startswith("target_")
        for name, parameter in module.named_parameters()
    }


class SeedTraining:
    """Agent, environments and counters of one seed; `run` is the loop.

    resumed_from: the checkpoint to go on from. Raises Damaged or CannotContinue if that is impossible.

    The order at a step, where each thing is due: train, log, evaluate, checkpoint. So a checkpoint of the schedule lies
    behind the rows of its step, and has nothing left to tell. One made because of a stop may lie before the evaluation
    of its step (`evaluation_due`) and holds what has not been logged yet; then the rows are the same as if the run had
    never been stopped.
    """

    def __init__(
        self, config: RunConfig, seed: int, folder: Path, listener: Listener, resumed_from: Path | None = None
    ):
        self.config, self.seed, self.listener = config, seed, listener
        self.device = torch.device(config.device)
        compute.set_up(self.device, config.threads)
        environment_seed = stream_seed(seed, "environment")
        self.runner: Runner = envs.make(
            config.env, config.num_envs, environment_seed, self.device, config.threads, **config.env_settings
        )
        if config.overlap:
            self.runner = InBackground(self.runner)
        self.streams = spawn_streams(seed, self.device)
        self.agent = build_agent(config, self.runner, self.device, self.streams)
        self.diagnostics = None if config.diagnostics_every is None else AgentDiagnostics(self.agent)
        self.obs = self.runner.reset()
        self.episodes = Episodes()
        self.metrics: Metrics = {}
        self.row_count = 0
        self.evaluation_due = True
        self.last_return: float | None = None
        self.writer = CheckpointWriter(folder, seed, lambda label, part: listener.saved(seed, label, part))
        if resumed_from is not None:
            self._resume(resumed_from)

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_seed(folder, self.seed)
        try:
            self.load_state_dict(state)
        except checkpoint.Damaged:
            raise
        except MISFITS as error:
            maker = made_by(self.config.environment)
            raise CannotContinue(f"{folder} does not fit this installation: {one_line(error)}; {maker}") from error
        self.writer.resume_from(folder, state)

    def run(self, stop: Callable[[], bool]) -> None:
        """Train to the end, or until `stop`; either way the last thing done is a checkpoint.

        Raises Diverged or OSError; checkpoints written before stay.
        """
        try:
            self._loop(stop)
            self._save(LAST)
            self.writer.wait()
        except FloatingPointError as error:
            # A broken network soon breaks the simulator; if a loss went first, it is the one to name.
            self._log(None)
            raise Diverged(f"{error}, at step {self.agent.steps} of seed {self.seed}") from error
        finally:
            self.writer.close()
            self.runner.close()

    def _loop(self, stop: Callable[[], bool]) -> None:
        config, agent = self.config, self.agent
        self._evaluate(stop)
        clock, clock_steps = time.perf_counter(), agent.steps
        while agent.steps < config.steps and not stop():
            self.writer.raise_if_failed()
            before = agent.steps
            self.advance()
            diagnosed = self._diagnose(before)
            checkpoint_due = self._due(before, config.checkpoint_every) and agent.steps < config.steps
            if self._due(before, config.log_every):
                seconds = time.perf_counter() - clock
                self._log((agent.steps - clock_steps) / seconds)
                clock, clock_steps = time.perf_counter(), agent.steps
            elif checkpoint_due or diagnosed:
                # The newest numbers are looked at first, so that no broken agent takes the place of a good one.
                self._log(None)
            if self._due(before, config.eval_every):
                self.evaluation_due = True
                paused = time.perf_counter()
                self._evaluate(stop)
                clock += time.perf_counter() - paused
            if checkpoint_due and not stop():
                self._save(f"step_{agent.steps}")

    def advance(self) -> None:
        """One action in every environment, the gradient steps it makes due, and what a change of task makes due."""
        tasks = len(switches(self.runner) or ())
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
        if len(switches(self.runner) or ()) > tasks:
            self.agent.plasticity.at_boundary()

    def _learn(self) -> None:
        with compute.bfloat16_products(self.device, self.config.bf16):
            self.metrics |= self.agent.update()

    def _diagnose(self, before: int) -> bool:
        """Measure the networks if it is due and they have begun to learn. Returns whether they were measured."""
        diagnostics, every, now = self.diagnostics, self.config.diagnostics_every, self.agent.steps
        if diagnostics is None or every is None:
            return False
        self.metrics |= diagnostics.gradient_norms()
        if not self._due(before, every) or self.agent.updates == 0:
            return False
        # What is drawn depends on seed and step alone, so there is nothing to save.
        source = torch.Generator(self.device).manual_seed(stream_seed(self.seed, "diagnostics", now))
        self.metrics |= diagnostics.measure(RandomStream(source))
        return True

    def _due(self, before: int, every: int) -> bool:
        """Whether the last round of steps reached a multiple of `every`, or the end of the run."""
        now = self.agent.steps
        return now // every > before // every or now >= self.config.steps

    def _log(self, steps_per_second: float | None) -> None:
        now, seed = self.agent.steps, self.seed
        rows = self._episode_rows()
        rows += [Row(now, name, float(value), seed) for name, value in self.metrics.items()]
        self.metrics = {}
        if self.runner.diverged_episodes:
            rows.append(Row(now, "train/diverged_episodes", self.runner.diverged_episodes, seed))
        if steps_per_second is not None:
            rows.append(Row(now, "speed/steps_per_second", steps_per_second, seed))
        self._tell(rows)
        for row in rows:
            if row.value is None:
                raise Diverged(f"{row.name} became {row.missing} at step {row.step} of seed {seed}")
        self.listener.progress(seed, now, self.last_return)

    def _episode_rows(self) -> list[Row]:
        rows = []
        for at, return_, length in self.episodes.drain():
            rows += [Row(at, "train/return", return_, self.seed), Row(at, "train/length", length, self.seed)]
            self.last_return = return_
        return rows

    def _tell(self, rows: list[Row]) -> None:
        self.row_count += len(rows)
        self.listener.rows(self.seed, rows)

    def _evaluate(self, stop: Callable[[], bool]) -> None:
        """Evaluate if it is due, unless `stop` comes first; then it stays due and has changed nothing."""
        if not self.evaluation_due:
            return
        config, now = self.config, self.agent.steps
        environment_seed = stream_seed(self.seed, "evaluation_environment", now)
        # So that an evaluation can be repeated, what agents draw in it depends on seed and step alone.
        self.streams["evaluation"].manual_seed([stream_seed(self.seed, "evaluation", now)])
        scores = evaluate(
            self.agent, config.env, config.env_settings, config.eval_episodes, environment_seed, self.device, stop
        )
        if scores is None:
            return
        self.evaluation_due = False
        returns, lengths = scores
        self._tell(
            [
                *self._episode_rows(),  # ended before: the steps in a seed's rows never fall
                Row(now, "eval/return", float(returns.mean()), self.seed),
                Row(now, "eval/length", float(lengths.float().mean()), self.seed),
            ]
        )
        if config.histograms:
            self.listener.weights(self.seed, now, network_weights(self.agent))

    def _save(self, label: str) -> None:
        for name, value in self.metrics.items():
            if not value.isfinite():
                self._log(None)  # raises Diverged
                raise Diverged(f"{name} is not finite at step {self.agent.steps} of seed {self.seed}")
        done = self.agent.steps >= self.config.steps and not self.evaluation_due
        self.writer.save(label, self.agent.steps, self.row_count, done, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future of this seed. Tensors and rings are the living ones, not copies."""
        return {
            "agent": self.agent.state_dict(),
            "runner": self.runner.state_dict(),
            "obs": self.obs,
            "episodes": list(self.episodes.fetch()),
            "metrics": dict(self.metrics),
            "row_count": self.row_count,
            "evaluation_due": self.evaluation_due,
            "diagnosing": {} if self.diagnostics is None else self.diagnostics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.agent.load_state_dict(state["agent"])
        self.runner.load_state_dict(state["runner"])
        self.obs = state["obs"].to(self.device, copy=True)
        self.episodes = Episodes([tuple(episode) for episode in state["episodes"]])
        self.metrics = {name: value.to(self.device) for name, value in state["metrics"].items()}
        if self.diagnostics is not None:
            self.diagnostics.load_state_dict(state["diagnosing"])
        self.row_count, self.evaluation_due = int(state["row_count"]), bool(state["evaluation_due"])
