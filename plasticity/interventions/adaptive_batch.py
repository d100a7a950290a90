"""How many samples a gradient needs: tests of its noise, and batches that grow by them (Lau et al. 2024,
arXiv:2402.11215).

The tests take gradients of single samples, tensor by tensor: each [b, *shape], b >= 2. They return the size b', a 0-d
tensor, that the batch should have; it may be smaller than b, and is infinite where the mean gradient is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from plasticity.intervention import Intervention, Learner
from plasticity.optimisers.adagrad import AdAdaGrad, Granularity

Gradients = Sequence[Tensor]


def per_sample_gradients(
    network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor
) -> list[Tensor]:
    """The gradient of each sample's loss with respect to each parameter: [b, *shape].

    loss: of outputs [1, ...] and targets [1, ...]. Raises ValueError for batch normalisation, where samples have none.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise ValueError("with batch normalisation single samples have no gradient of their own")
    parameters = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}

    def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(network, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    return list(vmap(grad(one), in_dims=(None, 0, 0), randomness="different")(parameters, inputs, targets).values())


def norm_test(gradients: Gradients, eta: float) -> Tensor:
    """b' = sum of variances / (eta^2 |mean|^2)."""
    g = _flat(gradients)
    return g.var(0).sum() / (eta**2 * g.mean(0).square().sum())


def inner_product_test(gradients: Gradients, theta: float, blockwise: bool = False) -> Tensor:
    """b' = Var(<g, mean>) / (theta^2 |mean|^4). blockwise: the variance within each tensor, added up."""
    blocks = [_flat([g]) for g in gradients] if blockwise else [_flat(gradients)]
    variance = torch.stack([(g @ g.mean(0)).var() for g in blocks]).sum()
    return variance / (theta**2 * _flat(gradients).mean(0).square().sum().square())


def augmented_test(gradients: Gradients, theta: float, nu: float, blockwise: bool = False) -> Tensor:
    """The larger of the inner-product test and the same for what of g is orthogonal to the mean, within nu."""
    g = _flat(gradients)
    mean = g.mean(0)
    square = mean.square().sum()
    orthogonal = g - torch.outer(g @ mean / square, mean)
    across = orthogonal.var(0).sum() / (nu**2 * square)
    return torch.maximum(inner_product_test(gradients, theta, blockwise), across.nan_to_num(nan=math.inf))


def coordinate_norm_test(gradients: Gradients, eta: float, quantile: float | None = None) -> Tensor:
    """b' = the largest over coordinates of Var / (eta^2 mean^2), or a quantile of it; for AdaGrad.

    Coordinates whose squared mean is below 1e-12 of the largest do not count.
    """
    g = _flat(gradients)
    square = g.mean(0).square()
    wanted = g.var(0) / (eta**2 * square)
    counted = wanted[square >= 1e-12 * square.max()]
    return counted.max() if quantile is None else counted.quantile(quantile)


def variance_of_micro_batches(variances: Tensor, means: Tensor) -> Tensor:
    """Of one sample, from micro-batches of equal size: the mean of their variances plus the variance of their means.

    variances, means: [J, ...]. Exact if the variances are taken with ddof = 0.
    """
    return variances.mean(0) + means.square().mean(0) - means.mean(0).square()


def micro_batches(size: int, largest: int, at_once: int) -> tuple[int, int]:
    """A batch as so many samples at once, so many times; together at least `size` but never above `largest`."""
    at_once = min(size, at_once)
    return at_once, min(math.ceil(size / at_once), largest // at_once)


def _flat(gradients: Gradients) -> Tensor:
    """[b, coordinates]. Raises ValueError if b < 2."""
    if gradients[0].shape[0] < 2:
        raise ValueError("a variance needs at least two samples")
    return torch.cat([g.flatten(1) for g in gradients], 1)


@dataclass
class BatchSize:
    """The size of the next batch in a loop that draws batches itself: grows by a test, never shrinks.

    test: of the gradients of the batch just used, such as `norm_test`. every: steps between tests. Testing ends at
    `largest`. Count samples, not steps, in such a loop. Reads the device at each test.
    """

    test: Callable[[Gradients], Tensor]
    size: int = 2
    largest: int = 1024
    every: int = 1
    steps: int = 0

    def __post_init__(self):
        if not 2 <= self.size <= self.largest:
            raise ValueError(f"size must be between 2 and largest, got {self.size} and {self.largest}")

    def observe(self, gradients: Gradients) -> int:
        """After a step: the size of the next batch. gradients: each sample's at that step."""
        self.steps += 1
        if self.size < self.largest and self.steps % self.every == 0:
            wanted = float(self.test(gradients))
            wanted = self.largest if not math.isfinite(wanted) else math.ceil(wanted)
            self.size = min(self.largest, max(self.size, wanted))
        return self.size


@dataclass
class AdaptiveBatch(Intervention):
    """AdAdaGrad: AdaGrad whose batches grow as its gradient gets noisier, made of the problem's own.

    Gradients of the problem's batches add up until they make the batch that a member wants, at which it steps; samples
    go by at the same pace for all. learning_rate: 1 suits the global step size, 0.3 that of rows. first, largest: sizes
    in batches of the problem; see `AdAdaGrad`. on_experience: whether the size falls back to the first where a new task
    begins.
    """

    learning_rate: float = 1.0
    eta: float = 0.5
    first: int = 2
    largest: int = 1024
    granularity: Granularity = "global"
    on_experience: Literal["reset", "keep"] = "reset"

    def __post_init__(self):
        self.uses_boundaries = self.on_experience == "reset"

    def optimizer(
        self, network: nn.Module, parameters: Mapping[str, Tensor], learning_rate: float, stacked: bool
    ) -> AdAdaGrad:
        if any("BatchNorm" in type(module).__name__ for module in network.modules()):
            raise ValueError("adaptive-batch is not for batch normalisation, whose statistics see the parts of a batch")
        values = parameters.values()
        return AdAdaGrad(
            values, self.learning_rate, self.eta, self.first, self.largest, self.granularity, stacked=stacked
        )

    def at_boundary(self, learner: Learner) -> None:
        learner.optimizer.reset_size()

    def metrics(self, learner: Learner) -> dict[str, Tensor]:
        """batch_size, in batches of the problem, and updates: steps that moved the parameters."""
        shared: dict[str, Any] = learner.optimizer.shared
        return {"adaptive_batch/size": shared["size"], "adaptive_batch/updates": shared["updates"]}
