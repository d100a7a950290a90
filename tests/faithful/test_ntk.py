"""The neural tangent kernel (shared/specs/optimizers-and-norms.md, section 7 and checks 24 to 27)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from plasticity.measures import ntk
from plasticity.networks.stacked import stack


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(seed=0, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
    ).double()


def parts(network):
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    return (lambda p, x: functional_call(network, p, (x,))), parameters


def test_kernel_of_a_linear_layer():
    """(X Xᵀ + 1) ⊗ I."""
    x1, x2 = double(5, 3), double(4, 3, seed=1)
    for method in ("jacobian", "vector products"):
        kernel = ntk.empirical_ntk(*parts(nn.Linear(3, 2).double()), x1, x2, "full", method)
        expected = torch.einsum("ij,ab->ijab", x1 @ x2.T + 1, torch.eye(2, dtype=torch.float64))
        torch.testing.assert_close(kernel, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["full", "trace", "diagonal", "pseudo"])
def test_both_methods_agree(reduction, monkeypatch):
    network, x1, x2 = parts(small()), double(7, 3), double(5, 3, seed=1)
    for other in (None, x2):
        whole = ntk.empirical_ntk(*network, x1, other, reduction)
        products = ntk.empirical_ntk(*network, x1, other, reduction, "vector products")
        torch.testing.assert_close(whole, products, rtol=0, atol=1e-8)
        monkeypatch.setattr(ntk, "_HELD", 2 * 2 * 370 * 2)  # two samples at a time
        torch.testing.assert_close(ntk.empirical_ntk(*network, x1, other, reduction), whole)
        monkeypatch.undo()


def test_kernel_is_symmetric_and_has_no_negative_eigenvalue():
    network, x = parts(small()), double(9, 3)
    full = ntk.empirical_ntk(*network, x, reduction="full")
    matrix = full.transpose(1, 2).reshape(18, 18)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-9


def test_trace_is_the_mean_of_the_outputs_kernels():
    network, x = parts(small()), double(6, 3)
    full = ntk.empirical_ntk(*network, x, reduction="full")
    trace = ntk.empirical_ntk(*network, x)
    torch.testing.assert_close(trace, (full[:, :, 0, 0] + full[:, :, 1, 1]) / 2)


def test_kernel_predicts_a_step_of_gradient_descent():
    """The error of -η Θ (f - y) is of second order: relative to the step it falls with η."""
    network, x, y = small(), double(6, 3), double(6, 2, seed=1)
    function, parameters = parts(network)
    kernel = ntk.empirical_ntk(function, parameters, x, reduction="full")
    f0 = network(x).detach()
    errors = []
    for rate in (1e-3, 1e-4):
        loss = 0.5 * (network(x) - y).square().sum()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        moved = {n: p - rate * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
        change = function(moved, x) - f0
        expected = -rate * torch.einsum("ijab,jb->ia", kernel, f0 - y)
        errors.append(float((change - expected).norm() / expected.norm()))
    assert errors[1] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)


def test_analytic_kernel_is_the_limit_of_wide_networks():
    """Width 1024, two hidden layers, mean of three draws of 4 outputs: within 5 % in Frobenius norm."""
    x = double(6, 5).float()
    width, layers = 1024, 2
    analytic = ntk.relu_mlp_ntk(x, x, layers, bias=0.1)

    def function(p, x):
        h = x
        for layer in range(layers + 1):
            h = h @ p[f"w{layer}"].T / math.sqrt(h.shape[1]) + 0.1 * p[f"b{layer}"]
            h = h if layer == layers else math.sqrt(2) * h.relu()
        return h

    kernels = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        sizes = [5, *[width] * layers, 4]
        p = {f"w{i}": torch.randn(sizes[i + 1], sizes[i], generator=generator) for i in range(layers + 1)}
        p |= {f"b{i}": torch.randn(sizes[i + 1], generator=generator) for i in range(layers + 1)}
        kernels.append(ntk.empirical_ntk(function, p, x))
    error = float((torch.stack(kernels).mean(0) - analytic).norm() / analytic.norm())
    assert error < 0.05


def test_analytic_kernel_without_hidden_layer_is_linear():
    x1, x2 = double(4, 5), double(3, 5, seed=1)
    torch.testing.assert_close(ntk.relu_mlp_ntk(x1, x2, 0), x1 @ x2.T / 5)
    whole = ntk.relu_mlp_ntk(torch.cat([x1, x2]), torch.cat([x1, x2]), 3, 0.5)
    torch.testing.assert_close(ntk.relu_mlp_ntk(x1, x2, 3, 0.5), whole[:4, 4:])


def test_linearized_prediction_is_that_of_a_linear_model():
    """A linear model's kernel does not move, so gradient descent with a small rate follows the prediction."""
    x, x_test, y = double(5, 8), double(3, 8, seed=1), double(5, 2, seed=2)
    weight = double(8, 2, seed=3)
    kernel, test_kernel = x @ x.T, x_test @ x.T
    train, test = ntk.linearized_predict(kernel, test_kernel, x @ weight, x_test @ weight, y, time=0.5)
    for _ in range(50_000):
        weight = weight - 1e-5 * x.T @ (x @ weight - y)
    torch.testing.assert_close(train, x @ weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(test, x_test @ weight, rtol=1e-3, atol=1e-4)
    still, _ = ntk.linearized_predict(0 * kernel, 0 * test_kernel, y + 1, x_test @ weight, y, time=3.0)
    torch.testing.assert_close(still, y + 1)


def test_linearized_classification_of_a_linear_model():
    x, weight = double(5, 8), double(8, 3, seed=3)
    y = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1, 0]]
    predicted = ntk.linearized_classify(x @ x.T, x @ weight, y, 0.01, 20)
    for _ in range(20):
        weight = weight - 0.01 * x.T @ ((x @ weight).softmax(1) - y)
    torch.testing.assert_close(predicted, x @ weight)


