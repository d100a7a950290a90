"""What is measured of an agent's networks while it trains, and changes nothing about it: units, ranks, norms.

Metrics are 0-d tensors on the agent's device. `plasticity/WHAT` is of the whole agent, `plasticity/WHAT/NETWORK` of one
network where there are several:

    dormant_fraction  share of hidden units whose activity is at most 0.025 of their layer's mean (`activity.dormant`)
    effective_rank    entropy rank of the last hidden layer (`ranks.erank`); mean of several networks, of twin critics
    weight_norm       Euclidean norm of all weights, without biases and normalisations
    gradient_norm     Euclidean norm of the loss's gradient before any clipping, in the next gradient step

Units and ranks are measured on observations (and actions) from the replay.

Of agents with the option `representation`, also what the critic's head reads, φ [N, D], mean over twin critics
(specs/beer-and-online-rl.md, section 6); `representation/WHAT`, with the N and D that all of it depends on:

    feature_rank    singular values of φ / √N above 0.01, BEER's representation rank (`ranks.feature_rank`)
    srank           fewest singular values with 0.99 of their sum (`ranks.srank`)
    effective_rank  entropy rank (`ranks.erank`)
    dead_fraction   share of features that are 0 on all samples
    samples         N
    features        D
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from agents.agent import Agent, Metrics
from agents.moments import as_seen
from agents.plastic import Optimizer
from agents.population import require_one_seed
from plasticity.measures import activity, norms, ranks
from plasticity.networks.functional import evaluating
from plasticity.networks.structure import Structure, activations, find_structure
from plasticity.population import RandomStream

SAMPLES = 512  # on which units and ranks are measured; ranks need twice as many as there are units
TAU = 0.025  # threshold of dormancy
RANK_SAMPLES = 2048  # on which the ranks of the representation are measured, or twice its width
_AT_A_TIME = 512  # of these, through a network: images are large


@dataclass
class _Network:
    """A trained network. waiting: the norm of its next gradient is wanted; gradient_norm: it was seen."""

    network: nn.Module
    structure: Structure
    optimizer: Optimizer
    waiting: bool = False
    gradient_norm: Tensor | None = field(default=None, repr=False)

    def see(self, gradients: Sequence[Tensor]) -> None:
        if self.waiting:
            self.gradient_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))
            self.waiting = False


class AgentDiagnostics:
    """Measures an agent with a replay. Raises ValueError for an agent without one, of several seeds, or whose networks
    cannot be traced."""

    def __init__(self, agent: Agent):
        self.agent = agent
        self.replay: Any = getattr(agent, "replay", None)
        if self.replay is None:
            raise ValueError("diagnostics need an agent with a replay, from which they take observations")
        if getattr(agent, "encoder", None) is not None and not hasattr(agent, "inputs_of"):
            raise ValueError(
                "diagnostics know networks that read observations; these read what an encoder makes of them"
            )
        require_one_seed(type(agent).__module__.rpartition(".")[2], self.replay.lead)
        self.networks: dict[str, _Network] = {}
        optimizers = [part for part in vars(agent).values() if isinstance(part, Optimizer)]
        for name, network in vars(agent).items():
            if isinstance(network, nn.Module) and (own := _optimizer_of(network, optimizers)) is not None:
                self.networks[name] = _Network(network, find_structure(network), own)
        if not self.networks:
            raise ValueError("diagnostics need an agent whose networks are trained by optimisers of `Plasticity`")
        for watched in self.networks.values():
            watched.optimizer.on_gradients = watched.see
        able = [one for one in self.networks.values() if hasattr(one.network, "features")]
        self.representing = able[0] if able and hasattr(getattr(agent, "config", None), "representation") else None

    def state_dict(self) -> dict[str, Any]:
        """Which networks' next gradients are to be measured, and what was measured but not told yet."""
        watched = self.networks.items()
        norms_seen = {name: one.gradient_norm for name, one in watched if one.gradient_norm is not None}
        return {"waiting": {name: one.waiting for name, one in watched}, "gradient_norms": norms_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        for name, watched in self.networks.items():
            norm = state["gradient_norms"].get(name)
            watched.waiting = state["waiting"][name]
            watched.gradient_norm = None if norm is None else norm.to(self.replay.device)

    @torch.no_grad()
    def measure(self, stream: RandomStream) -> Metrics:
        """Units, ranks and weights now, the norms of gradients at the next steps. stream: draws the samples."""
        began = time.perf_counter()
        with _drawing_from(self.replay, stream):
            batch = self.replay.sample(SAMPLES, 1.0)
        obs = as_seen(self.agent, batch.obs)
        inputs: dict[str, tuple[Tensor, ...]] = {}
        if hasattr(self.agent, "inputs_of"):  # whose networks read each other's outputs
            inputs = self.agent.inputs_of(obs, batch.action)  # type: ignore[attr-defined]
        found: dict[str, Metrics] = {}
        masks: list[Tensor] = []
        for name, watched in self.networks.items():
            seen = _hidden(watched, inputs[name] if name in inputs else _inputs(watched.network, obs, batch.action))
            units = [activity.dormant(h, TAU).flatten().unsqueeze(0) for h in seen]
            sigma = ranks.singular_values(ranks.feature_matrix(seen[-1]))
            found[name] = {
                "dormant_fraction": activity.fraction(units)[0],
                "effective_rank": ranks.erank(sigma).mean(),
                "weight_norm": torch.linalg.vector_norm(torch.stack(torch._foreach_norm(_weights(watched)))),
            }
            masks += units
            watched.waiting = True
        whole = _whole(found) | {"plasticity/dormant_fraction": activity.fraction(masks)[0]}
        if self.representing is not None:
            whole |= self._representation(self.representing, stream)
        return whole | {"speed/diagnostics_seconds": torch.tensor(time.perf_counter() - began)}

    def _representation(self, watched: _Network, stream: RandomStream) -> Metrics:
        network: Any = watched.network
        takes_action = "action" in inspect.signature(network.features).parameters
        with _drawing_from(self.replay, stream):
            batch = self.replay.sample(max(RANK_SAMPLES, 2 * watched.structure.hidden[-1].units), 1.0)
        obs = as_seen(self.agent, batch.obs)
        inputs = (obs, batch.action) if takes_action else (obs,)
        with evaluating(network):
            parts = [network.features(*part) for part in zip(*(x.split(_AT_A_TIME) for x in inputs), strict=True)]
        return representation_ranks(torch.cat(parts, -2))

    def gradient_norms(self) -> Metrics:
        """Of all networks, once each has taken a gradient step since `measure`; told once, else empty."""
        seen = {name: watched.gradient_norm for name, watched in self.networks.items()}
        found = {name: {"gradient_norm": norm} for name, norm in seen.items() if norm is not None}
        if len(found) < len(seen):
            return {}
        for watched in self.networks.values():
            watched.gradient_norm = None
        return _whole(found)


def representation_ranks(features: Tensor) -> Metrics:
    """Ranks of features [N, D] or, of K critics, [K, N, D], whose mean it is; see above."""
    h = features if features.ndim == 3 else features.unsqueeze(0)
    samples, width = h.shape[1:]
    sigma = ranks.singular_values(h)
    found = {
        "feature_rank": ranks.feature_rank(sigma, samples).mean(),
        "srank": ranks.srank(sigma).float().mean(),
        "effective_rank": ranks.erank(sigma).mean(),
        "dead_fraction": (h == 0).all(1).float().mean(),
        "samples": torch.tensor(float(samples), device=h.device),
        "features": torch.tensor(float(width), device=h.device),
    }
    return {f"representation/{name}": value for name, value in found.items()}


@contextmanager
def _drawing_from(replay: Any, stream: RandomStream) -> Iterator[None]:
    own, replay.stream = replay.stream, stream
    try:
        yield
    finally:
        replay.stream = own


def _optimizer_of(network: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer | None:
    """The one that trains it; targets have none."""
    first = next(network.parameters(), None)
    return next((own for own in optimizers if any(p is first for p in own.parameters)), None)


def _inputs(network: nn.Module, obs: Tensor, action: Tensor) -> tuple[Tensor, ...]:
    return (obs, action) if "action" in inspect.signature(network.forward).parameters else (obs,)


def _hidden(watched: _Network, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Activations of every hidden layer, [K, B, H, ...]; K: networks side by side, such as twin critics."""
    with activations(watched.network, watched.structure) as seen, evaluating(watched.network):
        watched.network(*inputs)
    layers = []
    for layer in watched.structure.hidden:
        h = seen[layer.name]
        samples = h.dim() + layer.unit_axis - 1  # their axis
        h = h.flatten(0, samples - 1) if samples else h.unsqueeze(0)
        layers.append(activity.fold_copies(h, layer.units))
    return layers


def _weights(watched: _Network) -> list[Tensor]:
    structure = watched.structure
    names = dict.fromkeys([*(name for layer in structure.hidden for name in layer.weights), *structure.heads])
    return [watched.network.get_parameter(name).detach() for name in names]


def _whole(found: dict[str, Metrics]) -> Metrics:
    """Of the whole agent, and of each network if there are several."""
    over: dict[str, Callable[[Tensor], Tensor]] = {
        "dormant_fraction": torch.mean, "effective_rank": torch.mean, "weight_norm": norms.total,
        "gradient_norm": norms.total,
    }  # fmt: skip
    names = next(iter(found.values()), {})
    metrics = {f"plasticity/{what}": over[what](torch.stack([own[what] for own in found.values()])) for what in names}
    if len(found) > 1:
        metrics |= {f"plasticity/{what}/{name}": own[what] for name, own in found.items() for what in own}
    return metrics
