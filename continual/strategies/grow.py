"""Growing: at each task the network becomes larger, and goes on from what it was (`continual.growth.classifiers`).

    path      the moves of `--path`, one at each task from the second on, in turn
    search    every move that fits the space is tried: in the first `--proxy-steps` of a task each candidate learns the
              same batches; the one with the smallest L (c / c_hold)^w goes on as it is. L: mean loss of the second half
              of these batches, each before it was learned, over all seeds; c: FLOPs of a step
    random    a move that fits is drawn
    none      it never grows: what the others are compared with
    large     it has its last size from the start, along the path

The space follows the data: at most P_0 (N_t / N_0)^ζ parameters, N_t samples so far (`--zeta`); the rule of choice is
AutoProg's (arXiv:2203.14509; specs/growclip-and-growth.md, A.3 and A.6). Members grow together, so a search decides for
all of them. `--inherit` below 1 mixes what is inherited with new random numbers (PIM). Classes are no part of growth:
the row of a class in the head is drawn when its task comes, and competes from then on. Replay is that of ER (`--memory
0`: none). Each growth begins with a new optimiser. Works with: task, class, domain.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from continual.growth.classifiers import WIDENINGS, Genome, GrowableClassifier, Widening, drawn_values
from continual.growth.inheriting import mix_
from continual.growth.protocol import Move
from continual.growth.search import fitted_weight
from continual.growth.space import HOLD, Budget
from continual.memory import Batch, Policy
from continual.networks.classifier import Classifier
from continual.strategies.replay import check_replay
from continual.strategy import Labelled, Metrics, Optimizer, Setting, Strategy
from continual.streams import Task
from plasticity.networks.stacked import StackedLinear, member, stack

Choice = Literal["path", "search", "random", "none", "large"]
CHOICES: tuple[Choice, ...] = ("path", "search", "random", "none", "large")
_BIAS = 1e-3  # the head's of a new class lies this far below 0, at most


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of them ours."""

    choice: Choice = "path"
    """of growth: path, search, random, none, large"""
    path: tuple[str, ...] = ("width", "depth")
    """moves in turn: width, width_1 ..., depth, stack"""
    widening: Widening = "unread"
    """new units are drawn and unread at first, or duplicated"""
    inherit: float = 1.0
    """part of inherited weights, the rest is new random numbers; 1: growth changes nothing"""
    zeta: float = 0.5
    """how fast the space of search and random choice grows with the data; 0: not at all, 1: as the data do"""
    proxy_steps: int = 20
    """of a task, in which candidates are tried"""
    cost_weight: float | None = 0.02
    """w, of cost in the score; None: fitted to the candidates"""
    memory: int | None = None
    """samples kept; default: the benchmark's"""
    policy: Policy = "reservoir"
    """which samples: reservoir, class-balanced or ring"""
    replay_batch: int = 10
    """samples replayed in a step"""

    def __post_init__(self) -> None:
        check_replay(self)
        if self.choice not in CHOICES:
            raise ValueError(f"choice must be one of {', '.join(CHOICES)}, got '{self.choice}'")
        if self.widening not in WIDENINGS:
            raise ValueError(f"widening must be one of {', '.join(WIDENINGS)}, got '{self.widening}'")
        if not self.path:
            raise ValueError("path needs at least one move")
        if not 0 <= self.inherit <= 1 or self.zeta < 0:
            raise ValueError("inherit must be in [0, 1], zeta not negative")
        if self.proxy_steps < 2:
            raise ValueError(f"proxy_steps must be at least 2, got {self.proxy_steps}")


