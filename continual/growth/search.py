"""Which growth is worth its cost: candidates are trained a little, and loss is weighed against cost.

    score = L (c / c_hold)^w        L: loss on fixed held-out pairs after a few steps; c: cost of a training step
    w: a number, or fitted: log L = log a_2 + a_1 log c over the candidates, w = max(-a_1, 0)

The rule is of AutoProg (Li et al. 2022, arXiv:2203.14509), whose cost is time. GrowCLIP's own is not known. Candidates
differ far less than repetitions do, so all of them see the same random numbers and only paired differences count
(specs/growclip-and-growth.md, A.6 and F).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from continual.growth.dual_encoder import DualEncoder
from continual.growth.genome import Genome
from continual.growth.protocol import Arrival, Move
from continual.growth.slots import SlotMap
from continual.growth.space import HOLD
from continual.growth.training import Optimisation, Training, loss_of
from continual.pairs.batch import PairBatch

Cost = Literal["flops", "time"]
_TIED = 1e-9  # relative difference of scores that is rounding

GrownModel = Callable[[Move[Genome]], tuple[DualEncoder, SlotMap]]  # of a candidate, always with the same draws


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """How candidates are tried. steps: of training; seeds: of the batches, one for each repetition.

    cost: FLOPs of a training step on a pair, or its measured seconds.
    """

    steps: int
    seeds: tuple[int, ...]
    cost: Cost
    optimisation: Optimisation


@dataclass(frozen=True)
class Trial:
    """What trying a candidate told. losses: one for each repetition. cost: of a step. flops: of training it.

    model: as the first repetition left it, from which training may go on.
    """

    losses: tuple[float, ...]
    cost: float
    flops: float = 0.0
    model: DualEncoder | None = None


Engine = Callable[[Sequence[Move[Genome]], GrownModel, Arrival, Proxy], list[Trial]]


@dataclass(frozen=True)
class Row:
    """A candidate in the table of a search."""

    name: str
    genome: Genome
    losses: tuple[float, ...]
    cost: float
    score: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name, "genome": self.genome.as_dict(), "parameters": self.genome.parameters,
            "losses": list(self.losses), "cost": self.cost, "score": self.score,
        }  # fmt: skip


def independent(candidates: Sequence[Move[Genome]], grown: GrownModel, arrival: Arrival, proxy: Proxy) -> list[Trial]:
    """Each candidate is grown and trained by itself, on the same batches."""
    validation = arrival.validation()
    return [_try(move, grown, arrival, proxy, validation) for move in candidates]


def _try(
    move: Move[Genome], grown: GrownModel, arrival: Arrival, proxy: Proxy, validation: Sequence[PairBatch]
) -> Trial:
    losses, seconds, pairs, kept = [], [], 0, None
    for seed in proxy.seeds:
        model, _ = grown(move)
        training = Training(model, proxy.optimisation, proxy.steps)
        began = time.perf_counter()
        for batch in arrival.proxy_batches(seed, proxy.steps):
            training.learn(batch)
            pairs += len(batch.images)
        losses.append(validation_loss(model, validation))  # waits for the device
        seconds.append((time.perf_counter() - began) / proxy.steps)
        kept = kept or model
    cost = model_cost(move.genome, proxy, min(seconds))
    return Trial(tuple(losses), cost, pairs * move.genome.flops, kept)


def model_cost(genome: Genome, proxy: Proxy, seconds: float) -> float:
    """Of a training step: FLOPs a pair, or the seconds measured."""
    return genome.flops if proxy.cost == "flops" else seconds


@torch.no_grad()
def validation_loss(model: DualEncoder, batches: Sequence[PairBatch]) -> float:
    """Mean contrastive loss over batches of one size: the loss depends on how many pairs compete."""
    return float(torch.stack([loss_of(model, batch) for batch in batches]).double().mean())


def fitted_weight(losses: Sequence[float], costs: Sequence[float]) -> float:
    """w = max(-a_1, 0) of the least-squares line through log L and log c; 0 where all costs are equal."""
    if len(set(costs)) < 2:
        return 0.0
    x, y = [math.log(cost) for cost in costs], [math.log(loss) for loss in losses]
    return max(-statistics.linear_regression(x, y).slope, 0.0)


def table(
    candidates: Sequence[Move[Genome]], trials: Sequence[Trial], hold_cost: float, weight: float | None
) -> tuple[list[Row], float]:
    """A row for each candidate, and the weight of cost. weight: None: fitted."""
    means = [statistics.fmean(trial.losses) for trial in trials]
    w = fitted_weight(means, [trial.cost for trial in trials]) if weight is None else weight
    rows = [
        Row(move.name, move.genome, trial.losses, trial.cost, mean * (trial.cost / hold_cost) ** w)
        for move, trial, mean in zip(candidates, trials, means, strict=True)
    ]
    return rows, w


def best(rows: Sequence[Row], hold_cost: float, weight: float) -> int:
    """Which row has the smallest score; of equal ones the cheapest, then the first.

    Where "hold" is a candidate, it stays unless another beats it by more than the standard error of the difference.
    That is over repetitions in pairs: the same batches, so what they have in common does not count.
    """
    smallest = min(row.score for row in rows)
    tied = [i for i, row in enumerate(rows) if row.score <= smallest + abs(smallest) * _TIED]
    chosen = min(tied, key=lambda i: (rows[i].cost, i))
    held = next((i for i, row in enumerate(rows) if row.name == HOLD), None)
    if held is None or held == chosen:
        return chosen
    factors = [(rows[i].cost / hold_cost) ** weight for i in (held, chosen)]
    pairs = zip(rows[held].losses, rows[chosen].losses, strict=True)
    differences = [a * factors[0] - b * factors[1] for a, b in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return chosen if statistics.fmean(differences) > error else held
