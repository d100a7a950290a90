"""What the optimisers of this folder share: a step is first proposed, then applied in whole or in part."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plasticity.denormals import denormals_as_zero
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
    last proposal moves, in its order. taken: by how much the last step moved them.
    """

    def __init__(self, parameters: Iterable[Any], defaults: dict[str, Any], stacked: bool = False):
        at_least("lr", defaults["lr"], 0)
        at_least("weight_decay", defaults.get("weight_decay", 0), 0)
        self.stacked = stacked
        super().__init__(parameters, defaults)
        self.shared: dict[str, Tensor] = {}
        self.proposed: list[Tensor] = []
        self.taken: list[Tensor] = []
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
        with denormals_as_zero():
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
            steps = list(torch._foreach_mul(steps, scale))
        if steps:
            torch._foreach_add_(self.proposed, steps)
        self.taken, self._proposal = steps, []

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

    def flat(self, tensor: Tensor) -> Tensor:
        """A parameter or its like as [K, numel]."""
        return tensor.reshape(self.member_count(), -1)

    def member_count(self) -> int:
        """K; 1 if parameters are not stacked."""
        return next(p for group in self.param_groups for p in group["params"]).shape[0] if self.stacked else 1

    def part(self, step: Tensor, scale: Tensor) -> Tensor:
        """A part, scale [K], of a step that is of a parameter's shape; no part of an infinite step is zero."""
        scale = scale.to(step.dtype)
        scale = scale.view(-1, *[1] * (step.dim() - 1)) if self.stacked else scale.squeeze(0)
        return torch.where(scale == 0, 0.0, step * scale)

    @torch.no_grad()
    def movement(self) -> dict[str, list[Tensor]]:
        """How the last step moved each of `proposed`; every measure [K].

        norm: of the parameter before the step. relative_step: norm of the step over it. angle: between the parameter
        before and after, in radians.
        """
        after = [self.flat(p) for p in self.proposed]
        steps = [self.flat(step) for step in self.taken]
        before = [p - step for p, step in zip(after, steps, strict=True)]
        norms = [p.norm(dim=1) for p in before]
        return {
            "norm": norms,
            "relative_step": [step.norm(dim=1) / norm for step, norm in zip(steps, norms, strict=True)],
            "angle": [
                torch.cosine_similarity(p, q, dim=1).clamp(-1, 1).acos() for p, q in zip(before, after, strict=True)
            ],
        }

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


def adam_proposal(optimizer: ProposingOptimizer, group: Group) -> list[Tensor]:
    """-lr * m / (sqrt(v) + eps) with bias correction (Kingma & Ba 2015, algorithm 1), one for each parameter.

    Reads "lr", "betas" and "eps" of the group. The fused kernel moves zeros in place of the parameters.
    """
    states = [adam_state(optimizer, p) for p in group.parameters]
    steps = [torch.zeros_like(p) for p in group.parameters]
    torch._foreach_add_([state["step"] for state in states], 1)
    beta1, beta2 = group.options["betas"]
    torch._fused_adam_(
        steps,
        group.gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        lr=group.options["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=group.options["eps"],
        amsgrad=False,
        maximize=False,
    )
    return steps


def adam_state(optimizer: ProposingOptimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The moments of a parameter, zero before its first step."""
    state = optimizer.state[parameter]
    if "step" not in state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state


def momentum_buffers(optimizer: ProposingOptimizer, group: Group) -> list[Tensor]:
    """The state "momentum_buffer" of the group's parameters, zero before their first step."""
    for p in group.parameters:
        if "momentum_buffer" not in optimizer.state[p]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return [optimizer.state[p]["momentum_buffer"] for p in group.parameters]


def decay(group: Group, steps: list[Tensor], factors: Sequence[Tensor | float] | None = None) -> None:
    """Add decoupled weight decay, -lr * weight_decay * factor * parameter, to the steps in place.

    factors: one for each parameter, a number or a tensor that broadcasts against it; all 1 if left out.
    """
    rate = group.options["lr"] * group.options["weight_decay"]
    if not rate:
        return
    if factors is None:
        torch._foreach_add_(steps, group.parameters, alpha=-rate)
        return
    for step, parameter, factor in zip(steps, group.parameters, factors, strict=True):
        step.sub_(rate * factor * parameter)


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
