"""What a network can still learn: copies of its weights, trained on fresh targets, against fresh networks.

Copies of the checkpoint and newly initialised networks of the same architecture see the same batches of the same
targets under a fresh optimiser; the gap between their scores, in the mean over all steps, is the plasticity that is
lost. Targets are drawn several times; all draws and arms train as one stacked population. Two further questions per
layer: does re-initialising it alone bring the ability back, and do the features up to it still serve, if they are
frozen and what reads them is fresh, as well as those of a fresh network?

Plasticity as what is left to learn on fresh targets: Lyle et al. 2023, arXiv:2303.01486. The families, the pairing and
the comparison at several rates are ours (specs/nap-and-plasticity.md, section 4.6).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from plasticity.adam import Adam
from plasticity.networks.functional import evaluating
from plasticity.networks.stacked import stack
from plasticity.problems.losses import member_losses, member_scores
from plasticity.problems.streams import generator

Fresh = Callable[[torch.Generator], nn.Module]

_HELD = 2**26  # parameters trained at a time, 1 GiB with gradients and moments in float32
_NUMBERS = 2**24  # numbers of input evaluated at a time, 64 MiB of float32
_POINTS = 30  # of a learning curve
_INITIALISATION, _TARGETS, _ORDER = range(3)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How copies and fresh networks are trained. Raises ValueError for a number out of range.

    factors: learning rates that are also tried, as multiples of the first one. layers: also ask layer by layer.
    """

    steps: int = 300
    batch_size: int = 64
    draws: int = 5
    learning_rate: float = 1e-3
    factors: tuple[float, ...] = (1 / 3, 3.0)
    optimizer: Literal["adam", "sgd"] = "adam"
    layers: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "draws"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclass(frozen=True)
class Draws:
    """D draws of fresh targets of one family.

    inputs [D, N, ...], or [1, N, ...] if all draws share them; targets [D, N] (classes) or [D, N, O] (numbers of zero
    mean and unit variance). held_inputs, held_targets: of samples that are not trained on, where that has a sense.
    """

    family: str
    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor | None = None
    held_targets: Tensor | None = None

    @property
    def chance(self) -> Tensor:
        """The score of whoever says the same for all inputs, [D]."""
        if self.targets.is_floating_point():
            return torch.zeros(len(self.targets), device=self.targets.device)
        return torch.stack([row.bincount().max() / len(row) for row in self.targets])


class Arm(NamedTuple):
    """What is trained: "checkpoint" or "fresh" as a whole; "reinitialised": the checkpoint with one fresh layer;
    "features", "fresh features": the layers up to one of them frozen as they are in either, all behind it fresh."""

    kind: Literal["checkpoint", "fresh", "reinitialised", "features", "fresh features"]
    layer: str | None = None


CHECKPOINT, FRESH = Arm("checkpoint"), Arm("fresh")


@dataclass(frozen=True)
class Learnt:
    """How one arm did at one rate, one row for each of D draws. Scores: accuracy, or the share of variance explained.

    curve [D, T]: score on each batch before it is learnt, in T bins of steps. online [D]: its mean. fitted [D]: score
    on all training samples at the end. held_out [D]: on the others.
    """

    curve: Tensor
    online: Tensor
    fitted: Tensor
    held_out: Tensor | None


@dataclass(frozen=True)
class Probed:
    """Everything measured on one family of targets. results: by learning rate, then arm; all arms at `rate`, the whole
    networks at the others too. chance [D]: see `Draws`."""

    family: str
    chance: Tensor
    rate: float
    layers: tuple[str, ...]
    results: dict[float, dict[Arm, Learnt]]

    def best_rate(self, arm: Arm) -> float:
        """At which the arm scored best, in the mean over draws."""
        return max(self.results, key=lambda rate: float(self.results[rate][arm].online.mean()))

    def online(self, arm: Arm, rate: float | None = None) -> Tensor:
        """Mean score over all steps, [D]."""
        return self.results[self.rate if rate is None else rate][arm].online

    def gap(self, arm: Arm = CHECKPOINT) -> Tensor:
        """Fresh minus arm, paired by draw, at the one rate, [D]: above 0 if plasticity is lost."""
        return self.online(FRESH) - self.online(arm)

    def gap_at_best_rates(self) -> Tensor:
        """The same with the best of all rates for either, [D]: small if only the step size was wrong."""
        best = {arm: self.best_rate(arm) for arm in (FRESH, CHECKPOINT)}
        return self.online(FRESH, best[FRESH]) - self.online(CHECKPOINT, best[CHECKPOINT])

    def held_out_gap(self) -> Tensor | None:
        """The gap on samples that were not trained on, [D]; None where nothing can be held out."""
        fresh, own = (self.results[self.rate][arm].held_out for arm in (FRESH, CHECKPOINT))
        return None if fresh is None or own is None else fresh - own

    def recovered(self, layer: str) -> Tensor:
        """What re-initialising one layer alone adds, [D]."""
        return self.online(Arm("reinitialised", layer)) - self.online(CHECKPOINT)

    def features_gap(self, layer: str) -> Tensor:
        """How much worse the frozen features up to a layer serve than those of a fresh network, [D]."""
        return self.online(Arm("fresh features", layer)) - self.online(Arm("features", layer))


