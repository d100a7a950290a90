"""Seeds of a run that train together: the loop in which an agent meets its environments."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from envs import Runner
from envs.overlap import InBackground
from envs.sequence import sequence_of, steps_of_task
from plasticity.population import Axes, RandomStream
from runs import checkpoint, compute
from runs.catalogue import find_agent
from runs.checkpoint import SeedPart
from runs.checkpoint_writer import CheckpointWriter
from runs.config import RunConfig
from runs.episodes import Episodes
from runs.evaluation import Scores, evaluate, evaluation_environments
from runs.fixed_data import give_data, score_rows
from runs.keeping import plasticity_of
from runs.randomness import spawn_streams, stream_seed
from runs.record import Row
from runs.settings import made_by
from runs.side_by_side import SideBySide
from runs.tasks import Returns, Tasks


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
    if plasticity.uses_boundaries and sequence_of(runner) is None:
        raise ValueError(
            f"'{config.interventions}' acts where the task changes, and {config.place} is one task: give it steps of "
            "its own, as in reset(every=20000) or injection(at=100000), or train on a sequence of tasks"
        )
    if config.initial is not None:
        agent.go_online(config.steps)  # type: ignore[attr-defined]
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
    returns: Returns = field(default_factory=Returns)
    evaluation_due: bool = True
    last_return: float | None = None
    lost: str | None = None


class Training:
    """Agent, environments and counters of seeds that train together, one or a population; `run` is the loop.

    resumed_from: the checkpoint to go on from. Raises Damaged or CannotContinue if that is impossible.

    The order at a step, where each thing is due: train, log, evaluate, change the task, checkpoint. So a checkpoint of
    the schedule lies behind the rows of its step, and has nothing left to tell. One made because of a stop may lie
    before the evaluation of its step (`evaluation_due`, `Tasks.changed`) and holds what has not been logged yet; then
    the rows are the same as if the run had never been stopped.

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
        if config.data is not None:
            try:
                give_data(self.agent, config, self.seeds)
            except ValueError as error:
                raise CannotContinue(one_line(error)) from error
        self.tasks = Tasks(config, self.runners.runners[0])
        self.diagnostics = None if config.diagnostics_every is None else AgentDiagnostics(self.agent)
        if config.cuda_graphs:
            graph_updates(self.agent, self.streams, self.device, self._tell_user)
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
        self._conclude(stop)
        clock, clock_steps = time.perf_counter(), agent.steps
        while self._remaining() and agent.steps < config.steps and not stop():
            for member in self.members:
                member.writer.raise_if_failed()
            before = agent.steps
            self.advance()
            self._lose_broken(self.runners.errors)
            changed = self.tasks.look(self.runners.first_working)
            diagnosed = self._diagnose(before, changed)
            checkpoint_due = self._due(before, config.checkpoint_every) and agent.steps < config.steps
            if self._due(before, config.log_every):
                seconds = time.perf_counter() - clock
                self._log((agent.steps - clock_steps) / seconds)
                clock, clock_steps = time.perf_counter(), agent.steps
            elif checkpoint_due or diagnosed or changed:
                # The newest numbers are looked at first, so that no broken agent takes the place of a good one.
                self._log(None)
            if changed or self._due(before, config.eval_every):
                for member in self.members:
                    member.evaluation_due = True
                paused = time.perf_counter()
                self._conclude(stop)
                clock += time.perf_counter() - paused
            if checkpoint_due and not stop():
                self._save(f"step_{agent.steps}")

    def advance(self) -> None:
        """One action in every environment, and the gradient steps it makes due; offline, one gradient step."""
        if self.config.is_offline:
            self._learn()
            return
        task = self.runners.task_rows
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
        self.episodes.add(step, self.agent.steps, task)
        self.obs = step.obs

    def _learn(self) -> None:
        if self.tasks.waits_for_a_batch(self.agent.steps):
            return
        with compute.bfloat16_products(self.device, self.config.bf16):
            self.metrics |= self.agent.update()

    def _conclude(self, stop: Callable[[], bool]) -> None:
        """Evaluate where it is due; then, if the task has changed and this is not the end, let the agent know."""
        self._evaluate(stop)
        agent, tasks = self.agent, self.tasks
        due = any(member.evaluation_due for _, member in self._remaining())
        if due or not tasks.changed or agent.steps >= self.config.steps:
            return
        agent.plasticity.at_boundary()
        if self.config.replay_at_switch == "clear":
            agent.replay.clear()  # type: ignore[attr-defined]
            tasks.cleared_at = agent.steps
        tasks.go_on()

    def _diagnose(self, before: int, changed: bool) -> bool:
        """Measure the networks if it is due, also where a task ends, and they have begun to learn.

        Returns whether they were measured.
        """
        diagnostics, every, now = self.diagnostics, self.config.diagnostics_every, self.agent.steps
        if diagnostics is None or every is None:
            return False
        self.metrics |= diagnostics.gradient_norms()
        if not (changed or self._due(before, every)) or self.agent.updates == 0:
            return False
        # What is drawn depends on seed and step alone, so there is nothing to save.
        sources = [
            torch.Generator(self.device).manual_seed(stream_seed(seed, "diagnostics", now)) for seed in self.seeds
        ]
        self.metrics |= diagnostics.measure(RandomStream(sources if self.lead else sources[0]))
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
        for name, of_seeds in values.items():
            task = self.tasks.name if name.startswith("plasticity/") else None
            rows.append(Row(now, name, of_seeds[index], seed, task))
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
        rows, seed = [], member.seed
        for at, return_, length, task in self.episodes.drain(index):
            name = self.tasks.names[task]
            rows += [Row(at, "train/return", return_, seed, name), Row(at, "train/length", length, seed, name)]
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
        now, found = self.agent.steps, {}
        for task in self.tasks.to_evaluate(now):
            scores = self._scores(task, stop, set(range(len(self.seeds))) - set(due))
            if scores is None:
                return
            found[task] = scores
        for scores in found.values():
            self._lose_broken(scores.errors)
        counts = self.tasks.count_visit(now)
        for index in due:
            member = self.members[index]
            if member.lost is None:
                self._tell_scores(index, member, found, counts)

    def _scores(self, task: int, stop: Callable[[], bool], others: set[int]) -> Scores | None:
        """Of one task, of all seeds but `others`; None if `stop` came first."""
        # So that an evaluation can be repeated, environments and draws of agents depend on seed, step and task alone.
        place = (self.agent.steps, task) if self.tasks.in_sequence else (self.agent.steps,)
        draws = [stream_seed(seed, "evaluation", *place) for seed in self.seeds]
        self.streams["evaluation"].manual_seed(draws)
        environments = [
            evaluation_environments(
                self.config,
                runner,
                task,
                self.config.eval_episodes,
                stream_seed(seed, "evaluation_environment", *place),
            )
            for seed, runner in zip(self.seeds, self.runners.runners, strict=True)
        ]
        scores = evaluate(self.agent, environments, stop, others, self.config.value_error)
        self.streams["evaluation"].manual_seed(draws)  # how often it was drawn from depends on the slowest seed
        return scores

    def _tell_scores(self, index: int, member: Member, found: Mapping[int, Scores], counts: bool) -> None:
        now, seed = self.agent.steps, member.seed
        member.evaluation_due = False
        rows = self._episode_rows(index, member)  # ended before: the steps in a seed's rows never fall
        means = {task: float(scores.returns[index].mean()) for task, scores in found.items()}
        for task, scores in found.items():
            name, length = self.tasks.names[task], float(scores.lengths[index].float().mean())
            rows += [Row(now, "eval/return", means[task], seed, name), Row(now, "eval/length", length, seed, name)]
            rows += score_rows(self.config, now, seed, means[task])
            errors = {} if scores.first_values is None else scores.first_values.errors(index)
            rows += [Row(now, what, value, seed, name) for what, value in errors.items()]
        self._tell(member, [*rows, *self.tasks.rows(now, seed, member.returns, means, counts)])
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
        diagnostics = self.diagnostics
        return {
            "agent": self.agent.state_dict(index),
            "runner": self.runners.runners[index].state_dict(),
            "obs": of_seed(self.obs, index, self.lead),
            "episodes": list(self.episodes.fetch(index)),
            "metrics": of_seed(self.metrics, index, self.lead),
            "row_count": self.members[index].row_count,
            "evaluation_due": self.members[index].evaluation_due,
            "tasks": self.tasks.state_dict(),
            "returns": self.members[index].returns.state_dict(),
            "diagnosing": {} if diagnostics is None else of_seed(diagnostics.state_dict(), index, self.lead),
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where `state_dict` was taken, of each seed. Raises ValueError if they are not of the same step."""
        if len({state["agent"]["steps"] for state in states}) != 1:
            raise ValueError("seeds that train as one population must be at the same step")
        for index, (member, state) in enumerate(zip(self.members, states, strict=True)):
            self.agent.load_state_dict(state["agent"], index)
            self.runners.runners[index].load_state_dict(state["runner"])
            member.row_count, member.evaluation_due = int(state["row_count"]), bool(state["evaluation_due"])
            member.returns = Returns.of(state["returns"])
        self.tasks.load_state_dict(states[0]["tasks"])
        self.episodes = Episodes([[tuple(episode) for episode in state["episodes"]] for state in states])
        self.obs = self._together([state["obs"] for state in states])
        names = states[0]["metrics"]
        self.metrics = {name: self._together([state["metrics"][name] for state in states]) for name in names}
        if self.diagnostics is not None:
            saved = [state["diagnosing"] for state in states]
            seen = {n: self._together([s["gradient_norms"][n] for s in saved]) for n in saved[0]["gradient_norms"]}
            self.diagnostics.load_state_dict({**saved[0], "gradient_norms": seen})

    def _together(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copies on the device, with the axis of seeds in front."""
        return torch.stack([t.to(self.device) for t in tensors]) if self.lead else tensors[0].to(self.device, copy=True)
