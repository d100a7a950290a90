"""Curvature of the loss and agreement of its gradients on a batch, for all members of a population at once.

`loss(outputs [K, B, ...], targets [K, B, ...]) -> [K]` is the mean loss of each member over its batch, such as
`losses.member_losses`. Members share no parameter, so the Hessian of the sum over members is block-diagonal, and one
product with it is one product for each member. H v is the gradient of <gradient, v>: no Hessian is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from plasticity.measures.decomposition import eigenvalues, eigenvectors
from plasticity.measures.ranks import erank
from plasticity.networks.functional import (
    Function,
    Parameters,
    count,
    flatten,
    member_function,
    population_function,
    trainable,
    unflatten,
)

Loss = Callable[[Tensor, Tensor], Tensor]
Product = Callable[[Tensor], Tensor]

# A Hessian is formed up to so many parameters; beyond, the empirical Fisher matrix stands for it.
_FORMED = 512
_GRADIENTS = 2**27  # numbers in the gradients held at a time, 512 MiB of float32


def hessian_product(function: Function, parameters: Parameters, inputs: Tensor, targets: Tensor, loss: Loss) -> Product:
    """v -> H v, both [K, P], for the mean loss over the batch. inputs, targets [K, B, ...].

    P counts the numbers of all `parameters` [K, *shape] in their order. Keeps the graph of the gradient alive.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    tensors = list(leaves.values())
    with torch.enable_grad():
        value = loss(function(leaves, inputs), targets).sum()
        gradients = torch.autograd.grad(value, tensors, create_graph=True, materialize_grads=True)
    curved = [index for index, gradient in enumerate(gradients) if gradient.requires_grad]

    def product(vector: Tensor) -> Tensor:
        if not curved:
            return torch.zeros_like(vector)
        pieces = unflatten(vector, tensors)
        found = torch.autograd.grad(
            [gradients[index] for index in curved],
            tensors,
            [pieces[index] for index in curved],
            retain_graph=True,
            materialize_grads=True,
        )
        return flatten(found)

    return product


def normed(product: Product, parameters: Parameters) -> Product:
    """v -> D H D v with D the norm of the parameter tensor that each number is in, of each member.

    Its spectrum does not change when a tensor is scaled that the function does not depend on the scale of; that of H
    goes with 1 / scale². A tensor of zeros drops out.
    """
    norms = flatten([p.flatten(1).norm(dim=1).view(-1, *[1] * (p.dim() - 1)).expand_as(p) for p in parameters.values()])
    return lambda vector: norms * product(norms * vector)


def top_eigenvalues(product: Product, like: Tensor, number: int = 1, iterations: int = 20) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric operator, [K, number] in falling order, and bounds on their errors.

    like [K, P]: any vector of its space. One Lanczos process of `iterations` products for each eigenvalue, from a start
    of its own and orthogonal to the eigenvectors found before (deflation), so that equal eigenvalues count as often as
    they are there. Holds as many vectors as there are iterations. Beside each value stands the norm of the residual
    A x - λ x: an eigenvalue lies no further away than that.
    """
    # The same starts for every member, device and call, from a generator of their own.
    starts = torch.randn(number, like.shape[1], generator=torch.Generator().manual_seed(0)).to(like)
    found = like.new_zeros(len(like), number, like.shape[1])
    values, residuals = like.new_zeros(2, len(like), number).unbind(0)
    for index in range(number):
        top = _lanczos(product, starts[index].expand_as(like), found[:, :index], iterations)
        values[:, index], found[:, index], residuals[:, index] = top
    order = values.sort(1, descending=True)
    return order.values, residuals.gather(1, order.indices)


def sharpness(
    network: nn.Module,
    members: int | None,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    by_norm: bool = False,
    number: int = 1,
    iterations: int = 20,
) -> Tensor:
    """The largest eigenvalues of the Hessian of the mean loss, [K, number]; see `top_eigenvalues`.

    inputs, targets [K, B, ...] (K = 1: ordinary network). by_norm: of `normed`, comparable between networks of
    different scale.
    """
    parameters = trainable(network, members)
    product = hessian_product(population_function(network, members), parameters, inputs, targets, loss)
    product = normed(product, parameters) if by_norm else product
    return top_eigenvalues(product, flatten(list(parameters.values())), number, iterations)[0]


def hessian_erank(network: nn.Module, members: int | None, inputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Effective rank of the magnitudes of the Hessian's eigenvalues, [K].

    Of the Hessian itself up to 512 parameters; beyond, of the empirical Fisher matrix (1 / B) Σ g_i g_iᵀ of the
    samples' gradients, whose rank is at most B (the better of the cheap stand-ins: Klein et al. 2024, arXiv:2411.04832,
    section 4.9).
    """
    parameters = trainable(network, members)
    if count(parameters) // len(inputs) > _FORMED:
        kernel = gradient_kernel(network, members, inputs, targets, loss)
        return erank(eigenvalues(kernel).clamp(min=0))
    product = hessian_product(population_function(network, members), parameters, inputs, targets, loss)
    return erank(eigenvalues(_formed(product, flatten(list(parameters.values())))).abs())