def random_labels(inputs: Tensor, classes: int, draws: int, seed: int) -> Draws:
    """Labels drawn for each of inputs [N, ...] for itself: memorisation, so nothing can be held out."""
    sources = [generator(inputs.device, seed, "probe", _TARGETS, draw) for draw in range(draws)]
    labels = [torch.randint(classes, (len(inputs),), generator=g, device=inputs.device) for g in sources]
    return Draws("random labels", inputs.unsqueeze(0), torch.stack(labels))


def random_values(inputs: Tensor, outputs: int, draws: int, seed: int) -> Draws:
    """The same for networks whose outputs are no classes: a normal number for each input [N, ...] and output."""
    shape = len(inputs), outputs
    sources = [generator(inputs.device, seed, "probe", _TARGETS, draw) for draw in range(draws)]
    values = torch.stack([torch.randn(shape, generator=g, device=inputs.device) for g in sources])
    return Draws("random labels", inputs.unsqueeze(0), _standardised(values, values))


def random_network(inputs: Tensor, held_inputs: Tensor, fresh: Fresh, draws: int, seed: int) -> Draws:
    """Outputs of a fresh network, another one for each draw, on inputs [N, ...] and held-out inputs [M, ...]."""
    seen, others = [], []
    for draw in range(draws):
        with torch.random.fork_rng():
            target = fresh(generator(inputs.device, seed, "probe", _TARGETS, draw))
        with torch.no_grad(), evaluating(target):
            seen.append(target(inputs).flatten(1))
            others.append(target(held_inputs).flatten(1))
    values, held = torch.stack(seen), torch.stack(others)
    return Draws(
        "random network",
        inputs.unsqueeze(0),
        _standardised(values, values),
        held_inputs.unsqueeze(0),
        _standardised(held, values),
    )


def probe(network: nn.Module, fresh: Fresh, draws: Draws, settings: Settings, seed: int) -> Probed:
    """Train copies of `network` and networks of `fresh` on the same draws.

    network: maps [B, ...] to [B, O]; it is left as it is. fresh: draws one of the same architecture from a generator.
    Numbers are fitted in units of each network's own outputs, recentred: what it must do is replace the function it has
    by another one of the same size, whatever that size is. Raises ValueError if the two differ in parameters.
    """
    count, device = len(draws.targets), draws.targets.device
    sources = [generator(device, seed, "probe", _INITIALISATION, draw) for draw in range(count)]
    with torch.random.fork_rng():  # constructors of layers draw from the global generator
        new = [fresh(source) for source in sources]
    if _shapes(network) != _shapes(new[0]):
        raise ValueError("the network and a fresh one differ in the names or shapes of their parameters")
    layers = layers_of(network)
    arms = {FRESH: _Members(new, frozenset()), CHECKPOINT: _Members([network] * count, frozenset())}
    results = {
        rate: _train(arms, draws, settings, rate, seed)
        for rate in (settings.learning_rate, *(settings.learning_rate * factor for factor in settings.factors))
    }
    names = tuple(layers) if settings.layers else ()
    by_layer = _arms_by_layer(network, new, layers) if settings.layers else {}
    results[settings.learning_rate] |= _train(by_layer, draws, settings, settings.learning_rate, seed, new)
    return Probed(draws.family, draws.chance, settings.learning_rate, names, results)


