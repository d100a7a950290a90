"""The optimiser of a network that another loop trains, with interventions in the loss and behind each step.

Agents and strategies of continual learning take their gradient steps through it; the harness has a loop of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plasticity.adam import Adam
from plasticity.intervention import Batch, Intervention, Learner, by_stage
from plasticity.interventions.adaptive_batch import AdaptiveBatch
from plasticity.networks.structure import watch
from plasticity.optimisers.members import MemberOptimizer
from plasticity.population import Axes
from plasticity.sgd import SGD

Inner = Adam | SGD | MemberOptimizer


class PlasticOptimizer:
    """Adam, or another intervention's optimiser, on one network, with interventions in the loss and after each step.

    The interface is that of `plasticity.adam.Adam`.

    What interventions see of a step are the activations of the last forward pass before it that had gradients, which is
    that of the loss.
    """

    def __init__(self, learner: Learner, inner: Inner, interventions: Sequence[Intervention]):
        self.learner, self.inner, self.interventions = learner, inner, by_stage(interventions)
        self.parameters: list[Tensor] = inner.parameters
        self.on_gradients: Callable[[Sequence[Tensor]], None] | None = None
        for intervention in self.interventions:
            intervention.begin(learner)
        self._penalising = [i for i in self.interventions if i.penalises]
        self._seen: dict[str, Tensor] = {}
        if any(i.needs_activations for i in self.interventions):
            watch(learner.network, learner.structure, self._seen, only_with_gradients=True)

    def penalty(self, lead: Axes) -> Tensor | None:
        """What is added to the loss of each seed, of shape `lead`; None: nothing."""
        if not self._penalising:
            return None
        named = {n: self.learner.by_member(n, p) for n, p in self.learner.network.named_parameters()}
        found = [i.penalty(self.learner, named) for i in self._penalising]
        penalties = [penalty.reshape(*lead, -1).sum(-1) for penalty in found if penalty is not None]
        return torch.stack(penalties).sum(0) if penalties else None

    @property
    def learning_rate(self) -> float:
        return self.inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self.inner.learning_rate = rate

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        self.inner.step(gradients)
        self.learner.steps += 1
        batch = Batch(torch.empty(0), torch.empty(0), self._activations())
        for intervention in self.interventions:
            intervention.after_step(self.learner, batch)

    def _activations(self) -> dict[str, Tensor]:
        """As in `Batch`: [K, B, H], behind convolutions [K, B, H, h, w]."""
        members = self.learner.members or 1
        layers = self.learner.structure.hidden if self._seen else ()
        return {x.name: (h := self._seen[x.name]).reshape(members, *h.shape[x.unit_axis - 1 :]) for x in layers}

    def at_boundary(self) -> None:
        """The task has changed."""
        for intervention in self.interventions:
            if intervention.uses_boundaries:
                intervention.at_boundary(self.learner)

    def state_dict(self) -> dict[str, Any]:
        """Of all members: moments, steps taken, interventions and what they draw from."""
        return {
            "optimizer": self.inner.state_dict(),
            "steps": self.learner.steps,
            "interventions": [intervention.state_dict() for intervention in self.interventions],
            "generators": [generator.get_state() for generator in self.learner.generators],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`. Raises ValueError if it is of other interventions."""
        if len(state.get("interventions", ())) != len(self.interventions):
            raise ValueError("the saved optimiser is of a run with other interventions")
        self.inner.load_state_dict(state["optimizer"])
        self.learner.steps = state["steps"]
        for intervention, saved in zip(self.interventions, state["interventions"], strict=True):
            intervention.load_state_dict(saved)
        for generator, saved in zip(self.learner.generators, state["generators"], strict=True):
            generator.set_state(saved)


def other_optimizer(
    network: nn.Module, learner: Learner, interventions: Sequence[Intervention], learning_rate: float
) -> MemberOptimizer | None:
    """That of an intervention, made the learner's own; None if none has one.

    network: as the learner's, of one member or of all; its modules tell what is what.
    """
    views = {name: learner.parameter(name) for name, _ in learner.network.named_parameters()}
    for intervention in interventions:
        optimizer = intervention.optimizer(network, views, learning_rate, stacked=True)
        if optimizer is not None:
            learner.optimizer, learner.optimized = optimizer, views
            return MemberOptimizer(optimizer, learner, learning_rate)
    return None


def brings_optimizer(intervention: Intervention) -> bool:
    """Whether it replaces the optimiser."""
    return type(intervention).optimizer is not Intervention.optimizer


def check_fits(intervention: Intervention, whose: str) -> None:
    """Raises ValueError for what only the harness offers. whose: "agents", for the message."""
    for needs, what in (
        (isinstance(intervention, AdaptiveBatch), f"sets the size of the batch, and that of {whose} is given"),
        (intervention.needs_inputs, f"runs the network on the inputs of a step, which {whose} do not hand on"),
    ):
        if needs:
            raise ValueError(
                f"{type(intervention).__name__} {what}; it is for `neoteny plasticity`, "
                f"{whose} take for example nap, redo, l2-init"
            )
