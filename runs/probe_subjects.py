"""Which networks `neoteny probe` asks, and on what: of agents, populations, strategies, or a module from a file."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents.agent import Agent
from agents.crossq import Actor as CrossQActor
from agents.diagnostics import networks_of
from agents.moments import as_seen
from agents.networks import DeterministicActor, Liftable
from agents.offline.a2pr import Value
from agents.ppo import ActorCritic
from agents.ppo import Agent as PPO
from agents.sac import StochasticActor
from continual.growth.dual_encoder import DualEncoder
from continual.growth.genome import Genome
from continual.learner import Learner
from continual.pairs.learner import PairLearner
from envs import Runner
from plasticity.harness import Trial
from plasticity.networks.stacked import member
from plasticity.probe import Draws, Fresh
from plasticity.problems.published import Problem
from plasticity.problems.streams import Stream, generator
from runs import checkpoint, continual_run, growth_run, plasticity_arm
from runs.config import RunConfig
from runs.continual_run import ContinualConfig
from runs.datasets.source import DataSource
from runs.errors import UsageError, nearest
from runs.growth_run import GrowthConfig
from runs.play import load_agent, open_environments, open_run, playable_seeds
from runs.randomness import spawn_streams, stream_seed
from runs.training import MISFITS, build_agent, one_line

Population = TypeVar("Population", Trial, Learner, PairLearner)


@dataclass(frozen=True)
class Subject:
    """One network to be probed.

    fresh: draws one of the same kind. inputs [N, ...]: what it has seen. classifies: its outputs are logits of classes.
    next_tasks: what its stream would have brought next, if that is known.
    """

    name: str
    seed: int
    step: int | None
    network: nn.Module
    fresh: Fresh
    inputs: Tensor
    learning_rate: float
    optimizer: Literal["adam", "sgd"]
    classifies: bool
    next_tasks: Draws | None = None

    @property
    def outputs(self) -> int:
        """Numbers in one output."""
        with torch.no_grad():
            return self.network(self.inputs[:2]).flatten(1).shape[1]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What of a run is to be probed: its first `seeds`, at `step` (None: the newest checkpoint), only `network` if one
    is named; with up to `samples` inputs for training and half as many held out, and `draws` tasks."""

    seeds: int
    step: int | None
    network: str | None
    samples: int
    draws: int

    @property
    def inputs(self) -> int:
        return self.samples + self.samples // 2


class OfOneInput(Liftable):
    """A network of several inputs as a function of all of them behind one another: [*S, B, inputs] -> [*S, B, outputs].

    Of critics the values of all, of an actor what it squashes and splits. sizes: of the inputs.
    """

    def __init__(self, network: nn.Module, sizes: Sequence[int]):
        super().__init__()
        self.network, self.sizes = network, list(sizes)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.sizes, -1)
        if hasattr(self.network, "count"):
            values = self.network(*parts)  # [*S, K, B], or several values of each, [*S, K, B, n]
            return values.mT if values.ndim == x.ndim else values.transpose(-3, -2).flatten(-2)
        return getattr(self.network, "straight_forward", self.network)(*parts)