def layers_of(network: nn.Module) -> dict[str, list[str]]:
    """Names of trained parameters by layer: those of one module, and of the normalisation behind it."""
    layers: dict[str, list[str]] = {}
    last = ""
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        module = name.rpartition(".")[0]
        if not layers or (module != last and _has_matrix(network.get_submodule(module))):
            last = module
            layers[last] = []
        layers[last].append(name)
    return layers


def _has_matrix(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters(recurse=False))


@dataclass(frozen=True)
class _Members:
    """The networks of one arm, one a draw, and the parameters that are not trained."""

    networks: Sequence[nn.Module]
    frozen: frozenset[str]


def _arms_by_layer(network: nn.Module, new: Sequence[nn.Module], layers: dict[str, list[str]]) -> dict[Arm, _Members]:
    arms: dict[Arm, _Members] = {}
    names, last = list(layers), list(layers)[-1]
    for layer in names:
        arms[Arm("reinitialised", layer)] = _Members([_mixed(network, net, layers[layer]) for net in new], frozenset())
        if layer == last:
            continue
        up_to = [name for part in names[: names.index(layer) + 1] for name in layers[part]]
        arms[Arm("features", layer)] = _Members([_mixed(net, network, up_to) for net in new], frozenset(up_to))
        arms[Arm("fresh features", layer)] = _Members(new, frozenset(up_to))
    return arms


