"""The faithfulness checks 1-10 of specs/optimizers-and-norms.md and 19 of specs/nap-and-plasticity.md."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from plasticity.optimisers.adamp import BY_CHANNEL, BY_LAYER, NOT_PROJECTED, AdamP
from plasticity.optimisers.erfi import ERFI_OF_ROOT_HALF, erfi
from plasticity.optimisers.muon import Muon
from plasticity.optimisers.normuon import NorMuon
from plasticity.optimisers.sgdp import SGDP
from plasticity.optimisers.trac import TRAC
from plasticity.optimisers.upgd import UPGD


def parameter(values):
    return nn.Parameter(torch.as_tensor(values, dtype=torch.float64).clone())


def moved(optimizer, p, *gradients):
    """The parameter after a step for each gradient."""
    for gradient in gradients:
        p.grad = torch.as_tensor(gradient, dtype=p.dtype)
        optimizer.step()
    return p.detach()


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def generator():
    return torch.Generator().manual_seed(0)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(), dtype=dtype)


G1, G2 = [[0.4, -0.3]], [[0.43, -0.26]]


def test_1_sgdp_by_hand():
    p = parameter([[3.0, 4.0]])
    optimizer = SGDP([p], lr=1.0, momentum=0.9)
    first = moved(optimizer, p, G1).clone()
    close(first, [[2.6, 4.3]])
    second = moved(optimizer, p, G2)
    close(second, [[1.786832, 4.791683]])
    # Orthogonal to w up to the eps = 1e-8 in the unit vector of the formula.
    close(second.square().sum(), first.square().sum() + optimizer.taken[0].square().sum(), 1e-7)


def test_2_sgdp_keeps_the_raw_momentum_unless_asked():
    for project_buffer, expected in ((True, [[0.813168, -0.491683]]), (False, [[0.79, -0.53]])):
        p = parameter([[3.0, 4.0]])
        optimizer = SGDP([p], lr=1.0, momentum=0.9, project_buffer=project_buffer)
        close(moved(optimizer, p, G1, G2), [[1.786832, 4.791683]])
        close(optimizer.state[p]["momentum_buffer"], expected)


def test_3_adamp_by_hand():
    for gradient, weight_decay, expected in (
        (G1, 0.0, [[2.888, 4.084]]),
        (G1, 0.1, [[2.885, 4.080]]),
        ([[0.4, 0.3]], 0.1, [[2.87, 3.86]]),
    ):
        p = parameter([[3.0, 4.0]])
        close(moved(AdamP([p], lr=0.1, weight_decay=weight_decay), p, gradient), expected, 5e-4)


def test_4_layer_view_is_the_fallback():
    gradient = torch.diag(torch.tensor([1.0, -1.0]))
    p = parameter(torch.eye(2))
    optimizer = AdamP([p], lr=0.1)
    close(moved(optimizer, p, gradient), [[0.9, 0.0], [0.0, 1.1]])
    assert optimizer.views[0] == BY_LAYER
    p = parameter(torch.eye(2))
    # Decay 0.1 * 0.1 * 0.1 of the weight first.
    close(moved(AdamP([p], lr=0.1, weight_decay=0.1), p, gradient), [[0.899, 0.0], [0.0, 1.099]])


@pytest.mark.parametrize("kind", [AdamP, SGDP])
def test_5_projected_updates_are_orthogonal_to_every_row_and_vectors_are_not_projected(kind):
    torch.manual_seed(0)
    p, vector = parameter(random(6, 10)), parameter(random(7))
    raw = random(6, 10) + 1
    gradient = raw - p.detach() * (raw * p).sum(1, keepdim=True).detach() / p.detach().square().sum(1, keepdim=True)
    optimizer = kind([p, vector], lr=0.1, eps=1e-12)  # which is in the formula's unit vector too
    for step in range(3):
        # The momentum of the first steps is not orthogonal to the weight of the later ones.
        before = p.detach().clone()
        now = gradient + 0.2 * step
        now -= before * (now * before).sum(1, keepdim=True) / before.square().sum(1, keepdim=True)
        p.grad, vector.grad = now, random(7)
        optimizer.step()
        assert optimizer.views[0] == BY_CHANNEL
        assert optimizer.views[1] == NOT_PROJECTED
        update = optimizer.taken[0]
        dots = (update * before).sum(1).abs()
        assert (dots <= 1e-9 * update.norm(dim=1) * before.norm(dim=1)).all()
    if kind is AdamP:
        plain = parameter(random(7))
        moved(torch.optim.Adam([plain], lr=0.1, eps=1e-12), plain, random(7), random(7), random(7))
        close(vector.detach(), plain, 1e-12)


def test_6_without_delta_adamp_is_adamw():
    p, q = parameter(random(4, 5)), parameter(random(4, 5))
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = AdamP([p], delta=0.0, **options), torch.optim.AdamW([q], **options)
    source = generator()
    for _ in range(20):
        gradient = torch.randn(4, 5, generator=source, dtype=torch.float64)
        moved(ours, p, gradient)
        moved(theirs, q, gradient)
    close(p.detach(), q.detach(), 1e-12)


def test_nesterov_adamp_by_the_formula():
    p = parameter([[3.0, 4.0]])
    optimizer = AdamP([p], lr=0.1, nesterov=True, delta=0.0)
    m = v = torch.zeros(1, 2, dtype=torch.float64)
    expected = p.detach().clone()
    for t, gradient in enumerate((G1, G2), start=1):
        g = torch.tensor(gradient, dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        denominator = v.sqrt() / math.sqrt(1 - 0.999**t) + 1e-8
        expected = expected - 0.1 / (1 - 0.9**t) * (0.9 * m + 0.1 * g) / denominator
        moved(optimizer, p, gradient)
    close(p.detach(), expected, 1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamp_is_the_authors(nesterov, weight_decay):
    adamp = pytest.importorskip("adamp", reason="the authors' package is not installed")
    p, q, b, c = (parameter(random(*shape)) for shape in ((4, 5), (4, 5), (3,), (3,)))
    options = {"lr": 0.01, "weight_decay": weight_decay, "nesterov": nesterov}
    for ours, theirs in (
        (AdamP([p, b], **options), adamp.AdamP([q, c], **options)),
        (
            SGDP([p, b], momentum=0.9, project_buffer=not nesterov, **options),
            adamp.SGDP([q, c], momentum=0.9, **options),
        ),
    ):
        source = generator()
        for _ in range(10):
            gradient = torch.randn(4, 5, generator=source, dtype=torch.float64)
            gradient -= (
                p.detach() * (gradient * p.detach()).sum(1, keepdim=True) / p.detach().square().sum(1, keepdim=True)
            )
            p.grad, q.grad = gradient, gradient.clone()
            b.grad, c.grad = random(3), random(3)
            ours.step()
            theirs.step()
        close(p.detach(), q.detach(), 1e-9)
        close(b.detach(), c.detach(), 1e-9)


def step_of(optimizer, p, gradient):
    p.grad = gradient
    return optimizer.propose()[0]


def orthogonal(rows):
    return torch.linalg.qr(random(rows, rows))[0]


def test_7_exact_muon_is_orthogonal_scale_invariant_and_equivariant():
    gradient = random(5, 8)

    def step(g):
        p = parameter(torch.zeros(g.shape))
        return -step_of(Muon([p], lr=1.0, ns="exact"), p, g)

    update = step(gradient)
    close(torch.linalg.svdvals(update), torch.ones(5), 1e-12)
    close(step(5 * gradient), update, 1e-12)
    q, r = orthogonal(5), torch.linalg.qr(random(8, 8))[0]
    close(step(q @ gradient @ r), q @ update @ r, 1e-12)
    low_rank = torch.outer(random(5), random(8))
    close(torch.linalg.svdvals(step(low_rank)), torch.tensor([1.0, 0, 0, 0, 0]), 1e-12)


def test_8_newton_schulz_bounds_and_torch():
    p = nn.Parameter(torch.zeros(64, 32))
    gradient = random(64, 32, dtype=torch.float32)
    update = -step_of(Muon([p], lr=1.0), p, gradient) / math.sqrt(2)
    values = torch.linalg.svdvals(update)
    assert values.min() >= 0.6
    assert values.max() <= 1.21
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon is not there")
    p, q = (nn.Parameter(random(64, 32, dtype=torch.float32)) for _ in range(2))
    ours = Muon([p], lr=0.02, momentum=0.9)
    theirs = torch.optim.Muon([q], lr=0.02, momentum=0.9, weight_decay=0.0, adjust_lr_fn="original")
    for scale in (1.0, -0.3, 2.0):
        moved(ours, p, scale * gradient + 0.1)
        moved(theirs, q, scale * gradient + 0.1)
    # Theirs is in bfloat16: 8 bits of an update of about 0.02 * sqrt(2) / sqrt(32) an entry.
    assert (p - q).norm() <= 0.02 * (p - random(64, 32, dtype=torch.float32)).norm()


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_9_normuon_first_step(shape):
    gradient = random(*shape)
    p = parameter(torch.zeros(shape))
    muon = step_of(Muon([p], lr=0.3), p, gradient)
    step = step_of(NorMuon([p], lr=0.3), p, gradient)
    rows = step.norm(dim=1)
    close(rows / rows.mean(), torch.ones(shape[0]), 1e-6)
    close(step.norm() / muon.norm(), 1.0, 1e-6)
    rms = step_of(NorMuon([p], lr=0.3, scale="rms"), p, gradient)
    close(rms.square().mean().sqrt(), 0.2 * 0.3, 1e-12)


@pytest.mark.parametrize("kind", [Muon, NorMuon])
def test_10_gradients_stay_and_convolutions_are_matrices(kind):
    gradient = random(8, 4, 3, 3)
    image, matrix = parameter(torch.zeros(8, 4, 3, 3)), parameter(torch.zeros(8, 36))
    kept = gradient.clone()
    one, other = kind([image], lr=0.1), kind([matrix], lr=0.1)
    for _ in range(2):
        moved(one, image, gradient)
        moved(other, matrix, gradient.flatten(1))
    assert torch.equal(image.grad, kept)
    assert torch.equal(image.detach().flatten(1), matrix.detach())


def test_19_upgd_with_equal_utilities_moves_by_one_minus_sigmoid_of_one():
    p, b = parameter(torch.full((2, 3), 0.5)), parameter(torch.full((4,), -0.25))
    optimizer = UPGD([p, b], lr=0.1, sigma=0.0, beta_utility=0.0)
    p.grad, b.grad = torch.full_like(p, -2.0), torch.full_like(b, 4.0)  # -g p = 1 everywhere
    optimizer.step()
    free = 1 - 1 / (1 + math.exp(-1))
    assert 1 - free == pytest.approx(0.731, abs=1e-3)
    close(p.detach(), [[0.5 + 0.1 * 2 * free] * 3] * 2, 1e-12)
    close(b.detach(), [-0.25 - 0.1 * 4 * free] * 4, 1e-12)


def test_upgd_by_the_formulas():
    start, gradient = random(2, 3), random(2, 3) * 0.5 + 0.2
    lr, beta, decay, sigma = 0.1, 0.9, 0.05, 0.3
    for protecting, local, adaptive in (
        (True, False, False),
        (False, False, False),
        (True, True, False),
        (True, False, True),
    ):
        p = parameter(start)
        options = {"protecting": protecting, "local": local, "adaptive": adaptive}
        optimizer = UPGD([p], lr, [generator()], sigma, beta, decay, **options)
        source, theta, u, m, v = generator(), start.clone(), 0.0, 0.0, 0.0
        for t in (1, 2):
            moved(optimizer, p, gradient)
            noise = sigma * torch.randn(6, generator=source, dtype=torch.float64).view(2, 3)
            u = beta * u - (1 - beta) * gradient * theta
            corrected = u / (1 - beta**t)
            if local:
                s = torch.sigmoid(corrected / corrected.norm(dim=1, keepdim=True))
            else:
                s = torch.sigmoid(corrected / u.max())  # the largest is not corrected
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            g = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) if adaptive else gradient
            change = (g + noise) * (1 - s) if protecting else g + noise * (1 - s)
            theta = (1 - lr * decay) * theta - lr * change
        close(p.detach(), theta, 1e-10)


def test_upgd_keeps_the_order_when_all_utilities_are_negative():
    p = parameter([[1.0, 2.0]])
    moved(UPGD([p], lr=0.1, sigma=0.0, beta_utility=0.0), p, [[1.0, 1.0]])
    close(p.detach(), [[0.9, 1.9]], 1e-12)  # both useless: free to move


def test_19_first_step_of_trac_is_next_to_nothing():
    p = parameter(random(4, 3))
    start = p.detach().clone()
    optimizer = TRAC(AdamP([p], lr=0.01, delta=0.0))
    moved(optimizer, p, random(4, 3))
    step = (p.detach() - start).abs().max()
    assert 0 < step < 1e-6 * 0.01


def test_trac_by_the_formula():
    """Three steps on a quadratic around SGD, with a first scale that makes them large."""
    start, target = random(3), random(3) + 1
    betas, first, eps, lr = (0.9, 0.99), 0.1, 1e-8, 0.5
    p = parameter(start)
    optimizer = TRAC(SGDP([p], lr=lr), betas, first, eps)
    theta, total, s = start.clone(), 0.0, [0.0, 0.0]
    v, sigma = [0.0, 0.0], [1e-8, 1e-8]
    for _ in range(3):
        gradient = theta - target
        moved(optimizer, p, p.detach() - target)
        distance = (theta - start) / (total + eps)
        h = float(gradient @ distance)
        for j, beta in enumerate(betas):
            v[j] = beta**2 * v[j] + h**2
            sigma[j] = beta * sigma[j] - h
            x = torch.tensor(sigma[j] / (math.sqrt(2) * math.sqrt(v[j]) + eps), dtype=torch.float64)
            s[j] = first / ERFI_OF_ROOT_HALF * float(erfi(x))
        total = max(sum(s), 0.0)
        theta = start + (distance - lr * gradient) * total
        close(p.detach(), theta, 1e-10)
    assert total > 2 * first


def test_erfi():
    special = pytest.importorskip("scipy.special")
    x = torch.cat([torch.linspace(-6, 6, 201), torch.linspace(4.9, 25.9, 50)]).double()
    expected = torch.tensor(special.erfi(x.numpy()))
    torch.testing.assert_close(erfi(x), expected, rtol=1e-9, atol=1e-12)
    assert special.erfi(math.sqrt(0.5)) == pytest.approx(ERFI_OF_ROOT_HALF, rel=1e-12)
    assert erfi(torch.tensor(1e6)).isfinite()
