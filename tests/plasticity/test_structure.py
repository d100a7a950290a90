"""The structure of a network: its units, what feeds them, who reads them; for one network and a population."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agents.networks import DeterministicActor
from plasticity.networks.stacked import stack
from plasticity.networks.structure import Reader, activations, explicit_nonlinearities, find_structure
from tests.plasticity import networks
from tests.plasticity.networks import CASES, Concatenated, Dueling, Functional, Noisy, Sum, mlp, residual


def build(case, seed=0):
    network, x = networks.build(case, seed)
    return explicit_nonlinearities(network), x


def columns(layer, reader, unit):
    step = layer.units * reader.inputs_per_unit
    start = reader.offset + unit * reader.inputs_per_unit
    return [start + copy * step + j for copy in range(reader.copies) for j in range(reader.inputs_per_unit)]


@pytest.mark.parametrize("case", CASES)
def test_a_unit_whose_readers_ignore_it_does_not_matter(case):
    """Also says that before they ignored it, it did, and that hooks see the units by name."""
    for layer in find_structure(build(case)[0]).hidden:
        network, x = build(case)
        shift = torch.zeros(layer.units)
        shift[1] = 10.0

        def shifted(module, inputs, output, layer=layer, shift=shift):
            both = torch.cat([shift, shift]) if layer.nonlinearity == "crelu" else shift
            return output + both.view(-1, *[1] * (-1 - layer.unit_axis))

        before = network(x)
        with network.get_submodule(layer.name).register_forward_hook(shifted):
            assert not torch.allclose(network(x), before)
        if layer.residual:
            continue
        with torch.no_grad():
            for reader in layer.readers:
                network.get_parameter(reader.weight)[:, columns(layer, reader, 1)] = 0
        before = network(x)
        with network.get_submodule(layer.name).register_forward_hook(shifted):
            torch.testing.assert_close(network(x), before)


@pytest.mark.parametrize("case", CASES)
def test_a_unit_without_its_weights_sees_nothing(case):
    network, x = build(case)
    for layer in find_structure(network).hidden:
        if layer.residual or layer.normaliser:
            continue
        with torch.no_grad():
            for name in layer.weights + layer.biases:
                network.get_parameter(name)[0] = 0
        with activations(network, find_structure(network)) as seen:
            network(x)
        units = seen[layer.name].movedim(layer.unit_axis, 0)
        assert len(units) == layer.units * (2 if layer.nonlinearity == "crelu" else 1)
        assert units[0].abs().max() == 0


@pytest.mark.parametrize("case", CASES)
def test_a_population_has_the_structure_of_its_members(case):
    alone, x = zip(*(build(case, seed) for seed in range(3)), strict=True)
    population = stack(alone)
    structure = find_structure(alone[0])
    assert find_structure(population) == structure
    if case == "nature":  # its memory format is beyond vmap
        return
    with activations(population, structure) as together:
        population(torch.stack(x))
    for member, network in enumerate(alone):
        with activations(network, structure) as seen:
            network(x[member])
        for name, value in seen.items():
            torch.testing.assert_close(together[name][member], value)


def test_mlp():
    structure = find_structure(build("mlp")[0])
    first, second = structure.hidden
    assert (first.name, first.units, first.nonlinearity) == ("2", 8, "relu")
    assert (first.weights, first.biases) == (("0.weight",), ("0.bias",))
    assert (first.normaliser, first.gain, first.offset) == ("1", "1.weight", "1.bias")
    assert first.readers == (Reader("3.weight", None),)
    assert (second.nonlinearity, second.weights, second.biases, second.normaliser) == ("tanh", ("3.weight",), (), None)
    assert structure.heads == ("5.weight",)
    assert str(structure).splitlines()[1].split() == ["2", "8", "relu", "0.weight", "0.bias", "1", "3.weight"]


def test_convolution_into_linear():
    structure = find_structure(build("crelu")[0])
    assert structure.hidden[0].readers == (Reader("3.weight", "3.bias", inputs_per_unit=16, copies=2),)


def test_streams_of_a_dueling_network_both_read_the_encoder():
    structure = find_structure(Dueling())
    assert [r.weight for r in structure.hidden[0].readers] == ["advantage.0.weight", "value.0.weight"]
    assert structure.heads == ("value.2.weight", "advantage.2.weight")


def test_residual_block():
    structure = find_structure(residual())
    stem, inner, outer = structure.hidden
    assert [layer.residual for layer in (stem, inner, outer)] == [True, False, False]
    assert outer.weights == ("3.conv2.weight",)
    assert [group.exact for group in structure.normalised] == [True, True, True]


def test_weights_summed_before_a_normaliser_are_one_group():
    structure = find_structure(Sum())
    assert structure.hidden[0].weights == ("a.weight", "b.weight")
    (group,) = structure.normalised
    assert (group.weights, group.biases, group.exact) == (("a.weight", "b.weight"), ("b.bias",), True)


def test_a_sum_with_the_input_is_not_exactly_invariant():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.act, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.act(self.norm(x + self.a(x))))

    assert [group.exact for group in find_structure(Skip()).normalised] == [False]


def test_noisy_weights_belong_together():
    (layer,) = find_structure(Noisy()).hidden
    assert layer.weights == ("weight_mean", "weight_scale")
    assert layer.biases == ("bias_mean", "bias_scale")


def test_output_functions_leave_the_head_a_head():
    structure = find_structure(DeterministicActor(6, 2, (8,), layer_norm=False))
    assert [layer.name for layer in structure.hidden] == ["net.1"]
    assert structure.heads == ("net.2.weight",)


def test_functional_nonlinearities_become_modules():
    network, x = Functional(), torch.randn(3, 6)
    structure = find_structure(network)
    with pytest.raises(ValueError, match="explicit_nonlinearities"), activations(network, structure):
        pass
    explicit = explicit_nonlinearities(network)
    assert find_structure(explicit) == structure
    assert dict(explicit.named_parameters()).keys() == dict(network.named_parameters()).keys()
    assert torch.equal(explicit(x), network(x))
    with activations(explicit, structure) as seen:
        explicit(x)
    assert list(seen) == [layer.name for layer in structure.hidden]
    assert explicit_nonlinearities(mlp_network := mlp()) is mlp_network


class Behind(Concatenated):
    def forward(self, x):
        return self.head(self.act(self.both(torch.cat([x, self.left(x), self.right(x)], -1))))


def test_units_behind_an_input_need_an_example():
    with pytest.raises(ValueError, match=r"'both.weight' reads hidden layer 'left.1'.*example"):
        find_structure(Behind())
    structure = find_structure(Behind(), torch.randn(2, 6))
    assert [layer.readers[0].offset for layer in structure.hidden[:2]] == [6, 9]


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), Branching(), nn.Linear(2, 2)), "module '1' cannot be traced"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "no nonlinearity"),
        (nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 1)), "'0' .* ConvTranspose2d"),
        (nn.Sequential(nn.Linear(2, 2), nn.Hardshrink(), nn.Linear(2, 2)), "'Hardshrink' between weights"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.ReLU(), nn.Linear(2, 2)), "'0'"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(network, message):
    with pytest.raises(ValueError, match=message):
        find_structure(network)


def test_finding_the_structure_changes_nothing():
    network = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 2))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    find_structure(network, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in network.modules())


class InFront(nn.Module):
    """A layer of one's own whose weight is [in, out], and one that is no module."""

    own_axes, inputs_axis = 2, -2

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias if x.dim() == 2 else x


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.head = InFront(6, 4), nn.ReLU(), nn.Parameter(torch.randn(4, 2))

    def straight_forward(self, x):
        return self.act(self.first(x)) @ self.head

    def forward(self, x):
        return self.straight_forward(x if x.dim() == 2 else x[None])


def test_layers_of_ones_own():
    structure = find_structure(Branched())
    (layer,) = structure.hidden
    assert (layer.units, layer.weights, layer.biases) == (4, ("first.weight",), ("first.bias",))
    assert layer.readers == (Reader("head", None),)
    assert structure.transposed == ("first.weight", "head")
