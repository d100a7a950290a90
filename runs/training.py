"""Seeds of a run that train together: the loop in which an agent meets its environments."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import envs
from agents.agent import Agent, Metrics
from agents.diagnostics import AgentDiagnostics
from agents.graphs import graph_updates
from agents.population import of_seed
from envs import Runner, Step
from envs.overlap import InBackground
from envs.sequence import steps_of_task, switches
from plasticity.population import Axes, RandomStream
from runs import checkpoint, compute
from runs.catalogue import find_agent
from runs.checkpoint import SeedPart
from runs.checkpoint_writer import CheckpointWriter
from runs.config import RunConfig
from runs.evaluation import Scores, evaluate
from runs.keeping import plasticity_of
from runs.randomness import spawn_streams, stream_seed
from runs.record import Row
from runs.settings import made_by
from runs.side_by_side import SideBySide


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

    def lost(self, seed: int) -> None:
        """Nothing more will come of this seed: its numbers are no longer finite."""
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
    """The episodes that ended since the last look, kept on the device so that no step waits for it.

    known: (step, return, length) for each seed, those fetched from the device but not drained yet.
    """

    def __init__(self, known: Sequence[Sequence[tuple[int, float, float]]] = ((),)) -> None:
        self.known = [list(own) for own in known]
        self.steps: list[int] = []
        self.ended: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, step: Step, at: int) -> None:
        """Remember what ended in `step`, which brought the count of environment steps to `at`."""
        self.steps.append(at)
        self.ended.append((step.episode_ended.clone(), step.episode_return.clone(), step.episode_length.clone()))

    def fetch(self, index: int = 0) -> list[tuple[int, float, float]]:
        """(step, return, length) of every ended episode of one seed, oldest first."""
        if self.ended:
            columns = (torch.stack(column).cpu() for column in zip(*self.ended, strict=True))
            ended, returns, lengths = (column.view(len(column), len(self.known), -1) for column in columns)  # [T, S, N]
            for t, s, n in ended.nonzero().tolist():
                self.known[s].append((self.steps[t], float(returns[t, s, n]), float(lengths[t, s, n])))
            self.steps, self.ended = [], []
        return self.known[index]

    def drain(self, index: int = 0) -> list[tuple[int, float, float]]:
        """The same, and forget them."""
        found, self.known[index] = self.fetch(index), []
        return found


def build_agent(config: RunConfig, runner: Runner, device: torch.device, streams: Mapping[str, RandomStream]) -> Agent:
    """The agent of a run, freshly initialised from its seed's streams."""
    plasticity = plasticity_of(config, steps_of_task(runner))
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


def network_weights(agent: Agent, index: int, lead: Axes) -> dict[str, np.ndarray]:
    """{"weights/actor/layers.0.weight": …} of every network that a seed's agent trains; targets only follow those."""
    networks = {name: part for name, part in vars(agent).items() if isinstance(part, nn.Module)}
    return {
        f"weights/{network}/{name}": of_seed(parameter.detach(), index, lead).float().cpu().numpy()
        for network, module in networks.items()
        if not network.startswith("target_")
        for name, parameter in module.named_parameters()
    }


@dataclass
class Member:
    """What one of the seeds that train together has for itself. lost: why it cannot go on."""

    seed: int
    writer: CheckpointWriter
    row_count: int = 0
    evaluation_due: bool = True
    last_return: float | None = None
    lost: str | None = None


