"""Drawing units and tensors anew: the optimiser's state, copies and identity go with them, for masks and indices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from plasticity.adam import Adam
from plasticity.networks.redraw import (
    clear_moments,
    clear_step_counts,
    fresh_parameters,
    reader_inputs,
    redraw_tensors,
    redraw_units,
    redrawable,
)
from plasticity.networks.stacked import stack
from plasticity.networks.structure import Reader
from plasticity.optimisers.adamp import AdamP
from plasticity.optimisers.trac import TRAC
from tests.plasticity.toy import MEMBERS, Residual, draw_, learner_of


def network(seed: int = 0) -> nn.Module:
    made = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(1, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    return draw_(made, torch.Generator().manual_seed(seed))


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "ours": lambda parameters: Adam(list(parameters), 0.1),
}


def trained(optimizer: str, members: int | None):
    whole = network() if members is None else stack([network(seed) for seed in range(members)])
    chosen = OPTIMIZERS[optimizer](whole.parameters())
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        gradients = [torch.rand(p.shape, generator=generator) + 0.5 for p in whole.parameters()]
        for p, g in zip(whole.parameters(), gradients, strict=True):
            p.grad = g
        chosen.step(*[gradients] * (optimizer == "ours"))
    learner = learner_of(whole, chosen, members)
    learner.fresh = lambda generator: draw_(network(), generator)
    learner.copies.append({name: learner.parameter(name).clone() for name, _ in whole.named_parameters()})
    return learner


def states(learner, name):
    """What the optimiser keeps for a parameter: [K, *shape] tensors, and step counts."""
    parameter, optimizer = learner.network.get_parameter(name), learner.optimizer
    if isinstance(optimizer, Adam):
        index = next(i for i, p in enumerate(optimizer.parameters) if p is parameter)
        found = [optimizer.exp_avg[index], optimizer.exp_avg_sq[index], optimizer.step_count[index]]
    else:
        found = [state for state in optimizer.state[parameter].values() if state is not None]
    moments = [state for state in found if state.dim()]
    moments = moments if learner.members else [state.unsqueeze(0) for state in moments]
    return moments, [state for state in found if not state.dim()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("members", [None, MEMBERS])
@pytest.mark.parametrize("indexed", [False, True])
def test_units_take_their_rows_columns_and_optimiser_state_with_them(optimizer, members, indexed):
    learner = trained(optimizer, members)
    count = members or 1
    identity = [id(p) for p in learner.network.parameters()]
    chosen = torch.tensor([[0, 2], [1, 3], [3, 0]])[:count]
    mask = torch.zeros(count, 4, dtype=torch.bool).scatter_(1, chosen, True)
    before = {name: learner.parameter(name).clone() for name, _ in learner.network.named_parameters()}
    layer, fresh = learner.structure.hidden[0], fresh_parameters(learner)
    if indexed:
        rows = {
            name: torch.stack([t[k, i] for k, i in enumerate(chosen)]) for name, t in fresh.items() if name[0] < "2"
        }
        redraw_units(learner, layer, chosen, rows)
    else:
        redraw_units(learner, layer, mask, fresh)

    rows, columns = mask, mask.repeat_interleave(4, 1)
    for values in ({n: learner.parameter(n) for n in before}, learner.copies[0]):
        for name in ("0.weight", "1.weight", "1.bias"):
            assert torch.equal(values[name][rows], fresh[name][rows])
            assert torch.equal(values[name][~rows], before[name][~rows])
        assert values["0.bias"][rows].abs().max() == 0
        outgoing, kept = values["4.weight"].mT, before["4.weight"].mT
        assert outgoing[columns].abs().max() == 0
        assert torch.equal(outgoing[~columns], kept[~columns])
        for name in ("4.bias", "6.weight", "6.bias"):
            assert torch.equal(values[name], before[name])
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        for state in states(learner, name)[0]:
            assert state[rows].abs().max() == 0
            assert state[~rows].abs().min() > 0
    for state in states(learner, "4.weight")[0]:
        assert state.mT[columns].abs().max() == 0
        assert state.mT[~columns].abs().min() > 0
    assert all(step == 3 for step in states(learner, "0.weight")[1])
    assert identity == [id(p) for p in learner.network.parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_tensor_drawn_anew_is_to_the_optimiser_as_at_the_beginning(optimizer):
    learner = trained(optimizer, MEMBERS)
    fresh = fresh_parameters(learner)
    redraw_tensors(learner, {name: fresh[name] for name in ("6.weight", "6.bias")})
    assert torch.equal(learner.parameter("6.weight"), fresh["6.weight"])
    assert torch.equal(learner.copies[0]["6.weight"], fresh["6.weight"])
    moments, steps = states(learner, "6.weight")
    assert all(not state.any() for state in [*moments, *steps])
    moments, steps = states(learner, "4.weight")
    assert all(state.all() for state in [*moments, *steps])


def test_moments_and_step_counts_are_cleared_apart():
    learner = trained("adam", None)
    clear_step_counts(learner, ["0.weight"])
    moments, steps = states(learner, "0.weight")
    assert steps == [0]
    assert all(state.all() for state in moments)
    clear_moments(learner, ["4.weight"])
    moments, steps = states(learner, "4.weight")
    assert steps == [3]
    assert not any(state.any() for state in moments)


def test_a_reference_to_the_first_weights_follows_the_draw():
    """TRAC scales the distance from them: a unit drawn anew has gone no distance. Its base forgets too."""
    whole = network()
    optimizer = TRAC(AdamP(whole.parameters(), 0.1, delta=0.0))
    learner = learner_of(whole, optimizer)
    for p in whole.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    mask = torch.tensor([[True, False, False, True]])
    redraw_units(learner, learner.structure.hidden[0], mask, fresh_parameters(learner))
    weight = whole.get_parameter("0.weight")
    assert torch.equal(optimizer.state[weight]["reference"][mask[0]], weight[mask[0]])
    moments = optimizer.base.state[weight]["exp_avg"]
    assert moments[mask[0]].abs().max() == 0
    assert moments[~mask[0]].abs().min() > 0


@pytest.mark.parametrize("reader", [Reader("w", None), Reader("w", None, 3, 2, 4), Reader("w", None, 1, 2)])
def test_masks_and_indices_name_the_same_inputs(reader):
    chosen, width = torch.tensor([[0, 4], [3, 1]]), 40
    mask = torch.zeros(2, 5, dtype=torch.bool).scatter_(1, chosen, True)
    inputs = reader_inputs(reader, 5, mask, width)
    from_indices = torch.zeros(2, width, dtype=torch.bool).scatter_(1, reader_inputs(reader, 5, chosen, width), True)
    assert torch.equal(inputs, from_indices)
    assert inputs.sum() == 4 * reader.inputs_per_unit * reader.copies


def test_layers_that_cannot_be_reset_are_refused():
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 1, 1))
    with pytest.raises(ValueError, match="'redo' cannot tell which inputs of '2.weight'"):
        redrawable(learner_of(grouped), "redo")

    learner = learner_of(Residual())
    layers = redrawable(learner, "redo")
    assert [layer.weights for layer in layers] == [("b.weight",)]
    only = copy.copy(learner)
    only.structure = copy.copy(learner.structure)
    object.__setattr__(only.structure, "hidden", learner.structure.hidden[:1])
    with pytest.raises(ValueError, match="no hidden units"):
        redrawable(only, "redo")