def gradient_kernel(network: nn.Module, members: int | None, inputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Inner products <∇ loss_i, ∇ loss_j> of the samples' gradients, [K, B, B]. inputs, targets [K, B, ...]."""
    parameters = trainable(network, members)
    kernels = []
    for index in range(len(inputs)):
        function = member_function(network, members, index)
        own = {name: p[index] for name, p in parameters.items()}

        one = _sample_gradient(function, own, loss)
        kernels.append(_gram(one, inputs[index], targets[index], count(own)))
    return torch.stack(kernels)


def grad_cov(kernel: Tensor) -> Tensor:
    """Cosines between the gradients of samples, [K, B, B] from `gradient_kernel`; a gradient of 0 has cosine 0.

    Lyle et al. 2023, arXiv:2303.01486, section 4.
    """
    norms = kernel.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    scale = norms.unsqueeze(2) * norms.unsqueeze(1)
    return torch.where(scale > 0, kernel / torch.where(scale > 0, scale, 1), 0)


def off_diagonal_mean(matrix: Tensor) -> Tensor:
    """[K, B, B] -> [K]."""
    size = matrix.shape[1]
    return (matrix.sum((1, 2)) - matrix.diagonal(dim1=1, dim2=2).sum(1)) / max(1, size * (size - 1))


def negative_share(matrix: Tensor) -> Tensor:
    """Share of entries off the diagonal that are negative: pairs of samples that work against each other, [K]."""
    return off_diagonal_mean((matrix < 0).float())


def jacobian_norm(network: nn.Module, members: int | None, inputs: Tensor) -> Tensor:
    """||∂ output / ∂ input||_F, mean over samples, [K]. inputs [K, B, ...], floating point."""
    x = inputs.detach().requires_grad_()
    with torch.enable_grad():
        outputs = population_function(network, members)(trainable(network, members), x).flatten(2)
    squares = torch.zeros(inputs.shape[:2], dtype=outputs.dtype, device=outputs.device)
    for index in range(outputs.shape[2]):
        # In evaluation mode an output depends on its own sample alone, so one backward pass serves all samples.
        (slope,) = torch.autograd.grad(outputs[:, :, index].sum(), x, retain_graph=True)
        squares += slope.flatten(2).square().sum(2)
    return squares.sqrt().mean(1)


def _sample_gradient(
    function: Function, parameters: dict[str, Tensor], loss: Loss
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """(x [n, ...], y [n, ...]) -> gradient of each sample's loss by parameter, [n, *shape]."""

    def value(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(function(p, x.unsqueeze(0)).unsqueeze(0), y.view(1, 1, *y.shape)).sum()

    return lambda x, y: vmap(grad(value), (None, 0, 0))(parameters, x, y)


def _gram(
    gradients: Callable[[Tensor, Tensor], dict[str, Tensor]], inputs: Tensor, targets: Tensor, size: int
) -> Tensor:
    """Inner products of gradients [B, *shape] of `size` numbers each, without holding more than `_GRADIENTS`."""
    rows = max(1, _GRADIENTS // (2 * size))
    pieces = list(zip(inputs.split(rows), targets.split(rows), strict=True))
    strips = []
    for left in (gradients(*piece) for piece in pieces):
        rights = [left] if len(pieces) == 1 else [gradients(*piece) for piece in pieces]
        strips.append(torch.cat([_products(left, right) for right in rights], 1))
    return torch.cat(strips)


def _products(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    return torch.stack([a[name].flatten(1) @ b[name].flatten(1).T for name in a]).sum(0)


def _formed(product: Product, like: Tensor) -> Tensor:
    """The matrix [K, P, P] of an operator on vectors such as `like` [K, P], one product for each column."""
    columns = []
    for index in range(like.shape[1]):
        unit = torch.zeros_like(like)
        unit[:, index] = 1
        columns.append(product(unit))
    return torch.stack(columns, 2)


def _lanczos(product: Product, start: Tensor, found: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest Ritz value [K], its vector [K, P] and the norm of its residual [K], orthogonal to `found` [K, F, P]."""
    iterations = min(iterations, start.shape[1] - found.shape[1])
    taken = found.shape[1]
    basis = torch.cat([found, start.new_zeros(len(start), iterations, start.shape[1])], 1)
    diagonal, beside = start.new_zeros(2, len(start), iterations).unbind(0)
    vector, _ = _direction(_orthogonal(start, found), start)
    for step in range(iterations):
        basis[:, taken + step] = vector
        image = product(vector)
        quotient = torch.linalg.vecdot(image, vector)
        # Once a process has used up its space, its vectors are 0; any value below the largest then does no harm.
        diagonal[:, step] = torch.where(vector.any(1), quotient, diagonal[:, 0])
        vector, beside[:, step] = _direction(_orthogonal(image, basis[:, : taken + step + 1]), image)
    neighbours = torch.diag_embed(beside[:, :-1], 1)
    small = torch.diag_embed(diagonal) + neighbours + neighbours.mT
    values, vectors = (part.to(start.dtype) for part in eigenvectors(small))
    weights = vectors[:, :, -1]
    top = torch.bmm(weights.unsqueeze(1), basis[:, taken:]).squeeze(1)
    return values[:, -1], top, beside[:, -1] * weights[:, -1].abs()


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """`vector` [K, P] without its parts along the rows of `basis` [K, m, P]; twice: once leaves rounding behind."""
    for _ in range(2):
        along = torch.bmm(basis, vector.unsqueeze(2))
        vector = vector - torch.bmm(basis.mT, along).squeeze(2)
    return vector


def _direction(vector: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vector and norm, [K, P] and [K]; zeros where no more than rounding is left of what it was `before`."""
    norm = vector.norm(dim=1)
    kept = norm > 100 * torch.finfo(norm.dtype).eps * before.norm(dim=1)
    return vector * (kept / torch.where(kept, norm, 1)).unsqueeze(1), norm * kept
