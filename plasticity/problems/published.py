"""The non-stationary problems on which plasticity is lost, by name, with their published settings.

A problem is a sequence of tasks that a network learns one after another, and the network and optimiser that it was
published with. Sources and traps: specs/nap-and-plasticity.md, section 2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from plasticity.networks.architectures import ARCHITECTURES, Law
from plasticity.problems.changes import (
    Alternating,
    Change,
    ClassPairs,
    Constant,
    FlippingBits,
    Growing,
    Permuted,
    Redrawn,
    Renamed,
    Shuffled,
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A stream of tasks, and who learns it. Raises ValueError for a number out of range.

    data: a name of `datasets.LOADERS`, "gaussian" (inputs drawn from N(0, 1)) or "bits" (`FlippingBits`).
    examples: how many images each member draws from the pool, once; None: all. all_images: the pool has the test images
    too. centred: pixels in [-1, 1] instead of [0, 1]. with_replacement: batches are drawn; else they go through the
    images in passes, each in an order of its own. held_out: test accuracy at the end of each task. zero_head: the last
    layer is set to zero at each task.
    """

    data: str
    change: Change
    tasks: int
    steps: int
    """of each task"""
    batch_size: int
    outputs: int = 10
    examples: int | None = None
    all_images: bool = False
    centred: bool = False
    with_replacement: bool = False
    held_out: bool = False
    zero_head: bool = False
    architecture: str = "mlp"
    hidden: tuple[int, ...] = (100, 100)
    initialisation: Law = "torch"
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.0
    source: str = "ours"

    def __post_init__(self) -> None:
        for name in ("tasks", "steps", "batch_size", "outputs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture '{self.architecture}', it is one of {', '.join(ARCHITECTURES)}")
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"unknown optimizer '{self.optimizer}', it is sgd or adam")
        if min(self.hidden, default=1) < 1:
            raise ValueError(f"hidden must list layer sizes of at least 1, got {self.hidden}")

    @property
    def online_metric(self) -> str:
        """What is measured on each batch before the network learns from it."""
        return "online_accuracy" if self.loss == "cross_entropy" else "online_error"

    def stationary(self) -> Problem:
        """The same with its first task all along: what an intervention costs where nothing changes."""
        return dataclasses.replace(self, change=Constant(self.change))


_LOP = "Dohare et al. 2024, Nature 632"
_L2_INIT = "Kumar et al. 2023, arXiv:2308.11958"
_UPGD = "Elsayed & Mahmood 2024, arXiv:2404.00781"
_NAP = "Lyle et al. 2024, arXiv:2407.01800"
_OURS = "ours, specs/nap-and-plasticity.md section 2.3"

_DIGITS: dict[str, Any] = {
    "data": "digits",
    "all_images": True,
    "centred": True,  # x / 8 - 1
    "batch_size": 64,
    "with_replacement": True,
    "hidden": (64, 64),
    "initialisation": "kaiming",
    "optimizer": "adam",
    "learning_rate": 3e-3,
    "source": _OURS,
}
_FMNIST: dict[str, Any] = {"data": "fmnist", "centred": True, "batch_size": 16}
_CIFAR: dict[str, Any] = {"architecture": "cnn-l2-init", "hidden": (100, 100), "centred": True, "batch_size": 16}
_IMAGENET: dict[str, Any] = {
    "data": "imagenet32",
    "change": ClassPairs(),
    "batch_size": 100,
    "outputs": 2,
    "architecture": "cnn-imagenet",
    "hidden": (128, 128),
    "centred": True,
}
_REGRESSION: dict[str, Any] = {
    "data": "bits",
    "tasks": 100,
    "steps": 10_000,
    "batch_size": 1,
    "outputs": 1,
    "hidden": (5,),
    "initialisation": "kaiming",
    "loss": "squared_error",
    "source": _LOP,
}
_STREAMING: dict[str, Any] = {"batch_size": 1, "centred": True, "source": _UPGD}

