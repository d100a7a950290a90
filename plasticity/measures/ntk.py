"""The neural tangent kernel: empirical, what it says and predicts, and its analytic limit (Jacot et al. 2018,
arXiv:1806.07572).

    Θ(x, x') = J(x) J(x')ᵀ,  J = ∂ f / ∂ θ

`function(parameters, x [B, ...]) -> [B, O]` is one network of O outputs (`functional.member_function`), `parameters`
what is trained, by name, without an axis of members. Kernels are [N, N'], or [K, N, N'] where the docstring says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import jacrev, jvp, vjp, vmap

from plasticity.measures.curvature import negative_share
from plasticity.measures.decomposition import eigenvalues
from plasticity.measures.ranks import erank, participation
from plasticity.networks.functional import Function, Parameters, member_function, trainable

Reduction = Literal["full", "trace", "diagonal", "pseudo"]
Method = Literal["jacobian", "vector products"]

_LARGEST = 4e9  # numbers in the Jacobian of a probe set; more would take hours or more memory than there is
_HELD = 2**26  # numbers in the Jacobians held at a time, 256 MiB of float32


def empirical_ntk(
    function: Function,
    parameters: Parameters,
    x1: Tensor,
    x2: Tensor | None = None,
    reduction: Reduction = "trace",
    method: Method = "jacobian",
) -> Tensor:
    """The kernel between the samples x1 [N, ...] and x2 [N', ...] (None: x1).

    reduction: "full" [N, N', O, O]; "trace" Σ_o Θ_oo / O, [N, N']; "diagonal" Θ_oo, [N, N', O]; "pseudo" the kernel of
    Σ_o f_o / sqrt(O), [N, N']. method: contract Jacobians, or multiply with vectors (`vjp`, then `jvp`), which holds no
    Jacobian and takes longer; the results agree. Raises ValueError if N O P, with P parameters, is above 4e9.
    """
    pseudo = reduction == "pseudo"
    used = _summed(function) if pseudo else function
    outputs = 1 if pseudo else _outputs(function, parameters, x1)
    size = outputs * sum(p.numel() for p in parameters.values())
    samples = max(len(x1), 0 if x2 is None else len(x2))
    if samples * size > _LARGEST:
        raise ValueError(
            f"the kernel of {samples} samples takes {samples * size:.1e} derivatives, more than {_LARGEST:.0e}: "
            "probe fewer samples"
        )
    if method == "jacobian":
        kernel = _by_jacobians(used, parameters, x1, x2, "trace" if pseudo else reduction, max(1, _HELD // (2 * size)))
    else:
        kernel = _reduced(_by_products(used, parameters, x1, x1 if x2 is None else x2, outputs), reduction)
    return kernel


def entk(network: nn.Module, members: int | None, inputs: Tensor, reduction: Reduction = "trace") -> Tensor:
    """The empirical kernel of every member of a population on its own inputs [K, N, ...], [K, N, N, ...]."""
    parameters = trainable(network, members)
    kernels = []
    for index in range(len(inputs)):
        own = {name: p[index] for name, p in parameters.items()}
        kernels.append(empirical_ntk(member_function(network, members, index), own, inputs[index], None, reduction))
    return torch.stack(kernels)


def spectrum(kernel: Tensor) -> Tensor:
    """Eigenvalues of [K, N, N], float64 [K, N] in falling order."""
    return eigenvalues(kernel).flip(1)


def kernel_metrics(kernel: Tensor) -> dict[str, Tensor]:
    """What the spectrum of [K, N, N] says of each member, [K] by name.

    largest, trace, effective_rank exp(H(λ / Σ λ)), participation (Σ λ)² / Σ λ², condition: the largest over the
    smallest eigenvalue above 1e-10 of it; condition_10: the largest over the one that 10 % of the eigenvalues are not
    above (inf if that is 0); negative: share of negative entries off the diagonal.
    """
    values = spectrum(kernel).clamp(min=0)
    largest = values[:, 0]
    counted = torch.where(values > 1e-10 * largest.unsqueeze(1), values, math.inf).amin(1)
    low = values[:, -max(1, round(0.1 * values.shape[1]))]
    return {
        "largest": largest,
        "trace": values.sum(1),
        "effective_rank": erank(values),
        "participation": participation(values.sqrt()),
        "condition": torch.where(largest > 0, largest / counted, 0),
        "condition_10": largest / low,
        "negative": negative_share(kernel),
    }


def alignment(kernel: Tensor, targets: Tensor) -> Tensor:
    """<Θ_c, (Y Yᵀ)_c> / (||Θ_c|| ||(Y Yᵀ)_c||), both centred: [..., N, N], targets [..., N, O] -> [...]."""
    return _cosine(_centred(kernel), _centred(targets @ targets.mT))


def drift(kernel: Tensor, before: Tensor) -> Tensor:
    """1 - <Θ_t, Θ_s> / (||Θ_t|| ||Θ_s||): [..., N, N] twice -> [...]. Over t - s steps: the kernel's speed."""
    return 1 - _cosine(kernel, before)


def weight_movement(parameters: Parameters, initial: Parameters) -> Tensor:
    """||θ_t - θ_0|| / ||θ_0||, []. Together with a small `drift`: the lazy regime."""
    moved = torch.stack([(p - initial[name]).norm() for name, p in parameters.items()]).norm()
    return moved / torch.stack([initial[name].norm() for name in parameters]).norm()


def cross_task(within_a: Tensor, between: Tensor, within_b: Tensor) -> Tensor:
    """How far a step for task A moves the outputs of task B: ||Θ_AB|| / sqrt(||Θ_AA|| ||Θ_BB||), [].

    Kernels [N, N], [N, M], [M, M], each norm over the root of its number of entries, so 1 for equal tasks.
    """
    a, ab, b = (kernel.norm() / math.sqrt(kernel.numel()) for kernel in (within_a, between, within_b))
    return ab / (a * b).sqrt()


def linearized_predict(
    train: Tensor, test_train: Tensor, f0: Tensor, f0_test: Tensor, targets: Tensor, time: float
) -> tuple[Tensor, Tensor]:
    """Outputs after gradient flow for `time` on ½ Σ ||f - y||², if the kernel stays: on train and test samples.

        f(t) = y + exp(-Θ t) (f_0 - y)        f'(t) = f'_0 - Θ' Θ⁻¹ (1 - exp(-Θ t)) (f_0 - y)

    train [N, N] and test_train [M, N]: kernels ("trace": outputs learn apart); f0, targets [N, O], f0_test [M, O].
    Where gradient descent takes n steps of rate η, time is n η (Lee et al. 2019, arXiv:1902.06720, eq. 10 and 11).
    """
    values, vectors = torch.linalg.eigh(train)
    values = values.clamp(min=0)
    error = vectors.mT @ (f0 - targets)
    shrunk = torch.exp(-values * time).unsqueeze(1)
    # (1 - exp(-λ t)) / λ, which is t where λ is 0.
    taken = torch.where(values > 0, -torch.expm1(-values * time) / torch.where(values > 0, values, 1), time)
    return targets + vectors @ (shrunk * error), f0_test - test_train @ (vectors @ (taken.unsqueeze(1) * error))


def linearized_classify(kernel: Tensor, f0: Tensor, targets: Tensor, rate: float, steps: int) -> Tensor:
    """Logits [N, C] after `steps` Euler steps of df/dt = -Θ (softmax(f) - y): cross-entropy summed over samples.

    kernel [N, N]; f0 [N, C]; targets [N, C], one-hot.
    """
    f = f0
    for _ in range(steps):
        f = f - rate * kernel @ (f.softmax(1) - targets)
    return f


def relu_mlp_ntk(x1: Tensor, x2: Tensor, layers: int, bias: float = 0.0) -> Tensor:
    """The limit of infinite width for a ReLU MLP of `layers` hidden layers, [N, D] and [M, D] -> [N, M].

    Parameterisation: z = W h / sqrt(n) + bias b with W, b ~ N(0, 1), h = sqrt(2) relu(z), one output (Jacot et al.
    2018, theorem 1; arc-cosine kernels of Cho & Saul 2009). No hidden layer: X Xᵀ / D + bias².
    """
    width = x1.shape[1]
    covariance = x1 @ x2.T / width + bias**2
    own1, own2 = ((x.square().sum(1) / width + bias**2) for x in (x1, x2))
    kernel = covariance
    for _ in range(layers):
        scale = (own1.unsqueeze(1) * own2).sqrt()
        cosine = (covariance / torch.where(scale > 0, scale, 1)).clamp(-1, 1)
        angle = math.pi - cosine.arccos()
        covariance = scale * (cosine * angle + (1 - cosine.square()).sqrt()) / math.pi + bias**2
        kernel = covariance + kernel * angle / math.pi
        own1, own2 = own1 + bias**2, own2 + bias**2
    return kernel


def _by_jacobians(
    function: Function, parameters: Parameters, x1: Tensor, x2: Tensor | None, reduction: Reduction, rows: int
) -> Tensor:
    def jacobians(x: Tensor) -> dict[str, Tensor]:
        """[n, O, P] for each parameter."""
        found = vmap(jacrev(lambda p, sample: function(p, sample.unsqueeze(0)).flatten()), (None, 0))(
            dict(parameters), x
        )
        return {name: part.flatten(2) for name, part in found.items()}

    contract: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor] = {
        "full": lambda a, b: _contracted("iap,jbp->ijab", a, b),
        "diagonal": lambda a, b: _contracted("iap,jap->ija", a, b),
        "trace": lambda a, b: _contracted("iap,jap->ij", a, b) / next(iter(a.values())).shape[1],
    }[reduction]
    strips = []
    for left in (jacobians(piece) for piece in x1.split(rows)):
        whole = x2 is None and len(x1) <= rows
        rights: Iterator[dict[str, Tensor]] | list[dict[str, Tensor]]
        rights = [left] if whole else (jacobians(piece) for piece in (x1 if x2 is None else x2).split(rows))
        strips.append(torch.cat([contract(left, right) for right in rights], 1))
    return torch.cat(strips)


def _contracted(equation: str, a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    return torch.stack([torch.einsum(equation, a[name], b[name]) for name in a]).sum(0)


def _by_products(function: Function, parameters: Parameters, x1: Tensor, x2: Tensor, outputs: int) -> Tensor:
    """[N, N', O, O]: row a of Θ(x, x') is J(x') (J(x)ᵀ e_a)."""
    own = dict(parameters)
    units = torch.eye(outputs, dtype=next(iter(own.values())).dtype, device=x1.device)

    def block(a: Tensor, b: Tensor) -> Tensor:
        pull = vjp(lambda p: function(p, a.unsqueeze(0)).flatten(), own)[1]

        def row(unit: Tensor) -> Tensor:
            return jvp(lambda p: function(p, b.unsqueeze(0)).flatten(), (own,), pull(unit))[1]

        return vmap(row)(units)

    return torch.stack([vmap(block, (None, 0), chunk_size=16)(a, x2) for a in x1])


def _reduced(full: Tensor, reduction: Reduction) -> Tensor:
    diagonal = full.diagonal(dim1=2, dim2=3)
    if reduction == "full":
        return full
    return diagonal if reduction == "diagonal" else diagonal.mean(2)


def _summed(function: Function) -> Function:
    """Σ_o f_o / sqrt(O) as a function of one output."""

    def summed(parameters: Parameters, x: Tensor) -> Tensor:
        outputs = function(parameters, x).flatten(1)
        return outputs.sum(1, keepdim=True) / math.sqrt(outputs.shape[1])

    return summed


def _outputs(function: Function, parameters: Parameters, x: Tensor) -> int:
    with torch.no_grad():
        return function(parameters, x[:1]).flatten(1).shape[1]


def _centred(matrix: Tensor) -> Tensor:
    """H M H with H = 1 - 1/N."""
    rows = matrix - matrix.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(-2), b.flatten(-2)
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(scale > 0, (a * b).sum(-1) / torch.where(scale > 0, scale, 1), 0)