class Training:
    """Agent, environments and counters of seeds that train together, one or a population; `run` is the loop.

    resumed_from: the checkpoint to go on from. Raises Damaged or CannotContinue if that is impossible.

    The order at a step, where each thing is due: train, log, evaluate, checkpoint. So a checkpoint of the schedule lies
    behind the rows of its step, and has nothing left to tell. One made because of a stop may lie before the evaluation
    of its step (`evaluation_due`) and holds what has not been logged yet; then the rows are the same as if the run had
    never been stopped.

    A seed whose numbers are no longer finite is lost: it is told and saved no more, and the others go on.
    """

    def __init__(
        self,
        config: RunConfig,
        seeds: Sequence[int],
        folder: Path,
        listener: Listener,
        resumed_from: Path | None = None,
    ):
        self.config, self.seeds, self.listener = config, tuple(seeds), listener
        self.lead: Axes = () if len(seeds) == 1 else (len(seeds),)
        self.device = torch.device(config.device)
        compute.set_up(self.device, config.threads)
        self.runners = SideBySide([self._new_runner(seed) for seed in seeds], self.lead)
        self.streams = spawn_streams(self.seeds if self.lead else self.seeds[0], self.device)
        self.agent = build_agent(config, self.runners.runners[0], self.device, self.streams)
        if config.cuda_graphs:
            graph_updates(self.agent, self.streams, self.device, self._tell_user)
        self.diagnostics = None if config.diagnostics_every is None else AgentDiagnostics(self.agent)
        self.obs = self.runners.reset()
        self.episodes = Episodes([() for _ in seeds])
        self.metrics: Metrics = {}
        self.members = [Member(seed, self._new_writer(folder, seed)) for seed in seeds]
        if resumed_from is not None:
            self._resume(resumed_from)

    def _tell_user(self, line: str) -> None:
        """On stderr; of all seeds, which are alike in this, only the first says it."""
        if self.seeds[0] == self.config.seeds[0]:
            print(f"neoteny: {line}", file=sys.stderr)

    def _new_runner(self, seed: int) -> Runner:
        config = self.config
        environment_seed = stream_seed(seed, "environment")
        runner: Runner = envs.make(
            config.env, config.num_envs, environment_seed, self.device, config.threads, **config.env_settings
        )
        return InBackground(runner) if config.overlap else runner

    def _new_writer(self, folder: Path, seed: int) -> CheckpointWriter:
        return CheckpointWriter(folder, seed, lambda label, part: self.listener.saved(seed, label, part))

    def _resume(self, folder: Path) -> None:
        states = [checkpoint.read_seed(folder, seed) for seed in self.seeds]
        try:
            self.load_state_dicts(states)
        except checkpoint.Damaged:
            raise
        except MISFITS as error:
            maker = made_by(self.config.environment)
            raise CannotContinue(f"{folder} does not fit this installation: {one_line(error)}; {maker}") from error
        for member, state in zip(self.members, states, strict=True):
            member.writer.resume_from(folder, state)

    def run(self, stop: Callable[[], bool]) -> None:
        """Train to the end, or until `stop`; either way the last thing done is a checkpoint.

        Raises OSError, or Diverged if seeds were lost, when the others are through; checkpoints written before stay.
        """
        try:
            self._loop(stop)
            self._save(LAST)
            for _, member in self._remaining():
                member.writer.wait()
        finally:
            for member in self.members:
                member.writer.close()
            self.runners.close()
        lost = [member.lost for member in self.members if member.lost is not None]
        if lost:
            raise Diverged("; ".join(lost))

    def _remaining(self) -> list[tuple[int, Member]]:
        """The seeds that are not lost, with their indices."""
        return [(index, member) for index, member in enumerate(self.members) if member.lost is None]

    def _loop(self, stop: Callable[[], bool]) -> None:
        config, agent = self.config, self.agent
        self._evaluate(stop)
        clock, clock_steps = time.perf_counter(), agent.steps
        while self._remaining() and agent.steps < config.steps and not stop():
            for member in self.members:
                member.writer.raise_if_failed()
            before = agent.steps
            self.advance()
            self._lose_broken(self.runners.errors)
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
                for member in self.members:
                    member.evaluation_due = True
                paused = time.perf_counter()
                self._evaluate(stop)
                clock += time.perf_counter() - paused
            if checkpoint_due and not stop():
                self._save(f"step_{agent.steps}")

    def advance(self) -> None:
        """One action in every environment, the gradient steps it makes due, and what a change of task makes due."""
        tasks = len(switches(self.runners.runners[0]) or ())
        with compute.small_products(self.config.num_envs):
            action = self.agent.act(self.obs, explore=True)
        if self.config.overlap:
            self.runners.send(action)
            self._learn()
            step = self.runners.recv()
            self.agent.observe(step)
        else:
            step = self.runners.step(action)
            self.agent.observe(step)
            self._learn()
        self.episodes.add(step, self.agent.steps)
        self.obs = step.obs
        if len(switches(self.runners.runners[0]) or ()) > tasks:
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
        source = torch.Generator(self.device).manual_seed(stream_seed(self.seeds[0], "diagnostics", now))
        self.metrics |= diagnostics.measure(RandomStream(source))
        return True

    def _due(self, before: int, every: int) -> bool:
        """Whether the last round of steps reached a multiple of `every`, or the end of the run."""
        now = self.agent.steps
        return now // every > before // every or now >= self.config.steps

    def _log(self, steps_per_second: float | None) -> None:
        values = self._metric_values()
        for index, member in self._remaining():
            self._log_seed(index, member, values, steps_per_second)
        self.metrics = {}

    def _metric_values(self) -> dict[str, list[float]]:
        """The newest metrics, of every seed."""
        return {name: value.reshape(-1).tolist() for name, value in self.metrics.items()}

    def _log_seed(
        self, index: int, member: Member, values: dict[str, list[float]], steps_per_second: float | None
    ) -> None:
        now, seed = self.agent.steps, member.seed
        rows = self._episode_rows(index, member)
        rows += [Row(now, name, of_seeds[index], seed) for name, of_seeds in values.items()]
        if diverged := self.runners.runners[index].diverged_episodes:
            rows.append(Row(now, "train/diverged_episodes", diverged, seed))
        if steps_per_second is not None:
            rows.append(Row(now, "speed/steps_per_second", steps_per_second, seed))
        self._tell(member, rows)
        broken = next((row for row in rows if row.value is None), None)
        if broken is not None:
            self._lose(index, f"{broken.name} became {broken.missing} at step {broken.step} of seed {seed}")
            return
        self.listener.progress(seed, now, member.last_return)

    def _episode_rows(self, index: int, member: Member) -> list[Row]:
        rows = []
        for at, return_, length in self.episodes.drain(index):
            rows += [Row(at, "train/return", return_, member.seed), Row(at, "train/length", length, member.seed)]
            member.last_return = return_
        return rows

    def _tell(self, member: Member, rows: list[Row]) -> None:
        member.row_count += len(rows)
        self.listener.rows(member.seed, rows)

    def _lose(self, index: int, why: str) -> None:
        member = self.members[index]
        member.lost = why
        self.runners.rest(index)
        member.writer.wait()  # what it has written so far still counts
        self.listener.lost(member.seed)

    def _lose_broken(self, errors: Mapping[int, FloatingPointError]) -> None:
        """Lose the seeds whose environments, of training or of an evaluation, met numbers that are not finite."""
        for index, member in self._remaining():
            if index not in errors:
                continue
            # A broken network soon breaks the simulator; if a loss went first, it is the one to name.
            self._log_seed(index, member, self._metric_values(), None)
            if member.lost is None:
                self._lose(index, f"{errors[index]}, at step {self.agent.steps} of seed {member.seed}")

    def _evaluate(self, stop: Callable[[], bool]) -> None:
        """Evaluate where it is due, unless `stop` comes first; then it stays due and has changed nothing."""
        due = [index for index, member in self._remaining() if member.evaluation_due]
        if not due:
            return
        config, now = self.config, self.agent.steps
        environment_seeds = [stream_seed(seed, "evaluation_environment", now) for seed in self.seeds]
        # So that an evaluation can be repeated, what agents draw in it depends on seed and step alone.
        draws = [stream_seed(seed, "evaluation", now) for seed in self.seeds]
        self.streams["evaluation"].manual_seed(draws)
        others = set(range(len(self.seeds))) - set(due)
        scores = evaluate(
            self.agent,
            config.env,
            config.env_settings,
            config.eval_episodes,
            environment_seeds,
            self.device,
            stop,
            others,
            config.value_error,
        )
        self.streams["evaluation"].manual_seed(draws)  # how often it was drawn from depends on the slowest seed
        if scores is None:
            return
        self._lose_broken(scores.errors)
        for index in due:
            member = self.members[index]
            if member.lost is None:
                self._tell_scores(index, member, scores)

    def _tell_scores(self, index: int, member: Member, scores: Scores) -> None:
        now, seed = self.agent.steps, member.seed
        member.evaluation_due = False
        errors = {} if scores.first_values is None else scores.first_values.errors(index)
        self._tell(
            member,
            [
                *self._episode_rows(index, member),  # ended before: the steps in a seed's rows never fall
                Row(now, "eval/return", float(scores.returns[index].mean()), seed),
                Row(now, "eval/length", float(scores.lengths[index].float().mean()), seed),
                *(Row(now, name, value, seed) for name, value in errors.items()),
            ],
        )
        if self.config.histograms:
            self.listener.weights(seed, now, network_weights(self.agent, index, self.lead))

    def _save(self, label: str) -> None:
        values, steps = self._metric_values(), self.agent.steps
        for index, member in self._remaining():
            if not all(math.isfinite(of_seeds[index]) for of_seeds in values.values()):
                self._log_seed(index, member, values, None)  # names what is not, and loses the seed
                continue
            done = steps >= self.config.steps and not member.evaluation_due
            member.writer.save(label, steps, member.row_count, done, self.state_dict(index))

    def state_dict(self, index: int = 0) -> dict[str, Any]:
        """Everything that decides the future of one seed. Tensors and rings are the living ones, not copies."""
        return {
            "agent": self.agent.state_dict(index),
            "runner": self.runners.runners[index].state_dict(),
            "obs": of_seed(self.obs, index, self.lead),
            "episodes": list(self.episodes.fetch(index)),
            "metrics": of_seed(self.metrics, index, self.lead),
            "row_count": self.members[index].row_count,
            "evaluation_due": self.members[index].evaluation_due,
            "diagnosing": {} if self.diagnostics is None else self.diagnostics.state_dict(),
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where `state_dict` was taken, of each seed. Raises ValueError if they are not of the same step."""
        if len({state["agent"]["steps"] for state in states}) != 1:
            raise ValueError("seeds that train as one population must be at the same step")
        for index, (member, state) in enumerate(zip(self.members, states, strict=True)):
            self.agent.load_state_dict(state["agent"], index)
            self.runners.runners[index].load_state_dict(state["runner"])
            member.row_count, member.evaluation_due = int(state["row_count"]), bool(state["evaluation_due"])
        self.episodes = Episodes([[tuple(episode) for episode in state["episodes"]] for state in states])
        self.obs = self._together([state["obs"] for state in states])
        names = states[0]["metrics"]
        self.metrics = {name: self._together([state["metrics"][name] for state in states]) for name in names}
        if self.diagnostics is not None:
            self.diagnostics.load_state_dict(states[0]["diagnosing"])

    def _together(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copies on the device, with the axis of seeds in front."""
        return torch.stack([t.to(self.device) for t in tensors]) if self.lead else tensors[0].to(self.device, copy=True)