def test_metrics_by_hand():
    """Eigenvalues 3 and 1."""
    kernel = torch.tensor([[[2.0, -1.0], [-1.0, 2.0]]])
    found = {name: float(value) for name, value in ntk.kernel_metrics(kernel).items()}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found == pytest.approx(
        {
            "largest": 3, "trace": 4, "effective_rank": math.exp(entropy), "participation": 1.6,
            "condition": 3, "condition_10": 3, "negative": 1,
        }
    )  # fmt: skip


def test_condition_leaves_out_what_is_numerically_zero():
    ones = torch.ones(1, 4, 4, dtype=torch.float64)
    found = ntk.kernel_metrics(ones)
    assert float(found["condition"]) == pytest.approx(1)
    assert float(found["effective_rank"]) == pytest.approx(1)
    assert {float(v) for v in ntk.kernel_metrics(0 * ones).values() if not v.isnan()} == {0}


def test_alignment_and_drift():
    y = double(6, 2)
    assert float(ntk.alignment(3 * y @ y.T, y)) == pytest.approx(1)
    assert float(ntk.alignment(torch.eye(6, dtype=torch.float64) * 0, y)) == 0
    a, b = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert float(ntk.drift(5 * a, a)) == pytest.approx(0, abs=1e-6)
    assert float(ntk.drift(b, a)) == 1
    assert ntk.drift(torch.stack([a, b]), torch.stack([a, a])).tolist() == pytest.approx([0, 1], abs=1e-6)
    one = {"w": torch.tensor([3.0, 4.0])}
    assert float(ntk.weight_movement({"w": torch.tensor([3.0, 5.0])}, one)) == pytest.approx(0.2)


def test_cross_task_block_of_equal_and_of_separate_tasks():
    x = double(6, 4)
    kernel = x @ x.T
    assert float(ntk.cross_task(kernel, kernel, kernel)) == pytest.approx(1)
    assert float(ntk.cross_task(kernel, 0 * kernel, kernel)) == 0


def test_population_kernels_are_those_of_the_members():
    members = [small(seed) for seed in range(3)]
    x = double(3, 5, 3)
    found = ntk.entk(stack(members), 3, x)
    for k, network in enumerate(members):
        torch.testing.assert_close(found[k], ntk.empirical_ntk(*parts(network), x[k]))
        torch.testing.assert_close(found[k : k + 1], ntk.entk(network, None, x[k : k + 1]))


def test_a_kernel_that_would_not_end_is_refused():
    with pytest.raises(ValueError, match="probe fewer samples"):
        ntk.empirical_ntk(*parts(small()), double(1, 3).expand(10_000_000, 3))