class _Candidate:
    """A network that learns. move: that made it. network: of all members."""

    def __init__(self, move: Move[Genome], network: Classifier, optimizer: Optimizer):
        self.move, self.network, self.optimizer = move, network, optimizer
        self.losses: list[Tensor] = []  # [K] each, while others learn beside it

    @property
    def loss(self) -> Tensor:
        """Mean of the later half, [K]."""
        return torch.stack(self.losses[len(self.losses) // 2 :]).mean(0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "name": self.move.name,
            "genome": dataclasses.asdict(self.move.genome),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
        }


class Grow(Strategy):
    """A network that grows at each task."""

    takes_interventions = False

    def __init__(self, setting: Setting, config: Config):
        super().__init__(setting, True, config.memory, config.policy)
        self.config, self.random = config, setting.random()
        device = self.parameters[0].device
        template = cast(Classifier, setting.fresh(True, torch.Generator(device).manual_seed(0)))
        first = GrowableClassifier.of(template, setting.shape, config.widening)
        self.first_parameters, self.samples = first.parameter_count, self._samples()
        for index in range(1, setting.tasks):
            self._on_path(first.genome, index)  # raises for a move that is not there
        self.candidates = [_Candidate(Move(HOLD, first.genome), self.network, self.optimizer)]
        if config.choice == "large":
            self.candidates = [self._drawn(self._last_genome(first.genome))]
        self.task = 0
        self.trials: dict[str, tuple[Tensor, float]] = {}  # of the last search: losses [K] and score
        self.known = torch.zeros_like(self.seen)  # classes that have a row in the head
        self._show(self.candidates[0])

    def _samples(self) -> list[int]:
        """Of the stream, up to the end of each task."""
        return list(itertools.accumulate(steps * self.setting.batch for steps in self.setting.steps))

    def _show(self, candidate: _Candidate) -> None:
        """Make its network that of this strategy, which learns and answers."""
        self.network, self.optimizer = candidate.network, candidate.optimizer
        self.parameters = candidate.optimizer.parameters

    @property
    def genome(self) -> Genome:
        """Of the network that answers."""
        return self.candidates[0].move.genome

    def _candidate(self, move: Move[Genome], singles: Sequence[nn.Module]) -> _Candidate:
        network = cast(Classifier, stack(singles))
        return _Candidate(move, network, self.setting.optimizer(network))

    def _drawn(self, genome: Genome) -> _Candidate:
        singles = [GrowableClassifier(genome, source, self.config.widening) for source in self.random.generators]
        return self._candidate(Move(HOLD, genome), singles)

    # Which way to grow

    def _last_genome(self, genome: Genome) -> Genome:
        for index in range(1, self.setting.tasks):
            genome = self._on_path(genome, index).genome
        return genome

    def _on_path(self, genome: Genome, index: int) -> Move[Genome]:
        """The move of the path at task `index`."""
        name = self.config.path[(index - 1) % len(self.config.path)]
        moves = {move.name: move for move in GrowableClassifier(genome, None).moves()}
        if name not in moves:
            raise ValueError(f"'{name}' of path is no way to grow this network; {', '.join(moves)} are")
        return moves[name]

    def _fitting(self, index: int) -> list[Move[Genome]]:
        """What the space has at a task, in a fixed order; staying as it is, if there is nothing else."""
        budget = Budget(exponent=self.config.zeta)
        cap = budget.cap(self.first_parameters, self.samples[0], self.samples[index])
        moves = [m for m in GrowableClassifier(self.genome, None).moves() if m.name != "stack"]
        fits = [m for m in moves if budget.allows(GrowableClassifier(m.genome, None).parameter_count, cap)]
        return fits or [Move(HOLD, self.genome)]

    def _chosen(self, index: int) -> list[Move[Genome]]:
        """The ways to grow that are begun at a task."""
        choice = self.config.choice
        if index == 0 or choice in ("none", "large"):
            return []
        if choice == "path":
            return [self._on_path(self.genome, index)]
        fits = self._fitting(index)
        if choice == "random":  # the same for all members, so not drawn by one
            source = torch.Generator().manual_seed(index)
            return [fits[int(torch.randint(len(fits), (), generator=source))]]
        return fits

    # Growth

    def begin_task(self, task: Task) -> None:
        self.task = task.index
        moves, singles = self._chosen(task.index), self._singles()
        if moves:
            self.candidates = [self._grown(move, singles) for move in moves]
            self.trials = {}
        self._grow_head(task)
        self._show(self.candidates[0])

    def _singles(self) -> list[GrowableClassifier]:
        template = GrowableClassifier(self.genome, None, self.config.widening).to(self.seen.device)
        members = range(self.setting.members)
        return [cast(GrowableClassifier, member(self.network, template, k)) for k in members]

    def _grown(self, move: Move[Genome], singles: Sequence[GrowableClassifier]) -> _Candidate:
        if move.name == HOLD:
            return self._candidate(move, singles)
        found = []
        for single, source in zip(singles, self.random.generators, strict=True):
            model, slots = single.grow(move, source)
            if self.config.inherit < 1:
                fresh = drawn_values(move.genome, source)
                mix_(model, slots, self.config.inherit, lambda name, _, fresh=fresh: fresh[name])
            found.append(model)
        return self._candidate(move, found)

    @torch.no_grad()
    def _grow_head(self, task: Task) -> None:
        """Rows for the classes of a task, in all candidates: weights as drawn anew, biases a little below 0."""
        new = task.outputs & ~self.known
        self.known |= new
        if task.index == 0:
            return  # as the network was drawn
        for candidate in self.candidates:
            head = candidate.network.head
            assert isinstance(head, StackedLinear)
            outputs, width = head.weight.shape[1:]
            drawn = (2 * self.random.uniform(outputs, width + 1) - 1) / math.sqrt(width)
            head.weight.copy_(torch.where(new.unsqueeze(2), drawn[..., :-1], head.weight))
            if head.bias is not None:
                low = -_BIAS * math.sqrt(width) * drawn[..., -1].abs()
                head.bias.copy_(torch.where(new, low, head.bias))

    # Learning

    def observe(self, batch: Batch, task: Task) -> Metrics:
        allowed = (self.known | self.seen).unsqueeze(1)
        parts = [Labelled(batch.x, batch.y, allowed=allowed)]
        if not self.memory.empty:
            replay = self.memory.sample(self.config.replay_batch)
            parts.append(Labelled(replay.x, replay.y, allowed=allowed))
        told = []
        for candidate in self.candidates:
            self._show(candidate)
            losses = torch.stack(self.learn(*parts))
            told.append(losses)
            if len(self.candidates) > 1:
                candidate.losses.append(losses.sum(0))
        self._show(self.candidates[0])
        self.memory.insert(batch)
        if len(self.candidates[0].losses) >= self.config.proxy_steps:
            self._choose()
        return dict(zip(("loss/current", "loss/replay"), torch.stack(told).mean(0), strict=False))

    def _choose(self) -> None:
        """Keep the best candidate, as it has learned so far."""
        losses = [float(c.loss.mean()) for c in self.candidates]
        costs = [GrowableClassifier(c.move.genome, None).cost() for c in self.candidates]
        weight = self.config.cost_weight
        w = fitted_weight(losses, costs) if weight is None else weight
        hold = min(costs)
        scores = [loss * (cost / hold) ** w for loss, cost in zip(losses, costs, strict=True)]
        trials = zip(self.candidates, scores, strict=True)
        self.trials = {c.move.name: (c.loss, score) for c, score in trials}
        best = min(range(len(scores)), key=lambda i: (scores[i], costs[i], i))
        self.candidates = [self.candidates[best]]
        self.candidates[0].losses = []
        self._show(self.candidates[0])

    def end_task(self, task: Task) -> None:
        if len(self.candidates) > 1:
            self._choose()

    # What there is to tell

    def measurements(self) -> Iterator[tuple[int | None, Metrics]]:
        """Parameters, without rows for classes to come, and FLOPs of a step on a sample; of a search, what it saw."""
        model, width = GrowableClassifier(self.genome, None), self.network.head.weight.shape[2]
        to_come = (~self.known).sum(1).double() * (width + 1)
        cost = torch.full_like(to_come, model.cost())
        yield None, {"growth/parameters": model.parameter_count - to_come, "growth/flops": cost}
        for name, (losses, score) in self.trials.items():
            scores = torch.full_like(losses, score)
            chosen = torch.full_like(losses, name == self.candidates[0].move.name)
            told = {"loss": losses, "score": scores, "chosen": chosen}
            yield self.task + 1, {f"growth/{kind}/{name}": value for kind, value in told.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "candidates": [candidate.state_dict() for candidate in self.candidates],
            "task": self.task,
            "trials": {name: [losses, score] for name, (losses, score) in self.trials.items()},
            "known": self.known,
            "seen": self.seen,
            "memory": self.memory.state_dict(),
            "random": [generator.get_state() for generator in self.random.generators],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.seen.device
        self.candidates = [self._restored(saved) for saved in state["candidates"]]
        self.task = state["task"]
        self.trials = {name: (losses.to(device), score) for name, (losses, score) in state["trials"].items()}
        self.known.copy_(state["known"])
        self.seen.copy_(state["seen"])
        self.memory.load_state_dict(state["memory"])
        for generator, saved in zip(self.random.generators, state["random"], strict=True):
            generator.set_state(saved)
        self._show(self.candidates[0])

    def _restored(self, saved: Mapping[str, Any]) -> _Candidate:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["genome"].items()}
        genome = Genome(**fields)
        blank = GrowableClassifier(genome, None, self.config.widening).to(self.seen.device)
        found = self._candidate(Move(saved["name"], genome), [blank] * self.setting.members)
        found.network.load_state_dict(saved["network"])
        found.optimizer.load_state_dict(saved["optimizer"])
        found.losses = [loss.to(self.seen.device) for loss in saved["losses"]]
        return found
