"""A small dual encoder and a stream of pairs for the tests of growth."""

import torch

from continual.growth.dual_encoder import DualEncoder
from continual.growth.genome import Genome
from continual.growth.protocol import Arrival
from continual.pairs.batch import PairBatch

GENOME = Genome(
    width=16, heads=2, head_dim=8, ffn=24, embedding=12, image_size=16, patch=8, vocabulary=30, length=6
)  # fmt: skip


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def encoder(genome=GENOME, dtype=torch.float32, seed=0) -> DualEncoder:
    """All of its parameters perturbed, so that none is 0 or 1 by accident."""
    model, noise = DualEncoder(genome, random(seed)).to(dtype), random(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise, dtype=dtype)
    return model


def batch(genome=GENOME, size=8, seed=0, known=None) -> PairBatch:
    """Pairs of which image and text both show the concept, some texts shorter than others."""
    drawn = random(seed)
    concepts = torch.randperm(20, generator=drawn)[:size]
    colours = torch.randint(0, 256, (20, 3, 1, 1), generator=random(99))
    images = colours[concepts].expand(size, 3, genome.image_size, genome.image_size)
    words = torch.randint(2, known or genome.vocabulary, (20, genome.length), generator=random(98))
    lengths = torch.randint(2, genome.length + 1, (size, 1), generator=drawn)
    tokens = torch.where(torch.arange(genome.length) < lengths, words[concepts], 0)
    return PairBatch(images.to(torch.uint8), tokens, concepts)


def arrival(index, pairs, vocabulary=30, steps=4, size=8) -> Arrival:
    genome = GENOME.grown(vocabulary=vocabulary)
    return Arrival(
        index, pairs, vocabulary, steps,
        lambda seed, steps: (batch(genome, size, seed % 1000 + i) for i in range(steps)),
        lambda: [batch(genome, size, 500), batch(genome, size, 501)],
    )  # fmt: skip
