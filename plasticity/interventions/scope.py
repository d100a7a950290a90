"""Which parameters an intervention acts on, and whether its settings are possible."""

from __future__ import annotations

from torch import nn

from plasticity.intervention import Learner
from plasticity.networks.structure import Structure


def normaliser_parameters(network: nn.Module, structure: Structure | None = None) -> set[str]:
    """Gains and offsets: parameters of modules that are called a norm, and those the structure knows."""
    names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    }
    for layer in structure.hidden if structure is not None else ():
        names.update(name for name in (layer.gain, layer.offset) if name is not None)
    return names


def regularised(learner: Learner) -> list[str]:
    """Trainable weights and biases, without the gains and offsets of normalisers (spec 3.1)."""
    spared = normaliser_parameters(learner.network, learner.structure)
    return [name for name, p in learner.network.named_parameters() if p.requires_grad and name not in spared]


def hidden_weights(learner: Learner) -> list[str]:
    """Weights in front of nonlinearities, in the order of computation, each once."""
    return list(dict.fromkeys(name for layer in learner.structure.hidden for name in layer.weights))


def all_weights(learner: Learner) -> list[str]:
    """Weights of all layers: hidden, inner, heads."""
    structure = learner.structure
    return list(dict.fromkeys([*hidden_weights(learner), *structure.inner, *structure.heads]))


def bias_of(network: nn.Module, weight: str) -> str | None:
    """The bias of the layer that owns a weight, if it has one."""
    name = f"{weight.rpartition('.')[0]}.bias".lstrip(".")
    return name if name in dict(network.named_parameters()) else None


def learning_rate(learner: Learner) -> float:
    """The rate of the optimiser's step, of its first group."""
    groups = getattr(learner.optimizer, "param_groups", None)
    return groups[0]["lr"] if groups else learner.optimizer.learning_rate


def between(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