PROBLEMS: dict[str, Problem] = {
    # Minutes on two cores, on data that every machine has.
    "permuted-digits": Problem(change=Permuted(), tasks=100, steps=100, examples=1500, **_DIGITS),
    "random-label-digits": Problem(change=Redrawn(), tasks=40, steps=500, examples=256, **_DIGITS),
    "label-shuffle": Problem(change=Shuffled(), tasks=40, steps=500, examples=256, **_DIGITS),
    "label-rename": Problem(change=Renamed(), tasks=40, steps=500, **_DIGITS),
    "class-pairs": Problem(
        change=ClassPairs(), tasks=100, steps=50, outputs=2, held_out=True, **{**_DIGITS, "all_images": False}
    ),
    "gauss-random-label": Problem(
        change=Redrawn(), tasks=40, steps=500, examples=256, **{**_DIGITS, "data": "gaussian"}
    ),
    "stationary-digits": Problem(
        change=Constant(), tasks=4, steps=500, held_out=True, **{**_DIGITS, "all_images": False}
    ),
    "slow-regression": Problem(change=FlippingBits(), **_REGRESSION),
    "slow-regression-all": Problem(change=FlippingBits(all_bits=True), **_REGRESSION),
    # Published settings of L2-Init on Fashion-MNIST.
    "permuted-fmnist": Problem(
        change=Permuted(first_unpermuted=True), tasks=500, steps=625, examples=10_000, source=_L2_INIT, **_FMNIST
    ),
    "random-label-fmnist": Problem(
        change=Shuffled(), tasks=50, steps=30_000, examples=1200, source=_L2_INIT, **_FMNIST
    ),
    "online-permuted-fmnist": Problem(
        data="fmnist", change=Permuted(composed=True), tasks=800, steps=60_000, batch_size=1,
        hidden=(2000, 2000, 2000), initialisation="kaiming", source=_LOP,
    ),
    # As published; their data must be placed by the user.
    "online-permuted-mnist": Problem(
        data="mnist", change=Permuted(composed=True), tasks=800, steps=60_000, batch_size=1,
        hidden=(2000, 2000, 2000), initialisation="kaiming", source=_LOP,
    ),
    "permuted-mnist": Problem(
        data="mnist", change=Permuted(first_unpermuted=True), tasks=500, steps=625, batch_size=16, examples=10_000,
        centred=True, source=_L2_INIT,
    ),
    "random-label-mnist": Problem(
        data="mnist", change=Shuffled(), tasks=50, steps=30_000, batch_size=16, examples=1200, centred=True,
        source=_L2_INIT,
    ),
    "random-label-mnist-1k": Problem(
        data="mnist", change=Redrawn(), tasks=100, steps=1000, batch_size=64, examples=1200, centred=True,
        optimizer="adam", learning_rate=1e-3, source=f"{_NAP}, figure 2; sizes ours",
    ),
    "random-label-cifar": Problem(
        data="cifar10", change=Shuffled(), tasks=50, steps=30_000, examples=1200, source=_L2_INIT, **_CIFAR
    ),
    "random-label-cifar-nap": Problem(
        data="cifar10", change=Redrawn(), tasks=200, steps=100_000, optimizer="adam", learning_rate=1e-4,
        source=f"{_NAP}, figure 5; network and batch ours", **_CIFAR,
    ),
    "5+1-cifar": Problem(
        data="cifar100", change=Alternating(5, 1), tasks=31, steps=625, outputs=100, source=_L2_INIT, **_CIFAR
    ),
    "continual-imagenet": Problem(
        tasks=2000, steps=3000, held_out=True, zero_head=True, momentum=0.9, initialisation="kaiming", source=_LOP,
        **_IMAGENET,
    ),
    "continual-imagenet-l2-init": Problem(tasks=500, steps=120, learning_rate=0.1, source=_L2_INIT, **_IMAGENET),
    "class-incremental-cifar100": Problem(
        data="cifar100", change=Growing(5), tasks=20, steps=10_000, outputs=100, held_out=True, momentum=0.9,
        source=f"stream of {_LOP}; the convolutional network of {_L2_INIT} instead of a ResNet-18",
        **{**_CIFAR, "batch_size": 90},
    ),
    "ipmnist": Problem(
        data="mnist", change=Permuted(), tasks=200, steps=5000, hidden=(300, 150), **_STREAMING
    ),
    "ipfmnist": Problem(
        data="fmnist", change=Permuted(), tasks=200, steps=5000, hidden=(300, 150), **_STREAMING
    ),
    "lp-emnist": Problem(
        data="emnist", change=Renamed(), tasks=400, steps=2500, outputs=47, hidden=(300, 150), **_STREAMING
    ),
    "lp-cifar10": Problem(
        data="cifar10", change=Renamed(), tasks=400, steps=2500, architecture="lenet", hidden=(120, 84), **_STREAMING
    ),
}  # fmt: skip

# What `--preset small` changes: a few minutes for ten seeds on two cores.
SMALL: dict[str, dict[str, Any]] = {
    "permuted-digits": {"tasks": 40},
    "random-label-digits": {"tasks": 24, "steps": 400},
    "label-shuffle": {"tasks": 24, "steps": 400},
    "label-rename": {"tasks": 24, "steps": 400},
    "class-pairs": {"tasks": 50},
    "gauss-random-label": {"tasks": 24, "steps": 400},
    "stationary-digits": {},
    "slow-regression": {"tasks": 20},
    "slow-regression-all": {"tasks": 20},
    "permuted-fmnist": {"tasks": 60},
    "permuted-mnist": {"tasks": 60},
    "random-label-fmnist": {"tasks": 20, "steps": 1500},
    "random-label-mnist": {"tasks": 20, "steps": 1500},
    "random-label-mnist-1k": {"tasks": 20},
    "online-permuted-fmnist": {"tasks": 20, "steps": 3000, "hidden": (100, 100, 100)},
    "online-permuted-mnist": {"tasks": 20, "steps": 3000, "hidden": (100, 100, 100)},
    "random-label-cifar": {"tasks": 10, "steps": 1000},
    "random-label-cifar-nap": {"tasks": 10, "steps": 1000},
    "5+1-cifar": {"tasks": 15, "steps": 200},
    "continual-imagenet": {"tasks": 20, "steps": 300},
    "continual-imagenet-l2-init": {"tasks": 20},
    "class-incremental-cifar100": {"tasks": 10, "steps": 300},
    "ipmnist": {"tasks": 10},
    "ipfmnist": {"tasks": 10},
    "lp-emnist": {"tasks": 20},
    "lp-cifar10": {"tasks": 20},
}
