"""GrowCLIP (Deng et al., ICCV 2023, arXiv:2308.11331), reconstructed from its abstract: a dual encoder of images and
texts that grows with its data. One seed.

    a part of the stream arrives, with new words
    if enough arrived since the last growth:
        candidates    growths of depth, width, heads, hidden layers that the budget of the data allows   `space`
        search        each trained a little, loss against cost                                           `search`
        growth        nothing that was learned changes                                                   `operators`
        PIM           what is inherited is mixed with new random numbers                                 `inheriting`
    learn from the part, or from all so far, as the stream decides

Of the paper: growth at every step, a space of growth that becomes larger with the data, an encoder that both
modalities share, several dimensions of growth compared, and inheriting with momentum. How each is done is of this
house (specs/growclip-and-growth.md, A.1), for no code and not more than the abstract could be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

import torch

from continual.growth import inheriting, operators, search
from continual.growth.dual_encoder import DualEncoder, fresh
from continual.growth.genome import Genome
from continual.growth.operators import DepthSource, Neurons, Operators
from continual.growth.protocol import Arrival, Move
from continual.growth.search import Cost, Engine, Proxy
from continual.growth.slots import SlotMap, Slots
from continual.growth.space import HOLD, Budget, GrowthSpace
from continual.growth.supernet import supernet
from continual.growth.training import Optimisation, Training
from continual.pairs.batch import PairBatch
from continual.strategy import Metrics
from plasticity.problems.streams import generator

Choice = Literal["search", "random", "path", "fixed"]
Inheritance = Literal["mix", "ema", "none", "scratch"]
ENGINES: dict[str, Engine] = {"independent": search.independent, "supernet": supernet}


@dataclass(frozen=True, kw_only=True)
class Config(Optimisation, GrowthSpace):
    """Values of this house throughout; the paper's are not known.

    Baselines are settings of it: `choice` fixed, random or path; `inheritance` scratch or none; `depth_source` stack.
    """

    choice: Choice = "search"
    """of the growth: by trying candidates, at random, along `path`, or none: the model stays"""
    path: tuple[str, ...] = ()
    """moves at the growth steps in turn, such as ("shared_depth", "heads+ffn"); then it stays"""
    budget_exponent: float = 0.5
    """ζ: parameters may grow like the pairs to this power"""
    largest: int | None = None
    """parameters without embeddings that no candidate exceeds"""
    min_ratio: float = 1.05
    """it grows if so many times the pairs of the last growth arrived"""
    force_growth: bool = True
    """it does not hold while a growth fits the budget"""

    engine: Literal["independent", "supernet"] = "independent"
    """candidates are tried each by itself, or as parts of one network"""
    proxy_steps: int = 40
    """steps of trying a candidate"""
    repeats: int = 2
    """of each trial, with other batches"""
    cost: Cost = "flops"
    """of a training step"""
    cost_weight: float | None = 0.02
    """w; None: fitted"""
    recycle: bool | None = None
    """the chosen candidate keeps what it learned while it was tried; None: in a supernet, as AutoProg does"""

    inheritance: Inheritance = "mix"
    """mix: PIM; ema: of running averages; none: of the weights as they are; scratch: nothing is inherited"""
    momentum: float = 0.9
    """m of PIM; 1: growth changes nothing"""
    rescale: bool = False
    """the mix is divided by sqrt(m² + (1 - m)²)"""
    mix_on_hold: bool = False
    """PIM also where it does not grow: shrink and perturb"""
    ema_decay: float = 0.99
    """of the running average that `ema` inherits"""
    ema_decays: tuple[float, ...] = ()
    """of the averages that copies of a number are taken from, so that they differ"""
    optimizer_state: Literal["fresh", "carry"] = "fresh"
    """of AdamW; carry: moments of what is inherited go on"""
    depth_source: DepthSource = "copy"
    """what a new block is; copy and fresh write nothing at first, stack and random do"""
    neurons: Neurons = "zero"
    """new ones of a hidden layer: unread at first, or copies that share what is read"""

    def __post_init__(self) -> None:
        Optimisation.__post_init__(self)
        GrowthSpace.__post_init__(self)
        allowed: dict[str, Sequence[str]] = {
            "choice": get_args(Choice), "engine": tuple(ENGINES), "cost": get_args(Cost),
            "inheritance": get_args(Inheritance), "optimizer_state": ("fresh", "carry"),
        }  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is one of {', '.join(values)}, got '{getattr(self, name)}'")
        if min(self.proxy_steps, self.repeats) < 1:
            raise ValueError("proxy_steps and repeats must be at least 1")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {self.momentum}")
        if not all(0 <= decay < 1 for decay in (self.ema_decay, *self.ema_decays)):
            raise ValueError("ema_decay and ema_decays must be in [0, 1)")
        if self.min_ratio < 1 or (self.cost_weight is not None and self.cost_weight < 0):
            raise ValueError("min_ratio must be at least 1, cost_weight not negative")
        if self.engine == "supernet" and (self.neurons != "zero" or not self.operators.preserve):
            raise ValueError("a supernet needs growths that begin at zero: depth_source copy or fresh, neurons zero")
        for name in self.path:
            self.space.move(Genome(), name)
        _ = self.budget, self.operators  # which check their own

    @property
    def space(self) -> GrowthSpace:
        """Of this configuration; a supernet has no widths."""
        moves: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(GrowthSpace)}
        if self.engine == "supernet":
            moves["width"] = None
        return GrowthSpace(**moves)

    @property
    def budget(self) -> Budget:
        return Budget(exponent=self.budget_exponent, parameters=self.largest)

    @property
    def operators(self) -> Operators:
        return Operators(depth=self.depth_source, neurons=self.neurons)


class GrowClip:
    """A dual encoder that grows, from its first genome on.

    history: what happened at each part that arrived, plain values. flops: of all training so far, candidates included.
    engine: tries candidates in place of the one that the configuration names.
    """

    def __init__(
        self,
        config: Config,
        genome: Genome,
        seed: int,
        device: torch.device | str = "cpu",
        engine: Engine | None = None,
    ):
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.engine = engine or ENGINES[config.engine]
        model = DualEncoder(genome, self._random("initialisation"))
        self.training = Training(model, config, steps=0)
        self.first_capacity, self.first_pairs, self.grown_at_pairs = genome.capacity, 0, 0
        self.growths = 0
        self.flops = 0.0
        self.history: list[dict[str, Any]] = []
        self._averages = self._new_averages()

    @property
    def model(self) -> DualEncoder:
        return self.training.model

    @property
    def genome(self) -> Genome:
        return self.model.genome

    def arrive(self, arrival: Arrival) -> dict[str, Any]:
        """A part arrives: learn its words, grow if it is time, and be ready to learn. Returns what happened."""
        self.extend_vocabulary(arrival)
        return self.grow(arrival)

    def extend_vocabulary(self, arrival: Arrival) -> None:
        """Tokens for new words; all embeddings stay. What is measured now is what was known before."""
        if arrival.vocabulary <= self.genome.vocabulary:
            return
        old, genome = self.genome, self.genome.grown(vocabulary=arrival.vocabulary)
        model, slots = operators.grow_vocabulary(self.model, arrival.vocabulary)
        if self._averages is not None:
            copies = [DualEncoder.of(old, self._averages.values(i)) for i in range(len(self._averages.decays))]
            values = [dict(operators.grow_vocabulary(c, genome.vocabulary)[0].named_parameters()) for c in copies]
            self._averages = inheriting.Averages(model, self._averages.decays, values)
        before, self.training = self.training, Training(model, self.config, steps=0)
        self.training.carry(before, slots)

    def grow(self, arrival: Arrival) -> dict[str, Any]:
        """Grow if it is time, and begin the steps of the part. Returns what happened, plain values."""
        record: dict[str, Any] = {"part": arrival.index, "pairs": arrival.pairs, "chosen": HOLD, "candidates": []}
        model, slots = self.model, SlotMap.same(self.model.named_parameters())
        if not self.first_pairs:
            self.first_pairs = self.grown_at_pairs = arrival.pairs
        elif self._is_time(arrival):
            model, slots = self._grow(arrival, record)
        before = self.training
        self.training = Training(model, self.config, arrival.steps)
        if self.config.optimizer_state == "carry":
            self.training.carry(before, slots)
        self._averages = self._new_averages()
        record |= {"genome": self.genome.as_dict(), **self.size}
        self.history.append(record)
        return record

    def learn(self, batch: PairBatch) -> Metrics:
        """One step. Raises ValueError if all steps of the part are taken."""
        if self.training.step >= self.training.steps:
            raise ValueError(
                f"all {self.training.steps} steps of this part are taken, the next one has to arrive first"
            )
        metrics = self.training.learn(batch)
        if self._averages is not None:
            self._averages.update()
        self.flops += self.genome.flops * len(batch.images)
        return metrics

    @property
    def size(self) -> dict[str, float]:
        """Parameters, those that the budget counts, FLOPs of a step on a pair, and of all training so far."""
        return {
            "parameters": self.genome.parameters, "capacity": self.genome.capacity,
            "flops_per_pair": self.genome.flops, "flops": self.flops,
        }  # fmt: skip

    def _is_time(self, arrival: Arrival) -> bool:
        return self.config.choice != "fixed" and arrival.pairs >= self.config.min_ratio * self.grown_at_pairs

    def _grow(self, arrival: Arrival, record: dict[str, Any]) -> tuple[DualEncoder, SlotMap]:
        """Choose, and grow to what was chosen."""
        cap = self.config.budget.cap(self.first_capacity, self.first_pairs, arrival.pairs)
        record["cap"] = cap
        move, trained = self._choose(arrival, cap, record)
        record["chosen"] = move.name
        step, self.growths = self.growths, self.growths + 1
        stays = {"scratch": False, "mix": not self.config.mix_on_hold}.get(self.config.inheritance, True)
        if move.genome == self.genome and stays:
            return self.model, SlotMap.same(self.model.named_parameters())
        if move.genome != self.genome:
            self.grown_at_pairs = arrival.pairs
        model, slots = self._grown(step, move)
        return trained or model, slots

    def _choose(self, arrival: Arrival, cap: float, record: dict[str, Any]) -> tuple[Move[Genome], DualEncoder | None]:
        """The move, and its model if that was trained already."""
        config, step = self.config, self.growths
        if config.choice == "path":
            return config.space.move(self.genome, config.path[step] if step < len(config.path) else HOLD), None
        candidates = config.space.candidates(self.genome, cap, config.budget, config.force_growth)
        if config.choice == "random":
            drawn = torch.randint(len(candidates), (), generator=self._random("growth", step, 1), device=self.device)
            return candidates[int(drawn)], None
        if len(candidates) == 1:
            return candidates[0], None
        trials = self._try(arrival, candidates)
        by_name = dict(zip((move.name for move in candidates), trials, strict=True))
        # Measured seconds of staying as it is are known only if that was tried.
        held = by_name[HOLD].cost if HOLD in by_name else min(trial.cost for trial in trials)
        hold_cost = self.genome.flops if config.cost == "flops" else held
        rows, weight = search.table(candidates, trials, hold_cost, config.cost_weight)
        record |= {"candidates": [row.as_dict() for row in rows], "cost_weight": weight}
        chosen = search.best(rows, hold_cost, weight)
        recycle = config.engine == "supernet" if config.recycle is None else config.recycle
        return candidates[chosen], trials[chosen].model if recycle else None

    def _try(self, arrival: Arrival, candidates: Sequence[Move[Genome]]) -> list[search.Trial]:
        config, step = self.config, self.growths
        seeds = tuple(self._random("growth", step, 2, repeat).initial_seed() for repeat in range(config.repeats))
        proxy = Proxy(steps=config.proxy_steps, seeds=seeds, cost=config.cost, optimisation=config)
        trials = self.engine(candidates, partial(self._grown, step), arrival, proxy)
        self.flops += sum(trial.flops for trial in trials)
        return trials

    def _grown(self, step: int, move: Move[Genome]) -> tuple[DualEncoder, SlotMap]:
        """The model of a move at a growth step, and what it inherits; the same each time."""
        config = self.config
        if config.inheritance == "scratch":
            model = DualEncoder(move.genome, self._random("growth", step, 3))
            return model, SlotMap({name: Slots.new(p) for name, p in model.named_parameters()})
        bases = [self.model]
        if self._averages is not None:
            copies = range(len(self._averages.decays))
            bases = [DualEncoder.of(self.genome, self._averages.values(index)) for index in copies]
        made = [base.grow(move, self._random("growth", step, 0), config.operators) for base in bases]
        model, slots = made[0]
        if len(made) > 1:
            inheriting.fill_copies_(model, slots, [dict(other.named_parameters()) for other, _ in made[1:]])
        if config.inheritance == "mix" and (config.mix_on_hold or move.name != HOLD):

            def drawn(name: str, shape: Sequence[int]) -> torch.Tensor:
                random = self._random("growth", step, 4, inheriting.seed_of(name))
                return fresh(model.genome, name, shape, random)

            inheriting.mix_(model, slots, config.momentum, drawn, rescale=config.rescale)
        return model, slots

    def _new_averages(self) -> inheriting.Averages | None:
        decays = (self.config.ema_decay, *self.config.ema_decays)
        return inheriting.Averages(self.model, decays) if self.config.inheritance == "ema" else None

    def _random(self, purpose: str, *index: int) -> torch.Generator:
        return generator(self.device, self.seed, purpose, *index)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future; random numbers follow from the seed and the growth step."""
        return {
            "genome": self.genome.to_json(),
            "training": self.training.state_dict(),
            "averages": None if self._averages is None else self._averages.state_dict(),
            "seed": self.seed,
            "first_capacity": self.first_capacity,
            "first_pairs": self.first_pairs,
            "grown_at_pairs": self.grown_at_pairs,
            "growths": self.growths,
            "flops": self.flops,
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly, with the architecture of the state. Raises ValueError if it is of another seed."""
        if state["seed"] != self.seed:
            raise ValueError(f"this state is of seed {state['seed']}, not of {self.seed}")
        genome = Genome.from_json(state["genome"])
        self.training = Training(DualEncoder(genome, None).to_empty(device=self.device), self.config, steps=0)
        self.training.load_state_dict(state["training"])
        self._averages = self._new_averages()
        if self._averages is not None:
            self._averages.load_state_dict(state["averages"])
        for name in ("first_capacity", "first_pairs", "grown_at_pairs", "growths", "flops"):
            setattr(self, name, state[name])
        self.history = list(state["history"])
