"""What is measured of an agent's networks while it trains, and changes nothing about it: units, ranks, norms.

Metrics are tensors [*S] on the agent's device. `plasticity/WHAT` is of the whole agent, `plasticity/WHAT/NETWORK` of
one network where there are several, `plasticity/WHAT/NETWORK/LAYER` of a hidden layer (all but `gradient_norm`):

    dormant_fraction  share of hidden units whose activity is at most 0.025 of their layer's mean (`activity.dormant`)
    effective_rank    entropy rank of the features, which heads read (`ranks.erank`); mean of several layers, networks,
                      twin critics
    weight_norm       Euclidean norm of all weights, without biases and normalisations
    gradient_norm     Euclidean norm of the loss's gradient before any clipping, in the next gradient step

Units and ranks are measured on observations (and actions) from the replay, from the last rollout, or from fixed data.

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
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from agents.agent import Agent, Metrics
from agents.moments import as_seen
from agents.plastic import Optimizer
from plasticity.measures import activity, norms, ranks
from plasticity.networks.functional import evaluating
from plasticity.networks.structure import Structure, activations, find_structure
from plasticity.population import Axes, RandomStream

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
    lead: Axes
    waiting: bool = False
    gradient_norm: Tensor | None = field(default=None, repr=False)

    def see(self, gradients: Sequence[Tensor]) -> None:
        if self.waiting:
            own = {id(p) for p in self.network.parameters()}
            pairs = zip(self.optimizer.parameters, gradients, strict=True)
            self.gradient_norm = _norm([gradient for p, gradient in pairs if id(p) in own], self.lead)
            self.waiting = False

    @property
    def features(self) -> list[str]:
        """The hidden layers that heads read; the last one where a residual stream stands between."""
        hidden, heads = self.structure.hidden, set(self.structure.heads)
        read = [layer.name for layer in hidden if any(reader.weight in heads for reader in layer.readers)]
        return read or [hidden[-1].name]


class AgentDiagnostics:
    """Measures an agent, of one seed or of a population, that has a replay, a rollout, or data to read.

    Raises ValueError for an agent with none of them, or whose networks cannot be traced.
    """

    def __init__(self, agent: Agent):
        self.agent = agent
        self.replay: Any = getattr(agent, "replay", None)
        self.rollout: Any = getattr(agent, "rollout", None)
        if self.replay is None and self.rollout is None and not hasattr(agent, "data"):
            raise ValueError("diagnostics need an agent with a replay or a rollout, from which they take observations")
        self.lead: Axes = agent.lead  # type: ignore[attr-defined]
        self.networks: dict[str, _Network] = {}
        optimizers = [part for part in vars(agent).values() if isinstance(part, Optimizer)]
        for name, network in networks_of(agent):
            if (own := _optimizer_of(network, optimizers)) is not None:
                self.networks[name] = _Network(network, find_structure(network), own, self.lead)
        if not self.networks:
            raise ValueError("diagnostics need an agent whose networks are trained by optimisers of `Plasticity`")
        for optimizer in optimizers:
            watching = [watched for watched in self.networks.values() if watched.optimizer is optimizer]
            optimizer.on_gradients = partial(_show, watching) if watching else None
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
            watched.gradient_norm = None if norm is None else norm.to(next(watched.network.parameters()).device)

    @torch.no_grad()
    def measure(self, stream: RandomStream) -> Metrics:
        """Units, ranks and weights now, the norms of gradients at the next steps. stream: draws the samples."""
        began = time.perf_counter()
        obs, action = self._samples(stream, SAMPLES)
        inputs: dict[str, tuple[Tensor, ...]] = {}
        if hasattr(self.agent, "inputs_of"):  # whose networks read each other's outputs
            inputs = self.agent.inputs_of(obs, action)  # type: ignore[attr-defined]
        found: dict[str, Metrics] = {}
        layers: Metrics = {}
        masks: list[Tensor] = []
        for name, watched in self.networks.items():
            own = inputs[name] if name in inputs else _inputs(watched.network, obs, action)
            measured, units = self._of_layers(watched, own)
            layers |= {f"plasticity/{what}/{name}/{layer}": value for (what, layer), value in measured.items()}
            read = [measured["effective_rank", layer] for layer in watched.features]
            found[name] = {
                "dormant_fraction": activity.fraction(units).view(self.lead),
                "effective_rank": torch.stack(read).mean(0),
                "weight_norm": _norm(_weights(watched), self.lead),
            }
            masks += units
            watched.waiting = True
        whole = _whole(found) | {"plasticity/dormant_fraction": activity.fraction(masks).view(self.lead)}
        if self.representing is not None:
            whole |= self._representation(self.representing, stream)
        seconds = torch.full(self.lead, time.perf_counter() - began)
        return whole | layers | {"speed/diagnostics_seconds": seconds}

    def _of_layers(
        self, watched: _Network, inputs: tuple[Tensor, ...]
    ) -> tuple[dict[tuple[str, str], Tensor], list[Tensor]]:
        """By what and layer, [*S]; and which units are dormant, for each layer a mask [S, units of all copies]."""
        seeds, found, masks = math.prod(self.lead), {}, []
        for layer, h in zip(watched.structure.hidden, _hidden(watched, inputs), strict=True):
            masks.append(activity.dormant(h, TAU).view(seeds, -1))
            rank = ranks.erank(ranks.singular_values(ranks.feature_matrix(h)))
            weights = [watched.network.get_parameter(name).detach() for name in layer.weights]
            found["dormant_fraction", layer.name] = activity.fraction(masks[-1:]).view(self.lead)
            found["effective_rank", layer.name] = rank.view(seeds, -1).mean(1).view(self.lead)
            found["weight_norm", layer.name] = _norm(weights, self.lead)
        return found, masks

    def _samples(self, stream: RandomStream, count: int) -> tuple[Tensor, Tensor]:
        """Observations and actions that the networks were trained on, [*S, count, ...], with replacement."""
        if self.replay is not None:
            with _drawing_from(self.replay, stream):
                batch = self.replay.sample(count, 1.0)
            return as_seen(self.agent, batch.obs), batch.action
        if self.rollout is None:  # an offline agent, whose data give observations as its networks see them
            data: Any = self.agent.data  # type: ignore[attr-defined]
            with _drawing_from(data, stream):
                batch = data.sample(count)
            return batch.obs, batch.action
        axis, seeds = len(self.lead), math.prod(self.lead)
        obs, action = (x.flatten(axis, axis + 1) for x in (self.rollout.obs, self.rollout.action))
        rows = obs.shape[axis]
        chosen = stream.integers(rows, count).view(seeds, count)
        chosen = (chosen + rows * torch.arange(seeds, device=chosen.device)[:, None]).flatten()
        flat = (x.flatten(0, axis) if axis else x for x in (obs, action))
        obs, action = (x.index_select(0, chosen).unflatten(0, (*self.lead, count)) for x in flat)
        return obs, action

    def _representation(self, watched: _Network, stream: RandomStream) -> Metrics:
        network: Any = watched.network
        takes_action = "action" in inspect.signature(network.features).parameters
        obs, action = self._samples(stream, max(RANK_SAMPLES, 2 * watched.structure.hidden[-1].units))
        inputs, axis = ((obs, action) if takes_action else (obs,)), len(self.lead)
        with evaluating(network):
            parts = zip(*(x.split(_AT_A_TIME, axis) for x in inputs), strict=True)
            features = torch.cat([network.features(*part) for part in parts], -2)
        return representation_ranks(features, self.lead)

    def gradient_norms(self) -> Metrics:
        """Of all networks, once each has taken a gradient step since `measure`; told once, else empty."""
        seen = {name: watched.gradient_norm for name, watched in self.networks.items()}
        found = {name: {"gradient_norm": norm} for name, norm in seen.items() if norm is not None}
        if len(found) < len(seen):
            return {}
        for watched in self.networks.values():
            watched.gradient_norm = None
        return _whole(found)


def representation_ranks(features: Tensor, lead: Axes = ()) -> Metrics:
    """Ranks [*S] of features [*S, N, D] or, of K critics, [*S, K, N, D], whose mean it is; see above. lead: S."""
    samples, width = features.shape[-2:]
    h, seeds = features.reshape(-1, samples, width), math.prod(lead)
    sigma = ranks.singular_values(h)
    each = {
        "feature_rank": ranks.feature_rank(sigma, samples),
        "srank": ranks.srank(sigma).float(),
        "effective_rank": ranks.erank(sigma),
        "dead_fraction": (h == 0).all(1).float(),
        "samples": torch.full((seeds,), float(samples), device=h.device),
        "features": torch.full((seeds,), float(width), device=h.device),
    }
    return {f"representation/{name}": value.view(seeds, -1).mean(1).view(lead) for name, value in each.items()}


@contextmanager
def _drawing_from(replay: Any, stream: RandomStream) -> Iterator[None]:
    own, replay.stream = replay.stream, stream
    try:
        yield
    finally:
        replay.stream = own


def _show(networks: Sequence[_Network], gradients: Sequence[Tensor]) -> None:
    for watched in networks:
        watched.see(gradients)


def networks_of(agent: Agent) -> Iterator[tuple[str, nn.Module]]:
    """An agent's networks by name, targets too; those that say so (`measured_apart`) in their parts."""
    for name, network in vars(agent).items():
        if isinstance(network, nn.Module):
            parts = getattr(network, "measured_apart", ())
            yield from ((f"{name}_{part}", network.get_submodule(part)) for part in parts)
            if not parts:
                yield name, network


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


def _norm(tensors: Sequence[Tensor], lead: Axes) -> Tensor:
    """Euclidean norm of several tensors [*S, ...] as one vector, [*S]."""
    if not lead:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
    return norms.total(torch.stack([torch.linalg.vector_norm(t.flatten(1), dim=1) for t in tensors]))


def _whole(found: dict[str, Metrics]) -> Metrics:
    """Of the whole agent, and of each network if there are several."""
    metrics: Metrics = {}
    for what in next(iter(found.values()), {}):
        own = torch.stack([of_network[what] for of_network in found.values()])
        metrics[f"plasticity/{what}"] = norms.total(own) if what.endswith("norm") else own.mean(0)
    if len(found) > 1:
        metrics |= {f"plasticity/{what}/{name}": own[what] for name, own in found.items() for what in own}
    return metrics
