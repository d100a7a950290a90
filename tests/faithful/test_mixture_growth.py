"""MixtureGrowth against the exact checks of specs/growclip-and-growth.md, section E 13-16."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from continual import datasets
from continual.catalogue import Benchmark, open_learner
from continual.growth.mixture import COEFFICIENTS, Recipe, Stage, Templates, new_coefficients
from continual.growth.mixture_network import MixtureNetwork, net2wider, with_blocks
from continual.learner import Learner
from continual.networks.classifier import NETWORKS, Classifier, draw
from continual.strategies import mixture_growth
from continual.strategies.mixture_growth import GROWTHS, MixtureGrowth, stage_ends
from plasticity.networks.stacked import stack
from plasticity.population import RandomStream

BLOBS = datasets.load("blobs")
TOY = Benchmark(data="blobs", tasks=2, hidden=(16, 8))
RECIPE = Recipe()
CNN = dataclasses.replace(TOY, network="wrn10", hidden=(4, 4, 6, 8))


def stream(*seeds: int) -> RandomStream:
    return RandomStream([torch.Generator().manual_seed(seed) for seed in seeds or (0, 1)])


def mixture(name="wrn10", hidden=(4, 4, 6, 8), shape=(1, 8, 8), recipe=RECIPE, dtype=torch.float64) -> MixtureNetwork:
    """Two networks of which every number was perturbed."""
    made = [draw(name, shape, hidden, 5, False, (), torch.Generator().manual_seed(k)) for k in (0, 1)]
    whole = stack(made)
    assert isinstance(whole, Classifier)
    network = MixtureNetwork(whole, recipe, stream()).to(dtype)
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=source, dtype=tensor.dtype))
    return network


def images(shape=(1, 8, 8), dtype=torch.float64) -> Tensor:
    return torch.rand(2, 6, *shape, generator=torch.Generator().manual_seed(9), dtype=dtype)


def at(network: MixtureNetwork, stage: Stage, x: Tensor) -> Tensor:
    network.set_stage(stage)
    return network(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("wrn10", (4, 4, 6, 8)),
        ("mlp", (6, 4)),
        ("cnn-bn", (4, 6)),
        ("resnet18-reduced", (2, 4, 4, 2)),
        ("mlp-bn", (6, 4)),
    ],
)
def test_13_zero_growth_is_the_sum_of_the_members(name, hidden, training):
    """Also where an image is flattened, and with biases."""
    shape = (1, 32, 32) if name.startswith("resnet") else (1, 8, 8)
    network, x = mixture(name, hidden, shape).train(training), images(shape)
    before = copy.deepcopy(network)
    wanted = at(before, 0, x) + at(before, 1, x)
    network.grow("zero", 1.0, stream())
    torch.testing.assert_close(network(x), wanted, rtol=0, atol=1e-12)
    blocks = with_blocks(copy.deepcopy(network).train(training), None)
    torch.testing.assert_close(blocks(x), wanted, rtol=0, atol=1e-12)
    other = mixture(name, hidden, shape).train(training)
    other.grow("orthogonal", 1.0, stream())
    assert not torch.allclose(other(x), wanted, atol=1e-3)


@pytest.mark.parametrize(("sizes", "cut"), [((4, 6), slice(None)), ((3, 5), slice(0, -1))])
def test_14_blocks_stand_where_the_paper_has_them(sizes, cut):
    """A block is marked with its number; odd sizes are cut."""
    outs, ins = sizes
    for place, shape, wanted in (
        ("inner", sizes, [[0, 2], [3, 1]]),
        ("first", sizes, [[0], [1]]),
        ("last", sizes, [[0, 1]]),
    ):
        made = Templates((*shape, 3, 3), place, Recipe(), stream(), None)
        blocks = [torch.full_like(made.block(b), b) for b in range(len(made.coefficients))]
        rows = outs if place == "last" else -(-outs // 2)
        columns = ins if place == "first" else -(-ins // 2)
        assert blocks[0].shape == (2, rows, columns, 3, 3)
        marked = torch.tensor(wanted, dtype=torch.float32)
        marked = marked.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:outs, :ins]
        assert torch.equal(made.assembled(*blocks)[1, :, :, 2, 1], marked)
        assert made.weight("grown").shape == (2, *shape, 3, 3)
        assert torch.equal(made.weight("grown")[:, :rows, :columns], made.block(0)[:, :outs, :ins])
    odd = mixture("wrn10", (3, 3, 5, 7))
    odd.grow("orthogonal", 1.0, stream())
    assert odd(images()).shape == (2, 6, 5)


def test_15_copies_and_directions():
    made = Templates((8, 6, 3, 3), "inner", Recipe(), stream(), None)
    made.grow("copy", 0.0, stream())
    assert torch.equal(made.block(2), made.block(0))
    assert torch.equal(made.block(3), made.block(1))
    rows = torch.stack(list(made.coefficients), 1)
    third, fourth = new_coefficients("copy", rows, 2.0, stream())
    torch.testing.assert_close(third - rows[:, 0], fourth - rows[:, 1])
    torch.testing.assert_close((third - rows[:, 0]).norm(dim=1), torch.full((2,), 2.0))
    for n in (2, 3, 4, 6):
        drawn = stream(3, 4).normal(4, n)
        kept, fourth = new_coefficients("orthogonal", drawn, 1.0, stream())
        assert torch.equal(kept, drawn[:, 2])
        torch.testing.assert_close(fourth.norm(dim=1), torch.ones(2))
        found = torch.einsum("kbn,kn->kb", drawn[:, :3], fourth)
        if n >= 4:
            assert float(found.abs().max()) < 1e-5
        else:  # three rows span the space: the direction that they excite least
            least = torch.linalg.svd(drawn[:, :3]).S.amin(1)
            torch.testing.assert_close(found.norm(dim=1), least)
    uniform = torch.stack(new_coefficients("random", torch.zeros(2, 4, 50), 3.0, stream()))
    assert 0 <= float(uniform.min()) < 0.2
    assert 2.8 < float(uniform.max()) < 3
    for how, wanted in (("zero", torch.zeros(2, 2)), ("none", rows[:, 2])):
        assert torch.equal(new_coefficients(how, rows, 1.0, stream())[0], wanted)
    orthogonal = torch.stack(list(Templates((8, 6), "inner", Recipe(4), stream(), None).coefficients), 1)
    torch.testing.assert_close(orthogonal @ orthogonal.mT, torch.eye(4).expand(2, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sets", [(0, 1, 0, 1), (0, 1, 1, 0)])
def test_16_exported_layers_give_the_same_and_gradients_reach_all_templates(sets):
    network, x = mixture(recipe=Recipe(sets=sets)), images()
    for stage in (0, 1):
        network.set_stage(stage)
        torch.testing.assert_close(network.export().eval()(x), network.eval()(x))
    network.grow("copy", 1.0, stream())
    plain = network.export()
    torch.testing.assert_close(plain(x), network(x))
    assert not any("templates" in name for name, _ in plain.named_parameters())
    network(x).square().sum().backward()
    trained = [*network.weights("grown"), *network.coefficients("grown")]
    assert all(p.grad is not None and bool(p.grad.abs().flatten(1).amax(1).gt(0).all()) for p in trained)
    # W_2 changes with its coefficients alone; of the two sets it is made of one.
    layer = next(layer for layer in network.layers if layer.templates.place == "inner")
    (first, second) = torch.autograd.grad(layer.templates.block(2).sum(), list(layer.templates.sets), allow_unused=True)
    assert (first is None, second is None) == ((True, False) if sets[2] else (False, True))


def test_net2wider_keeps_the_function_and_breaks_the_symmetry():
    network, x = mixture(), images()
    network.eval()
    wanted = at(network, 0, x)
    wider = net2wider(network, stream()).eval()
    torch.testing.assert_close(wider(x), wanted, rtol=0, atol=1e-12)
    weight = dict(wider.named_parameters())["features.1.second.weight"]
    assert not torch.allclose(weight[:, :2], weight[:, 2:])


def test_wrn_28_10_has_its_published_size():
    """But for gains and offsets of the BatchNorm between two convolutions, which this one leaves out."""
    with torch.device("meta"):
        network = NETWORKS["wrn28"]((3, 32, 32), (), 100)
    assert sum(p.numel() for p in network.parameters()) == 36_536_884 - 2 * 4 * (160 + 320 + 640)


def learner(benchmark: Benchmark = TOY, seeds=(0, 1), **settings: Any) -> Learner:
    return open_learner(benchmark, "mixture_growth", mixture_growth.Config(**settings), seeds, data=BLOBS)


def of(found: Learner) -> MixtureGrowth:
    assert isinstance(found.strategy, MixtureGrowth)
    return found.strategy


def test_stages_are_parts_of_steps_or_whole_tasks():
    assert stage_ends([100], (0.4, 0.8)) == (40, 80)
    assert stage_ends([100, 50], (0.4, 0.8)) == (100, 130)
    assert stage_ends([100, 50], (0.5, 1.0)) == (100, 150)
    assert stage_ends([10] * 5, (0.4, 0.8)) == (20, 40)
    assert stage_ends([10] * 3, (0.1, 0.2)) == (10, 20)
    assert stage_ends([2], (0.1, 0.2)) == (1, 2)


def test_members_learn_in_turn_and_answer_as_their_sum():
    found = learner(stages=(0.5, 0.75))
    strategy = of(found)
    start = {name: value.clone() for name, value in strategy.mixture.state_dict().items()}

    def moved() -> set[str]:
        """Which of the two sets of the second layer, and which coefficients, are not as they were."""
        now, layer = strategy.mixture.state_dict(), "features.3.templates."
        return {n.removeprefix(layer) for n in now if n.startswith(layer) and not torch.equal(now[n], start[n])}

    while found.index < 1:
        found.advance(1000)
    assert moved() == {"sets.0", "coefficients.0"}
    x = BLOBS.test_images[:20].float().div(255).expand(2, -1, -1, -1, -1)
    network, first = strategy.mixture, at(strategy.mixture, 0, x)
    torch.testing.assert_close(strategy.predict(x, None), first)
    found.advance(1)
    assert strategy.stage == 1
    torch.testing.assert_close(strategy.predict(x, None), first + at(network, 1, x))
    assert moved() == {"sets.0", "coefficients.0", "sets.1", "coefficients.1"}
    while not found.done:
        found.advance(1000)
    assert network.stage == "grown"
    assert "coefficients.3" in moved()
    torch.testing.assert_close(strategy.predict(x, None), network.export()(x))


def test_coefficients_do_not_decay_and_moments_are_kept():
    found = learner(dataclasses.replace(TOY, momentum=0.9, weight_decay=0.5), stages=(0.5, 0.75))
    strategy = of(found)
    assert strategy.mixing is not None
    zeros = [torch.zeros_like(p) for p in strategy.parameters]
    before = [p.detach().clone() for p in strategy.parameters]
    count = len(strategy.optimizer.parameters)
    assert count == len(strategy.mixture.weights(0))
    strategy.optimizer.step(zeros[:count])
    strategy.mixing.step(zeros[count:])
    same = [torch.equal(a, b) for a, b in zip(before, strategy.parameters, strict=True)]
    assert same[count:] == [True] * (len(same) - count)
    assert not any(s for s, b in zip(same[:count], before, strict=False) if b.any())
    while strategy.stage != "grown":
        found.advance(1)
        velocity = {id(p): v for p, v in zip(strategy.optimizer.parameters, strategy.optimizer.velocity, strict=True)}
        if found.steps == strategy.ends[1]:
            break
    strategy._go_to("grown")
    for parameter, own in zip(strategy.optimizer.parameters, strategy.optimizer.velocity, strict=True):
        kept = velocity.get(id(parameter))
        assert torch.equal(own, torch.zeros_like(own) if kept is None else kept)
    assert len(velocity) < len(strategy.optimizer.parameters)


@pytest.mark.parametrize("growth", GROWTHS)
def test_every_growth_runs_on_and_resumes_exactly(growth):
    benchmark = CNN if growth == "mixture" else TOY
    settings: dict[str, Any] = {"growth": growth, "schedule": "cosine", "cycles": 2, "stages": (0.5, 0.75)}
    whole = learner(benchmark, **settings)
    cut = None
    while not whole.done:
        whole.advance(whole.total_steps - 3 - whole.steps if cut is None else 3)
        if whole.steps == whole.total_steps - 3:
            cut = copy.deepcopy(whole.state_dict())
    assert cut is not None
    resumed = learner(benchmark, **settings)
    resumed.load_state_dict(cut)
    resumed.advance(3)
    a, b = (of(one).network.state_dict() for one in (whole, resumed))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert torch.equal(whole.matrix, resumed.matrix)
    told = {name: float(v[0]) for _, values in of(whole).measurements() for name, v in values.items()}
    half = learner(benchmark, growth="mixture")
    half.advance(1)
    small = next(float(v["growth/parameters"][0]) for _, v in of(half).measurements())
    assert told["growth/parameters"] > 1.9 * small


@pytest.mark.parametrize("how", COEFFICIENTS)
def test_members_of_a_population_are_what_they_are_alone(how):
    settings: dict[str, Any] = {"coefficients": how, "stages": (0.5, 0.75), "first_weight": 0.1}
    together, alone = (learner(TOY, seeds, **settings) for seeds in ((3, 8), (8,)))
    for one in (together, alone):
        while not one.done:
            one.advance(1000)
    own = of(together).network.state_dict()
    for name, value in of(alone).network.state_dict().items():
        torch.testing.assert_close(own[name][1], value[0], rtol=1e-3, atol=1e-5)


def test_what_cannot_be_split_says_so():
    with pytest.raises(ValueError, match="splits linear layers, convolutions and batch normalisations, not ZeroPadded"):
        learner(dataclasses.replace(TOY, network="resnet32", hidden=(4, 4, 8, 8)))
    with pytest.raises(ValueError, match="convolution of several groups"):
        learner(dataclasses.replace(TOY, network="mobilenetv2", hidden=()))
    with pytest.raises(ValueError, match="needs a network with a hidden layer"):
        learner(dataclasses.replace(TOY, hidden=()))
    with pytest.raises(ValueError, match="stages must rise"):
        mixture_growth.Config(stages=(0.5, 0.4))
    with pytest.raises(ValueError, match="sets must be 0 1 0 1 or 0 1 1 0"):
        mixture_growth.Config(sets=(0, 1))
