"""Classifiers that grow: perceptrons, convolutional networks and vision transformers of the benchmarks.

    width     every hidden layer, channels of every convolution, or hidden layers of all blocks, 1.5 times as large
    width_i   only the i-th
    depth     perceptron: one more hidden layer, the identity (Net2DeeperNet); convolutions: a residual block behind the
              last one that adds nothing yet; transformer: one more block that adds nothing yet
    stack     twice the blocks of a transformer, or twice the square layers of a perceptron: copies, G_stack

All but "stack" keep what the network computes, batch normalisation in training included. New places are drawn as those
of a new network and read with zeros, or copied (Net2WiderNet). The head is no part of this: its rows are classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from continual.growth.axes import Axis, Grown, duplicated, grown, rounded, unread
from continual.growth.protocol import Move
from continual.growth.slots import SlotMap, Slots
from continual.growth.stack import depth_map
from continual.growth.transformers import RESIDUAL, ClassToken, Patches, TransformerBlock, vit
from continual.networks.classifier import Classifier, strided_cnn
from continual.networks.residual import Residual, basic_block
from plasticity.networks.architectures import draw_, mlp

Family = Literal["mlp", "cnn", "vit"]
Widening = Literal["unread", "duplicated"]
WIDENINGS: tuple[Widening, ...] = ("unread", "duplicated")
WIDER = 1.5
_MULTIPLE = 4  # of which sizes are


@dataclass(frozen=True, order=True)
class Genome:
    """The architecture: shape of an input, classes, and, by family,

    mlp: hidden, its sizes. cnn: hidden, channels; blocks, residual ones behind each convolution. vit: hidden, units of
    the hidden layer of each block; width and heads of the stream.
    """

    family: Family
    shape: tuple[int, ...]
    outputs: int
    hidden: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    width: int = 0
    heads: int = 0
    head_bias: bool = True


class GrowableClassifier(Classifier):
    """A single classifier with a genome; see `continual.growth.protocol.Growable`."""

    def __init__(self, genome: Genome, generator: torch.Generator | None, widening: Widening = "unread"):
        """generator: draws its parameters, by PyTorch's own law; None: they stay as they are made."""
        layers = _layers(genome)
        head = nn.Linear(cast(nn.Linear, layers[-1]).in_features, genome.outputs, bias=genome.head_bias)
        super().__init__(layers[:-1], head)
        self.genome = genome
        self.widening: Widening = widening
        if generator is not None:
            draw_(self.to(generator.device), "torch", generator)

    @classmethod
    def of(cls, network: Classifier, shape: Sequence[int], widening: Widening = "unread") -> GrowableClassifier:
        """That with the values of a single network. Raises ValueError for an architecture that is not known here."""
        found = cls(_genome_of(network, shape), None, widening)
        found.load_state_dict(network.state_dict())
        return found

    def moves(self) -> Sequence[Move[Genome]]:
        genome, sizes = self.genome, self.genome.hidden
        wider = tuple(rounded(size, WIDER, _MULTIPLE) for size in sizes)
        found = [Move("width", dataclasses.replace(genome, hidden=wider))]
        for i in range(len(sizes) if len(sizes) > 1 else 0):
            one = (*sizes[:i], wider[i], *sizes[i + 1 :])
            found.append(Move(f"width_{i + 1}", dataclasses.replace(genome, hidden=one)))
        if genome.family == "cnn":
            deeper = dataclasses.replace(genome, blocks=_one_more(genome.blocks))
        else:
            deeper = dataclasses.replace(genome, hidden=(*sizes, *sizes[len(sizes) - 1 :]))
        found.append(Move("depth", deeper))
        square = sizes[1:] if genome.family == "mlp" else sizes
        if genome.family != "cnn" and square and len(set(sizes)) == 1:
            found.append(Move("stack", dataclasses.replace(genome, hidden=(*sizes, *square))))
        return found

    @torch.no_grad()
    def grow(self, move: Move[Genome], generator: torch.Generator) -> tuple[GrowableClassifier, SlotMap]:
        if move not in self.moves():
            raise ValueError(f"'{move.name}' with {move.genome} is no growth of {self.genome}")
        new = GrowableClassifier(move.genome, generator, self.widening).to(self.head.weight.dtype)
        transfer = _Transfer(self, new)
        if move.name.startswith("width"):
            _widen(transfer, generator)
        else:
            _deepen(transfer, copies=move.name == "stack")
        return new.train(self.training), transfer.slots

    def cost(self) -> float:
        """FLOPs of one training step on one sample: three times those of products forward."""
        return _flops(self.genome)

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


