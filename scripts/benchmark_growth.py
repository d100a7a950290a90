"""What a step of the growing dual encoder costs, what growing costs, and what choosing a growth costs.

python scripts/benchmark_growth.py [ROUNDS]        default 5 rounds, on one thread

Steps: forward, backward, clipping and AdamW at a batch of 128, in turns with the same network written with
torch.nn.TransformerEncoderLayer, torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW(fused=True); that both compute
the same is checked first. Time is that of the processor; a ratio is taken in each turn, and its median told.
Growth: against a copy of the grown model's parameters. Search: against training for as many steps without it.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continual.growth import operators
from continual.growth.contrastive import contrastive_loss
from continual.growth.dual_encoder import DualEncoder
from continual.growth.genome import SMALL, Genome
from continual.growth.growclip import Config, GrowClip
from continual.growth.protocol import Arrival
from continual.growth.space import GrowthSpace
from continual.growth.training import Optimisation, Training
from continual.pairs.batch import PairBatch
from runs import compute

BATCH, WORDS = 128, 4150
MIDDLE = SMALL.grown(depth=(3, 3, 2), width=128, head_dim=32, ffn=512, vocabulary=WORDS)
GENOMES = {"small": SMALL.grown(vocabulary=WORDS), "middle": MIDDLE}
STEPS = {"small": 8, "middle": 2}  # in a turn


class Plain(nn.Module):
    """The same network by torch's own layers."""

    def __init__(self, ours: DualEncoder):
        super().__init__()
        genome = ours.genome
        self.side, self.width = genome.patch, genome.width
        self.patch = nn.Conv2d(3, self.width, self.side, self.side)
        self.tokens = nn.Embedding(genome.vocabulary, self.width)
        self.image_class, self.text_class, self.image_positions, self.text_positions, self.logit_scale = (
            nn.Parameter(own.detach().clone())
            for own in (ours.image_class, ours.text_class, ours.image_positions, ours.text_positions, ours.logit_scale)
        )
        self.image, self.text, self.shared = (
            nn.ModuleList(layer(genome, tower) for _ in range(genome.depth[tower])) for tower in range(3)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(self.width, genome.epsilon) for _ in range(2))
        self.projections = nn.ModuleList(nn.Linear(self.width, genome.embedding, bias=False) for _ in range(2))
        self.copy_from(ours)

    @torch.no_grad()
    def copy_from(self, ours: DualEncoder) -> None:
        """The weights of the other."""
        self.patch.weight.copy_(ours.patch.weight.view_as(self.patch.weight))
        self.patch.get_parameter("bias").copy_(ours.patch.bias)
        self.tokens.weight.copy_(ours.tokens)
        for theirs, stack in ((self.image, "image"), (self.text, "text"), (self.shared, "shared")):
            for block, source in zip(theirs, ours.stack(stack), strict=True):
                pairs = (
                    ("self_attn.in_proj_weight", "qkv.weight"), ("self_attn.in_proj_bias", "qkv.bias"),
                    ("self_attn.out_proj.weight", "out.weight"), ("self_attn.out_proj.bias", "out.bias"),
                    ("linear1.weight", "up.weight"), ("linear1.bias", "up.bias"), ("linear2.weight", "down.weight"),
                    ("linear2.bias", "down.bias"), ("norm1.weight", "norm1.weight"), ("norm1.bias", "norm1.bias"),
                    ("norm2.weight", "norm2.weight"), ("norm2.bias", "norm2.bias"),
                )  # fmt: skip
                for own, other in pairs:
                    block.get_parameter(own).copy_(source.get_parameter(other))
        for name, norm, projection in zip(("image", "text"), self.norms, self.projections, strict=True):
            norm.load_state_dict(ours.get_submodule(f"{name}_norm").state_dict())
            projection.get_parameter("weight").copy_(ours.get_parameter(f"{name}_projection"))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patch(images.float() / 127.5 - 1).flatten(2).transpose(1, 2)
        x = self.begun(self.image_class, patches, self.image_positions)
        for block in (*self.image, *self.shared):
            x = block(x)
        y = self.begun(self.text_class, self.tokens(tokens), self.text_positions)
        padding = F.pad(tokens == 0, (1, 0))
        for block in (*self.text, *self.shared):
            y = block(y, src_key_padding_mask=padding)
        found = zip((x, y), self.norms, self.projections, strict=True)
        images_out, texts_out = (F.normalize(projection(norm(z[:, 0])), dim=-1) for z, norm, projection in found)
        return images_out, texts_out

    @staticmethod
    def begun(token: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        return torch.cat([token.expand(len(x), 1, -1), x], 1) + positions


def layer(genome: Genome, tower: int) -> nn.Module:
    return nn.TransformerEncoderLayer(
        genome.width, genome.heads[tower], genome.ffn[tower], dropout=0.0, activation="gelu",
        layer_norm_eps=genome.epsilon, batch_first=True, norm_first=True,
    )  # fmt: skip


def random_batch(genome: Genome, padded: bool, seed: int) -> PairBatch:
    drawn = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=drawn, dtype=torch.uint8)
    tokens = torch.randint(2, genome.vocabulary, (BATCH, genome.length), generator=drawn)
    if padded:  # as captions of emoji are: 1 to 8 words, most of them short
        lengths = torch.randint(1, 9, (BATCH, 1), generator=drawn)
        tokens = torch.where(torch.arange(genome.length) < lengths, tokens, 0)
    return PairBatch(images, tokens, torch.arange(BATCH))


