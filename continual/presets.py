"""Settings of a strategy that go together, its own and those of the benchmark, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """benchmarks: by the name of each that it is for, what it changes there. settings: of the strategy."""

    benchmarks: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]


# DST. The defaults of the authors' two scripts and the four examples of their README, specs/dynamic-sparse-training.md,
# section 9. Which backbone the paper's tables are of is not known; these are the scripts'. Pixels are not normalised
# here beyond [0, 1], and miniImageNet keeps its 84 x 84.
_ADAM = {"kind": "task", "optimizer": "adam", "learning_rate": 1e-3}


def _cifar100(tasks: int, epochs: int, **settings: Any) -> Preset:
    script = {"network": "mobilenetv2", "batch": 64, "augmentation": "crop-flip", "class_order": tuple(range(100))}
    return Preset({"split-cifar100": {**_ADAM, **script, "tasks": tasks, "epochs": epochs}}, settings)


def _mini_imagenet(**settings: Any) -> Preset:
    script = {"network": "resnet18", "batch": 128, "augmentation": "crop-flip", "class_order": tuple(range(100))}
    return Preset({"split-miniimagenet": {**_ADAM, **script, "tasks": 10, "epochs": 100}}, settings)


# Section 14: an MLP for digits, a CNN of three poolings for pictures.
_MLP = {**_ADAM, "network": "mlp-bn", "hidden": (128, 64), "batch": 64, "epochs": 20}
_CNN = {**_ADAM, "network": "cnn-bn", "hidden": (16, 32, 64, 64), "batch": 64, "epochs": 10, "augmentation": "none"}
_CNN |= {"train_per_class": 500, "test_per_class": 200}
_PICTURES = ("split-fmnist", "split-mnist", "split-notmnist", "split-cifar10-jpeg", "split-cifar10")

PRESETS: dict[str, dict[str, Preset]] = {
    "dst": {
        "cifar100": _cifar100(10, 20),
        "cifar100-5": _cifar100(5, 100, init="uniform", growth="momentum", density=0.1, update_every=100),
        "cifar100-10": _cifar100(10, 100, init="erk", growth="random", density=0.2, update_every=400),
        "cifar100-20": _cifar100(20, 25, init="uniform", growth="unfired", density=0.05, update_every=100),
        "miniimagenet": _mini_imagenet(density=0.1, update_every=50),
        "miniimagenet-10": _mini_imagenet(init="erk", growth="gradient", density=0.2, update_every=400),
        "small": Preset(
            {"split-digits": _MLP, "split-mnist5k": _MLP, "split-blobs": {**_MLP, "batch": 20}}
            | dict.fromkeys(_PICTURES, _CNN),
            {"growth": "gradient"},
        ),
    }
}


def find(strategy: str, preset: str | None, benchmark: str | None) -> Preset:
    """A preset of a strategy for a benchmark; one that changes nothing if the strategy has none of this name.

    Raises ValueError, one sentence, if it is for others.
    """
    found = PRESETS.get(strategy, {}).get(preset or "")
    if found is None:
        return Preset({}, {})
    if benchmark is not None and benchmark not in found.benchmarks:
        names = ", ".join(found.benchmarks)
        raise ValueError(f"preset '{preset}' of '{strategy}' is for {names}, not for '{benchmark}'")
    return found
