"""NaP on every kind of network: what it inserts, what it holds, what it refuses; schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from plasticity.intervention import Batch, Learner
from plasticity.nap import NaP, convert, needs_annealing, plan, project_
from plasticity.networks import projection
from plasticity.networks.normalisation import ImageRMSNorm, Normalise
from plasticity.networks.projection import Projection
from plasticity.networks.stacked import stack
from plasticity.networks.structure import find_structure
from plasticity.schedules import Constant, Cosine, Linear, Replay, Scheduled, learning_rates
from tests.plasticity.networks import CASES, build, mlp, residual


def parameters(net):
    return dict(net.named_parameters())


def no_epsilon(net):
    for module in net.modules():
        if hasattr(module, "eps"):
            module.eps = 0.0
        if isinstance(module, ImageRMSNorm):
            module.epsilon = 0.0
    return net


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("case", CASES)
def test_groups_that_keep_the_function_do(case, kind):
    net, x = build(case)
    net, tolerance = no_epsilon(convert(net, kind)), 1e-4
    if case != "nature":  # which computes in float32
        net, x, tolerance = net.double(), x.double() if x.is_floating_point() else x, 1e-10
    held = plan(net, joint_biases=True)
    before = net(x)
    for group in held.groups:
        with torch.no_grad():
            for name in group.tensors:
                parameters(net)[name].mul_(3)
        change = float((net(x) - before).detach().abs().max())
        assert (change <= tolerance) == group.exact, group
        project_(parameters(net), held)
        torch.testing.assert_close(net(x), before, rtol=tolerance, atol=tolerance)
    assert set(held.heads).isdisjoint(name for group in held.groups for name in group.tensors)
    for name in held.heads:
        with torch.no_grad():
            parameters(net)[name].mul_(3)
        assert (net(x) - before).abs().max() > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_what_is_converted_passes_the_strict_plan_and_is_left_alone(case):
    net, x = build(case)
    names = parameters(net)
    converted = convert(net)
    assert parameters(net).keys() == names.keys()
    strict = case not in ("noisy", "recurrent")  # their biases are no part of a known layer
    held = plan(converted, strict)
    hidden = {name for layer in find_structure(converted).hidden for name in layer.weights}
    assert hidden <= {name for group in held.groups for name in group.tensors}
    again = convert(converted)
    assert parameters(again).keys() == parameters(converted).keys()
    assert torch.equal(again(x), converted(x))


def test_what_is_put_in():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    layer, rms, gains = (dict(n.named_modules()) for n in (convert(net), convert(net, "rms"), convert(net, gains=True)))
    assert list(layer)[1:] == ["0", "1_norm", "1", "2", "3", "4_norm", "4", "5"]
    image, features = layer["1_norm"], layer["4_norm"]
    assert isinstance(image, nn.GroupNorm)
    assert (image.num_groups, image.eps, image.weight) == (1, 1e-5, None)
    assert isinstance(features, nn.LayerNorm)
    assert (features.eps, features.weight) == (1e-5, None)
    assert layer["0"].bias is layer["3"].bias is None
    assert layer["5"].bias is not None
    assert isinstance(rms["1_norm"], ImageRMSNorm)
    assert isinstance(rms["4_norm"], nn.RMSNorm)
    assert (gains["1_norm"].weight.shape, gains["4_norm"].bias.shape) == ((4,), (8,))
    assert Normalise().build(net).get_parameter("4_norm.weight").shape == (8,)
    assert find_structure(convert(net)).hidden[0].normaliser == "1_norm"


def test_an_attribute_becomes_a_pair():
    block = convert(residual())
    assert isinstance(convert(build("sum")[0]).norm, nn.LayerNorm)
    assert [type(part) for part in convert(build("dueling")[0]).value] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]
    assert isinstance(convert(build("concatenated")[0]).act, nn.Sequential)
    assert find_structure(block).hidden[0].residual


@pytest.mark.parametrize("gain", [False, True])
def test_root_mean_square_of_images(gain):
    torch.manual_seed(0)
    layers = [ImageRMSNorm(3, 1e-5, gain) for _ in range(2)]
    for layer in layers if gain else ():
        layer.weight.data.uniform_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 3, 5, 5)
    y = stack(layers)(x)
    for k, layer in enumerate(layers):
        root = x[k].square().mean((1, 2, 3), keepdim=True).add(1e-5).sqrt()
        expected = x[k] / root * (layer.weight[:, None, None] if gain else 1)
        torch.testing.assert_close(layer(x[k]), expected)
        torch.testing.assert_close(y[k], expected)


def test_streams_of_a_transformer():
    net, _ = build("transformer")
    joint = plan(convert(net))
    stream = next(group for group in joint.groups if len(group.tensors) > 1)
    assert stream.exact
    assert {"emb.weight", "pos", "enc.layers.0.self_attn.out_proj.weight"} <= set(stream.tensors)
    each = plan(convert(net), streams="each")
    assert all(len(group.tensors) == 1 for group in each.groups)
    assert each.unprojected == ("emb.weight", "pos")
    projected = {group.tensors[0] for group in each.groups}
    assert {
        f"enc.layers.{i}.{n}.weight" for i in (0, 1) for n in ("self_attn.out_proj", "linear1", "linear2")
    } <= projected
    assert "enc.layers.0.self_attn.in_proj_weight" in projected


def test_plan_is_readable_and_can_be_saved():
    held = plan(convert(mlp()))
    text = str(held)
    assert "0.weight" in text.splitlines()[1]
    assert "heads: 5.weight" in text
    saved = held.to_json()
    assert saved["groups"][0]["radius"] == pytest.approx(float(held.groups[0].radius))
    assert saved["heads"] == ("5.weight",)


def simple(*layers):
    return nn.Sequential(*(layers or (nn.Linear(3, 4, False), nn.LayerNorm(4), nn.ReLU())), nn.Linear(4, 2))


def tied():
    net = simple(nn.Linear(3, 4, False), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4, False), nn.LayerNorm(4), nn.ReLU(),
                 nn.Linear(4, 4, False), nn.LayerNorm(4), nn.ReLU())  # fmt: skip
    net[6].weight = net[3].weight
    return net


def zero():
    net = simple()
    nn.init.zeros_(net[0].weight)
    return net


def integer():
    net = simple()
    net[0].weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int32), requires_grad=False)
    return net


def half_frozen():
    net = convert(build("sum")[0])
    net.a.weight.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "no nonlinearity"),
        (simple(nn.Linear(3, 4), nn.ReLU()), r"no normaliser between '0\.weight' and the relu '1'"),
        (simple(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU()), r"the bias '0\.bias' in front of '1'"),
        (simple(nn.Linear(3, 4, False), nn.BatchNorm1d(4), nn.ReLU()), r"'1' is a BatchNorm.*GroupNorm\(1\)"),
        (simple(nn.Bilinear(3, 3, 4), nn.LayerNorm(4), nn.ReLU()), "'0' is of a type that is not known"),
        (nn.Sequential(nn.LSTM(3, 4), nn.ReLU(), nn.Linear(4, 2)), "'0' is of a type that is not known here: LSTM"),
        (tied(), r"'3\.weight' and '6\.weight' are one tensor"),
        (zero(), r"the norm of '0\.weight' is 0"),
        (integer(), r"'0\.weight' holds torch\.int32"),
        (half_frozen(), r"'a\.weight' is frozen but shares a radius"),
    ],
)
def test_refusals(net, message):
    with pytest.raises(ValueError, match=message):
        plan(net)


def test_batch_norm_can_be_replaced():
    net = simple(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    converted = convert(net, replace_batch_norm=True)
    assert isinstance(converted[1], nn.GroupNorm)
    assert len(plan(converted).groups) == 1


def test_frozen_weights_are_left_alone():
    net = simple()
    net[0].weight.requires_grad_(False)
    assert plan(net).groups == ()
    assert plan(net).unprojected == ("0.weight",)


@pytest.mark.parametrize("members", [None, 3])
def test_zero_and_infinite_tensors_stay(members):
    nets = [convert(mlp()) for _ in range(members or 1)]
    net = stack(nets) if members else nets[0]
    held = plan(net)
    first = parameters(net)["0.weight"].detach()
    (first if members is None else first[1]).zero_()
    second = parameters(net)["3.weight"].detach()
    (second if members is None else second[2])[0, 0] = math.inf
    (second if members is None else second[0]).mul_(2)
    before = {name: p.detach().clone() for name, p in parameters(net).items()}
    bound = Projection(held.groups, parameters(net))
    bound.project_()
    assert int(bound.zero_norms()) == 1
    for name, p in parameters(net).items():
        if members is None or name != "3.weight":
            assert torch.allclose(p, before[name], rtol=1e-6)
    if members:
        torch.testing.assert_close(second[0], before["3.weight"][0] / 2)
        assert torch.equal(second[2], before["3.weight"][2])


def started(net, nap, optimizer=None, members=None):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.1)
    generators = [torch.Generator().manual_seed(k) for k in range(members or 1)]
    watched = Learner(net, find_structure(net), optimizer, members, generators, lambda generator: convert(mlp()))
    nap.begin(watched)
    return watched


def step(nap, watched):
    watched.steps += 1
    nap.after_step(watched, Batch(torch.zeros(1), torch.zeros(1), {}))


def test_twin_networks_inside_one_are_held_apart():
    class Twins(nn.Module):
        """An encoder of its own, then two heads side by side."""

        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(3, 4, False), nn.LayerNorm(4, elementwise_affine=False), nn.ReLU())
            heads = [nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)) for _ in range(2)]
            self.heads = stack(heads)

        def forward(self, x):
            return self.heads(self.encoder(x).expand(2, -1, -1))

    net = convert(Twins())
    held = plan(net)
    assert [tuple(group.radius.shape) for group in held.groups] == [(), (2,)]
    radii = [group.radius.clone() for group in held.groups]
    with torch.no_grad():
        net.heads[0].weight[0].mul_(3)
        net.encoder[0].weight.mul_(2)
    project_(parameters(net), held)
    torch.testing.assert_close(net.encoder[0].weight.norm(), radii[0])
    torch.testing.assert_close(net.heads[0].weight.flatten(1).norm(dim=1), radii[1])


def test_changed_shapes_get_the_radius_of_a_fresh_network():
    torch.manual_seed(0)
    net, wide = convert(two_layers(4, 5)), convert(two_layers(4, 9))
    nap = NaP()
    watched = started(net, nap)
    kept = nap.groups[0].radius.clone()
    second, new = net.get_submodule("2"), wide.get_submodule("2")
    with torch.no_grad():
        net[0].weight.mul_(7)
    second.weight = nn.Parameter(3 * new.weight.detach())
    watched.fresh = lambda generator: convert(two_layers(4, 5))
    with pytest.raises(ValueError, match=r"'2\.weight' is \[9, 4\], but a fresh network has \[5, 4\]"):
        nap.reshaped(watched)
    watched.fresh = lambda generator: wide
    nap.reshaped(watched)
    step(nap, watched)
    torch.testing.assert_close(net[0].weight.norm(), kept)
    torch.testing.assert_close(second.weight.norm(), new.weight.norm())


def two_layers(first, second):
    return nn.Sequential(nn.Linear(6, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 3))


def test_gains_that_nobody_took_out_are_refused():
    with pytest.raises(ValueError, match=r"gains 'none' found the gain '1\.weight'"):
        started(simple(), NaP())
    smooth = nn.Sequential(nn.Linear(3, 4, False), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"tanh\(c x\) is not c times"):
        started(smooth, NaP(gains="joint"))


@pytest.mark.parametrize("setting", [{"project_every": 0}, {"gains": "sometimes"}, {"pull": math.nan}])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match="NaP"):
        NaP(**setting)


@pytest.mark.parametrize("members", [None, 3])
def test_steps_do_not_wait_for_a_gpu(members, monkeypatch):
    """Traced: reading a value is refused. Planning reads the radii once; that is left out here."""
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    monkeypatch.setattr(projection, "_check_radii", lambda groups: None)
    with FakeTensorMode():
        with torch.device("cuda"):
            nets = [convert(mlp(), gains=True) for _ in range(members or 1)]
        net = stack(nets) if members else nets[0]
        growth = torch.ones(4, 2, device="cuda")
        nap = NaP(gains="pull", schedule=Replay(growth), record_growth_every=1)
        watched = started(net, nap, members=members)
        for _ in range(3):
            step(nap, watched)
        tensors = {name: p if members else p.unsqueeze(0) for name, p in parameters(net).items()}
        results = [nap.growth, nap.penalty(watched, tensors), *nap.effective_learning_rates(watched).values()]
        assert {tensor.device.type for tensor in results} == {"cuda"}


def test_schedules():
    assert [Linear(10, 0.5).factor(t, t) for t in (0, 5, 10, 20)] == [1, 0.75, 0.5, 0.5]
    cosine = Cosine(110, warmup=10, start=0.1, end=0.2)
    assert [cosine.factor(t, 0) for t in (0, 5, 10, 60, 110, 500)] == pytest.approx([0.1, 0.55, 1, 0.6, 0.2, 0.2])
    assert not cosine.uses_boundaries
    restart = Cosine(100, warmup=10, restart=True)
    assert restart.uses_boundaries
    assert restart.factor(1000, 10) == 1
    assert restart.factor(1000, 100) == pytest.approx(0)
    with pytest.raises(ValueError, match="more than warmup"):
        Cosine(10, warmup=10)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Linear(10, end=2)


def test_learning_rates_are_set_before_each_step_and_restart_with_the_task():
    net = convert(mlp())
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(net.parameters())])
    nap = NaP(schedule=Cosine(4, warmup=1, restart=True))
    watched = started(net, nap, optimizer)
    assert nap.uses_boundaries
    seen = [learning_rates(optimizer)[1]]
    for _ in range(5):
        step(nap, watched)
        seen.append(learning_rates(optimizer)[1])
    assert seen == pytest.approx([0, 0.2, 0.15, 0.05, 0, 0])
    nap.at_boundary(watched)
    step(nap, watched)
    assert learning_rates(optimizer) == pytest.approx([0.1 * (i + 1) for i in range(4)])

    other = NaP(schedule=Cosine(4, warmup=1, restart=True))
    started(net, other, torch.optim.SGD([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(net.parameters())]))
    other.load_state_dict(nap.state_dict())
    assert learning_rates(other.scheduled.optimizer) == learning_rates(optimizer)


def test_a_learning_rate_that_is_a_tensor_is_changed_in_place():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], rate)
    Scheduled(optimizer, Linear(10)).set_for(5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.25


def test_replayed_growth():
    growth = torch.tensor([[1.0, 1.0], [2.0, 4.0]])
    replay = Replay(growth, every=10)
    assert replay.growth_before(5).tolist() == [1.5, 2.5]
    assert replay.growth_before(30).tolist() == [2, 4]
    assert Replay(growth, every=10, one_rate=True).growth_before(10).tolist() == pytest.approx([10**0.5] * 2)
    with pytest.raises(ValueError, match="1 groups of weights, this network has 2"):
        started(convert(mlp()), NaP(schedule=Replay(torch.ones(5, 1))))
    with pytest.raises(ValueError, match="no growth"):
        _ = NaP().growth


def test_value_based_agents_are_to_be_warned():
    assert needs_annealing(NaP())
    assert not needs_annealing(NaP(schedule=Linear(10)))
    assert not needs_annealing(NaP(project=False))
    assert isinstance(NaP().schedule, Constant)


def test_units_revive_under_a_held_norm():
    """Mean and variance couple the units, so one that is silent on every sample still gets a gradient (section 1.1)."""
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    x, y = torch.randn(32, 6).abs(), torch.randint(2, (32,))
    with torch.no_grad():
        net[0].weight[0] = -5.0
    F.cross_entropy(net(x), y).backward()
    assert (net[2](net[1](net[0](x)))[:, 0] == 0).all()
    assert net[0].weight.grad[0].abs().max() > 1e-6
