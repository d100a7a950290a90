"""Which weights of a normalised network matter by their direction only, and how to hold their norms.

Normalize-and-Project, Lyle et al. 2024 (arXiv:2407.01800). Norms are Frobenius norms of whole tensors, not of rows:
scaling one row in front of a LayerNorm changes the function, scaling the tensor does not. Weights that are summed in
front of one normaliser share a radius.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plasticity.networks import tracing
from plasticity.networks.structure import Normalised, Structure, find_structure, table

# act(c x) = c act(x) for c > 0: scaling gain and offset together scales the units.
HOMOGENEOUS = {"relu", "leaky_relu", "prelu", "crelu"}


@dataclass(frozen=True)
class Group:
    """Tensors that are scaled together, to the joint Frobenius norm `radius`.

    leading: axes of members in front of each tensor (0 of an ordinary network); radius has their shape.
    exact: scaling them together leaves the network's function as it is, up to the normaliser's epsilon.
    """

    tensors: tuple[str, ...]
    radius: Tensor
    leading: int
    exact: bool
    normalisers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gain:
    """Gain and offset (None: without) that a normaliser applies in front of a nonlinearity."""

    gain: str
    offset: str | None
    nonlinearity: str
    leading: int


@dataclass(frozen=True)
class Plan:
    """What is projected and what is not; prints as a table. Radii are those of the network at planning.

    power: p of the effective learning rate, 2 where the step follows the gradient's scale (SGD), 1 where not (Adam).
    heads: weights that no normaliser follows. unprojected: other weights left alone. gains: in front of nonlinearities.
    """

    groups: tuple[Group, ...]
    heads: tuple[str, ...]
    unprojected: tuple[str, ...] = ()
    gains: tuple[Gain, ...] = ()
    power: int = 1

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("projected weights", "radius", "function kept", "normalised by")]
        for group in self.groups:
            radius = group.radius.double()
            spread = f"{float(radius.min()):.4g}"
            if radius.numel() > 1:
                spread += f"..{float(radius.max()):.4g}"
            kept = "yes" if group.exact else "nearly"
            rows.append((" + ".join(group.tensors), spread, kept, ", ".join(group.normalisers) or "-"))
        gains = [name for pair in self.gains for name in (pair.gain, pair.offset) if name]
        others = {"heads": self.heads, "not projected": self.unprojected, "gains and offsets": gains}
        return "\n".join([table(rows), *(f"{name}: {', '.join(found)}" for name, found in others.items() if found)])

    def to_json(self) -> dict[str, Any]:
        """Plain values, to be saved with a run; radii as nested lists."""
        groups = [
            {"tensors": list(g.tensors), "radius": g.radius.tolist(), "exact": g.exact, "normalisers": g.normalisers}
            for g in self.groups
        ]
        gains = [[pair.gain, pair.offset] for pair in self.gains]
        rest = {"heads": self.heads, "unprojected": self.unprojected, "gains": gains, "power": self.power}
        return {"groups": groups, **rest}


def plan(
    network: nn.Module,
    strict: bool = True,
    *,
    structure: Structure | None = None,
    members: int | None = None,
    power: int = 1,
    joint_biases: bool = False,
    streams: Literal["joint", "each"] = "joint",
) -> Plan:
    """What NaP projects in this network, with its present norms as radii.

    strict: every nonlinearity has a normaliser in front and no bias in front of that; else whatever feeds a
    nonlinearity is projected, though the function changes. joint_biases: biases in front of a normaliser are scaled
    with their weights instead. members: of a population, needed only if weights belong to layers of unknown types.

    streams: weights that write into one residual stream share one radius, which keeps the function ("joint"); or each
    has its own, and its norm stays though the function changes ("each"). Embeddings and positions are projected only as
    part of such a group. Queries, keys, values and factorised layers are projected each on its own.

    Raises ValueError naming what is in the way: a bare nonlinearity or a bias (strict), BatchNorm, tied, partly frozen,
    all-zero or integer weights, and what `find_structure` refuses.
    """
    structure = find_structure(network) if structure is None else structure
    parameters = dict(network.named_parameters())
    _check_ties(network)
    if strict:
        _check_batch_normalisers(network)
        _check_normalised(structure, joint_biases)
    found = [part for group in structure.normalised for part in _parts(group, streams, structure.tables)]
    taken = {name for names, *_ in found for name in names}
    alone = [layer.weights for layer in structure.hidden] + [(name,) for name in structure.inner]
    found += [(names, (), False) for names in dict.fromkeys(alone) if not taken & set(names)]
    biases = {group.weights: group.biases for group in structure.normalised} if joint_biases else {}
    leading = tracing.leading_axes(network, members)
    groups, frozen = [], []
    for names, normalisers, exact in found:
        tensors = names + biases.get(names, ())
        _check_weights(parameters, tensors)
        if not parameters[tensors[0]].requires_grad:
            frozen += tensors
            continue
        axes = leading[names[0]]
        radius = torch.stack([_norm(parameters[name].detach(), axes).square() for name in tensors]).sum(0).sqrt()
        groups.append(Group(tensors, radius, axes, exact, normalisers))
    _check_radii(groups)
    gains = tuple(
        dict.fromkeys(
            Gain(layer.gain, layer.offset, layer.nonlinearity, leading[layer.gain])
            for layer in structure.hidden
            if layer.gain is not None
        )
    )
    projected = {name for group in groups for name in group.tensors}
    rest = tuple(name for name in (*structure.tables, *frozen) if name not in projected)
    return Plan(tuple(groups), structure.heads, rest, gains, power)


def _parts(
    group: Normalised, streams: str, tables: tuple[str, ...]
) -> list[tuple[tuple[str, ...], tuple[str, ...], bool]]:
    """(weights, normalisers, exact) of the projection groups that a scale-invariant group gives."""
    if streams == "joint" or len(group.normalisers) == 1:
        return [(group.weights, group.normalisers, group.exact)]
    return [((name,), group.normalisers, False) for name in group.weights if name not in tables]


def _check_ties(network: nn.Module) -> None:
    names: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if names.setdefault(id(parameter), name) != name:
            raise ValueError(f"'{names[id(parameter)]}' and '{name}' are one tensor; NaP needs weights of their own")


_BATCH_NORMALISED = (
    "'{}' is a BatchNorm, whose statistics tie samples to each other and to the past; "
    "NaP needs one per sample: convert(network, replace_batch_norm=True) puts GroupNorm(1) there"
)


def _check_batch_normalisers(network: nn.Module) -> None:
    """Raises ValueError also for one that no weights reach without a nonlinearity between."""
    for name, module in network.named_modules():
        if tracing.is_batch_normaliser(module):
            raise ValueError(_BATCH_NORMALISED.format(name))


def _check_normalised(structure: Structure, joint_biases: bool) -> None:
    normalised = {name for group in structure.normalised for name in group.weights}
    for layer in structure.hidden:
        bare = [name for name in layer.weights if name not in normalised]
        if bare:
            raise ValueError(
                f"no normaliser between '{bare[0]}' and the {layer.nonlinearity} '{layer.name}'; put one there, "
                "for example with plasticity.networks.normalisation.convert"
            )
    for group in structure.normalised:
        if group.batch:
            raise ValueError(_BATCH_NORMALISED.format(group.normalisers[0]))
        if group.biases and not joint_biases:
            raise ValueError(
                f"the bias '{group.biases[0]}' in front of '{group.normalisers[0]}' breaks scale invariance; remove it "
                "or project it with its weights (joint_biases)"
            )


def _check_weights(parameters: Mapping[str, nn.Parameter], names: Iterable[str]) -> None:
    tensors = {name: parameters[name] for name in names}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"'{name}' holds {tensor.dtype}, which cannot be projected; make it a floating-point weight"
            )
    if len({tensor.requires_grad for tensor in tensors.values()}) > 1:
        frozen = next(name for name, tensor in tensors.items() if not tensor.requires_grad)
        raise ValueError(f"'{frozen}' is frozen but shares a radius with weights that learn; freeze all or none")


def _check_radii(groups: Sequence[Group]) -> None:
    smallest = torch.stack([group.radius.min() for group in groups]).tolist() if groups else []
    for group, radius in zip(groups, smallest, strict=True):
        if not 0 < radius < math.inf:
            raise ValueError(f"the norm of '{group.tensors[0]}' is {radius:g}: NaP cannot hold it")


def _norm(tensor: Tensor, leading: int) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=tuple(range(leading, tensor.dim())))


def gain_groups(plan: Plan, parameters: Mapping[str, Tensor]) -> tuple[Group, ...]:
    """The groups that hold each gain and offset together at √d, their norm at gain 1 and offset 0 (d features).

    It keeps the function only where the next weights are normalised without a bias; behind the last hidden layer it
    scales the outputs. Raises ValueError for a nonlinearity that is not homogeneous.
    """
    groups = []
    for pair in plan.gains:
        if pair.nonlinearity not in HOMOGENEOUS:
            raise ValueError(
                f"'{pair.gain}' cannot be held at one norm: {pair.nonlinearity}(c x) is not c times its value"
            )
        gain = parameters[pair.gain]
        members = gain.shape[: pair.leading]
        features = gain.numel() // max(members.numel(), 1)
        radius = torch.full(members, math.sqrt(features), dtype=gain.dtype, device=gain.device)
        groups.append(Group((pair.gain, *((pair.offset,) if pair.offset else ())), radius, pair.leading, False))
    return tuple(groups)


class _Batch:
    """Groups with member axes of one shape, handled together. index: the group of each tensor; None: one each."""

    def __init__(self, groups: Sequence[Group], parameters: Mapping[str, Tensor]):
        self.groups, self.leading = groups, groups[0].leading
        self.tensors = [parameters[name].detach() for group in groups for name in group.tensors]
        self.radii = torch.stack([group.radius for group in groups])  # [groups, *members]
        self.smallest = torch.finfo(self.radii.dtype).tiny
        self.index: Tensor | None = None
        if len(self.tensors) > len(groups):
            index = [i for i, group in enumerate(groups) for _ in group.tensors]
            self.index = torch.tensor(index, device=self.radii.device)
        # One axis behind those of members is quicker to reduce and to scale than several; a bias has none of its own.
        self.flat = [t.view(*t.shape[: self.leading], -1) if t.is_contiguous() else t for t in self.tensors]
        # Where they allow it, one number for each tensor and member in memory of its own: half the operations.
        self.factors = torch.ones_like(self.radii).unsqueeze(-1)
        alike = self.leading > 0 and self.index is None and all(t.dim() == self.leading + 1 for t in self.flat)
        self.each = list(self.factors.unbind()) if alike else []
        self.radius_of_each = self.radii.unsqueeze(-1)

    def norms(self) -> Tensor:
        """[groups, *members]."""
        if self.leading:
            norms = torch.stack([_norm(tensor, self.leading) for tensor in self.flat])
        else:
            norms = torch.stack(torch._foreach_norm(self.tensors))
        if self.index is None:
            return norms
        return torch.zeros_like(self.radii).index_add_(0, self.index, norms.square()).sqrt_()

    def spread(self, values: Tensor) -> list[Tensor]:
        """values [groups, *members] or [groups] -> one for each of `flat`, that broadcasts with it."""
        each = values if self.index is None else values[self.index]
        if not self.leading:
            return list(each.unbind())
        each = each.view(len(each), *[1] * (self.radii.dim() - each.dim()), *each.shape[1:], 1)
        if all(tensor.dim() == each.dim() - 1 for tensor in self.flat):
            return list(each.unbind())
        return [v[(..., *[None] * (t.dim() - v.dim()))] for v, t in zip(each.unbind(), self.flat, strict=True)]

    def project_(self) -> None:
        for tensor, factor in zip(self.flat, self.each, strict=False):
            torch.linalg.vector_norm(tensor, dim=-1, keepdim=True, out=factor)
        excess = self.factors.div_(self.radius_of_each) if self.each else self.norms() / self.radii
        # Nothing to divide by if a norm is not finite; zeros stay zeros. A product takes half the time of a quotient.
        factors = excess.nan_to_num_(1.0, 1.0).clamp_(min=self.smallest).reciprocal_()
        torch._foreach_mul_(self.flat if self.leading else self.tensors, self.each or self.spread(factors))


class Projection:
    """Groups bound to the tensors of a network, which it rescales in place.

    A tensor that is all zero or not finite is left as it is.
    """

    def __init__(self, groups: Iterable[Group], parameters: Mapping[str, Tensor]):
        alike: dict[Any, list[Group]] = {}
        for group in groups:
            alike.setdefault((group.radius.shape, group.radius.dtype), []).append(group)
        self.batches = [_Batch(some, parameters) for some in alike.values()]

    @property
    def names(self) -> list[str]:
        """Of the first tensor of each group."""
        return [group.tensors[0] for batch in self.batches for group in batch.groups]

    @property
    def tensors(self) -> list[Tensor]:
        """All that are projected, sharing memory with the network's."""
        return [tensor for batch in self.batches for tensor in batch.tensors]

    @torch.no_grad()
    def growth(self) -> list[Tensor]:
        """||u|| / radius of each group, in the order of `names`, [*members] each."""
        return [part for batch in self.batches for part in (batch.norms() / batch.radii).unbind()]

    def project_(self) -> None:
        """u <- u radius / ||u|| for all groups at once, on the device."""
        for batch in self.batches:
            batch.project_()

    @torch.no_grad()
    def shorten_(self, before: Sequence[Tensor], parts: Tensor) -> None:
        """Take back all but a part of what moved the tensors away from `before` (in the order of `tensors`).

        parts: of each group, [G] or [G, *members].
        """
        at = 0
        for batch in self.batches:
            some = parts[at : at + len(batch.groups)]
            kept, before = before[: len(batch.tensors)], before[len(batch.tensors) :]
            for old, tensor, part in zip(kept, batch.flat, batch.spread(some.to(batch.radii)), strict=True):
                old = old.view(tensor.shape)
                tensor.copy_(old + (tensor - old) * part)
            at += len(batch.groups)

    def set_radii(self, groups: Iterable[Group]) -> None:
        """Take over the radii of the same groups."""
        radii = {group.tensors: group.radius for group in groups}
        for batch in self.batches:
            batch.radii.copy_(torch.stack([radii[group.tensors] for group in batch.groups]))

    def zero_norms(self) -> Tensor:
        """How many groups (each member's counts) are all zero, []."""
        return torch.stack([(part == 0).sum() for part in self.growth()]).sum()


def project_(parameters: Mapping[str, Tensor], plan: Plan) -> None:
    """Scale each group of the plan back to its radius, in place. Heads and optimiser states are not touched."""
    Projection(plan.groups, parameters).project_()


def elr(
    parameters: Mapping[str, Tensor], plan: Plan, learning_rate: float, initial_learning_rate: float | None = None
) -> dict[str, Tensor]:
    """Effective learning rate of each group relative to initialisation: (η / η₀) (radius / ||u||)^p, [*members].

    By the name of the group's first tensor. initial_learning_rate: η₀, default `learning_rate`.
    """
    projection = Projection(plan.groups, parameters)
    rate = learning_rate / (learning_rate if initial_learning_rate is None else initial_learning_rate)
    return {n: rate * growth**-plan.power for n, growth in zip(projection.names, projection.growth(), strict=True)}
