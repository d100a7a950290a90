"""What is measured of a learner while it trains: a cheap tier after single steps, a costly one between tasks.

Metrics are tensors [K], one value for each member (K = 1: ordinary network), under the names `plasticity/WHAT` for the
whole network and `plasticity/WHAT/LAYER` for a layer (the name of a weight or of a nonlinearity's module). Nothing here
changes what is trained, draws from its generators or reads a value back from the device: a run goes the same way with
diagnostics and without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from plasticity.intervention import Batch, Learner
from plasticity.measures import activity, churn, curvature, norms, ntk, ranks
from plasticity.measures.curvature import Loss
from plasticity.networks.functional import evaluating, population_function, trainable
from plasticity.networks.structure import Hidden, activations

Metrics = dict[str, Tensor]


class Diagnostics:
    """Measures one learner. Call `begin` before the first step; around a step that is `due`, `before_step` and `cheap`;
    `costly` at the end of each task.

    every: optimiser steps between cheap measurements. taus: thresholds of dormancy, the first one names the metric
    `plasticity/dormant_fraction`. curvature: whether `costly` also measures Hessian, kernels and Jacobian, which takes
    seconds; their samples are the first ones of the probe batch.
    seconds, calls: what each tier has cost so far (on a GPU: the host's time, which does not wait for the device).
    """

    def __init__(
        self,
        every: int = 100,
        taus: Sequence[float] = (0.025, 0.0, 0.1),
        curvature: bool = True,
        curvature_samples: int = 128,
        kernel_samples: int = 64,
    ):
        if every < 1:
            raise ValueError(f"diagnostics need at least one step between measurements, got every={every}")
        if not taus:
            raise ValueError("diagnostics need at least one threshold of dormancy")
        self.every, self.taus, self.curvature = every, tuple(taus), curvature
        self.curvature_samples, self.kernel_samples = curvature_samples, kernel_samples
        self.seconds, self.calls = {"cheap": 0.0, "costly": 0.0}, {"cheap": 0, "costly": 0}
        self.initial: dict[str, Tensor] = {}
        self.initial_norm: dict[str, Tensor] = {}
        self.initial_rate = 1.0
        self.copies: dict[
            str, Tensor
        ] = {}  # weights ahead of a step; kept, because fresh memory costs more than copying
        self.norm_before: Tensor | None = None  # of each weight, [T, K], between `before_step` and `cheap`

    def begin(self, learner: Learner) -> None:
        """Remember the network as it was initialised: one copy of its weights."""
        self.initial = {name: learner.parameter(name).clone() for name in _weights(learner)}
        self.initial_norm = {name: norms.l2(p) for name, p in self.initial.items()}
        self.initial_rate = learning_rate(learner.optimizer)

    def due(self, steps: int) -> bool:
        """Whether the step that brings the count of optimiser steps to `steps` is to be measured."""
        return steps % self.every == 0

    @torch.no_grad()
    def before_step(self, learner: Learner) -> None:
        """Copy the weights, so that `cheap` can say how far the step went. Without this call it leaves that out."""
        with self._clocked("cheap", counted=False):
            weights = {name: learner.parameter(name) for name in _weights(learner)}
            if self.copies:
                torch._foreach_copy_(list(self.copies.values()), list(weights.values()))
            else:
                self.copies = {name: w.clone() for name, w in weights.items()}
            self.norm_before = torch.stack([norms.l2(w) for w in weights.values()])

    @torch.no_grad()
    def cheap(
        self,
        learner: Learner,
        batch: Batch,
        gradients: Sequence[Tensor],
        loss: Loss | None = None,
        loss_before: Tensor | None = None,
    ) -> Metrics:
        """After an optimiser step: norms of weights and gradients, effective learning rates, how far the step went.

        gradients: as the loss gave them, before any clipping, for the parameters that require one in their order.
        batch: of that step; with `batch.activations`, the share of zeros. loss, loss_before [K]: with both, also the
        plasticity of the step, for one more forward pass.
        """
        with self._clocked("cheap"):
            names = _weights(learner)
            after = {name: learner.parameter(name) for name in names}
            found = _gradient_metrics(learner, gradients)
            weight_norm = self._movement(learner, after, found)
            found["plasticity/weight_norm"] = norms.total(torch.stack(list(weight_norm.values())))
            found |= {f"plasticity/weight_norm/{name}": norm for name, norm in weight_norm.items()}
            found |= self._rates(learner, weight_norm)
            found["plasticity/grad_to_param"] = norms.ratio(
                found["plasticity/gradient_norm"], found["plasticity/weight_norm"]
            )
            if batch.activations:
                zeros = {name: activity.zero_fraction(h) for name, h in batch.activations.items()}
                found |= {f"plasticity/zero_fraction/{name}": share for name, share in zeros.items()}
                found["plasticity/zero_fraction"] = torch.stack(list(zeros.values())).mean(0)
            if loss is not None and loss_before is not None:
                own = population_function(learner.network, learner.members)
                with evaluating(learner.network):
                    outputs = own(trainable(learner.network, learner.members), batch.inputs)
                loss_after = loss(outputs, batch.targets)
                found["plasticity/step_plasticity"] = churn.step_plasticity(loss_before, loss_after)
            self.norm_before = None
            return found

    def _movement(self, learner: Learner, after: Mapping[str, Tensor], found: Metrics) -> dict[str, Tensor]:
        """The norm of each weight after the step; with a `before_step`, also enter angle and size of the step."""
        new, old = torch.stack([norms.l2(w) for w in after.values()]), self.norm_before
        if old is not None:
            moves = list(self.copies.values())
            torch._foreach_sub_(moves, list(after.values()))  # the copies have served
            moved = torch.stack([norms.l2(move) for move in moves])
            angle, update = norms.angle_from_norms(moved, old, new), norms.ratio(moved, old)
            for index, name in enumerate(after):
                found[f"plasticity/angular_step/{name}"] = angle[index]
                found[f"plasticity/update_ratio/{name}"] = update[index]
            hidden = set(_hidden_weights(learner))
            found["plasticity/angular_step"] = angle[[i for i, name in enumerate(after) if name in hidden]].mean(0)
            found["plasticity/update_ratio"] = norms.ratio(norms.total(moved), norms.total(old))
        return dict(zip(after, new.unbind(0), strict=True))

    def _rates(self, learner: Learner, weight_norm: Mapping[str, Tensor]) -> Metrics:
        """Effective learning rates of hidden weights relative to initialisation, and their geometric mean."""
        if not self.initial:
            return {}
        rate, exponent = learning_rate(learner.optimizer), norm_exponent(learner.optimizer)
        rates = {
            name: norms.elr(weight_norm[name], self.initial_norm[name], rate, self.initial_rate, exponent)
            for name in _hidden_weights(learner)
        }
        found = {f"plasticity/elr/{name}": value for name, value in rates.items()}
        return found | {"plasticity/elr": torch.stack(list(rates.values())).log().mean(0).exp()}

    def costly(
        self,
        learner: Learner,
        probe_inputs: Tensor,
        probe_targets: Tensor | None = None,
        loss: Loss | None = None,
        curvature: bool | None = None,
    ) -> Metrics:
        """On a fixed probe batch [K, B, ...], usually 512 samples: unit activity, ranks, distance from initialisation.

        targets [K, B, ...] and loss(outputs [K, B, ...], targets) -> [K], such as `losses.member_losses`, add what
        gradients tell; without them it is left out. curvature: as in the constructor, for this call only.
        """
        with self._clocked("costly"), evaluating(learner.network):
            found = self._features(learner, probe_inputs)
            found |= self._weights(learner)
            if loss is not None and probe_targets is not None:
                found |= _loss_metrics(learner, probe_inputs, probe_targets, loss)
                if self.curvature if curvature is None else curvature:
                    found |= self._curvature(learner, probe_inputs, probe_targets, loss)
            return found

    @torch.no_grad()
    def _features(self, learner: Learner, inputs: Tensor) -> Metrics:
        seen = hidden_activations(learner, inputs)
        pairs = [(layer, activity.fold_copies(seen[layer.name], layer.units)) for layer in learner.structure.hidden]
        found: Metrics = {}
        for number, tau in enumerate(self.taus):
            name = "dormant_fraction" if number == 0 else f"dormant_fraction_{tau:g}"
            found |= _of_units(name, pairs, lambda h, _, tau=tau: activity.dormant(h, tau), per_layer=number == 0)
        rectified = [(layer, h) for layer, h in pairs if layer.nonlinearity in activity.RECTIFIERS]
        found |= _of_units("dead_fraction", rectified, activity.dead)
        found |= _of_units("rarely_active_fraction", pairs, lambda h, _: activity.rarely(h), per_layer=False)
        saturable = [(layer, h) for layer, h in pairs if layer.nonlinearity in ("tanh", "sigmoid", "relu")]
        found |= _of_units("saturated_fraction", saturable, activity.saturated, per_layer=False)
        found |= _of_units("duplicate_fraction", pairs, lambda h, _: activity.duplicate(h), per_layer=False)
        for layer, _ in pairs:
            found |= _ranks_of(seen[layer.name], layer.name)
        last = pairs[-1][0].name  # what the head reads: the features
        for what in ("effective_rank", "srank", "energy_rank", "stable_rank", "participation", "feature_rank"):
            found[f"plasticity/{what}"] = found[f"plasticity/{what}/{last}"]
        return found

    @torch.no_grad()
    def _weights(self, learner: Learner) -> Metrics:
        weights = {name: learner.parameter(name) for name in _weights(learner)}
        sizes = torch.stack([norms.l2(w) for w in weights.values()])
        found = {
            "plasticity/weight_norm": norms.total(sizes),
            "plasticity/weight_magnitude": sum(norms.l1(w) for w in weights.values())
            / sum(w[0].numel() for w in weights.values()),
            "plasticity/weight_rank": torch.stack([ranks.weight_rank(w) for w in weights.values()]).mean(0),
        }
        found |= {f"plasticity/weight_norm/{name}": norm for name, norm in zip(weights, sizes, strict=True)}
        if self.initial:
            moved = {name: norms.l2(w - self.initial[name]) for name, w in weights.items()}
            start = torch.stack([self.initial_norm[name] for name in weights])
            found["plasticity/distance_from_init"] = norms.total(torch.stack(list(moved.values())))
            found["plasticity/relative_distance_from_init"] = norms.ratio(
                found["plasticity/distance_from_init"], norms.total(start)
            )
            found |= {f"plasticity/distance_from_init/{name}": distance for name, distance in moved.items()}
        return found | adam_metrics(learner)

    def _curvature(self, learner: Learner, inputs: Tensor, targets: Tensor, loss: Loss) -> Metrics:
        network, members = learner.network, learner.members
        x, y = inputs[:, : self.curvature_samples], targets[:, : self.curvature_samples]
        few, few_targets = inputs[:, : self.kernel_samples], targets[:, : self.kernel_samples]
        gradient_kernel = curvature.gradient_kernel(network, members, few, few_targets, loss)
        cosines = curvature.grad_cov(gradient_kernel)
        tangent = ntk.kernel_metrics(ntk.entk(network, members, few, "pseudo"))
        return {
            "plasticity/sharpness": curvature.sharpness(network, members, x, y, loss)[:, 0],
            "plasticity/sharpness_normed": curvature.sharpness(network, members, x, y, loss, by_norm=True)[:, 0],
            "plasticity/hessian_effective_rank": curvature.hessian_erank(network, members, few, few_targets, loss),
            "plasticity/gradient_cosine": curvature.off_diagonal_mean(cosines),
            "plasticity/gradient_conflict": curvature.negative_share(cosines),
            "plasticity/gradient_effective_rank": ranks.erank(ntk.spectrum(gradient_kernel).clamp(min=0).sqrt()),
            "plasticity/jacobian_norm": curvature.jacobian_norm(network, members, x),
            **{f"plasticity/ntk_{name}": value for name, value in tangent.items()},
        }

    @contextmanager
    def _clocked(self, tier: str, counted: bool = True) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[tier] += time.perf_counter() - start
        self.calls[tier] += counted

    def state_dict(self) -> dict[str, Any]:
        """What later measurements are compared with. The clocks are no part of it."""
        return {"initial": dict(self.initial), "initial_rate": self.initial_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.initial = dict(state["initial"])
        self.initial_norm = {name: norms.l2(p) for name, p in self.initial.items()}
        self.initial_rate = float(state["initial_rate"])


def hidden_activations(learner: Learner, inputs: Tensor) -> dict[str, Tensor]:
    """Outputs of all nonlinearities on inputs [K, B, ...], by `Hidden.name`, [K, B, H, ...]."""
    with activations(learner.network, learner.structure) as seen:
        learner.network(inputs if learner.members is not None else inputs.squeeze(0))
    return seen if learner.members is not None else {name: h.unsqueeze(0) for name, h in seen.items()}


def learning_rate(optimizer: Any) -> float:
    """The rate of the first group of a torch optimiser, or of `plasticity.adam.Adam`."""
    groups = getattr(optimizer, "param_groups", None)
    return float(groups[0]["lr"] if groups else optimizer.learning_rate)


def norm_exponent(optimizer: Any) -> int:
    """p of `norms.elr`: 2 for SGD, whose steps go with the gradient, 1 for those that do not see its scale."""
    return 2 if isinstance(optimizer, torch.optim.SGD) else 1


def adam_metrics(learner: Learner) -> Metrics:
    """Signal to noise of the moments, mean over all parameters; empty if the optimiser has none or took no step."""
    optimizer = learner.optimizer
    if hasattr(optimizer, "exp_avg"):
        moments = list(zip(optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.step_count, strict=True))
        betas, epsilon = optimizer.betas, optimizer.epsilon
    else:
        states = [state for state in optimizer.state.values() if "exp_avg" in state and "exp_avg_sq" in state]
        moments = [(state["exp_avg"], state["exp_avg_sq"], state["step"]) for state in states]
        group = optimizer.param_groups[0]
        betas, epsilon = group.get("betas"), group.get("eps")
    if learner.steps == 0 or not moments or betas is None:
        return {}
    alone = learner.members is None
    sums, size = [], 0
    for mean, square, step in moments:
        mean, square = (m.unsqueeze(0) if alone else m for m in (mean, square))
        sums.append(norms.adam_snr(mean, square, step, betas, epsilon) * mean[0].numel())
        size += mean[0].numel()
    return {"plasticity/adam_snr": torch.stack(sums).sum(0) / size}


def _gradient_metrics(learner: Learner, gradients: Sequence[Tensor]) -> Metrics:
    names = [name for name, p in learner.network.named_parameters() if p.requires_grad]
    alone = learner.members is None
    given = {name: g.unsqueeze(0) if alone else g for name, g in zip(names, gradients, strict=True)}
    long = torch.stack([norms.l2(g) for g in given.values()])
    flat = torch.stack([norms.l1(g) for g in given.values()])
    found = {"plasticity/gradient_norm": norms.total(long), "plasticity/gradient_l1": flat.sum(0)}
    weights = set(_weights(learner))
    for index, name in enumerate(given):
        if name in weights:
            found[f"plasticity/gradient_norm/{name}"] = long[index]
            found[f"plasticity/gradient_l1/{name}"] = flat[index]
    return found


def _loss_metrics(learner: Learner, inputs: Tensor, targets: Tensor, loss: Loss) -> Metrics:
    """What one gradient on the whole probe batch tells."""
    leaves = {n: p.requires_grad_() for n, p in trainable(learner.network, learner.members).items()}
    with torch.enable_grad():
        outputs = population_function(learner.network, learner.members)(leaves, inputs)
        value = loss(outputs, targets)
        gradients = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
    by_name = dict(zip(leaves, gradients, strict=True))
    zeros = torch.stack([g.flatten(1).shape[1] - g.flatten(1).count_nonzero(1) for g in gradients]).sum(0)
    masks = [activity.grad_dormant(by_name[name], 0.025) for name in _hidden_weights(learner) if name in by_name]
    return {
        "plasticity/probe_loss": value.detach(),
        "plasticity/gradient_zero_fraction": zeros / sum(g[0].numel() for g in gradients),
        "plasticity/grad_dormant_fraction": activity.fraction(masks),
    }


def _of_units(
    name: str,
    pairs: Sequence[tuple[Hidden, Tensor]],
    mask: Callable[[Tensor, str], Tensor],
    per_layer: bool = True,
) -> Metrics:
    """The share of units that a mask marks, in the whole network and in each layer; empty without layers."""
    if not pairs:
        return {}
    masks = {layer.name: mask(h, layer.nonlinearity) for layer, h in pairs}
    found = {f"plasticity/{name}": activity.fraction(list(masks.values()))}
    if per_layer:
        found |= {f"plasticity/{name}/{layer}": activity.fraction([units]) for layer, units in masks.items()}
    return found


def _ranks_of(h: Tensor, layer: str) -> Metrics:
    features = ranks.feature_matrix(h)
    sigma = ranks.singular_values(features)
    found = {
        "effective_rank": ranks.erank(sigma),
        "srank": ranks.srank(sigma),
        "energy_rank": ranks.energy_rank(sigma),
        "stable_rank": ranks.stable_rank(sigma),
        "participation": ranks.participation(sigma),
        "feature_rank": ranks.feature_rank(sigma, features.shape[1]),
    }
    return {f"plasticity/{name}/{layer}": value for name, value in found.items()}


def _hidden_weights(learner: Learner) -> list[str]:
    return list(dict.fromkeys(name for layer in learner.structure.hidden for name in layer.weights))


def _weights(learner: Learner) -> list[str]:
    """All weights in the order of the structure: hidden ones, then heads."""
    return list(dict.fromkeys([*_hidden_weights(learner), *learner.structure.heads]))