class ImageEncoder(nn.Module):
    """The half of a dual encoder that reads images [B, 3, S, S], before its outputs [B, E] get length 1.

    That bounds what it can say, and not what it can learn.
    """

    def __init__(self, encoder: DualEncoder):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        outputs, features = encoder.image_projection.shape
        self.projection = nn.Linear(features, outputs, bias=False, device="meta")
        self.projection.weight = self.encoder.image_projection
        for name in {name.partition(".")[0] for name, _ in encoder.named_parameters()}:
            if name == "image_projection" or not name.startswith(("image", "patch", "shared")):
                delattr(self.encoder, name)

    def forward(self, images: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # others are looped over by vmap, with a warning
            return self.projection(self.encoder.image_features(images))


def agent_subjects(folder: Path, wanted: Wanted, device: torch.device) -> Iterator[Subject]:
    """Actors, critics and Q networks of a run of `neoteny train` or `neoteny offline`.

    Raises UsageError if there are none to be had, or data that cannot be read.
    """
    config, saved = open_run(folder) if wanted.step is None else _at_step(folder, wanted.step)
    step = int(saved.name.removeprefix("step_"))
    data = None
    if config.data is not None and config.initial is None:
        data = DataSource.load(config.data).open().transitions
    for seed in playable_seeds(config, saved)[: wanted.seeds]:
        runner = open_environments(config, 1, stream_seed(seed, "evaluation_environment", 0), device)
        try:
            agent = load_agent(config, saved, seed, runner, device, with_rings=True)
            if data is not None:
                agent.read(data, config.steps)  # type: ignore[attr-defined]
            obs, action = _visited(agent, runner, wanted.inputs)
            found = _networks(agent, obs, action)
            chosen = _chosen(found, wanted.network)
            for name in chosen:
                network, inputs = found[name]
                rate = getattr(config.agent_config, "learning_rate", 1e-3)
                fresh = _fresh_of(config, runner, device, name, obs, action)
                yield Subject(name, seed, step, network, fresh, inputs, rate, "adam", classifies=False)
        finally:
            runner.close()


def _restored(build: Callable[[], Population], saved: Path, first_seed: int) -> Population:
    """What `build` makes, as a checkpoint has it; a population's lies in the file of its first seed."""
    try:
        population = build()
        population.load_state_dict(checkpoint.read_seed(saved, first_seed))
    except checkpoint.Damaged as error:
        raise UsageError(str(error)) from error
    except MISFITS as error:
        raise UsageError(f"{saved} does not fit this installation: {one_line(error)}") from error
    return population


def arm_subjects(folder: Path, wanted: Wanted, device: torch.device) -> Iterator[Subject]:
    """Every seed's network of one arm of `neoteny plasticity`; named after the arm."""
    config = dataclasses.replace(plasticity_arm.ArmConfig.load(folder), device=device.type)
    trial = _restored(lambda: plasticity_arm.build(config), _checkpoint(folder, wanted.step), config.seeds[0])
    _chosen([config.intervention], wanted.network)
    problem, index = trial.problem, min(trial.index, trial.problem.tasks - 1)
    inputs, _ = trial.stream.task(index).examples()
    template = trial.learner.fresh(torch.Generator(device).manual_seed(0))
    for number, seed in enumerate(config.seeds[: wanted.seeds]):
        rows = inputs[number][_first_of_each(inputs[number])][: wanted.inputs]
        yield Subject(
            config.name,
            seed,
            trial.learner.steps,
            member(trial.network, template, number),
            trial.learner.fresh,
            rows,
            problem.learning_rate,
            "adam" if problem.optimizer == "adam" else "sgd",
            classifies=problem.loss == "cross_entropy",
            next_tasks=_next_tasks(problem, trial.stream, index, number, wanted),
        )


def strategy_subjects(folder: Path, wanted: Wanted, device: torch.device) -> Iterator[Subject]:
    """Every seed's network of a run of `neoteny continual`, on training images of the tasks so far."""
    config = dataclasses.replace(ContinualConfig.load(folder), device=device.type)
    learner = _restored(lambda: continual_run.build(config), _checkpoint(folder, wanted.step), config.seeds[0])
    _chosen([config.strategy], wanted.network)
    if not learner.strategy.trains_network:
        raise UsageError(f"{folder} cannot be probed: '{config.strategy}' trains what makes weights, not a network")
    stream, strategy, benchmark = learner.stream, learner.strategy, config.resolved()
    begun = learner.index if learner.step else max(0, learner.index - 1)
    steps = min(stream.steps(begun, "seen"), -(-wanted.inputs // stream.batch))
    images = stream.batches(begun, 0, steps, "seen")[0].flatten(1, 2)
    fresh = partial(strategy.setting.fresh, strategy.network.head.bias is not None)
    template = fresh(torch.Generator(device).manual_seed(0))
    for number, seed in enumerate(config.seeds[: wanted.seeds]):
        seen = learner.inputs.scaled(images[number])
        yield Subject(
            config.strategy,
            seed,
            learner.steps,
            member(strategy.network, template, number),
            fresh,
            seen[_first_of_each(seen)][: wanted.inputs],
            benchmark.learning_rate,
            benchmark.optimizer,
            classifies=True,
        )


def growth_subjects(folder: Path, wanted: Wanted, device: torch.device) -> Iterator[Subject]:
    """Every seed's image encoder of a run of GrowCLIP, on training images of the parts so far.

    Fresh ones have the architecture that it has grown to.
    """
    config = dataclasses.replace(GrowthConfig.load(folder), device=device.type)
    learner = _restored(lambda: growth_run.build(config), _checkpoint(folder, wanted.step), config.seeds[0])
    (name,) = _chosen(["image_encoder"], wanted.network)
    stream = learner.stream
    part = min(learner.index if learner.step else max(0, learner.index - 1), stream.parts - 1)
    images = stream.labelled(stream.concepts("train", part), part, view=0).images.float() / 255
    inputs = images[_first_of_each(images)][: wanted.inputs]
    for clip in learner.clips[: wanted.seeds]:

        def fresh(source: torch.Generator, genome: Genome = clip.genome) -> nn.Module:
            return ImageEncoder(DualEncoder(genome, source))

        network, rate = ImageEncoder(clip.model), clip.config.learning_rate
        yield Subject(name, clip.seed, learner.steps, network, fresh, inputs, rate, "adam", classifies=False)


def module_subject(
    path: Path,
    builder: str | None,
    inputs: Path | None,
    shape: tuple[int, ...],
    learning_rate: float | None,
    classifies: bool,
    wanted: Wanted,
    device: torch.device,
) -> Subject:
    """A network from a file with its state_dict, and a function that builds it anew."""
    if builder is None:
        raise UsageError("a file with weights needs --builder MODULE:FUNCTION, which builds its network")
    build = _builder(builder)

    def fresh(source: torch.Generator) -> nn.Module:
        # The builder draws from torch's global generator, which the caller has put aside.
        torch.manual_seed(int(torch.randint(2**62, (), generator=source, device=device)))
        return build().to(device)

    with torch.random.fork_rng():
        network = fresh(torch.Generator(device).manual_seed(0))
    try:
        network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except (OSError, *MISFITS, EOFError) as error:
        raise UsageError(f"'{path}' does not hold the weights of {builder}: {one_line(error)}") from error
    samples = _inputs_of_module(inputs, shape, wanted, device)
    try:
        with torch.no_grad():
            network(samples[:2])
    except MISFITS as error:
        raise UsageError(f"{builder} does not take inputs of shape {list(samples.shape[1:])}") from error
    return Subject(path.stem, 0, None, network, fresh, samples, learning_rate or 1e-3, "adam", classifies)


def _at_step(folder: Path, step: int) -> tuple[RunConfig, Path]:
    config, _ = open_run(folder)
    return config, _checkpoint(folder, step)


def _checkpoint(folder: Path, step: int | None) -> Path:
    try:
        found = {int(path.name.removeprefix("step_")): path for path in checkpoint.list_checkpoints(folder)}
        if step is None:
            return checkpoint.newest(folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if step not in found:
        raise UsageError(f"'{folder}' has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    return found[step]


def _chosen(found: Mapping[str, Any] | list[str], network: str | None) -> list[str]:
    if network is not None and network not in found:
        raise UsageError(f"there is no network '{network}'.{nearest(network, found)}")
    return list(found) if network is None else [network]


@torch.no_grad()
def _visited(agent: Agent, runner: Runner, count: int) -> tuple[Tensor, Tensor]:
    """Observations, as the networks see them, and the actions taken there.

    From the agent's replay, its last rollout or the data that it reads; by acting where it has none of them yet, or the
    replay was just cleared.
    """
    replay: Any = getattr(agent, "replay", None)
    if replay is not None and agent.updates > 0 and not replay.is_empty:
        batch = replay.sample(count, 1.0)
        return _distinct_pairs(as_seen(agent, batch.obs), batch.action)
    if replay is None and getattr(agent, "data", None) is not None:
        batch = agent.data.sample(count)  # type: ignore[attr-defined]
        return _distinct_pairs(batch.obs, batch.action)
    if isinstance(agent, PPO) and agent.updates > 0:
        pairs = (tensor.flatten(0, 1)[:count] for tensor in (agent.rollout.obs, agent.rollout.action))
        return _distinct_pairs(*pairs)
    obs, seen, taken = runner.reset(), [], []
    for _ in range(count):
        action = agent.act(obs, explore=False)
        seen.append(as_seen(agent, obs).clone())
        taken.append(action.clone())
        obs = runner.step(action).obs
    return torch.cat(seen), torch.cat(taken)


def _distinct_pairs(obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    kept = _first_of_each(torch.cat([obs.flatten(1), action.reshape(len(action), -1)], 1))
    return obs[kept], action[kept]


def _networks(agent: Agent, obs: Tensor, action: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """Trained networks of an agent as functions of one input, with inputs; targets that follow them are left out.

    A policy is asked before its tanh, which bounds what it can say and not what it can learn.
    """
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    read: dict[str, tuple[Tensor, ...]] = {}
    if hasattr(agent, "inputs_of"):  # whose networks read each other's outputs
        read = agent.inputs_of(obs, action)  # type: ignore[attr-defined]
    for name, network in networks_of(agent):
        if name.startswith("target"):
            continue
        if not any(p.requires_grad for p in network.parameters()):
            continue
        if name in read:
            found[name] = OfOneInput(network, [part.shape[1] for part in read[name]]), torch.cat(read[name], 1)
            continue
        parameters = inspect.signature(network.forward).parameters.values()
        taken = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
        if isinstance(network, DeterministicActor | StochasticActor | Value):
            found[name] = network.net, obs
        elif isinstance(network, CrossQActor | ActorCritic):
            found[name] = OfOneInput(network, [obs.shape[-1]]), obs
        elif taken == ["obs", "action"] and hasattr(network, "count") and obs.dim() == 2 and action.dim() == 2:
            found[name] = OfOneInput(network, [obs.shape[1], action.shape[1]]), torch.cat([obs, action], 1)
        elif len(taken) == 1:
            found[name] = network, obs
    if not found:
        raise UsageError("this agent has no network of observations, or of observations and actions, to probe")
    return found


def _fresh_of(config: RunConfig, runner: Runner, device: torch.device, name: str, obs: Tensor, action: Tensor) -> Fresh:
    """Draws the same network of a newly built agent."""
    # A replay of the run's size is not needed, and on a GPU it would be there at once.
    small = {"replay_capacity": 1000 * config.num_envs} if hasattr(config.agent_config, "replay_capacity") else {}
    config = dataclasses.replace(config, agent_config=dataclasses.replace(config.agent_config, **small))

    def fresh(source: torch.Generator) -> nn.Module:
        seed = int(torch.randint(2**31, (), generator=source, device=device))
        return _networks(build_agent(config, runner, device, spawn_streams(seed, device)), obs, action)[name][0]

    return fresh


def _first_of_each(rows: Tensor) -> Tensor:
    """Where each different row of [N, ...] appears first, in order."""
    _, inverse = rows.flatten(1).unique(dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(rows), device=rows.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(rows), device=rows.device), "amin")
    return first.sort().values


def _next_tasks(problem: Problem, stream: Stream, index: int, number: int, wanted: Wanted) -> Draws | None:
    """The tasks behind the present one as a member of the population would see them; None where there are none."""
    if problem.loss != "cross_entropy":
        return None
    seen, held = [], []
    try:
        for task in (stream.task(index + 1 + draw) for draw in range(wanted.draws)):
            seen.append([part[number, : wanted.samples] for part in task.examples()])
            held.append([part[number] for part in task.test()] if problem.held_out else [])
    except ValueError:  # such streams end when their classes are used up
        return None
    inputs, targets = (torch.stack(part) for part in zip(*seen, strict=True))
    if not problem.held_out:
        return Draws("next tasks", inputs, targets)
    kept = [[x[y >= 0], y[y >= 0]] for x, y in held]
    count = min(wanted.samples, *(len(y) for _, y in kept))
    tests = [torch.stack([part[:count] for part in parts]) for parts in zip(*kept, strict=True)]
    return Draws("next tasks", inputs, targets, *tests)


def _builder(text: str) -> Any:
    """MODULE:FUNCTION of this folder or the installation. Raises UsageError if there is no such thing."""
    module, colon, function = text.partition(":")
    if not colon:
        raise UsageError(f"--builder needs MODULE:FUNCTION, got '{text}'")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
        with torch.random.fork_rng():
            network = found()
    except (ImportError, AttributeError, TypeError) as error:
        raise UsageError(f"--builder {text} cannot be called: {one_line(error)}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(network, nn.Module):
        raise UsageError(f"--builder {text} gives a {type(network).__name__}, not a torch module")
    return found


def _inputs_of_module(path: Path | None, shape: tuple[int, ...], wanted: Wanted, device: torch.device) -> Tensor:
    if path is None:
        if not shape:
            raise UsageError("a file with weights needs --inputs FILE, or --input-shape for normal numbers")
        return torch.randn(wanted.inputs, *shape, generator=generator(device, 0, "examples"), device=device)
    try:
        if path.suffix == ".npy":
            inputs = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            inputs = torch.load(path, map_location=device, weights_only=True)
    except (OSError, *MISFITS, EOFError) as error:
        raise UsageError(f"'{path}' holds no tensor of inputs: {one_line(error)}") from error
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or len(inputs) < 4:
        raise UsageError(f"'{path}' must hold a tensor [N, ...] of at least 4 inputs")
    return inputs[: wanted.inputs].to(device)
