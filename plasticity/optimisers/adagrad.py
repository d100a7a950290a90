"""AdaGrad with one step size for all, for each neuron or for each weight (Duchi et al. 2011; Ward et al. 2019), and
with batches that grow as a test of the gradient's noise asks (AdAdaGrad, Lau et al. 2024, arXiv:2402.11215).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from plasticity.optimisers.proposing import Group, ProposingOptimizer, at_least, decay

Granularity = Literal["global", "row", "coordinate"]


class AdaGrad(ProposingOptimizer):
    """s <- s + |g|^2; p <- p - lr g / (sqrt(s) + eps), with the norm over everything that shares a step size.

    granularity: "global" (AdaGradNorm: all parameters), "row" (each output unit; a vector as a whole) or "coordinate"
    (AdaGrad). initial: s before the first step. shared: "squares", [K], if global.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        granularity: Granularity = "global",
        initial: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        stacked: bool = False,
    ):
        super().__init__(params, adagrad_defaults(lr, granularity, initial, eps, weight_decay), stacked)
        self.shared = global_squares(self)

    def _propose(self, groups: Sequence[Group]) -> list[Tensor]:
        steps = []
        for group, proposals in zip(groups, adagrad_steps(self, groups), strict=True):
            decay(group, proposals)
            steps += proposals
        return steps


class AdAdaGrad(ProposingOptimizer):
    """AdaGrad on batches of a size of its own: gradients add up until they are a batch, and only then it steps.

    Every gradient handed in is the mean over a micro-batch of the same size, m samples. Sizes are counted in micro-
    batches; b samples are b / m. After each step the norm test asks for batches of |b| >= Var / (eta |mean|)^2 samples,
    where Var, the summed variance of one sample's gradient, is m times that between micro-batches. A size never
    shrinks. first, largest: sizes at the start and at most. Weight decay is at each step of the optimiser.

    shared: "size", "seen" (micro-batches since the last step), "squares_seen" (the sum of their squared norms) and
    "updates", [K] each.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eta: float = 0.5,
        first: int = 2,
        largest: int = 1024,
        granularity: Granularity = "global",
        initial: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        stacked: bool = False,
    ):
        if not eta > 0:
            raise ValueError(f"eta must be positive, got {eta}")
        at_least("first", first, 2)
        at_least("largest", largest, first)
        super().__init__(params, adagrad_defaults(lr, granularity, initial, eps, weight_decay), stacked)
        self.eta, self.first, self.largest = eta, first, largest
        zero = self.param_groups[0]["params"][0].detach().new_zeros(self.member_count())
        counts = {"size": zero + first, "seen": zero.clone(), "squares_seen": zero.clone(), "updates": zero.clone()}
        self.shared = {**global_squares(self), **counts}

    def _propose(self, groups: Sequence[Group]) -> list[Tensor]:
        seen = self.shared["seen"].add_(1)
        gradients = [g for group in groups for g in group.gradients]
        squares = self.shared["squares_seen"].add_(squared_norm(self, gradients))
        sums = [self._gradient_sums(group) for group in groups]
        ready = (seen >= self.shared["size"]).to(seen.dtype)
        batches = [
            Group(group.options, group.parameters, [self.part(total, ready / seen) for total in totals])
            for group, totals in zip(groups, sums, strict=True)
        ]
        self._choose_size([g for batch in batches for g in batch.gradients], ready)
        steps = []
        for batch, totals, proposals in zip(batches, sums, adagrad_steps(self, batches), strict=True):
            decay(batch, proposals)
            steps += [self.part(step, ready) for step in proposals]
            torch._foreach_copy_(totals, [self.part(total, 1 - ready) for total in totals])
        seen.mul_(1 - ready)
        squares.mul_(1 - ready)
        self.shared["updates"].add_(ready)
        return steps

    def _gradient_sums(self, group: Group) -> list[Tensor]:
        """Since the last step of each member, with the gradients at hand."""
        for p in group.parameters:
            if "gradient_sum" not in self.state[p]:
                self.state[p]["gradient_sum"] = torch.zeros_like(p)
        sums = [self.state[p]["gradient_sum"] for p in group.parameters]
        torch._foreach_add_(sums, group.gradients)
        return sums

    def _choose_size(self, means: Sequence[Tensor], ready: Tensor) -> None:
        """The norm test for members with a whole batch; their means are zero otherwise."""
        seen, size = self.shared["seen"], self.shared["size"]
        square = squared_norm(self, means)
        variance = ((self.shared["squares_seen"] - seen * square) / (seen - 1).clamp_min(1)).clamp_min(0)
        wanted = torch.where(square > 0, (variance / (self.eta**2 * square)).ceil(), self.largest)
        wanted = torch.maximum(size, wanted).clamp_max(self.largest)
        size.copy_(torch.where(ready > 0, wanted, size))

    def reset_size(self) -> None:
        """Back to the first size, at the start of a new task."""
        self.shared["size"].fill_(self.first)


def adagrad_defaults(
    lr: float, granularity: Granularity, initial: float, eps: float, weight_decay: float
) -> dict[str, Any]:
    """The options of a parameter group. Raises ValueError if one is out of range."""
    at_least("initial", initial, 0)
    at_least("eps", eps, 0)
    if granularity not in get_args(Granularity):
        raise ValueError(f"unknown granularity '{granularity}'")
    return {"lr": lr, "granularity": granularity, "initial": initial, "eps": eps, "weight_decay": weight_decay}


def global_squares(optimizer: ProposingOptimizer) -> dict[str, Tensor]:
    """The shared state of global granularity; none for the others. Raises ValueError if groups differ in it."""
    granularities = {group["granularity"] for group in optimizer.param_groups}
    if granularities == {"global"}:
        first = optimizer.param_groups[0]
        return {"squares": first["params"][0].detach().new_full((optimizer.member_count(),), first["initial"])}
    if "global" in granularities:
        raise ValueError("granularity 'global' is for all parameter groups or none")
    return {}


def adagrad_steps(optimizer: ProposingOptimizer, groups: Sequence[Group]) -> list[list[Tensor]]:
    """-lr g / (sqrt(s) + eps) for the parameters of each group, s advanced."""
    if "squares" not in optimizer.shared:
        return [_own_steps(optimizer, group) for group in groups]
    square = squared_norm(optimizer, [g for group in groups for g in group.gradients])
    root = optimizer.shared["squares"].add_(square).sqrt()
    rates = [-group.options["lr"] / (root + group.options["eps"]) for group in groups]
    return [[optimizer.part(g, rate) for g in group.gradients] for group, rate in zip(groups, rates, strict=True)]


def _own_steps(optimizer: ProposingOptimizer, group: Group) -> list[Tensor]:
    """With a step size for each row or coordinate."""
    options = group.options
    steps = []
    for p, g in zip(group.parameters, group.gradients, strict=True):
        gradient = optimizer.members(g)
        squares = gradient.square()
        if options["granularity"] == "row" and squares.dim() > 1:
            squares = squares.sum(tuple(range(min(2, squares.dim() - 1), squares.dim())), keepdim=True)
        state = optimizer.state[p]
        if "squares" not in state:
            state["squares"] = torch.full_like(squares, options["initial"])
        root = state["squares"].add_(squares).sqrt()
        steps.append((gradient * (-options["lr"] / (root + options["eps"]))).view_as(p))
    return steps


def squared_norm(optimizer: ProposingOptimizer, tensors: Sequence[Tensor]) -> Tensor:
    """Of all tensors, which are of the parameters' shapes, together; of each member: [K]."""
    return torch.stack([optimizer.flat(t).norm(dim=1) for t in tensors]).square().sum(0)