@torch.no_grad()
def _mixed(network: nn.Module, other: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of `network` with some parameters of `other`."""
    mixed = copy.deepcopy(network)
    for name in names:
        mixed.get_parameter(name).copy_(other.get_parameter(name))
    return mixed


def _train(
    arms: dict[Arm, _Members],
    draws: Draws,
    settings: Settings,
    rate: float,
    seed: int,
    reference: Sequence[nn.Module] | None = None,
) -> dict[Arm, Learnt]:
    """All arms on all draws, as many at a time as memory holds; members never mix, so that changes nothing.

    reference: the fresh networks, if they are not among the arms.
    """
    if not arms:
        return {}
    first = next(iter(arms.values())).networks
    size = sum(p.numel() for p in first[0].parameters())
    together = max(1, _HELD // (size * len(first)))
    unit = _Task(stack(reference or arms[FRESH].networks), draws, 1).scale
    found: dict[Arm, Learnt] = {}
    names = list(arms)
    for start in range(0, len(names), together):
        chosen = names[start : start + together]
        found |= _train_together({arm: arms[arm] for arm in chosen}, draws, settings, rate, seed, unit)
    return found


def _train_together(
    arms: dict[Arm, _Members], draws: Draws, settings: Settings, rate: float, seed: int, unit: Tensor | None
) -> dict[Arm, Learnt]:
    """unit [D, 1, O]: standard deviation of a fresh network's outputs, the least that numbers are measured in."""
    count = len(draws.targets)
    network = stack([net for members in arms.values() for net in members.networks])
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    trained = _trained(named, arms, count)
    task = _Task(network.train(), draws, len(arms), unit)
    optimizer = _optimizer(settings.optimizer, list(named.values()), rate)
    order = _order(draws, settings, seed)
    scores = []
    for rows in order.unbind(1):
        outputs, targets = task.batch(rows)
        scores.append(task.score(outputs.detach(), targets))
        gradients = torch.autograd.grad(task.loss(outputs, targets), list(named.values()), materialize_grads=True)
        optimizer([g if mask is None else g * mask for g, mask in zip(gradients, trained, strict=True)])
    curve = torch.stack(scores, 1)
    bins = min(_POINTS, curve.shape[1])
    binned = torch.stack([part.mean(1) for part in curve.tensor_split(bins, 1)], 1)
    held = None if draws.held_inputs is None else task.held_out().split(count)
    rows = zip(binned.split(count), curve.mean(1).split(count), task.fitted().split(count), strict=True)
    return {
        arm: Learnt(*values, held_out=None if held is None else held[index])
        for index, (arm, values) in enumerate(zip(arms, rows, strict=True))
    }


class _Task:
    """Stacked members of A arms, arm by arm, in front of the draws that each arm has all of."""

    def __init__(self, network: nn.Module, draws: Draws, arms: int, unit: Tensor | None = None):
        self.network, self.draws, self.arms = network, draws, arms
        self.numbers = draws.targets.is_floating_point()
        self.centre = self.scale = None
        if self.numbers:
            outputs = self._outputs(draws.inputs)
            self.centre, self.scale = outputs.mean(1, keepdim=True), outputs.std(1, keepdim=True)
            if unit is not None:
                self.scale = torch.maximum(self.scale, self._repeated(unit))

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs, with their graph, and targets of the samples in rows [D, B] of each draw, [A D, B, ...]."""
        pick = torch.arange(len(rows), device=rows.device).unsqueeze(1)
        inputs = self.draws.inputs[pick if len(self.draws.inputs) > 1 else 0, rows]
        return self._normalised(self.network(self._repeated(inputs))), self._repeated(self.draws.targets[pick, rows])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed over members, []."""
        return member_losses(outputs, targets).sum()

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Accuracy, or 1 - squared error / squared targets, at least 0 (who says the mean, or diverged): [A D]."""
        scores = member_scores(outputs, targets)
        if not self.numbers:
            return scores
        explained = 1 - scores / targets.square().flatten(1).mean(1)
        return explained.nan_to_num(0.0).clamp(min=0)  # a network whose training diverged explains nothing

    def fitted(self) -> Tensor:
        """Score on all training samples, [A D]."""
        outputs = self._normalised(self._outputs(self.draws.inputs))
        return self.score(outputs, self._repeated(self.draws.targets))

    def held_out(self) -> Tensor:
        """Score on the held-out samples, [A D]."""
        inputs, targets = self.draws.held_inputs, self.draws.held_targets
        assert inputs is not None
        assert targets is not None
        return self.score(self._normalised(self._outputs(inputs)), self._repeated(targets))

    def _normalised(self, outputs: Tensor) -> Tensor:
        return outputs if self.centre is None or self.scale is None else (outputs - self.centre) / self.scale

    @torch.no_grad()
    def _outputs(self, inputs: Tensor) -> Tensor:
        """[D or 1, N, ...] -> [A D, N, O], in evaluation mode."""
        count = len(self.draws.targets)
        with evaluating(self.network):
            together = max(1, _NUMBERS // (self.arms * count * inputs[0, 0].numel()))
            parts = inputs.expand(count, *inputs.shape[1:]).split(together, 1)
            return torch.cat([self.network(self._repeated(part)) for part in parts], 1)

    def _repeated(self, x: Tensor) -> Tensor:
        return x.repeat(self.arms, *[1] * (x.dim() - 1))


def _trained(named: dict[str, nn.Parameter], arms: dict[Arm, _Members], draws: int) -> list[Tensor | None]:
    """For each parameter 1 for members that train it, 0 for others, in a shape to multiply with; None: all do."""
    found: list[Tensor | None] = []
    for name, parameter in named.items():
        trains = [name not in members.frozen for members in arms.values() for _ in range(draws)]
        mask = torch.tensor(trains, dtype=parameter.dtype, device=parameter.device)
        found.append(None if all(trains) else mask.view(-1, *[1] * (parameter.dim() - 1)))
    return found


def _optimizer(name: str, parameters: list[nn.Parameter], rate: float) -> Callable[[list[Tensor]], None]:
    """A fresh optimiser, as what to call with the gradients of a step."""
    if name == "adam":
        return Adam(parameters, rate).step

    @torch.no_grad()
    def descend(gradients: list[Tensor]) -> None:
        torch._foreach_add_(list[Tensor](parameters), gradients, alpha=-rate)

    return descend


def _order(draws: Draws, settings: Settings, seed: int) -> Tensor:
    """Rows of the batches of each draw, [D, steps, B], with replacement; the same for all arms and rates."""
    samples, device = draws.targets.shape[1], draws.targets.device
    shape = settings.steps, settings.batch_size
    sources = [generator(device, seed, "probe", _ORDER, draw) for draw in range(len(draws.targets))]
    return torch.stack([torch.randint(samples, shape, generator=g, device=device) for g in sources])


def _standardised(values: Tensor, like: Tensor) -> Tensor:
    """[D, N, O], shifted and scaled as `like` needs it for zero mean and unit variance over samples."""
    deviation = like.std(1, keepdim=True, correction=0)
    return (values - like.mean(1, keepdim=True)) / torch.where(deviation > 0, deviation, 1)


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in network.named_parameters()}
