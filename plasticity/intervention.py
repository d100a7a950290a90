"""What may keep a network plastic: the moments at which an intervention may act, and what it acts upon.

The same object serves a supervised learner, an agent and a continual strategy, one network or a stacked population.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from plasticity.networks.structure import Structure

Stage = Literal["decay", "reset", "clip", "project"]  # the order after a step, specs/nap-and-plasticity.md section 3.4


@dataclass
class Learner:
    """A network in training, as interventions see it.

    members: K if every parameter has a leading axis of K members (`networks.stacked`), None for an ordinary network.
    twins: so many of them make one network that `fresh` draws, side by side in layers of one's own; nearly always 1.
    leading: by parameter name, how many axes stand for members, where it is not the one of a population.
    optimizer: a `torch.optim.Optimizer`, or `plasticity.adam.Adam`; both own one state for each parameter.
    optimized: what it moves instead of a parameter, by name: tensors in the axes of `parameter` that share its memory.
    generators: one for each member (one for an ordinary network), for the draws of interventions and nothing else.
    fresh: draws a newly initialised ordinary network from a generator, with the law that drew the first one.
    steps: optimiser steps taken; `after_step` sees the one just taken counted.
    copies: values remembered for parameters ([K, *shape] by name), such as initial ones, averages and targets; where a
    part of a parameter is drawn anew (`plasticity.networks.redraw`), these follow.
    """

    network: nn.Module
    structure: Structure
    optimizer: Any
    members: int | None
    generators: Sequence[torch.Generator]
    fresh: Callable[[torch.Generator], nn.Module]
    steps: int = 0
    copies: list[Mapping[str, Tensor]] = field(default_factory=list)
    twins: int = 1
    leading: Mapping[str, int] = field(default_factory=dict)
    optimized: Mapping[str, Tensor] = field(default_factory=dict)

    def parameter(self, name: str) -> Tensor:
        """A parameter without gradient, [K, *shape]; K is 1 for an ordinary network. Shares memory: write in place.

        Weights are [K, out, in, ...], however their layer keeps them.
        """
        return self.by_member(name, self.network.get_parameter(name).detach())

    def by_member(self, name: str, tensor: Tensor, leading: int | None = None) -> Tensor:
        """A tensor of a parameter's shape, such as its gradient, in the axes of `parameter`. Shares memory.

        leading: how many axes stand for members in this tensor, if not as in the parameter.
        """
        if leading is None:
            leading = self.leading.get(name, 0 if self.members is None else 1)
        if leading != 1:
            tensor = tensor.flatten(0, leading - 1) if leading else tensor.unsqueeze(0)
        return tensor.mT if name in self.structure.transposed else tensor


@dataclass(frozen=True)
class Batch:
    """What the last gradient step saw: inputs [K, B, ...], targets [K, B] or [K, B, out] (K = 1: ordinary network).

    activations: outputs of the nonlinearities by `Hidden.name`, [K, B, H, ...], detached, in the forward pass of that
    step; empty unless an intervention asks for them.
    """

    inputs: Tensor
    targets: Tensor
    activations: Mapping[str, Tensor]


class Intervention:
    """Does nothing. A real one overrides the moments that it needs; all are called in the order of this class.

    uses_boundaries: it must be told when the task changes, which most problems hide from the learner.
    needs_activations: `after_step` reads `batch.activations`.
    needs_inputs: it runs the network on `batch.inputs`, so the network must be a function of one tensor.
    sees_members: it reads parameters as `Learner.parameter` gives them. NaP keeps account of axes itself.
    scales_steps: `scale_step` is to be asked; the optimiser must then be one of `plasticity.optimisers`.
    stage: of several interventions, `after_step` is called in the order of `by_stage`.
    """

    uses_boundaries = False
    needs_activations = False
    needs_inputs = False
    scales_steps = False
    stage: Stage = "reset"

    @property
    def sees_members(self) -> bool:
        """Whether it acts on parameters at all, and through `Learner.parameter`."""
        moments = ("begin", "penalty", "after_step", "at_boundary")
        return any(getattr(type(self), moment) is not getattr(Intervention, moment) for moment in moments)

    def build(self, network: nn.Module) -> nn.Module:
        """The network to train instead of `network`, one member, before weights are drawn. Raises ValueError if it
        cannot be."""
        return network

    def optimizer(
        self, network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
    ) -> torch.optim.Optimizer | None:
        """The optimiser to use instead of the problem's; None: no change. parameters: what it moves, by the name in
        `network`; tensors that share the parameters' memory. stacked: they have a leading axis of members."""
        return None

    def begin(self, learner: Learner) -> None:
        """Once, before the first step: remember initial values, make room for statistics."""

    @property
    def penalises(self) -> bool:
        """Whether `penalty` is to be asked."""
        return type(self).penalty is not Intervention.penalty

    def penalty(self, learner: Learner, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """What to add to each member's loss, [K] ([1] for an ordinary network), as a function of `parameters` (by name,
        in the axes of `Learner.parameter`, with gradient); None: nothing."""
        return None

    def scale_step(self, learner: Learner, batch: Batch, proposal: Mapping[str, Tensor]) -> Tensor:
        """The part of the proposed step to take, [K] ([1] for an ordinary network), without gradient; 1 is all of it.

        Called between the optimiser's `propose` and its `apply`, so parameters and optimiser state are given and stay
        as they are; only if `scales_steps`. batch: what the proposal was computed from, without activations. proposal:
        by parameter name, of the parameter's shape; the change of the parameter, learning rate and decay included.
        """
        return torch.ones(learner.members or 1, device=batch.inputs.device)

    def after_step(self, learner: Learner, batch: Batch) -> None:
        """After each optimiser step, in place, without gradient."""

    def at_boundary(self, learner: Learner) -> None:
        """Between the last step of a task and the first of the next; only if `uses_boundaries`."""

    def metrics(self, learner: Learner) -> dict[str, Tensor]:
        """What to record of the last step, [K] by metric name; asked on a schedule, so it may take time."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What decides the future: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`, after `begin`."""


def by_stage(interventions: Iterable[Intervention]) -> list[Intervention]:
    """In the order in which they act after a step; those of one stage stay as they are."""
    return sorted(interventions, key=lambda intervention: get_args(Stage).index(intervention.stage))