@functools.cache
def _flops(genome: Genome) -> float:
    shadow = GrowableClassifier(genome, None).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.zeros(1, *genome.shape, device="meta"))
    return 3.0 * counter.get_total_flops()


def _one_more(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Behind the last convolution."""
    return tuple(count + (index == len(blocks) - 1) for index, count in enumerate(blocks))


def _layers(genome: Genome) -> nn.Sequential:
    """The network of a genome, with a head."""
    shape, hidden, outputs = genome.shape, genome.hidden, genome.outputs
    if genome.family == "mlp":
        return cast(nn.Sequential, mlp(shape, hidden, outputs))
    if genome.family == "vit":
        first, *rest = vit(shape, (genome.width, genome.heads, 1, 0), outputs)
        blocks = [TransformerBlock(genome.width, genome.heads, ffn, causal=False) for ffn in hidden]
        return nn.Sequential(first, *blocks, *rest)
    plain, layers = list(strided_cnn(shape, hidden, outputs)), []
    for index, (size, blocks) in enumerate(zip(hidden, genome.blocks, strict=True)):
        layers += plain[3 * index : 3 * index + 3] + [basic_block(size, size, 1) for _ in range(blocks)]
    return nn.Sequential(*layers, *plain[3 * len(hidden) :])


def _genome_of(network: Classifier, shape: Sequence[int]) -> Genome:
    layers = list(cast(nn.Sequential, network.features))
    kinds = [type(layer) for layer in layers]
    told = {"shape": tuple(shape), "outputs": network.head.weight.shape[0], "head_bias": network.head.bias is not None}
    linear = [layer for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]
    if linear and kinds == [nn.Flatten, *[nn.Linear, nn.ReLU] * len(linear)]:
        return Genome("mlp", hidden=tuple(layer.weight.shape[0] for layer in linear), **told)
    if linear and kinds == [*[nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * len(linear), nn.AdaptiveAvgPool2d, nn.Flatten]:
        sizes = tuple(layer.weight.shape[0] for layer in linear)
        return Genome("cnn", hidden=sizes, blocks=(0,) * len(sizes), **told)
    blocks = [layer for layer in layers if isinstance(layer, TransformerBlock)]
    if blocks and kinds == [Patches, *[TransformerBlock] * len(blocks), nn.LayerNorm, ClassToken]:
        ups = tuple(cast(nn.Linear, block.up).out_features for block in blocks)
        width = cast(nn.Linear, blocks[0].up).in_features
        return Genome("vit", hidden=ups, width=width, heads=blocks[0].heads, **told)
    raise ValueError("growing classifiers are --network mlp, cnn or vit, with a hidden layer")


class _Transfer:
    """From the values of the old network to those of the new one, which is as it was drawn before."""

    def __init__(self, old: GrowableClassifier, new: GrowableClassifier):
        self.old, self.new = old, new
        self.values, self.targets = old.state_dict(), new.state_dict()
        self.learned = {name for name, _ in new.named_parameters()}
        self.slots = SlotMap({name: Slots.new(p) for name, p in new.named_parameters()})

    def move(self, target: str, source: str, first: Axis | None = None, second: Axis | None = None) -> None:
        """A tensor, with its first and second axes grown; new places keep what was drawn."""
        value = self.values[source]
        axes = [first, second][: value.dim()] + [None] * (value.dim() - 2)
        drawn = self.targets[target]
        # New places are at the end of an axis: they take what was drawn there.
        made, slots = grown(source, value, axes, lambda shape: drawn[tuple(slice(-n, None) for n in shape)])
        drawn.copy_(made)
        if target in self.learned:
            self.slots[target] = slots

    def layer(self, target: str, source: str, written: Axis | None = None, read: Axis | None = None) -> None:
        """All tensors of a module: weights by what is written and read, the others by what is written."""
        for name in self.values:
            if name.startswith(source + "."):
                matrix = self.values[name].dim() > 1
                axes = (written, read if matrix else None) if self.values[name].dim() else (None, None)
                self.move(target + name[len(source) :], name, *axes)


@dataclass(frozen=True)
class _Hidden:
    """A hidden layer by the names of its modules: what writes it, its norm, residual blocks on it."""

    layer: str
    norm: str | None
    blocks: tuple[str, ...]


def _hidden(network: GrowableClassifier) -> Iterator[_Hidden]:
    """Of a perceptron or convolutional network, from the first."""
    layer, norm, blocks = "", None, []
    for name, module in network.features.named_children():
        name = f"features.{name}"
        if isinstance(module, nn.Linear | nn.Conv2d):
            if layer:
                yield _Hidden(layer, norm, tuple(blocks))
            layer, norm, blocks = name, None, []
        elif isinstance(module, nn.BatchNorm2d):
            norm = name
        elif isinstance(module, Residual):
            blocks.append(name)
    yield _Hidden(layer, norm, tuple(blocks))


def _blocks(network: GrowableClassifier) -> list[str]:
    """Of a transformer, the names of its blocks."""
    return [f"features.{n}" for n, m in network.features.named_children() if isinstance(m, TransformerBlock)]


def _widen(transfer: _Transfer, generator: torch.Generator) -> None:
    old, new = transfer.old.genome, transfer.new.genome

    def axis(before: int, after: int) -> Grown | None:
        if before == after:
            return None
        copies = transfer.old.widening == "duplicated"
        return duplicated(before, after, generator, "random") if copies else unread(before, after)

    if old.family == "vit":
        for name in transfer.values:
            if transfer.values[name].shape == transfer.targets[name].shape:
                transfer.move(name, name)
        for name, before, after in zip(_blocks(transfer.old), old.hidden, new.hidden, strict=True):
            if (grows := axis(before, after)) is not None:
                transfer.layer(f"{name}.up", f"{name}.up", grows.written)
                transfer.layer(f"{name}.down", f"{name}.down", read=grows.read)
        return
    read = None
    for hidden, before, after in zip(_hidden(transfer.old), old.hidden, new.hidden, strict=True):
        grows = axis(before, after)
        written = None if grows is None else grows.written
        transfer.layer(hidden.layer, hidden.layer, written, read)
        read = None if grows is None else grows.read
        if hidden.norm is not None:
            transfer.layer(hidden.norm, hidden.norm, written)
        for block in hidden.blocks:
            inner = axis(before, after)
            sides = (None, None) if inner is None else (inner.written, inner.read)
            transfer.layer(f"{block}.body.0", f"{block}.body.0", sides[0], read)
            transfer.layer(f"{block}.body.1", f"{block}.body.1", sides[0])
            transfer.layer(f"{block}.body.3", f"{block}.body.3", written, sides[1])
            transfer.layer(f"{block}.body.4", f"{block}.body.4", written)
    transfer.layer("head", "head", read=read)


def _deepen(transfer: _Transfer, copies: bool) -> None:
    """More layers behind the others: copies of them, or such that nothing changes."""
    old, new = transfer.old, transfer.new
    transfer.layer("head", "head")
    if old.genome.family == "vit":
        _deepen_blocks(transfer, copies)
        return
    before, after = list(_hidden(old)), list(_hidden(new))
    for own, hidden in zip(before, after, strict=False):
        transfer.layer(hidden.layer, own.layer)
        if own.norm is not None and hidden.norm is not None:
            transfer.layer(hidden.norm, own.norm)
        for target, source in zip(hidden.blocks, own.blocks, strict=False):
            transfer.layer(target, source)
    if old.genome.family == "cnn":
        transfer.targets[f"{after[-1].blocks[-1]}.body.4.weight"].zero_()
        return
    for index, hidden in enumerate(after[len(before) :]):
        if copies:  # of the square layers, from the second on
            transfer.layer(hidden.layer, before[1 + index].layer)
        else:
            transfer.targets[f"{hidden.layer}.weight"].copy_(torch.eye(new.genome.hidden[-1]))
            transfer.targets[f"{hidden.layer}.bias"].zero_()


def _deepen_blocks(transfer: _Transfer, copies: bool) -> None:
    before, after = _blocks(transfer.old), _blocks(transfer.new)
    transfer.layer("features.0", "features.0")
    transfer.layer(_behind(after), _behind(before))  # the last norm
    order = depth_map(len(before), len(after), "stack") if copies else [*range(len(before)), len(before) - 1]
    for target, source in zip(after, order, strict=True):
        transfer.layer(target, before[source])
    if not copies:
        for name in RESIDUAL:
            target = f"{after[-1]}.{name}"
            transfer.targets[target].zero_()
            transfer.slots[target] = Slots.new(transfer.targets[target])


def _behind(blocks: Sequence[str]) -> str:
    """The module that follows the last of these."""
    stem, _, number = blocks[-1].rpartition(".")
    return f"{stem}.{int(number) + 1}"


def drawn_values(genome: Genome, generator: torch.Generator) -> dict[str, Tensor]:
    """The parameters that a new network of a genome begins with, by name."""
    return {name: p.detach() for name, p in GrowableClassifier(genome, generator).named_parameters()}
