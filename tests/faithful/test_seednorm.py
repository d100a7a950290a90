"""The faithfulness checks 11 and 12 of specs/optimizers-and-norms.md."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plasticity.interventions.seednorm import SeeDNorm, WithSeeDNorm, seednorm_param_groups
from plasticity.networks.architectures import draw_
from plasticity.networks.stacked import stack
from plasticity.networks.structure import find_structure


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(features=6, heads=1, eps=1e-6):
    """One with parameters far from where they begin."""
    made = SeeDNorm(features, heads, eps=eps).double()
    with torch.no_grad():
        for seed, p in enumerate(made.parameters()):
            p.copy_(random(features, seed=10 + seed))
    return made


def test_11_begins_as_rms_norm_and_beta_learns():
    x, up = random(4, 6), random(4, 6, seed=1)
    made, plain = SeeDNorm(6).double(), nn.RMSNorm(6, eps=1e-6).double()
    assert (made(x) - plain(x)).abs().max() <= 1e-7
    (made(x) * up).sum().backward()
    assert made.beta.grad.abs().min() > 0
    assert (made.alpha.grad == 0).all()


def test_12_gradients_in_closed_form():
    x, up, made = random(4, 6).requires_grad_(), random(4, 6, seed=1), norm()
    (made(x) * up).sum().backward()
    gamma, alpha, beta = (p.detach() for p in (made.weight, made.alpha, made.beta))
    t = x.detach()
    r = (t.square().mean(1, keepdim=True) + 1e-6).sqrt()
    n, s = t / r, torch.tanh(t @ beta).unsqueeze(1)
    along = (up * alpha * n).sum(1, keepdim=True)
    torch.testing.assert_close(made.weight.grad, (up * n).sum(0))
    torch.testing.assert_close(made.alpha.grad, (s * up * n).sum(0))
    torch.testing.assert_close(made.beta.grad, ((1 - s**2) * along * t).sum(0))
    c = up * (s * alpha + gamma)
    through = (c - n * (c * n).mean(1, keepdim=True)) / r
    torch.testing.assert_close(x.grad, through + (1 - s**2) * along * beta)


def test_12_scaling_changes_the_score_only():
    made, x, k = norm(eps=0.0), random(5, 6), 2.5
    change = torch.tanh(k * x @ made.beta) - torch.tanh(x @ made.beta)
    n = x / x.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(made(k * x) - made(x), change.unsqueeze(1) * made.alpha * n)


def test_12_heads():
    x, one, each = random(5, 6), norm(), norm(heads=6)
    n = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    by_hand = (torch.tanh(x @ one.beta).unsqueeze(1) * one.alpha + one.weight) * n
    torch.testing.assert_close(one(x), by_hand)
    torch.testing.assert_close(each(x), (torch.tanh(x * each.beta) * each.alpha + each.weight) * n)
    two = norm(heads=2)
    halves = torch.stack([torch.tanh(x[:, i : i + 3] @ two.beta[i : i + 3]) for i in (0, 3)], 1)
    torch.testing.assert_close(two(x), (halves.repeat_interleave(3, 1) * two.alpha + two.weight) * n)


def test_output_stays_bounded():
    made = norm()
    n = random(5, 6)
    n = n / n.square().mean(1, keepdim=True).sqrt()
    assert (made(1e6 * n).abs() <= (made.alpha.abs() + made.weight.abs()) * n.abs() * (1 + 1e-6)).all()


def test_bad_settings():
    with pytest.raises(ValueError, match="do not divide"):
        SeeDNorm(6, heads=4)
    with pytest.raises(ValueError, match="both begin at 0"):
        SeeDNorm(6, alpha_init=0.0)
    with pytest.raises(ValueError, match="one axis"):
        WithSeeDNorm().build(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm([4, 3]), nn.ReLU(), nn.Linear(3, 2)))


def test_half_precision_is_computed_in_single():
    made, x = SeeDNorm(64), random(8, 64).bfloat16() * 100
    assert made(x).dtype == torch.bfloat16
    torch.testing.assert_close(made(x), made(x.float()).bfloat16())


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(("make", "shape"), [(mlp, (5,)), (cnn, (1, 4, 4))])
def test_intervention_puts_it_before_every_nonlinearity(make, shape):
    network = WithSeeDNorm(heads=2).build(make())
    layers = find_structure(network).hidden
    assert [layer.units for layer in layers] == [layer.units for layer in find_structure(make()).hidden]
    assert all(isinstance(network.get_submodule(layer.normaliser), SeeDNorm) for layer in layers)
    # Its output depends on the scale of its input, so the weights in front have a scale that counts.
    assert not any(group.exact for group in find_structure(network).normalised)

    networks = [WithSeeDNorm(heads=2).build(make()).double() for _ in range(3)]
    for k, one in enumerate(networks):
        for p in one.parameters():
            p.data.copy_(random(*p.shape, seed=k))
    x = random(3, 7, *shape)
    population = stack(networks)
    torch.testing.assert_close(population(x), torch.stack([one(x[k]) for k, one in enumerate(networks)]))
    assert [layer.units for layer in find_structure(population).hidden] == [layer.units for layer in layers]


def test_networks_are_drawn_with_it():
    network = WithSeeDNorm(alpha_init=0.5).build(mlp())
    network[1].alpha.data.zero_()
    draw_(network, "kaiming", torch.Generator().manual_seed(0))
    assert (network[1].alpha == 0.5).all()


def test_intervention_replaces_normalisers():
    network = nn.Sequential(
        nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3)
    )
    built = WithSeeDNorm().build(network)
    assert [type(module) for module in built] == [nn.Linear, SeeDNorm, nn.ReLU, nn.Linear, SeeDNorm, nn.Linear]


def test_parameter_groups():
    network = WithSeeDNorm().build(mlp())
    decayed, others = seednorm_param_groups(network, 0.1)
    names = {id(p): name for name, p in network.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert sorted(names[id(p)] for p in decayed["params"]) == [
        "0.weight", "1_norm.alpha", "1_norm.beta", "2.weight", "3_norm.alpha", "3_norm.beta", "4.weight",
    ]  # fmt: skip
    assert sorted(names[id(p)] for p in others["params"]) == [
        "0.bias", "1_norm.weight", "2.bias", "3_norm.weight", "4.bias",
    ]  # fmt: skip
