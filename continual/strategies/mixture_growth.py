"""MixtureGrowth (Pham, Teterwak, Nelson & Plummer, WACV 2024, arXiv:2311.04251): two networks grow into a wider one.

A member of half the width learns first, another one after it; then the weights of both, mixtures of templates, become
two blocks of a wider network, whose other blocks are new mixtures of the same templates (`continual.growth.mixture`).
No sample is replayed. In a stream of tasks, with the two parts `--stages` of a run (0.4 and 0.8):

    1 task    member 0, member 1 and the wider network learn the same data, two, two and one fifth of the steps
    2 tasks   member 0 learns the first, member 1 the second, the wider network the rest of the second
    more      each part is rounded to whole tasks

With a second part of 1 the network grows at the very end and learns no more. Until it grows, the answer is the sum of
the members' outputs. `--growth` names what it is compared with, which shares all but the last stage:

    mixture         new blocks of templates, begun by `--coefficients`
    random-blocks   new blocks of plain weights, Kaiming normal
    zero-blocks     the same, of zeros: at first the sum of both members
    net2wider       member 0 learns until growth, then has each unit twice (Chen et al. 2016, arXiv:1511.05641)
    ensemble        never grows: both members learn on as the sum of their outputs
    large           the wider network from the start

The benchmark's network (`--network wrn10`, `mlp`, `cnn` ...) is the wider one, its optimiser trains; weight decay is
not for coefficients. Only abstract and code of the paper could be read (specs/growclip-and-growth.md, part B). Not in
here: banks of templates that several layers share. Works with: task, class, domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from continual.growth.mixture import COEFFICIENTS, Coefficients, Recipe, Stage
from continual.growth.mixture_network import MixtureNetwork, draw_kaiming_, net2wider, with_blocks
from continual.memory import Batch
from continual.strategy import Metrics, Setting, Strategy
from continual.streams import Task
from plasticity.plastic_optimizer import PlasticOptimizer
from plasticity.schedules import Cosine

Growth = Literal["mixture", "random-blocks", "zero-blocks", "net2wider", "ensemble", "large"]
GROWTHS: tuple[Growth, ...] = ("mixture", "random-blocks", "zero-blocks", "net2wider", "ensemble", "large")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Templates and coefficients as in the paper's code; its training for CIFAR is the preset `cifar`."""

    growth: Growth = "mixture"
    """mixture, or what it is compared with: random-blocks, zero-blocks, net2wider, ensemble, large"""
    coefficients: Coefficients = "orthogonal"
    """of new blocks: orthogonal, copy, zero, random, or none: as they were drawn"""
    scale: float = 1.0
    """of new coefficients"""
    templates: int = 2
    """in each of the two sets of a layer"""
    sets: tuple[int, ...] = (0, 1, 0, 1)
    """the set that each block is made of: 0 1 0 1, or 0 1 1 0"""
    stages: tuple[float, float] = (0.4, 0.8)
    """parts of the run where member 1 begins, and where both grow together"""
    second_member: Literal["drawn", "copied"] = "drawn"
    """member 1 begins with templates of its own, or as member 0 with noise of 0.01"""
    first_weight: float = 0.0
    """of member 0's loss while member 1 learns; 0: member 0 rests, else both learn on the mean"""
    schedule: Literal["constant", "cosine"] = "constant"
    """of the learning rate within each stage"""
    warmup: float = 0.01
    """part of a member's stage in which the rate of a cosine rises"""
    grown_warmup: float = 0.025
    """the same of the last stage"""
    least_rate: float = 1e-5
    """that a cosine falls to, as part of the highest"""
    grown_rate: float = 1.0
    """learning rate of the last stage, as part of the members'"""
    grown_least_rate: float = 0.3
    """that a cosine of the last stage falls to, as part of its highest"""
    cycles: int = 1
    """cosines of the last stage, each half as high as the one before"""

    def __post_init__(self) -> None:
        Recipe(self.templates, self.sets)
        if self.growth not in GROWTHS:
            raise ValueError(f"growth must be one of {', '.join(GROWTHS)}, got '{self.growth}'")
        if self.coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients must be one of {', '.join(COEFFICIENTS)}, got '{self.coefficients}'")
        if self.second_member not in ("drawn", "copied") or self.schedule not in ("constant", "cosine"):
            raise ValueError("second_member is drawn or copied, schedule constant or cosine")
        if not 0 < self.stages[0] < self.stages[1] <= 1:
            raise ValueError(f"stages must rise, above 0 and up to 1, got {self.stages[0]} and {self.stages[1]}")
        if min(self.scale, self.first_weight) < 0 or not self.grown_rate > 0 or self.cycles < 1:
            raise ValueError("scale and first_weight must not be negative, grown_rate positive, cycles at least 1")
        if not all(0 <= p < 1 for p in (self.warmup, self.grown_warmup, self.least_rate, self.grown_least_rate)):
            raise ValueError("warm-ups and least rates are parts, in [0, 1)")


