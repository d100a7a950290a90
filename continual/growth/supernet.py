"""One network that contains all candidates of a growth, trained by sampling them (after AutoProg, arXiv:2203.14509).

The union of all candidates is grown once. A candidate is the part of it that is left without the heads, neurons and
blocks that it has not; a part of what is zero-initialised computes what the candidate would. Width is not searched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from continual.growth.contrastive import contrastive_loss
from continual.growth.dual_encoder import DualEncoder
from continual.growth.genome import TOWERS, Genome, Towers
from continual.growth.inheriting import Averages
from continual.growth.operators import axes_of, tower_of
from continual.growth.protocol import Arrival, Move
from continual.growth.search import GrownModel, Proxy, Trial, model_cost, validation_loss
from continual.growth.training import Training, loss_of
from continual.pairs.batch import PairBatch

_DECAY = 0.99  # of the averages that candidates are judged by
_WHOLE_EVERY = 4  # steps between those of the whole network


def supernet(candidates: Sequence[Move[Genome]], grown: GrownModel, arrival: Arrival, proxy: Proxy) -> list[Trial]:
    """All candidates as parts of one network. Raises ValueError if they differ in width or vocabulary."""
    whole = union([move.genome for move in candidates])
    validation, steps = arrival.validation(), max(1, proxy.steps * len(candidates) // 2)
    losses: list[list[float]] = [[] for _ in candidates]
    first: Averages | None = None
    cost, flops = 0.0, 0.0
    for seed in proxy.seeds:
        model, _ = grown(Move("supernet", whole))
        began = time.perf_counter()
        averages, spent = _train(model, candidates, arrival, proxy, seed, steps)
        for found, move in zip(losses, candidates, strict=True):
            found.append(validation_loss(part_of(averages.values(), whole, move.genome), validation))
        cost, flops = (time.perf_counter() - began) / steps, flops + spent
        first = first or averages
    assert first is not None  # there is a seed
    return [
        Trial(
            tuple(found),
            model_cost(move.genome, proxy, cost * move.genome.flops / whole.flops),
            flops / len(candidates),
            part_of(first.values(), whole, move.genome),
        )
        for found, move in zip(losses, candidates, strict=True)
    ]


def _train(
    model: DualEncoder, candidates: Sequence[Move[Genome]], arrival: Arrival, proxy: Proxy, seed: int, steps: int
) -> tuple[Averages, float]:
    """One candidate a step, drawn from all, and every fourth time the whole. Returns averages and FLOPs."""
    training, averages, flops = Training(model, proxy.optimisation, steps), Averages(model, [_DECAY]), 0.0
    shells = [DualEncoder(move.genome, None) for move in candidates]
    drawn = torch.randint(len(shells), (steps,), generator=torch.Generator().manual_seed(seed)).tolist()
    for step, batch in enumerate(arrival.proxy_batches(seed, steps)):
        whole = step % _WHOLE_EVERY == _WHOLE_EVERY - 1
        trained = model if whole else shells[drawn[step]]
        training.descend(loss_of(model, batch) if whole else part_loss(model, trained, batch))
        averages.update()
        flops += trained.genome.flops * len(batch.images)
    return averages, flops


def part_loss(model: DualEncoder, shell: DualEncoder, batch: PairBatch) -> Tensor:
    """The contrastive loss of a part of a network, [], with gradients for the network. shell: names the part."""
    values = sliced(dict(model.named_parameters()), model.genome, shell.genome)
    images, texts = functional_call(shell, values, (batch.images, batch.tokens))
    return contrastive_loss(images, texts, values["logit_scale"], batch.concepts)


def union(genomes: Sequence[Genome]) -> Genome:
    """The smallest genome that contains them all. Raises ValueError if they differ in what no part can do without."""
    first = genomes[0]
    merged = {
        name: Towers(*(max(getattr(genome, name)[tower] for genome in genomes) for tower in range(len(TOWERS))))
        for name in ("depth", "heads", "ffn")
    }
    whole = first.grown(**merged, head_dim=max(genome.head_dim for genome in genomes))
    same = {name: whole.as_dict()[name] for name in merged} | {"head_dim": whole.head_dim}
    if any(genome.as_dict() | same != whole.as_dict() for genome in genomes):
        raise ValueError("candidates of a supernet differ in depth, heads, head_dim and ffn only")
    return whole


def part_of(values: Mapping[str, Tensor], whole: Genome, genome: Genome) -> DualEncoder:
    """A part of a network as a model of its own that shares no memory."""
    with torch.no_grad():
        found = {name: value.detach().clone() for name, value in sliced(values, whole, genome).items()}
    return DualEncoder.of(genome, found)


def sliced(values: Mapping[str, Tensor], whole: Genome, genome: Genome) -> dict[str, Tensor]:
    """The parameters of a part of a network, differentiable. values: those of the network, by name."""
    return {
        name: _sliced(value, name, whole, genome)
        for name, value in values.items()
        if "_blocks." not in name or int(name.split(".")[1]) < genome.depth[tower_of(name)]
    }


def _sliced(value: Tensor, name: str, whole: Genome, genome: Genome) -> Tensor:
    for axis, kind in enumerate(axes_of(name)):
        if kind not in ("qkv", "attended", "ffn", "neurons"):
            continue
        tower = tower_of(name)
        if kind in ("ffn", "neurons"):
            value = value.narrow(axis, 0, genome.ffn[tower])
            continue
        heads, size, old_size = genome.heads[tower], genome.head_dim, whole.head_dim
        if (heads, size) == (whole.heads[tower], old_size):
            continue
        parts = 3 if kind == "qkv" else 1
        apart = value.unflatten(axis, (parts, whole.heads[tower], old_size))
        apart = apart.narrow(axis + 1, 0, heads).narrow(axis + 2, 0, size)
        if kind == "qkv" and size != old_size:  # scores are divided by the square root of the head's size
            scale = apart.new_tensor([math.sqrt(size / old_size), 1, 1])
            apart = apart * scale.view(-1, *[1] * (apart.dim() - 1))
        value = apart.flatten(axis, axis + 2)
    return value
