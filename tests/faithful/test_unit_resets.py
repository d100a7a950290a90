"""Checks 17 and 18 of specs/nap-and-plasticity.md, section 7: redo, cbp and snr by hand-made cases."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from plasticity.interventions.cbp import CBP, FreshRows, Schedule, least_useful
from plasticity.interventions.redo import ReDo, dormancy
from plasticity.interventions.snr import record_silences, silence_thresholds
from plasticity.networks.redraw import fresh_parameters
from tests.plasticity.toy import draw, draw_, learner_of, relu_mlp, watched


def test_redo_scores_by_hand():
    score = dormancy(torch.tensor([[4.0, 1.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert score[0].tolist() == pytest.approx([3.137, 0.784, 0.0784, 0], abs=1e-3)
    assert [(score[0] <= tau).sum() for tau in (0.025, 0.1, 0.0)] == [1, 2, 1]
    assert torch.equal(score[1], torch.zeros(4))


def silenced(*units: int) -> nn.Sequential:
    """An MLP in whose first layer some units are never positive."""
    network = relu_mlp(3, 6, 5, 2)
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
    network = relu_mlp(3, 6, 5, 2)
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
    network, x = relu_mlp(3, 6, 2), draw(32, 3)
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
    network, x = relu_mlp(3, 6, 2), draw(32, 3)
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
    network = relu_mlp(50, 40, 2)
    learner, stock = learner_of(network), FreshRows()
    layer = learner.structure.hidden[0]
    rows = torch.cat([stock.take(learner, layer, 15)["0.weight"][0] for _ in range(8)])
    assert len({tuple(row.tolist()) for row in rows}) == 120
    assert rows.abs().max() <= 50**-0.5
    assert rows.std() == pytest.approx(50**-0.5 / math.sqrt(3), rel=0.05)


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