def stage_ends(steps: Sequence[int], stages: tuple[float, float]) -> tuple[int, int]:
    """The step at which member 1 begins and that at which both grow, of tasks with so many steps each."""
    tasks = len(steps)
    first, second = (part * tasks for part in stages)
    if tasks > 1:
        first = min(max(round(first), 1), tasks - 1)
    if tasks > 2:
        second = min(max(round(second), first + 1), tasks)
    ends = [sum(steps[: int(place)]) + round(place % 1 * steps[int(place) % tasks]) for place in (first, second)]
    begin = max(ends[0], 1)
    return begin, max(ends[1], begin + 1)


class MixtureGrowth(Strategy):
    """Two members, then one network."""

    takes_interventions = False
    trains_network = False

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting, head_bias=False)
        self.config, self.random = config, setting.random()
        self.ends = stage_ends(setting.steps, config.stages)
        self.step = 0
        self.mixture = MixtureNetwork(self.network, Recipe(config.templates, config.sets), self.random)
        if config.growth == "large":
            draw_kaiming_(self.network, self.random)
        else:
            self.network = self.mixture
        self.stage: Stage = 0
        self._train(0)

    @property
    def _learns_members(self) -> tuple[Literal[0, 1], ...]:
        """Whose outputs a loss is taken of; none where the network is whole."""
        if self.network is not self.mixture or self.mixture.stage == "grown":
            return ()
        if self.stage == 0 or self.config.growth == "net2wider":
            return (0,)
        return (0, 1) if self.stage == "grown" or self.config.first_weight else (1,)

    def _train(self, stage: Stage) -> None:
        """What a stage trains, and new optimisers for it."""
        self.stage = stage
        mixture, members = self.mixture, self._learns_members
        if self.network is not mixture:
            weights, coefficients = list(self.network.parameters()), []
        elif members:
            weights = [w for m in members for w in mixture.weights(m)]
            coefficients = [c for m in members for c in mixture.coefficients(m)]
        else:
            weights, coefficients = mixture.weights("grown"), mixture.coefficients("grown")
        self.parameters = [*weights, *coefficients]
        self.optimizer = self.setting.optimizer(nn.ParameterList(weights))
        self._rate = self.optimizer.learning_rate
        self.mixing = None if not coefficients else self.setting.optimizer(nn.ParameterList(coefficients))
        if self.mixing is not None:
            assert not isinstance(self.mixing, PlasticOptimizer)  # as there are no interventions
            self.mixing.weight_decay = 0.0

    def _stage_at(self, step: int) -> Stage:
        return 0 if step < self.ends[0] else 1 if step < self.ends[1] else "grown"

    def _go_to(self, stage: Stage) -> None:
        while self.stage != stage:
            if self.stage == 0:
                if self.config.second_member == "copied":
                    self.mixture.start_second(0.01, self.random)
                if self.config.growth not in ("net2wider", "large"):
                    self._train(1)
                self.stage = 1
            else:
                self._grow()

    def _grow(self) -> None:
        """Make the wider network. Optimisers go on with what they know of its parameters."""
        config, mixture, knew = self.config, self.mixture, self._moments()
        if config.growth == "mixture":
            mixture.grow(config.coefficients, config.scale, self.random)
        elif config.growth == "net2wider":
            self.network = net2wider(mixture, self.random)
        elif config.growth in ("random-blocks", "zero-blocks"):
            self.network = with_blocks(mixture, self.random if config.growth == "random-blocks" else None)
        if config.growth == "large":
            self.stage = "grown"
        else:
            self._train("grown")
            self._remember(knew)

    def _moments(self) -> dict[int, dict[str, Tensor]]:
        """What the optimisers know of each parameter, by its identity."""
        found: dict[int, dict[str, Tensor]] = {}
        for optimizer in (self.optimizer, self.mixing):
            if optimizer is not None:
                for name, values in optimizer.state_dict().items():
                    for parameter, value in zip(optimizer.parameters, values, strict=False):
                        found.setdefault(id(parameter), {})[name] = value
        return found

    @torch.no_grad()
    def _remember(self, knew: Mapping[int, Mapping[str, Tensor]]) -> None:
        """The same of those parameters that are trained on."""
        for optimizer in (self.optimizer, self.mixing):
            if optimizer is not None:
                for name, values in optimizer.state_dict().items():
                    for parameter, value in zip(optimizer.parameters, values, strict=False):
                        if id(parameter) in knew:
                            value.copy_(knew[id(parameter)][name])

    def begin_task(self, task: Task) -> None:
        self._go_to(self._stage_at(self.step))

    def observe(self, batch: Batch, task: Task) -> Metrics:
        self._go_to(self._stage_at(self.step))
        factor = self._rate_factor()
        for optimizer in (self.optimizer, self.mixing):
            if optimizer is not None:
                optimizer.learning_rate = self._rate * factor
        loss = self._loss(batch)
        self.descend(loss)
        self.step += 1
        return {"loss/current": loss.detach()}

    def _loss(self, batch: Batch) -> Tensor:
        members = self._learns_members
        if len(members) < 2:
            if members:
                self.mixture.set_stage(members[0])
            return self.cross_entropy(self.network(batch.x), batch.y)
        outputs = self._of_members(batch.x)
        if self.stage == "grown":
            return self.cross_entropy(torch.stack(outputs).sum(0), batch.y)
        first, second = (self.cross_entropy(o, batch.y) for o in outputs)
        return (self.config.first_weight * first + second) / 2

    def _of_members(self, x: Tensor) -> list[Tensor]:
        found = []
        for member in (0, 1):
            self.mixture.set_stage(member)
            found.append(self.mixture(x))
        return found

    def _rate_factor(self) -> float:
        """Of the learning rate, at the present step of its stage."""
        config, total = self.config, sum(self.setting.steps)
        borders = (0, *self.ends, total)
        number = 2 if self.stage == "grown" else self.stage
        done, steps = self.step - borders[number], borders[number + 1] - borders[number]
        peak = config.grown_rate if number == 2 else 1.0
        if config.schedule == "constant":
            return peak
        warmup, least = (
            (config.grown_warmup, config.grown_least_rate) if number == 2 else (config.warmup, config.least_rate)
        )
        cycle, length = 0, steps
        if number == 2:
            length = max(1, -(-steps // config.cycles))
            cycle, done = divmod(done, length)
        peak *= 0.5**cycle
        lowest = min(least * 2**cycle, 1.0)  # the same in all cycles
        return peak * Cosine(length, int(warmup * length), start=min(1e-4, lowest), end=lowest).factor(done, 0)

    def descend(self, loss: Tensor) -> None:
        gradients, count = self.gradients(loss), len(self.optimizer.parameters)
        self.optimizer.step(gradients[:count])
        if self.mixing is not None:
            self.mixing.step(gradients[count:])

    def end_task(self, task: Task) -> None:
        if self.step >= self.ends[1]:
            self._go_to("grown")

    def predict(self, x: Tensor, task: Task | None) -> Tensor:
        if self._learns_members in ((), (0,)):
            return self.network(x)
        return torch.stack(self._of_members(x)).sum(0)

    @property
    def parameter_count(self) -> int:
        """All that a run trains."""
        if self.config.growth == "large":
            return super().parameter_count
        members, mixture = self.setting.members, self.mixture
        whole = [*mixture.weights("grown"), *mixture.coefficients("grown")]
        return sum(p.numel() for p in whole) // members

    def measurements(self) -> Iterator[tuple[int | None, Metrics]]:
        """The weights that answer, once made of their templates."""
        if self.network is not self.mixture:
            count = sum(p.numel() for p in self.network.parameters())
        else:
            count = self._weight_count()
        each = torch.full((self.setting.members,), count / self.setting.members, dtype=torch.float64)
        yield None, {"growth/parameters": each}

    def _weight_count(self) -> int:
        stage = self.mixture.stage
        used: tuple[Stage, ...] = ("grown",) if stage == "grown" else (0,) if self.stage == 0 else (0, 1)
        found = 0
        for part in used:
            self.mixture.set_stage(part)
            found += sum(p.numel() for p in self.mixture.export().parameters())
        self.mixture.set_stage(stage)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "mixture": self.mixture.state_dict(),
            "network": {} if self.network is self.mixture else self.network.state_dict(),
            "stages": [self.stage, self.mixture.stage],
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "mixing": {} if self.mixing is None else self.mixing.state_dict(),
            "random": [generator.get_state() for generator in self.random.generators],
            "seen": self.seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        stage, of_mixture = state["stages"]
        if state["network"] and self.network is self.mixture:
            self.network = with_blocks(self.mixture, None)  # of that shape; its values follow
        self.mixture.load_state_dict(state["mixture"])
        self.mixture.set_stage(of_mixture)
        if state["network"]:
            self.network.load_state_dict(state["network"])
        self._train(stage)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.mixing is not None:
            self.mixing.load_state_dict(state["mixing"])
        for generator, saved in zip(self.random.generators, state["random"], strict=True):
            generator.set_state(saved)
        self.seen.copy_(state["seen"])
        self.step = state["step"]
