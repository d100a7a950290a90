"""What the optimisers of this folder share: a step is first proposed, then applied in whole or in part."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plasticity.intervention import Batch, Intervention, Learner


@dataclass(frozen=True)
class Group:
    """The parameters of one parameter group that have a gradient. options: of the group, with "lr"."""

    options: dict[str, Any]
    parameters: list[Tensor]
    gradients: list[Tensor]


class ProposingOptimizer(torch.optim.Optimizer):
    """An optimiser whose `step()` is `propose()` and then `apply()`.

    stacked: parameters have a leading axis of members. Parameters without gradient are skipped. `parameter.grad` is
    only read. shared: state that belongs to no single parameter, saved with the rest. proposed: the parameters that the
    last proposal moves, in its order.
    """

    def __init__(self, parameters: Iterable[Any], defaults: dict[str, Any], stacked: bool = False):
        at_least("lr", defaults["lr"], 0)
        at_least("weight_decay", defaults.get("weight_decay", 0), 0)
        super().__init__(parameters, defaults)
        self.stacked = stacked
        self.shared: dict[str, Tensor] = {}
        self.proposed: list[Tensor] = []
        self._proposal: list[Tensor] = []

    @torch.no_grad()
    def propose(self) -> list[Tensor]:
        """What the next step adds to each of `proposed`: learning rate and weight decay included. Advances the state.

        Raises ValueError for a sparse gradient.
        """
        groups = []
        for options in self.param_groups:
            parameters = [p for p in options["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in parameters):
                raise ValueError(f"{type(self).__name__} takes dense gradients; one is sparse")
            if parameters:
                groups.append(Group(options, parameters, [p.grad for p in parameters]))
        self.proposed = [p for group in groups for p in group.parameters]
        self._proposal = self._propose(groups) if groups else []
        return self._proposal

    @abstractmethod
    def _propose(self, groups: Sequence[Group]) -> list[Tensor]:
        """The proposals for the parameters of all groups, in their order; new tensors."""

    @torch.no_grad()
    def apply(self, scale: Tensor | float = 1.0) -> None:
        """Move the parameters by a part of the last proposal. scale: a number, or one for each member: [K]."""
        steps = self._proposal
        if isinstance(scale, Tensor):
            steps = [self.part(step, scale) for step in steps]
        elif scale != 1.0:
            steps = torch._foreach_mul(steps, scale)
        if steps:
            torch._foreach_add_(self.proposed, steps)
        self._proposal = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One whole step. closure: recomputes the gradients and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.propose()
        self.apply()
        return loss

    def members(self, tensor: Tensor) -> Tensor:
        """A parameter or its like as [K, *shape]; K = 1 if parameters are not stacked. Shares memory."""
        return tensor if self.stacked else tensor.unsqueeze(0)

    def member_count(self) -> int:
        """K; 1 if parameters are not stacked."""
        return self.members(self.param_groups[0]["params"][0]).shape[0]

    def part(self, step: Tensor, scale: Tensor) -> Tensor:
        """A part, scale [K], of a step that is of a parameter's shape; no part of an infinite step is zero."""
        scale = scale.view(-1, *[1] * (step.dim() - 1)) if self.stacked else scale.squeeze(0)
        return torch.where(scale == 0, 0.0, step * scale)

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimiser, and `shared`."""
        return {**super().state_dict(), "shared": self.shared}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if it does not fit."""
        if {n: t.shape for n, t in state_dict["shared"].items()} != {n: t.shape for n, t in self.shared.items()}:
            raise ValueError(f"the saved state is not one of {type(self).__name__} for this many members")
        super().load_state_dict(state_dict)
        for name, tensor in state_dict["shared"].items():
            self.shared[name].copy_(tensor)


def at_least(name: str, value: Any, least: float) -> None:
    """Raises ValueError if `value` is smaller than `least` or not a number."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def fraction(name: str, value: float) -> None:
    """Raises ValueError unless 0 <= value < 1, as for the decay of a running mean."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def scaled_step(learner: Learner, batch: Batch, interventions: Sequence[Intervention]) -> Tensor:
    """A step of the learner's `ProposingOptimizer`, scaled by the interventions with `scales_steps`, in their order.

    Gradients are in `parameter.grad`. Returns the part of the step that was taken, [K].
    """
    optimizer = learner.optimizer
    steps = optimizer.propose()
    names = {id(parameter): name for name, parameter in learner.network.named_parameters()}
    proposal = {names[id(p)]: step for p, step in zip(optimizer.proposed, steps, strict=True)}
    taken = torch.ones(learner.members or 1, device=batch.inputs.device)
    for intervention in interventions:
        if intervention.scales_steps:
            scale = intervention.scale_step(learner, batch, proposal)
            proposal = {name: optimizer.part(step, scale) for name, step in proposal.items()}
            taken = taken * scale
    optimizer.apply(taken)
    return taken