def steps_of_ours(model: DualEncoder, batches: list[PairBatch]) -> Callable[[], None]:
    training = Training(model, Optimisation(), steps=10**6)

    def turn() -> None:
        for batch in batches:
            training.learn(batch)

    return turn


def steps_of_torch(model: Plain, batches: list[PairBatch]) -> Callable[[], None]:
    parts = [[p for p in model.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False)]
    groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, (0.05, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, 1e-3, (0.9, 0.98), 1e-6, fused=True)

    def turn() -> None:
        for batch in batches:
            images, texts = model(batch.images, batch.tokens)
            loss = contrastive_loss(images, texts, model.logit_scale, batch.concepts)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return turn


def seconds(turn: Callable[[], object]) -> float:
    """Of the processor."""
    gc.collect()
    began = time.process_time()
    turn()
    return time.process_time() - began


def measure_steps(rounds: int) -> None:
    print(f"A step at a batch of {BATCH}, against torch's own layers (higher is better)")
    for name, genome in GENOMES.items():
        for padded in (True, False):
            ours = DualEncoder(genome, torch.Generator().manual_seed(0))
            plain = Plain(ours)
            batches = [random_batch(genome, padded, seed) for seed in range(STEPS[name])]
            with torch.no_grad():
                both = zip(ours(*batches[0][:2]), plain(*batches[0][:2]), strict=True)
                assert max(float((a - b).abs().max()) for a, b in both) < 1e-5
            turns = steps_of_ours(ours, batches), steps_of_torch(plain, batches)
            for turn in turns:
                turn()
            times = [[seconds(turn) for turn in turns] for _ in range(rounds)]
            ratio = statistics.median(theirs / own for own, theirs in times)
            own, theirs = (1000 * statistics.median(column) / STEPS[name] for column in zip(*times, strict=True))
            texts = "texts of 1 to 8 words" if padded else "texts of 16 words"
            size = f"{name}, {genome.parameters:,} parameters"
            print(f"  {size}, {texts}: {own:.1f} ms, torch {theirs:.1f} ms, {ratio:.2f} x")


def measure_growth(rounds: int) -> None:
    print("Growing, and how many times as long that takes as a copy of the grown model's parameters")
    genome = MIDDLE.grown(width=256, ffn=1024)
    model = DualEncoder(genome, torch.Generator().manual_seed(0))
    for move in GrowthSpace().moves(genome):
        generator = torch.Generator().manual_seed(1)
        grown, _ = operators.grow(model, move.genome, generator)
        times = []
        for _ in range(rounds):
            growth = seconds(lambda: operators.grow(model, move.genome, generator))  # noqa: B023
            times.append((growth, seconds(lambda: [p.detach().clone() for p in grown.parameters()])))  # noqa: B023
        growth, ratio = statistics.median(own for own, _ in times), statistics.median(own / copy for own, copy in times)
        print(f"  {move.name}: {grown.genome.parameters:,} parameters, {1000 * growth:.0f} ms, {ratio:.1f} x")


def measure_search(rounds: int) -> None:
    print("Choosing among the candidates of a growth, against training the model without growth for as many steps")
    genome, steps = GENOMES["small"], 20
    batches = [random_batch(genome, True, seed) for seed in range(steps)]
    config = Config(proxy_steps=steps, repeats=1, budget_exponent=2.0, momentum=0.9)
    arrivals = [
        Arrival(index, pairs, WORDS, steps, lambda seed, count: (batches * count)[:count], lambda: batches[:4])
        for index, pairs in enumerate((1000, 2000))
    ]
    for engine in ("independent", "supernet"):
        ratios, count = [], 0
        for _ in range(rounds):
            grower = GrowClip(Config(**{**vars(config), "engine": engine}), genome, seed=0)
            grower.arrive(arrivals[0])
            plain = seconds(lambda: [grower.learn(batch) for batch in batches])  # noqa: B023
            found: list[int] = []
            chosen = seconds(lambda: found.append(len(grower.arrive(arrivals[1])["candidates"])))  # noqa: B023
            count = found[0]
            ratios.append(chosen / plain / (count * (1 if engine == "independent" else 0.5)))
        print(f"  {engine}: {count} candidates, {statistics.median(ratios):.2f} x for each of its steps")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    compute.keep_freed_memory()
    print(f"products in {compute.choose_matmul_precision()} precision, one thread")
    measure_steps(rounds)
    measure_growth(rounds)
    measure_search(max(1, rounds // 2))


if __name__ == "__main__":
    main()
