"""Which strategies and benchmarks there are, by name, and how the two become a learner."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn

from continual import datasets
from continual.avalanche import baselines
from continual.experiences import Experiences, ExperienceStream
from continual.inputs import AUGMENTATIONS, Augmentation, Inputs
from continual.learner import Learner
from continual.networks.classifier import NETWORKS, Classifier, draw
from continual.plastic import plastic_optimizer
from continual.strategies import (
    agem,
    chunked_hypernet,
    cumulative,
    der,
    derpp,
    dst,
    er,
    er_ace,
    ewc,
    grow,
    hypernet,
    joint,
    lwf,
    mixture_growth,
    naive,
    packnet,
    si,
    uer,
)  # fmt: skip
from continual.strategy import Optimizer, Setting, Strategy
from continual.streams import Change, Kind, TaskStream
from plasticity.adam import Adam
from plasticity.intervention import Intervention
from plasticity.networks.stacked import stack
from plasticity.population import RandomStream
from plasticity.problems.datasets import Images
from plasticity.problems.streams import generator
from plasticity.sgd import SGD

# Each with its class and its settings.
STRATEGIES: dict[str, tuple[type[Strategy], type[Any]]] = {
    "naive": (naive.Naive, naive.Config),
    "joint": (joint.Joint, joint.Config),
    "cumulative": (cumulative.Cumulative, cumulative.Config),
    "er": (er.ER, er.Config),
    "er_ace": (er_ace.ERACE, er_ace.Config),
    "der": (der.DER, der.Config),
    "derpp": (derpp.DERPP, derpp.Config),
    "uer": (uer.UER, uer.Config),
    "ewc": (ewc.EWC, ewc.Config),
    "si": (si.SI, si.Config),
    "lwf": (lwf.LwF, lwf.Config),
    "agem": (agem.AGEM, agem.Config),
    "packnet": (packnet.PackNet, packnet.Config),
    "dst": (dst.DST, dst.Config),
    "hypernet": (hypernet.Hypernet, hypernet.Config),
    "chunked_hypernet": (chunked_hypernet.ChunkedHypernet, chunked_hypernet.Config),
    "grow": (grow.Grow, grow.Config),
    "mixture_growth": (mixture_growth.MixtureGrowth, mixture_growth.Config),
}

# Those of Avalanche, run by it on our streams.
BASELINES: dict[str, tuple[type[Strategy], type[Any]]] = {
    name: (baselines.AvalancheStrategy, settings) for name, settings in baselines.SETTINGS.items()
}
KNOWN = {**STRATEGIES, **BASELINES}
AVALANCHE = "avalanche:"  # in front of a name of its classic benchmarks


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A stream, the network that learns it, and its optimiser. Raises ValueError for a number out of range.

    data: a name of `datasets.names()`. memory: samples that may be kept, K. train_per_class, test_per_class: only so
    many images of each class; None: all. hidden: sizes of the network's layers.
    """

    data: str
    change: Change = "split"
    kind: Kind = "class"
    tasks: int = 5
    batch: int = 10
    epochs: int = 1
    blurry: float = 0.0
    memory: int = 200
    network: str = "mlp"
    hidden: tuple[int, ...] = (256, 128)
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    augmentation: Augmentation = "none"
    train_per_class: int | None = None
    test_per_class: int | None = None
    class_groups: tuple[int, ...] = ()
    """how many classes each task has; (): the groups of the data, such as alphabets, or all as many"""
    class_order: tuple[int, ...] = ()
    """the same for all seeds; (): drawn for each"""

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"unknown network '{self.network}', it is one of {', '.join(NETWORKS)}")
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"unknown optimizer '{self.optimizer}', it is sgd or adam")
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"unknown augmentation '{self.augmentation}', it is one of {', '.join(AUGMENTATIONS)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise ValueError("momentum must be in [0, 1), weight_decay not negative")
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum):
            raise ValueError("Nesterov's step is for sgd with momentum: --optimizer sgd --momentum 0.9")
        if min(self.hidden, default=1) < 1:
            raise ValueError(f"hidden must list layer sizes of at least 1, got {self.hidden}")
        for name in ("train_per_class", "test_per_class"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


_CNN: dict[str, Any] = {"network": "cnn", "hidden": (16, 32, 64)}
# The protocol of the siblings of UER (specs/uer-and-online-cl.md, section 1.6): reduced ResNet-18, batches doubled.
_RESNET: dict[str, Any] = {"network": "resnet18-reduced", "hidden": (), "augmentation": "doubled"}

BENCHMARKS: dict[str, Benchmark] = {
    # 134: the smallest class, so that members with classes in another order stay in step.
    "split-digits": Benchmark(data="digits", memory=50, train_per_class=134),
    "split-mnist5k": Benchmark(data="mnist5k", memory=100),
    "split-mnist": Benchmark(data="mnist", memory=500, train_per_class=5421),
    "split-fmnist": Benchmark(data="fmnist", **_CNN),
    "split-notmnist": Benchmark(data="notmnist", **_CNN),
    "perm-digits": Benchmark(data="digits", change="permuted", kind="domain", tasks=10, memory=50),
    "perm-mnist": Benchmark(data="mnist", change="permuted", kind="domain", tasks=10, memory=500),
    "perm-fmnist": Benchmark(data="fmnist", change="permuted", kind="domain", tasks=10),
    "perm-notmnist": Benchmark(data="notmnist", change="permuted", kind="domain", tasks=5),
    "rot-digits": Benchmark(data="digits", change="rotated", kind="domain", tasks=10, memory=50),
    "rot-mnist": Benchmark(data="mnist", change="rotated", kind="domain", tasks=10, memory=500),
    "rot-fmnist": Benchmark(data="fmnist", change="rotated", kind="domain", tasks=10),
    "split-cifar10-jpeg": Benchmark(data="cifar10-jpeg", **_RESNET),
    "split-cifar10": Benchmark(data="cifar10", **_RESNET),
    "split-cifar100": Benchmark(data="cifar100", tasks=10, memory=1000, **_RESNET),
    # All of CIFAR-10, then ten classes of CIFAR-100 at a time (von Oswald et al. 2020).
    "split-cifar10-100": Benchmark(
        data="cifar10-100", kind="task", tasks=6, memory=1000, class_order=tuple(range(60)), **_RESNET
    ),
    "split-miniimagenet": Benchmark(data="miniimagenet", tasks=10, memory=1000, **_RESNET),
    "split-tinyimagenet": Benchmark(data="tinyimagenet", tasks=10, memory=1000, **_RESNET),
    # Fifteen drawings of each character: more than one pass.
    "split-omniglot": Benchmark(data="omniglot", kind="task", tasks=8, epochs=10, memory=500, **_CNN),
    # Made by Avalanche, from files where torchvision keeps them; it draws one order of classes or pixels for all seeds.
    "avalanche:SplitMNIST": Benchmark(data="avalanche:SplitMNIST", memory=500),
    "avalanche:PermutedMNIST": Benchmark(data="avalanche:PermutedMNIST", kind="domain", tasks=10, memory=500),
    "avalanche:RotatedMNIST": Benchmark(data="avalanche:RotatedMNIST", kind="domain", tasks=10, memory=500),
    "avalanche:SplitFMNIST": Benchmark(data="avalanche:SplitFMNIST", **_CNN),
    "avalanche:SplitCIFAR10": Benchmark(data="avalanche:SplitCIFAR10", **_RESNET),
    "avalanche:SplitCIFAR100": Benchmark(data="avalanche:SplitCIFAR100", tasks=10, memory=1000, **_RESNET),
    # No files: class-conditional patterns drawn from a seed, for tests.
    "split-blobs": Benchmark(data="blobs", memory=50, hidden=(64,)),
}

# What `--preset small` changes: minutes, or seconds, on two cores.
_SMALL_IMAGES: dict[str, Any] = {"train_per_class": 1000, "test_per_class": 200}
_SMALL_COLOUR: dict[str, Any] = {**_SMALL_IMAGES, "augmentation": "none"}
SMALL: dict[str, dict[str, Any]] = {
    **{name: _SMALL_IMAGES for name in BENCHMARKS if name.endswith("mnist")},
    "split-mnist5k": {},
    "split-notmnist": {"train_per_class": 500},
    "split-cifar10-jpeg": _SMALL_COLOUR,
    "split-cifar10": _SMALL_COLOUR,
    "split-cifar10-100": {**_SMALL_COLOUR, "test_per_class": 20},
    "split-cifar100": {"train_per_class": 100, "test_per_class": 20, "augmentation": "none", "memory": 500},
}


def make_strategy(name: str, config: Any, setting: Setting) -> Strategy:
    """A strategy by name. Raises ValueError for an unknown one, or settings that do not fit."""
    if name not in KNOWN:
        raise ValueError(f"unknown strategy '{name}', it is one of {', '.join(KNOWN)}")
    return KNOWN[name][0](setting, config)


def open_data(benchmark: Benchmark, folder: Path | None = None) -> Images | Experiences:
    """The data of a benchmark. Raises ValueError, one sentence, if it is not on this machine."""
    if benchmark.data.startswith(AVALANCHE):
        return open_avalanche(benchmark, folder)
    found = datasets.load(benchmark.data, folder)
    return datasets.subset(found, benchmark.train_per_class, benchmark.test_per_class)


def open_avalanche(benchmark: Benchmark, folder: Path | None) -> Experiences:
    """One of Avalanche's classic benchmarks, made there."""
    from continual.avalanche.streams import open_classic

    refused = next(
        (n for n in ("train_per_class", "test_per_class", "blurry", "class_groups") if vars(benchmark)[n]), None
    )
    if refused is not None:
        raise ValueError(f"'{benchmark.data}' is made by Avalanche and takes no {refused}")

    name = benchmark.data.removeprefix(AVALANCHE)
    return open_classic(name, benchmark.tasks, benchmark.kind, benchmark.class_order, folder)


def open_stream(
    benchmark: Benchmark, data: Images | Experiences, seeds: Sequence[int], device: torch.device
) -> TaskStream:
    """The tasks of a benchmark for a population of seeds. Raises ValueError, one sentence."""
    if isinstance(data, Experiences):
        return ExperienceStream(data, seeds, device, batch=benchmark.batch, epochs=benchmark.epochs)
    return TaskStream(
        data, seeds, device, change=benchmark.change, kind=benchmark.kind, tasks=benchmark.tasks,
        batch=benchmark.batch, epochs=benchmark.epochs, blurry=benchmark.blurry,
        class_groups=benchmark.class_groups or None, class_order=benchmark.class_order or None,
    )  # fmt: skip


def open_learner(
    benchmark: Benchmark,
    strategy: str,
    config: Any,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    data: Images | Experiences | None = None,
    evaluate_every: int | None = None,
    mask_unseen: bool = True,
    interventions: Sequence[Intervention] = (),
) -> Learner:
    """A population of seeds that is about to learn a benchmark. data: its tasks or images; None: those that it names.

    interventions: in the network and its training, objects of this learner alone (`plasticity.registry.make`).
    Raises ValueError, one sentence, for what does not fit together.
    """
    device, seeds = torch.device(device), tuple(seeds)
    if interventions and strategy in STRATEGIES and not STRATEGIES[strategy][0].takes_interventions:
        raise ValueError(f"'{strategy}' itself decides which weights move, so it takes no interventions (--with)")
    stream = open_stream(benchmark, open_data(benchmark) if data is None else data, seeds, device)
    setting = make_setting(benchmark, stream, seeds, device, interventions)
    made = make_strategy(strategy, config, setting)
    return Learner(stream, made, setting.inputs, evaluate_every, mask_unseen=mask_unseen)


class Outline(Protocol):
    """What a strategy has to know of a stream. shape: of an input; levels: of a fully bright pixel."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def outputs(self) -> int: ...

    @property
    def tasks(self) -> int: ...

    @property
    def kind(self) -> str: ...

    @property
    def levels(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def scopes(self) -> torch.Tensor | None: ...

    def steps(self, index: int) -> int: ...


def make_setting(
    benchmark: Benchmark,
    stream: Outline,
    seeds: Sequence[int],
    device: torch.device,
    interventions: Sequence[Intervention] = (),
) -> Setting:
    """What a strategy is told: the network and optimiser of a benchmark for a stream, drawn from the seeds."""

    def drawn(purpose: str, *index: int) -> RandomStream:
        return RandomStream([generator(device, seed, purpose, *index) for seed in seeds])

    inputs = Inputs(stream.levels, benchmark.augmentation, drawn("augmentation"))
    uses = iter(range(1000))  # of the stream "memory": each memory draws numbers of its own

    def fresh(head_bias: bool, source: torch.Generator) -> torch.nn.Module:
        sizes = stream.shape, benchmark.hidden, stream.outputs
        return draw(benchmark.network, *sizes, head_bias, interventions, source)

    def network(head_bias: bool) -> Classifier:
        members = [fresh(head_bias, source) for source in drawn("initialisation").generators]
        return cast(Classifier, stack(members))

    def optimizer(trained: nn.Module) -> Optimizer:
        plain = make_optimizer(benchmark, [p for p in trained.parameters() if p.requires_grad])
        if not interventions:
            return plain
        sources, head_bias = drawn("intervention").generators, cast(Classifier, trained).head.bias is not None
        return plastic_optimizer(trained, plain, interventions, sources, partial(fresh, head_bias))

    return Setting(
        members=len(seeds), shape=tuple(stream.shape), outputs=stream.outputs, tasks=stream.tasks,
        labelled=stream.kind == "task",
        scopes=stream.scopes, network=network, fresh=fresh, optimizer=optimizer,
        inputs=inputs, memory=benchmark.memory, random=lambda: drawn("memory", next(uses)), batch=stream.batch,
        steps=tuple(stream.steps(index) for index in range(stream.tasks)),
    )  # fmt: skip


def make_optimizer(benchmark: Benchmark, parameters: Sequence[torch.nn.Parameter]) -> Adam | SGD:
    """The optimiser that a benchmark names, for these parameters."""
    if benchmark.optimizer == "adam":
        return Adam(parameters, benchmark.learning_rate, weight_decay=benchmark.weight_decay)
    return SGD(parameters, benchmark.learning_rate, benchmark.momentum, benchmark.weight_decay, benchmark.nesterov)


def resolve(name: str, small: bool = False, **changes: Any) -> Benchmark:
    """A benchmark by name, small or not, with changes. Raises ValueError, one sentence, for what cannot be."""
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark '{name}', it is one of {', '.join(BENCHMARKS)}")
    if changes.get("class_groups"):
        changes = {"tasks": len(changes["class_groups"])} | changes
    return dataclasses.replace(BENCHMARKS[name], **{**(SMALL.get(name, {}) if small else {}), **changes})
