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

# What a strategy changes in every benchmark unless told otherwise.
WANTED: dict[str, dict[str, Any]] = {
    name: {"optimizer": "adam", "learning_rate": 1e-3} for name in ("hypernet", "chunked_hypernet", "dst")
}

# Target networks and training of von Oswald et al. 2020 (specs/rnn-hypernetworks.md, section 9), but that images of
# MNIST are not padded, and Adam's β1 for ZenkeNet is 0.9, not 0.5. They count steps: 2 000 a task of split MNIST, 5 000
# a permuted one.
_SPLIT_MNIST = {**_ADAM, "network": "mlp", "hidden": (400, 400), "batch": 128, "epochs": 24}
_PERM_MNIST = {**_ADAM, "hidden": (1000, 1000), "batch": 128, "epochs": 11, "learning_rate": 1e-4}
_RESNET = {**_ADAM, "network": "resnet32", "hidden": (), "augmentation": "crop-flip", "batch": 32, "epochs": 200}
_DECAY = {"rate_drops": (0.4, 0.6, 0.8, 0.9), "rate_factors": (0.1, 0.01, 0.001, 0.0005)}
_ZENKE = {**_ADAM, "network": "zenkenet", "hidden": (), "augmentation": "none", "batch": 256, "epochs": 80}
_ZENKE |= {"learning_rate": 1e-4}
# Ours, for permuted images of 8 x 8 and of 28 x 28 pixels: seconds, and minutes.
_DIGITS = {**_ADAM, "tasks": 5, "hidden": (32, 32), "batch": 64, "epochs": 12, "learning_rate": 2e-3}
_IMAGES = {**_ADAM, "tasks": 5, "network": "mlp", "hidden": (64, 64), "batch": 64, "epochs": 3}
_IMAGES |= {"train_per_class": 800, "test_per_class": 200}
_SPLIT_28 = ("split-mnist", "split-mnist5k", "split-fmnist", "split-notmnist")
_PERM_28 = ("perm-mnist", "perm-fmnist", "perm-notmnist")


def _sizes(task_embedding: int, chunk_embedding: int, chunk: int, beta: float) -> dict[str, Any]:
    return {"task_embedding": task_embedding, "chunk_embedding": chunk_embedding, "chunk": chunk, "beta": beta}


def _on(benchmarks: tuple[str, ...], changes: Mapping[str, Any], *settings: Mapping[str, Any], **others: Any) -> Preset:
    return Preset(dict.fromkeys(benchmarks, changes), {key: s[key] for s in (*settings, others) for key in s})


_CIFAR = ("split-cifar10-100",)
_HNET = {"head_scale": 1.0, "lookahead": True}
# Sizes of the LSTM are those with which it has no more parameters than its target; H = 96 is from its authors' code.
# The small ones of the two generators have as many parameters, to a hundredth.
_LSTM_PRESETS = {
    "split-mnist": _on(_SPLIT_28, _SPLIT_MNIST, _sizes(32, 32, 13_500, 0.01), hidden_size=32),
    "perm-mnist": _on(_PERM_28, _PERM_MNIST, _sizes(32, 32, 53_000, 0.1), hidden_size=32),
    "split-cifar": _on(_CIFAR, _RESNET, _sizes(32, 32, 4_000, 0.05), _DECAY, hidden_size=96),
    "split-cifar-zenkenet": _on(_CIFAR, _ZENKE, _sizes(48, 48, 18_000, 0.01), hidden_size=64),
    "perm-digits-small": _on(("perm-digits",), _DIGITS, _sizes(8, 8, 200, 0.1), hidden_size=16),
    "perm-images-small": _on(_PERM_28, _IMAGES, _sizes(16, 16, 1_000, 0.1), hidden_size=24),
}
_MANY = {**_PERM_MNIST, "tasks": 100}
_CHUNKED_PRESETS = {
    "split-mnist": _on(_SPLIT_28, _SPLIT_MNIST, _HNET, _sizes(96, 96, 42_000, 0.01), layers=(10, 10)),
    "perm-mnist": _on(_PERM_28, _PERM_MNIST, _HNET, _sizes(24, 8, 78_000, 0.1), layers=(25, 25), activation="elu"),
    "perm-mnist-100": _on(_PERM_28, _MANY, _HNET, _sizes(128, 12, 7_500, 0.01), layers=(200, 250, 350)),
    "split-cifar": _on(_CIFAR, _RESNET, _HNET, _sizes(32, 32, 7_000, 0.05), _DECAY, layers=()),
    "split-cifar-zenkenet": _on(_CIFAR, _ZENKE, _HNET, _sizes(48, 80, 5_500, 0.01), layers=(100, 150, 200)),
    "perm-digits-small": _on(("perm-digits",), _DIGITS, _sizes(8, 8, 200, 0.1), layers=(25,)),
    "perm-images-small": _on(_PERM_28, _IMAGES, _sizes(16, 16, 1_000, 0.1), layers=(29,)),
}

# MixtureGrowth. The authors' settings for CIFAR (specs/growclip-and-growth.md, B.2), without their cutout: epochs 200,
# 200 and 40. Ours for digits, of one task or two: seconds.
_WRN = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "learning_rate": 0.1}
_WRN28 = {**_WRN, "network": "wrn28", "hidden": (), "tasks": 1, "batch": 128, "epochs": 440}
_WRN10 = {**_WRN, "network": "wrn10", "hidden": (8, 8, 16, 32), "tasks": 2, "batch": 32, "epochs": 12}
_GROWN = {"schedule": "cosine", "grown_rate": 1e-3, "cycles": 4, "grown_warmup": 0.1, "stages": (200 / 440, 400 / 440)}

PRESETS: dict[str, dict[str, Preset]] = {
    "mixture_growth": {
        "cifar": Preset(
            dict.fromkeys(("split-cifar100", "split-cifar10"), {**_WRN28, "augmentation": "crop-flip"}), _GROWN
        ),
        "small": Preset(
            dict.fromkeys(("split-digits", "split-fmnist", "split-mnist5k"), _WRN10),
            {"schedule": "cosine", "grown_rate": 0.1},
        ),
    },
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
    },
    "hypernet": _LSTM_PRESETS,
    "chunked_hypernet": _CHUNKED_PRESETS,
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
