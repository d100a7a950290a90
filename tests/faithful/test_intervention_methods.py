"""Checks 16 to 18 and 20 of specs/nap-and-plasticity.md, section 7, and hand-made cases of the other interventions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from plasticity.intervention import Batch
from plasticity.interventions.activations import WithCReLU, WithFourier
from plasticity.interventions.cbp import CBP, FreshRows, Schedule, least_useful
from plasticity.interventions.churn import Churn
from plasticity.interventions.hare_tortoise import HareTortoise
from plasticity.interventions.injection import Injection
from plasticity.interventions.perturb import ShrinkPerturb, ShrinkPerturbStep
from plasticity.interventions.redo import ReDo, dormancy
from plasticity.interventions.regularisers import L2, L2Init, Parseval, Spectral, W2Init
from plasticity.interventions.shifts import AdamW, WeightClip, WeightDecay
from plasticity.interventions.snr import record_silences, silence_thresholds
from plasticity.networks.redraw import fresh_parameters
from plasticity.networks.structure import activations, find_structure
from tests.plasticity.toy import Residual, draw_, learner_of

NOTHING = Batch(torch.zeros(1, 1, 1), torch.zeros(1, 1), {})


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs, dtype=torch.float64), nn.ReLU()]
    return draw_(nn.Sequential(*layers[:-1]), torch.Generator().manual_seed(seed))  # type: ignore[return-value]


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_axis(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.unsqueeze(0) for name, p in network.named_parameters()}


def watched(learner, x):
    """The batch [1, B, ...] as interventions see it, and the output."""
    with activations(learner.network, learner.structure) as seen:
        output = learner.network(x)
    return Batch(x.unsqueeze(0), torch.zeros(1, len(x)), {n: h.unsqueeze(0) for n, h in seen.items()}), output.detach()


# Check 16.


def test_l2_init_pulls_by_lambda_times_the_distance():
    network = mlp(3, 4, 2)
    learner, l2_init = learner_of(network), L2Init(strength=0.3)
    l2_init.begin(learner)
    l2_init.penalty(learner, with_axis(network)).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in network.parameters())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1)
    l2_init.penalty(learner, with_axis(network)).sum().backward()
    for p in network.parameters():
        torch.testing.assert_close(p.grad, torch.full_like(p, 0.3))


@pytest.mark.parametrize(("distance", "far", "near"), [("l1", 1.0, 1.0), ("huber", 1.0, 0.25), ("l2", 4.0, 0.25)])
def test_distances_of_l2_init(distance, far, near):
    network = mlp(3, 4, 2)
    learner, l2_init = learner_of(network), L2Init(strength=1.0, distance=distance)
    l2_init.begin(learner)
    with torch.no_grad():
        network[0].weight.add_(4.0)
        network[2].bias.sub_(0.25)
    l2_init.penalty(learner, with_axis(network)).sum().backward()
    torch.testing.assert_close(network[0].weight.grad, torch.full_like(network[0].weight, far))
    torch.testing.assert_close(network[2].bias.grad, torch.full_like(network[2].bias, -near))


def test_l2_counts_biases_but_not_gains():
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    learner, l2 = learner_of(network), L2(strength=0.5)
    l2.begin(learner)
    expected = sum(0.25 * p.square().sum() for p in [*network[0].parameters(), *network[3].parameters()])
    torch.testing.assert_close(l2.penalty(learner, with_axis(network)).squeeze(0), expected)
    heads = L2(strength=0.5, hidden=False)
    heads.begin(learner)
    assert heads.names == ["0.bias", "3.weight", "3.bias"]


def test_w2_init_does_not_see_an_exchange_of_values():
    network = mlp(3, 4, 2)
    learner, w2_init = learner_of(network), W2Init(strength=2.0)
    w2_init.begin(learner)
    with torch.no_grad():
        network[0].weight.copy_(network[0].weight.flip(0, 1))
    assert w2_init.penalty(learner, with_axis(network)).sum() == 0
    with torch.no_grad():
        network[0].weight.add_(3.0)
    torch.testing.assert_close(w2_init.penalty(learner, with_axis(network)).sum(), torch.tensor(9.0 * 12).double())


@pytest.mark.parametrize("keep", [0.0, 0.25, 1.0])
def test_shrink_perturb_moves_towards_a_fresh_draw(keep):
    network = mlp(3, 4, 2)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    expected = fresh_parameters(learner_of(network))
    learner = learner_of(network)
    ShrinkPerturb(keep).at_boundary(learner)
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.detach(), keep * before[name] + (1 - keep) * expected[name][0])
        if keep in (0, 1):
            assert torch.equal(p, before[name] if keep else expected[name][0])


def test_shrink_perturb_step_draws_anew_each_time():
    network = mlp(3, 4, 2)
    learner, reference = learner_of(network), learner_of(network)
    expected = network[0].weight.detach().clone()
    for _ in range(3):
        ShrinkPerturbStep(shrink=0.1, perturb=0.2).after_step(learner, NOTHING)
        expected = 0.9 * expected + 0.2 * fresh_parameters(reference)["0.weight"][0]
    torch.testing.assert_close(network[0].weight.detach(), expected)


@pytest.mark.parametrize("clip_last", [True, False])
def test_weight_clip(clip_last):
    network = mlp(784, 5, 3)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(100)
    before = network[2].weight.detach().clone()
    learner, clip = learner_of(network), WeightClip(factor=2.0, clip_last=clip_last)
    clip.begin(learner)
    clip.after_step(learner, NOTHING)
    largest = {name: float(p.detach().abs().max()) for name, p in network.named_parameters()}
    assert [largest["0.weight"], largest["0.bias"]] == pytest.approx([2 / 28, 2 / 28])
    if clip_last:
        assert largest["2.weight"] == pytest.approx(2 / math.sqrt(5))
    else:
        assert torch.equal(network[2].weight, before)


def test_weight_clip_to_the_range_of_another_initialiser():
    network = mlp(6, 5, 3)
    nn.init.kaiming_uniform_(network[0].weight, generator=torch.Generator().manual_seed(0))
    largest = network[0].weight.detach().abs().max()
    learner, clip = learner_of(network), WeightClip(factor=1.5, bound="initial")
    clip.begin(learner)
    with torch.no_grad():
        network[0].weight.mul_(10)
    clip.after_step(learner, NOTHING)
    torch.testing.assert_close(network[0].weight.detach().abs().max(), 1.5 * largest)


def test_hare_becomes_a_copy_of_the_tortoise_with_its_own_storage():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    learner, tortoise = learner_of(network), HareTortoise(momentum=0.9, every=2)
    tortoise.begin(learner)
    start = network[0].weight.detach().clone()
    for step in (1, 2):
        with torch.no_grad():
            network[0].weight.add_(1)
            network(draw(8, 3, seed=step).float())
        learner.steps = step
        tortoise.after_step(learner, NOTHING)
    torch.testing.assert_close(network[0].weight.detach(), start + 0.9 * 0.1 + 0.1 * 2)
    assert network[1].num_batches_tracked == 2
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        assert torch.equal(tortoise.slow[name][0], tensor)
        assert tortoise.slow[name].data_ptr() != tensor.data_ptr()
    assert network[1].running_mean.abs().max() > 0


# Check 17.


def test_redo_scores_by_hand():
    score = dormancy(torch.tensor([[4.0, 1.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert score[0].tolist() == pytest.approx([3.137, 0.784, 0.0784, 0], abs=1e-3)
    assert [(score[0] <= tau).sum() for tau in (0.025, 0.1, 0.0)] == [1, 2, 1]
    assert torch.equal(score[1], torch.zeros(4))


def silenced(*units: int) -> nn.Sequential:
    """An MLP in whose first layer some units are never positive."""
    network = mlp(3, 6, 5, 2)
    with torch.no_grad():
        for unit in units:
            network[0].bias[unit] = -100.0
    return network


def test_resetting_silent_units_leaves_the_logits():
    network, x = silenced(1, 4), draw(64, 3)
    learner = learner_of(network)
    redo = ReDo(threshold=0.0, every=1)
    redo.begin(learner)
    fresh = fresh_parameters(learner_of(network))
    batch, before = watched(learner, x)
    learner.steps = 1
    redo.after_step(learner, batch)
    assert torch.equal(network(x), before)
    assert torch.equal(network[0].weight[[1, 4]], fresh["0.weight"][0, [1, 4]])
    assert network[0].bias[[1, 4]].abs().max() == 0
    assert network[2].weight[:, [1, 4]].abs().max() == 0
    assert network[2].weight[:, [0, 2, 3, 5]].abs().min() > 0


def test_a_layer_that_is_silent_altogether_is_reset_without_nan():
    network, x = silenced(*range(6)), draw(64, 3)
    learner, redo = learner_of(network), ReDo(every=1)
    redo.begin(learner)
    learner.steps = 1
    redo.after_step(learner, watched(learner, x)[0])
    assert all(p.isfinite().all() for p in network.parameters())
    assert network[0].bias.abs().max() == 0


def test_redo_averages_over_the_last_samples_only():
    network = silenced()
    learner, redo = learner_of(network), ReDo(every=5, samples=20)
    redo.begin(learner)
    for step in range(1, 5):
        learner.steps = step
        redo.after_step(learner, watched(learner, draw(10, 3, seed=step))[0])
        assert (redo.activity["1"].sum() > 0) == (step == 4)


# Check 18.


def schedule_of(units, maturity, rate, steps):
    schedule = Schedule(units, maturity, rate)
    return schedule, [schedule.advance() for _ in range(steps)]


def test_cbp_replaces_at_the_tenth_eligible_step_of_a_hundred_units():
    schedule, counts = schedule_of(100, 20, 1e-3, 30)
    assert counts == [0] * 29 + [1]
    assert schedule.eligible == 99
    later = [schedule.advance() for _ in range(21)]
    assert schedule.eligible == 99 - sum(later) + 1


@pytest.mark.parametrize(("units", "rate", "maturity"), [(100, 1e-3, 5), (7, 0.37, 2), (50, 1.0, 3), (2000, 1e-5, 100)])
def test_cbp_counts_what_the_ages_say(units, rate, maturity):
    """Against ages kept one by one; the count is exact, not what adding floats makes of it."""
    schedule, ages, replaced, due = Schedule(units, maturity, rate), [0] * units, 0, 0
    hundred_thousand = round(rate * 100_000)
    for _ in range(400):
        ages = [age + 1 for age in ages]
        old = [i for i, age in enumerate(ages) if age > maturity]
        due += hundred_thousand * len(old)
        count = schedule.advance()
        assert count == min(due // 100_000 - replaced, len(old))
        replaced += count
        for i in old[:count]:
            ages[i] = 0


def test_cbp_ranks_by_corrected_utility_of_those_old_enough():
    age = torch.tensor([[101, 1000, 100]])
    true = torch.tensor([[1.0, 0.9, 0.0]])
    raw = true * (1 - 0.99**age)
    assert raw[0, 0] == pytest.approx(0.638, abs=1e-3)
    assert raw[0, :2].argmin() == 0
    assert least_useful(raw / (1 - 0.99**age), age, 100, 1).tolist() == [[1]]


def run_cbp(network, cbp, batches, optimizer=None):
    learner = learner_of(network, optimizer)
    cbp.begin(learner)
    for step, x in enumerate(batches, start=1):
        learner.steps = step
        cbp.after_step(learner, watched(learner, x)[0])
    return learner


def test_cbp_spares_units_until_they_are_mature():
    network = mlp(3, 6, 5, 2)
    before = copy.deepcopy(network)
    cbp = CBP(rate=1.0, maturity=3)
    batches = [draw(8, 3, seed=step) for step in range(4)]
    learner = run_cbp(network, cbp, batches[:3])
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before.parameters(), strict=True))
    learner.steps = 4
    cbp.after_step(learner, watched(learner, batches[3])[0])
    assert not torch.equal(network[0].weight, before[0].weight)


@pytest.mark.parametrize("compensate", [True, False])
def test_cbp_changes_the_output_by_what_differs_from_the_mean(compensate):
    network, x = mlp(3, 6, 2), draw(32, 3)
    old = copy.deepcopy(network)
    cbp = CBP(rate=0.2, maturity=4, compensate=compensate)  # one of six units at the fifth step
    batches = [x + 0.01 * draw(32, 3, seed=step) for step in range(5)]
    learner = run_cbp(network, cbp, batches[:4])
    batch, before = watched(learner, batches[4])
    learner.steps = 5
    cbp.after_step(learner, batch)
    (unit,) = (network[0].weight != old[0].weight).any(1).nonzero().flatten()
    h = batch.activations["1"][0, :, unit]
    means = [old[:2](b)[:, unit].mean() for b in batches]
    weights = [0.01 * 0.99 ** (4 - i) for i in range(5)]
    f = sum(w * m for w, m in zip(weights, means, strict=True)) / (1 - 0.99**5)
    removed = (h - f if compensate else h).unsqueeze(1) * old[2].weight[:, unit]
    torch.testing.assert_close(network(batches[4]), before - removed)
    assert network[2].weight[:, unit].abs().max() == 0
    assert network[0].bias[unit] == 0
    assert [cbp.units["1"].age[0, unit], cbp.units["1"].utility[0, unit], cbp.units["1"].mean[0, 0, unit]] == [0, 0, 0]


@pytest.mark.parametrize("utility", ["contribution", "zero_contribution", "adaptable_contribution", "weight"])
def test_utilities_by_hand(utility):
    network, x = mlp(3, 6, 2), draw(32, 3)
    cbp = CBP(rate=0.0, utility=utility)
    learner = learner_of(network)
    cbp.begin(learner)
    batch, _ = watched(learner, x)
    cbp.after_step(learner, batch)
    h, out = batch.activations["1"][0], network[2].weight.detach().abs().mean(0)
    spread = (h - h.mean(0)).abs().mean(0)
    expected = {
        "contribution": out * h.abs().mean(0),
        "zero_contribution": out * spread,
        "adaptable_contribution": out * spread / network[0].weight.detach().abs().mean(1),
        "weight": out,
    }
    torch.testing.assert_close(cbp.units["1"].utility[0], 0.01 * expected[utility])


def test_cbp_behind_a_convolution_clears_every_column_of_the_channel_and_compensates():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    draw_(network, torch.Generator().manual_seed(0))
    old, x = copy.deepcopy(network), draw(32, 2, 4, 4)
    learner = run_cbp(network, CBP(rate=0.3, maturity=0), [x])  # one of four channels
    (unit,) = (network[0].weight != old[0].weight).flatten(1).any(1).nonzero().flatten()
    columns = (old[3].weight != network[3].weight).any(0).nonzero().flatten()
    assert columns.tolist() == list(range(4 * unit, 4 * unit + 4))
    assert network[3].weight[:, columns].abs().max() == 0
    mean = old[:2](x)[:, unit].mean()
    torch.testing.assert_close(network[3].bias, old[3].bias + mean * old[3].weight[:, columns].sum(1))
    assert learner.structure.hidden[0].readers[0].inputs_per_unit == 4


def test_fresh_rows_follow_the_layers_own_law_and_are_used_once():
    network = mlp(50, 40, 2)
    learner, stock = learner_of(network), FreshRows()
    layer = learner.structure.hidden[0]
    rows = torch.cat([stock.take(learner, layer, 15)["0.weight"][0] for _ in range(8)])
    assert len({tuple(row.tolist()) for row in rows}) == 120
    assert rows.abs().max() <= 50**-0.5
    assert rows.std() == pytest.approx(50**-0.5 / math.sqrt(3), rel=0.05)


# Check 20 (the halves of CReLU: tests/plasticity/test_nonlinearities.py).


def test_injection_keeps_the_logits_and_trains_the_new_branch_only():
    network = Injection().build(mlp(3, 6, 2))
    x, y = draw(32, 3), draw(32, 2, seed=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    learner, injection = learner_of(network, optimizer), Injection()

    def step():
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        optimizer.step()

    step()
    before, theta, head = network(x).detach(), network[2].weight.detach().clone(), network[2].weight
    injection.at_boundary(learner)
    assert network[2].weight is head
    assert not torch.equal(head, theta)
    torch.testing.assert_close(network(x), before, rtol=1e-6, atol=1e-6)
    frozen = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert torch.equal(frozen["2.frozen_weight"], theta)
    assert torch.equal(frozen["2.offset_weight"], head)
    assert optimizer.state[head]["step"] == 0
    step()
    assert all(torch.equal(frozen[name], buffer) for name, buffer in network.named_buffers())
    assert not torch.equal(head, frozen["2.offset_weight"])
    injection.at_boundary(learner)
    assert torch.equal(network[2].get_buffer("frozen_weight"), theta), "it is done once"


def test_the_features_get_no_gradient_through_the_subtracted_branch():
    network = Injection().build(mlp(3, 6, 2))
    Injection().at_boundary(learner_of(network))
    h = draw(4, 6).requires_grad_()
    network[2](h).sum().backward()
    theta, own = network[2].get_buffer("frozen_weight"), network[2].weight.detach()
    torch.testing.assert_close(h.grad, (theta + own).sum(0).expand(4, -1))


# The others.


def test_spectral_finds_the_largest_singular_value():
    network = mlp(7, 9, 4)
    with torch.no_grad():
        network[0].weight.mul_(3)
    learner, spectral = learner_of(network), Spectral(strength=0.1)
    spectral.begin(learner)
    for _ in range(300):
        spectral.after_step(learner, NOTHING)
    penalty = spectral.penalty(learner, with_axis(network)).sum()
    penalty.backward()
    network_again = copy.deepcopy(network)
    sigmas = [torch.linalg.matrix_norm(layer.weight, 2) for layer in (network_again[0], network_again[2])]
    biases = [layer.bias.square().sum() for layer in (network_again[0], network_again[2])]
    expected = 0.1 * (sum((s**2 - 1) ** 2 for s in sigmas) + sum(biases))
    torch.testing.assert_close(penalty, expected)
    network_again.zero_grad()
    expected.backward()
    for p, q in zip(network.parameters(), network_again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)


def test_parseval_by_hand():
    network = mlp(7, 5, 4)
    learner, parseval = learner_of(network), Parseval(strength=0.2, scale=2.0)
    parseval.begin(learner)
    w = network[0].weight
    expected = 0.2 * (w @ w.T - 2 * torch.eye(5)).square().sum()
    torch.testing.assert_close(parseval.penalty(learner, with_axis(network)).sum(), expected)


def test_adamw_is_torchs_and_spares_gains():
    networks = [nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    ours = AdamW(strength=0.3).optimizer(networks[0], networks[0].parameters(), 0.01, False)
    layers = [*networks[1][0].parameters(), *networks[1][3].parameters()]
    groups = [{"params": layers, "weight_decay": 0.3}, {"params": networks[1][1].parameters(), "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01)
    for step in range(5):
        for network, optimizer in zip(networks, (ours, theirs), strict=True):
            optimizer.zero_grad()
            network(draw(8, 3, seed=step).float()).square().mean().backward()
            optimizer.step()
    for p, q in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_weight_decay_shrinks_by_rate_times_strength():
    network = mlp(3, 4, 2)
    before = network[0].weight.detach().clone()
    learner, decay = learner_of(network, torch.optim.SGD(network.parameters(), lr=0.1)), WeightDecay(strength=0.5)
    decay.begin(learner)
    decay.after_step(learner, NOTHING)
    torch.testing.assert_close(network[0].weight.detach(), 0.95 * before)


def test_churn_compares_outputs_on_the_batch_before_with_those_of_the_parameters_before():
    network = mlp(3, 4, 2)
    learner, churn = learner_of(network), Churn(strength=5.0)
    churn.begin(learner)
    assert churn.penalty(learner, with_axis(network)) is None
    past = {name: p.detach().clone() for name, p in network.named_parameters()}
    x = draw(8, 3)
    with torch.no_grad():
        network[0].weight.add_(0.1)
    churn.after_step(learner, watched(learner, x)[0])
    expected = 5 * (network(x) - functional_call(network, past, (x,))).square().mean()
    torch.testing.assert_close(churn.penalty(learner, with_axis(network)).sum(), expected)
    with pytest.raises(ValueError, match="BatchNorm"):
        churn.begin(learner_of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))))


def test_snr_thresholds_by_hand():
    """Silences of 0 (98 times), 3 and 7: one in a hundred is longer than 3, two are longer than 0."""
    silence, history = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 60)
    for length in [0] * 98 + [3, 7]:
        for fires in [False] * length + [True]:
            record_silences(silence, history, torch.tensor([[fires, False]]))
    assert silence.tolist() == [[0, 110]]
    assert history.sum(2).tolist() == [[100, 0]]
    # ends of bins: lengths 0, 1, 2, 3 have bins of their own
    assert silence_thresholds(history, 0.02, 1000).tolist() == [[0, 1000]]
    assert silence_thresholds(history, 0.01, 1000).tolist() == [[3, 1000]]
    assert silence_thresholds(history, 0.005, 1000).tolist() == [[1000, 1000]], "100 silences do not tell one in 200"


@pytest.mark.parametrize("length", [0, 1, 2, 5, 17, 100, 999])
def test_a_silence_as_long_as_all_before_is_not_rare(length):
    silence, history = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 60)
    for fires in ([False] * length + [True]) * 3:
        record_silences(silence, history, torch.tensor([[fires]]))
    (threshold,) = silence_thresholds(history, 0.5, 10_000).flatten().tolist()
    assert length <= threshold <= 1.2 * length + 1


def test_crelu_keeps_the_number_of_parameters():
    """9 % fewer units for the network of Kumar et al., as they state."""
    network = mlp(784, 100, 100, 10)
    before = sum(p.numel() for p in network.parameters())
    network = WithCReLU().build(network)
    assert [network[0].out_features, network[2].in_features, network[2].out_features] == [91, 182, 91]
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(before, rel=0.005)
    assert network(torch.zeros(5, 784, dtype=torch.float64)).shape == (5, 10)
    layer = find_structure(network).hidden[0]
    assert (layer.nonlinearity, layer.units, layer.readers[0].copies) == ("crelu", 91, 2)


@pytest.mark.parametrize(("intervention", "units"), [(WithCReLU(keep="units"), 8), (WithFourier(), 4)])
def test_doubled_outputs_in_a_network_of_images(intervention, units):
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8),
        nn.Tanh(), nn.Flatten(), nn.Linear(32, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    state = torch.get_rng_state()
    network = intervention.build(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer.units for layer in find_structure(network).hidden] == [units] * 3
    assert network(torch.zeros(5, 2, 6, 6)).shape == (5, 3)
    assert all(p.isfinite().all() for p in network.parameters())


def test_widths_that_cannot_be_told_are_refused():
    with pytest.raises(ValueError, match="residual sum"):
        WithCReLU().build(Residual())
    with pytest.raises(ValueError, match="normaliser '2'"):
        WithCReLU().build(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="no nonlinearity"):
        WithCReLU().build(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
