"""The faithfulness checks 13-16 of specs/optimizers-and-norms.md: norms that are enforced, and their certificate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from plasticity.measures.lipschitz import (
    Attention,
    ConvexResidual,
    DividedGELU,
    Multiply,
    initialise,
    lipschitz_bound,
    lipschitz_transformer,
    operator_norm,
)
from plasticity.networks.stacked import stack
from plasticity.optimisers.lipschitz import ConstrainedMuon, norm_after_step, parameter_groups
from plasticity.optimisers.spectral import (
    leading,
    soft_cap_strength,
    spectral_hammer,
    spectral_hard_cap,
    spectral_normalize,
    spectral_soft_cap,
    spectral_weight_decay,
    stiefel,
    svd_clip,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def with_values(values, rows=7, columns=5):
    """[1, rows, columns] with these singular values, and its singular vectors."""
    values = torch.tensor(values, dtype=torch.float64)
    u = torch.linalg.qr(random(rows, len(values)))[0]
    v = torch.linalg.qr(random(columns, len(values), seed=1))[0]
    return ((u * values) @ v.T).unsqueeze(0), u, v


def values(matrix):
    return torch.linalg.svdvals(matrix)[0]


@pytest.mark.parametrize("constraint", ["spectral_soft_cap", "svd_clip"])
@pytest.mark.parametrize("direction", ["muon", "muon_stiefel", "muon_exact"])
def test_13_norms_stay_within_the_bound(constraint, direction):
    layers = nn.Linear(12, 20).double(), nn.Conv2d(3, 8, 3).double()
    weights = [layer.weight for layer in layers]
    optimizer = ConstrainedMuon(weights, 0.1, 1.5, constraint, direction, weight_decay=0.1)
    optimizer.constrain_now()
    for step in range(40):
        for seed, weight in enumerate(weights):
            # The same direction again and again is the hardest to hold.
            weight.grad = random(*weight.shape, seed=seed) + 0.1 * random(*weight.shape, seed=step)
        optimizer.step()
        for weight in weights:
            assert operator_norm(weight.unsqueeze(0)) <= 1.5 * (1 + 1e-5)
    assert operator_norm(weights[0].unsqueeze(0)) > 1.3  # and it is used


def test_13_soft_cap_in_single_precision():
    weight = nn.Parameter(random(30, 10).float())
    optimizer = ConstrainedMuon([weight], 0.1, 1.0)
    optimizer.constrain_now()
    for _ in range(60):
        weight.grad = random(30, 10, seed=3).float()
        optimizer.step()
        assert operator_norm(weight.unsqueeze(0)) <= 1 + 1e-5


@pytest.mark.parametrize(
    ("maximum", "before", "strength"), [(1, 1.1, 0.158864), (2, 2.2, 0.0397161), (6, 6.2, 0.00285246)]
)
def test_13_coupling_of_the_soft_cap(maximum, before, strength):
    assert soft_cap_strength(maximum, before) == pytest.approx(strength, abs=1e-6)
    matrix, _, _ = with_values([before, 0.99 * before, maximum, 0.5 * maximum, 1e-3])
    capped = values(spectral_soft_cap(matrix, soft_cap_strength(maximum, before)))
    assert capped[0] == pytest.approx(maximum, abs=1e-9)
    assert (capped.diff() <= 0).all()
    assert capped[-1] == pytest.approx(1e-3, rel=1e-6)


def test_soft_cap_refuses_what_it_cannot_hold():
    assert soft_cap_strength(1.0, 0.9) == 0
    with pytest.raises(ValueError, match="lower the learning rate"):
        ConstrainedMuon([nn.Parameter(torch.zeros(3, 3))], lr=0.5, max_norm=1.0)
    with pytest.raises(ValueError, match="svd_clip"):
        ConstrainedMuon([nn.Parameter(torch.zeros(3, 3))], direction="adam")
    options = ConstrainedMuon([nn.Parameter(torch.zeros(3, 3))], lr=0.1, weight_decay=0.5, direction="muon_exact")
    assert norm_after_step(options.param_groups[0]) == pytest.approx(1 - 0.05 + 0.1)


def test_14_hard_cap():
    matrix, _, _ = with_values([3.0, 2.0, 1.0, 0.9, 0.2])
    expected = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.2]).double()
    assert (values(spectral_hard_cap(matrix, 1.0)) - expected.sort(descending=True)[0]).abs().max() <= 0.035
    assert values(spectral_hard_cap(5.0 * matrix, 5.0))[0] == pytest.approx(5.0, rel=0.035)
    far, _, _ = with_values([5.0, 1.0])
    capped = values(spectral_hard_cap(far, 1.0))
    assert capped[0] == pytest.approx(1.0, abs=0.035)  # unguarded, the polynomials make it negative and huge
    assert capped[1] == pytest.approx(0.6, abs=0.035)  # the price: everything was divided by 5 / 3


def test_15_hammer_moves_the_largest_only():
    for largest in (4.0, 1.0):
        matrix, u, v = with_values([largest, 0.4, 0.3, 0.1])
        hammered = spectral_hammer(matrix, 2.0, only_down=False)[0]
        for i, value in enumerate((2.0, 0.4, 0.3, 0.1)):
            torch.testing.assert_close(hammered @ v[:, i], value * u[:, i], rtol=0, atol=1e-6)
    matrix, _, _ = with_values([1.0, 0.4])
    torch.testing.assert_close(spectral_hammer(matrix, 2.0), matrix)
    matrix, _, _ = with_values([9.0, 3.0, 1.0])
    assert values(spectral_hammer(matrix, 2.0))[0] == pytest.approx(3.0, rel=1e-5)  # max(bound, second)


def test_the_other_constraints():
    matrix, u, v = with_values([4.0, 1.0, 0.5])
    assert values(spectral_normalize(matrix, 2.0))[:3].tolist() == pytest.approx([2.0, 0.5, 0.25])
    torch.testing.assert_close(spectral_normalize(matrix, 5.0), matrix)
    assert values(spectral_weight_decay(matrix, 0.1))[:3].tolist() == pytest.approx([3.6, 1.0, 0.5])
    assert values(svd_clip(matrix, 0.7))[:3].tolist() == pytest.approx([0.7, 0.7, 0.5])
    made = values(stiefel(matrix, 3.0))[:3] / 3
    assert made.min() >= 0.995
    assert made.max() <= 1.0
    largest, left, right = leading(matrix)
    assert largest.squeeze() == pytest.approx(4.0)
    torch.testing.assert_close((left @ right.mT)[0], torch.outer(u[:, 0], v[:, 0]), rtol=0, atol=1e-6)


def stretch(f, x, direction, size):
    """rms(f(x + size * direction) - f(x)) / rms of the step, the largest over tokens each; [pairs]."""
    step = direction * size

    def largest(t):
        return t.square().mean(-1).sqrt().reshape(len(t), -1).amax(1)

    return largest(f(x + step) - f(x)) / largest(step)


def worst_stretch(f, shape, pairs=10_000, ascents=100, size=1e-3):
    """The largest over random pairs, and after gradient ascent from other pairs."""
    x, direction = random(pairs, *shape), random(pairs, *shape, seed=1)
    with torch.no_grad():
        largest = max(
            float(stretch(f, part, d, s).max())
            for s in (1e-3, 1.0)
            for part, d in zip(x.split(1000), direction.split(1000), strict=True)
        )
    x, direction = x[:ascents].clone().requires_grad_(), direction[:ascents].clone().requires_grad_()
    optimizer = torch.optim.Adam([x, direction], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (-stretch(f, x, direction, size)).sum().backward()
        optimizer.step()
    return largest, float(stretch(f, x, direction, size).detach().max())


def test_16_certificate_holds_and_is_not_far_off():
    network = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), DividedGELU(), nn.Linear(16, 3), nn.Tanh(), Multiply(-0.5)
    ).double()
    bound = float(lipschitz_bound(network))
    found, climbed = worst_stretch(network, (6,))
    assert found <= climbed <= bound
    assert climbed > 0.1 * bound


def test_16_certificate_of_an_attention_network():
    width, share = 8, 0.25
    network = nn.Sequential(
        ConvexResidual(Attention(width, 2, softmax_scale=2.0), share),
        ConvexResidual(nn.Sequential(nn.Linear(width, 16, bias=False), DividedGELU(), nn.Linear(16, width)), share),
        nn.Linear(width, 4),
    ).double()
    initialise(network, generator())
    bound = float(lipschitz_bound(network, input_rms=1.0))

    def within(x):  # inputs of root mean square at most 1, by a map that stretches by 1 at most
        return network(x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1))

    found, climbed = worst_stretch(within, (5, width), pairs=1000, ascents=20)
    assert max(found, climbed) <= bound
    with pytest.raises(ValueError, match="input_rms"):
        lipschitz_bound(network)


def test_16_identity_gives_exactly_one():
    eye = nn.Linear(5, 5, bias=False).double()
    with torch.no_grad():
        eye.weight.copy_(torch.eye(5))
    assert float(lipschitz_bound(nn.Sequential(nn.Identity(), eye, nn.Flatten()))) == 1.0


def test_norm_one_attention_stretches_by_one():
    attention = Attention(8, 2).double()
    initialise(attention, generator())
    for layer in (attention.query, attention.key, attention.value):  # per head, sqrt(8 / 4) times the norm
        layer.weight.data /= math.sqrt(2)
    assert float(lipschitz_bound(attention, input_rms=1.0)) == pytest.approx(1.0)


def test_certificate_of_convolutions_holds():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6, 3),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        network(random(20, 2, 6, 6))
        network[3].running_var.fill_(0.3)
    bound = float(lipschitz_bound(network))

    def by_pixel(x):  # [N, pixels, channels]
        return network(x.mT.reshape(len(x), 2, 6, 6))

    found, climbed = worst_stretch(by_pixel, (36, 2), pairs=300, ascents=10)
    assert max(found, climbed) <= bound


def test_what_has_no_certificate_is_refused():
    with pytest.raises(ValueError, match="LayerNorm has no useful"):
        lipschitz_bound(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))
    loose = lipschitz_bound(nn.Sequential(nn.LayerNorm(3, eps=1e-5)), strict=False)
    assert float(loose) == pytest.approx(316, abs=0.5)
    with pytest.raises(ValueError, match="Bilinear"):
        lipschitz_bound(nn.Sequential(nn.Bilinear(2, 2, 2)))


def test_certificate_of_a_population_is_that_of_its_members():
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)) for _ in range(3)]
    alone = torch.stack([lipschitz_bound(network) for network in networks])
    torch.testing.assert_close(lipschitz_bound(stack(networks)), alone)


def test_transformer_trains_within_its_certificate():
    torch.manual_seed(0)
    network = lipschitz_transformer(11, 16, 2, 4, final_scale=2.0)
    initialise(network, generator())
    optimizer = ConstrainedMuon(parameter_groups(network, dict(network.named_parameters()), 1e-2, False), 0.1, 1.0)
    optimizer.constrain_now()
    tokens = torch.randint(11, (32, 6), generator=generator())
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(network(tokens)[:, :-1].flatten(0, 1), tokens[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    # Every sub-layer of norm 1 keeps the stretch at 1; an MLP of two layers of norm 1, an attention, a head of norm 1.
    assert float(lipschitz_bound(network)) <= 2.0 * (1 + 1e-4)
    assert network[0].weight.square().mean(-1).max() <= 1 + 1e-5
