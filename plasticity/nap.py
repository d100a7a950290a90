"""Normalize-and-Project, NaP (Lyle et al. 2024, arXiv:2407.01800).

    build    a normaliser before every nonlinearity, no bias in front of it      `normalisation.convert`
    init     ρ_l = ||u_l||, Frobenius, for every weight that is normalised       `projection.plan`
    step     optimiser step with an explicit rate η_t                            `schedules`
             u_l <- u_l ρ_l / ||u_l||  every k steps                             `projection.project_`

A normalised weight matters by its direction only, so its gradient shrinks as its norm grows: under SGD the effective
learning rate is η / ||u||², under Adam η / ||u||. Held norms leave the schedule as the only thing that anneals it.

Four arms tell the mechanisms apart: `plain` (neither), `norm`, `project` (without normalisers it changes the function)
and `nap`. With both off the learner is the plain one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.networks.normalisation import Kind, convert
from plasticity.networks.projection import Gain, Group, Plan, Projection, elr, gain_groups, plan, project_
from plasticity.schedules import Constant, Replay, Schedule, Scheduled, learning_rates

__all__ = ["ARMS", "NaP", "Plan", "convert", "elr", "elr_power", "needs_annealing", "plan", "project_"]

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"normalise": False, "project": False},
    "norm": {"normalise": True, "project": False},
    "project": {"normalise": False, "project": True},
    "nap": {"normalise": True, "project": True},
}


class NaP(Intervention):
    """The intervention; the defaults are the specification's, as the paper's choices are not all known.

    normalise, project: the two mechanisms. project_every: k, counted in optimiser steps. kind, epsilon: of the
    normalisers that are put in; replace_batch_norm: also in the place of BatchNorm.

    gains: the learned gain γ and offset β of normalisers are not scale-invariant. "none" takes them out; "free" leaves
    them alone; "joint" holds (γ, β) at their initial norm, for ReLU-like nonlinearities; "pull" adds
    pull/2 (|γ - 1|² + |β|²) to the loss.

    joint_biases, streams: see `projection.plan`. schedule: of the optimiser's learning rate, or a `Replay`.
    record_growth_every: keep ||u|| / ρ of every group each so many steps in `growth`; 0 keeps none.

    Optimiser moments are not rescaled, and projected weights are best not decayed: decoupled decay λ would only change
    the rate to η / (1 - ηλ).
    """

    stage = "project"

    def __init__(
        self,
        *,
        normalise: bool = True,
        project: bool = True,
        project_every: int = 1,
        kind: Kind = "layer",
        epsilon: float = 1e-5,
        gains: Literal["none", "free", "joint", "pull"] = "none",
        pull: float = 1e-2,
        joint_biases: bool = False,
        streams: Literal["joint", "each"] = "joint",
        replace_batch_norm: bool = False,
        schedule: Schedule | None = None,
        record_growth_every: int = 0,
    ):
        if project_every < 1 or record_growth_every < 0 or not pull >= 0:
            raise ValueError("NaP: project_every must be at least 1, record_growth_every and pull not negative")
        if gains not in ("none", "free", "joint", "pull"):
            raise ValueError(f"NaP: gains must be none, free, joint or pull, got '{gains}'")
        self.normalise, self.project, self.project_every = normalise, project, project_every
        self.kind: Kind = kind
        self.epsilon, self.gains, self.pull = epsilon, gains, pull
        self.joint_biases = joint_biases
        self.streams: Literal["joint", "each"] = streams
        self.replace_batch_norm, self.record_growth_every = replace_batch_norm, record_growth_every
        self.schedule: Schedule = Constant() if schedule is None else schedule
        self.uses_boundaries = self.schedule.uses_boundaries
        self.plan: Plan | None = None
        self.scheduled: Scheduled | None = None
        self.steps = 0
        self.previous: list[Tensor] = []
        self._growth: list[Tensor] = []

    @property
    def sees_members(self) -> bool:
        return False

    def build(self, network: nn.Module) -> nn.Module:
        if not self.normalise:
            return network
        return convert(network, self.kind, self.gains != "none", self.epsilon, self.replace_batch_norm)

    def begin(self, learner: Learner) -> None:
        """Raises ValueError if the network cannot be projected; see `projection.plan`."""
        self.base_rate = learning_rates(learner.optimizer)[0]
        if not isinstance(self.schedule, Constant):
            self.scheduled = Scheduled(learner.optimizer, self.schedule)
        self.groups: tuple[Group, ...] = ()
        self.held: tuple[Group, ...] = ()
        if not self.normalise and not self.project:
            return
        self.plan = self._plan(learner)
        if self.normalise and self.gains == "none" and self.plan.gains:
            raise ValueError(f"NaP with gains 'none' found the gain '{self.plan.gains[0].gain}'; choose another mode")
        self.groups = self.plan.groups
        if self.gains == "joint":
            self.held = gain_groups(self.plan, dict(learner.network.named_parameters()))
        self._bind(learner)

    def _plan(self, learner: Learner) -> Plan:
        return plan(
            learner.network,
            strict=self.normalise,
            structure=learner.structure,
            members=learner.members,
            power=elr_power(learner.optimizer),
            joint_biases=self.joint_biases,
            streams=self.streams,
        )

    def _bind(self, learner: Learner) -> None:
        parameters = dict(learner.network.named_parameters())
        self.shapes = {name: parameters[name].shape for group in self.groups for name in group.tensors}
        self.weights, self.gain_pairs = Projection(self.groups, parameters), Projection(self.held, parameters)
        follows = isinstance(self.schedule, Replay) or self.record_growth_every > 0
        if follows and len({group.radius.shape for group in self.groups}) > 1:
            raise ValueError(
                "growth cannot be recorded or replayed where some weights have members and others have none"
            )
        if isinstance(self.schedule, Replay):
            if self.schedule.growth.shape[1] != len(self.groups):
                raise ValueError(
                    f"the recorded growth is of {self.schedule.growth.shape[1]} groups of weights, "
                    f"this network has {len(self.groups)}"
                )
            self.previous = [tensor.clone() for tensor in self.weights.tensors]
        if self.record_growth_every and not self._growth:
            self._growth.append(torch.stack(self.weights.growth()))

    @property
    def penalises(self) -> bool:
        return self.gains == "pull"

    def penalty(self, learner: Learner, parameters: Mapping[str, Tensor]) -> Tensor | None:
        if self.plan is None or not self.plan.gains:
            return None
        return torch.stack([_distance(pair, parameters) for pair in self.plan.gains]).sum(0) * (self.pull / 2)

    @torch.no_grad()
    def after_step(self, learner: Learner, batch: Batch) -> None:
        self.steps = learner.steps
        if self.scheduled is not None:
            self.scheduled.set_for(self.steps)
        if self.plan is None:
            return
        if isinstance(self.schedule, Replay):
            self.weights.shorten_(self.previous, self.schedule.growth_before(self.steps - 1) ** -self.plan.power)
        if self.steps % self.project_every == 0:
            if self.project:
                self.weights.project_()
            if self.held:
                self.gain_pairs.project_()
        for kept, tensor in zip(self.previous, self.weights.tensors if self.previous else (), strict=True):
            kept.copy_(tensor)
        if self.record_growth_every and self.steps % self.record_growth_every == 0:
            self._growth.append(torch.stack(self.weights.growth()))

    def at_boundary(self, learner: Learner) -> None:
        if self.scheduled is not None:
            self.scheduled.at_boundary(learner.steps)

    @property
    def growth(self) -> Tensor:
        """||u|| / ρ, recorded: [T, G] or [T, G, K], the first before the first step; for `Replay`."""
        if not self._growth:
            raise ValueError("NaP recorded no growth: set record_growth_every")
        return torch.stack(self._growth)

    def effective_learning_rates(self, learner: Learner) -> dict[str, Tensor]:
        """Of each group relative to initialisation, by the name of its first weight; see `projection.elr`."""
        if self.plan is None:
            return {}
        rate, now = learning_rates(learner.optimizer)[0], replace(self.plan, groups=self.groups)
        return elr(dict(learner.network.named_parameters()), now, rate, self.base_rate)

    def zero_norms(self) -> Tensor:
        """How many projected groups are all zero now and so cannot be rescaled, [] (each member's count)."""
        return self.weights.zero_norms()

    def reshaped(self, learner: Learner) -> None:
        """Weights have got other shapes, as `learner.structure` knows: their radii become the norms of a network that
        `learner.fresh` draws.

        The others keep theirs. Raises ValueError if `learner.fresh` does not draw networks of the new shapes.
        """
        new, parameters = self._plan(learner), dict(learner.network.named_parameters())
        old = {group.tensors: group for group in self.groups}
        fresh = [dict(learner.fresh(generator).named_parameters()) for generator in learner.generators]
        groups = []
        for group in new.groups:
            kept = old.get(group.tensors)
            if kept is None or any(self.shapes[name] != parameters[name].shape for name in group.tensors):
                groups.append(replace(group, radius=_fresh_radius(group, parameters, fresh)))
            else:
                groups.append(kept)
        self.plan, self.groups = new, tuple(groups)
        if self.gains == "joint":
            self.held = gain_groups(new, parameters)
        self._bind(learner)

    def state_dict(self) -> dict[str, Any]:
        """Radii cannot be recovered from a trained network, so they are saved."""
        return {
            "steps": self.steps,
            "schedule": None if self.scheduled is None else self.scheduled.state_dict(),
            "radii": [group.radius for group in self.groups],
            "growth": self._growth,
            "previous": self.previous,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the saved radii are of other groups."""
        own = self.groups
        if [radius.shape for radius in state["radii"]] != [group.radius.shape for group in own]:
            raise ValueError("the saved radii do not fit the weights that NaP projects in this network")
        self.steps, self._growth = state["steps"], list(state["growth"])
        for group, radius in zip(own, state["radii"], strict=True):
            group.radius.copy_(radius)
        if self.plan is not None:
            self.weights.set_radii(self.groups)
        for kept, saved in zip(self.previous, state["previous"], strict=True):
            kept.copy_(saved)
        if self.scheduled is not None:
            self.scheduled.load_state_dict(state["schedule"], self.steps)


def _distance(pair: Gain, parameters: Mapping[str, Tensor]) -> Tensor:
    """|γ - 1|² + |β|² of each member, [K]."""
    distance = (parameters[pair.gain] - 1).flatten(1).square().sum(1)
    return distance if pair.offset is None else distance + parameters[pair.offset].flatten(1).square().sum(1)


def _fresh_radius(group: Group, parameters: Mapping[str, Tensor], fresh: list[dict[str, nn.Parameter]]) -> Tensor:
    for name in group.tensors:
        shape = parameters[name].shape[group.leading :]
        if fresh[0][name].shape != shape:
            raise ValueError(f"'{name}' is {list(shape)}, but a fresh network has {list(fresh[0][name].shape)}")
    norms = [torch.stack([network[name].detach().norm() for name in group.tensors]).norm() for network in fresh]
    return torch.stack(norms).view(group.radius.shape).to(group.radius)


def elr_power(optimizer: Any) -> int:
    """p in effective learning rate ∝ ||u||^-p: 2 if the step is proportional to the gradient (SGD), else 1 (Adam).

    An optimiser of one's own says so with an attribute `follows_gradient_scale`.
    """
    return 2 if isinstance(optimizer, torch.optim.SGD) or getattr(optimizer, "follows_gradient_scale", False) else 1


def needs_annealing(intervention: Intervention) -> bool:
    """True for NaP at a constant rate: value-based agents rely on the decay that growing norms gave them."""
    return isinstance(intervention, NaP) and intervention.project and isinstance(intervention.schedule, Constant)
