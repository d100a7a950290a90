"""Checks 1 to 15 of the specification of Normalize-and-Project (shared/specs/nap-and-plasticity.md, section 7).

Float64, a network 10-32-32-5 with LayerNorm without gains, epsilon 0 and no hidden biases, unless a check says else.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from plasticity.adam import Adam
from plasticity.intervention import Batch, Learner
from plasticity.nap import ARMS, NaP, convert, elr, plan, project_
from plasticity.networks.projection import Group, Plan, Projection
from plasticity.networks.stacked import member, stack
from plasticity.networks.structure import find_structure
from plasticity.schedules import Replay

HIDDEN = ("0.weight", "2.weight")


def plain_network(bias=True):
    return nn.Sequential(
        nn.Linear(10, 32, bias), nn.ReLU(), nn.Linear(32, 32, bias), nn.ReLU(), nn.Linear(32, 5)
    )  # fmt: skip


def network(seed=0, epsilon=0.0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return convert(plain_network(), epsilon=epsilon, **options).to(dtype)


def batches(count, seed=1, dtype=torch.float64, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 10, generator=generator, dtype=dtype)
    return x, torch.randint(5, (count, size), generator=generator)


def parameters(net):
    return dict(net.named_parameters())


def loss(net, x, y):
    return F.cross_entropy(net(x), y)


def gradients(net, x, y):
    named = parameters(net)
    return dict(zip(named, torch.autograd.grad(loss(net, x, y), list(named.values())), strict=True))


@torch.no_grad()
def scale(net, **factors):
    for name, factor in factors.items():
        parameters(net)[f"{name.removeprefix('w')}.weight"].mul_(factor)


def learner(net, optimizer, members=None):
    generators = [torch.Generator().manual_seed(k) for k in range(members or 1)]
    return Learner(net, find_structure(net), optimizer, members, generators, lambda generator: network())


def train(net, nap, x, y, optimizer, on_step=lambda: None, members=None):
    """One step for each batch; the loss is summed over members."""
    watched = learner(net, optimizer, members)
    nap.begin(watched)
    continue_training(net, nap, x, y, watched, on_step)
    return watched


def continue_training(net, nap, x, y, watched, on_step=lambda: None):
    for inputs, targets in zip(x, y, strict=True):
        watched.optimizer.zero_grad()
        outputs = net(inputs)
        each = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
        (each.sum() / targets.shape[-1]).backward()
        watched.optimizer.step()
        watched.steps += 1
        nap.after_step(watched, Batch(inputs, targets, {}))
        on_step()


def sgd(net, rate):
    return torch.optim.SGD(net.parameters(), rate)


def test_network_is_the_one_of_the_specification():
    net = network()
    assert [tuple(p.shape) for p in net.parameters()] == [(32, 10), (32, 32), (5, 32), (5,)]
    assert sum(isinstance(m, nn.LayerNorm) and m.weight is None and m.eps == 0 for m in net.modules()) == 2
    assert [group.tensors for group in plan(net).groups] == [(name,) for name in HIDDEN]


def test_1_scaling_hidden_weights_scales_their_gradients_inversely():
    net, (x, y) = network(), batches(1)
    logits, before = net(x[0]), gradients(net, x[0], y[0])
    scale(net, w0=7.0, w2=0.3)
    after = gradients(net, x[0], y[0])
    assert (net(x[0]) - logits).abs().max() <= 1e-12
    assert (after["0.weight"] * 7 - before["0.weight"]).abs().max() <= 1e-12
    assert (after["2.weight"] * 0.3 - before["2.weight"]).abs().max() <= 1e-12
    assert (after["4.weight"] - before["4.weight"]).abs().max() <= 1e-12
    assert before["0.weight"].abs().max() > 1e-3


def test_2_gradients_are_orthogonal_to_hidden_weights_only():
    net, (x, y) = network(), batches(1)
    found = gradients(net, x[0], y[0])
    dots = {name: abs(float((found[name] * parameters(net)[name].detach()).sum())) for name in (*HIDDEN, "4.weight")}
    assert all(dots[name] <= 1e-12 for name in HIDDEN)
    assert dots["4.weight"] > 1e-3


def test_3_norms_grow_as_pythagoras_says():
    net, (x, y) = network(), batches(100)
    start, added = float(net[0].weight.detach().square().sum()), 0.0
    optimizer = sgd(net, 0.5)
    for inputs, targets in zip(x, y, strict=True):
        optimizer.zero_grad()
        loss(net, inputs, targets).backward()
        added += 0.25 * float(net[0].weight.grad.square().sum())
        optimizer.step()
    grown = float(net[0].weight.detach().square().sum()) - start
    assert grown > 0.1
    assert abs(grown - added) <= 1e-10


class AdamWithoutEpsilon:
    """ε = 0, with 0 / 0 taken as 0; one learning rate a parameter."""

    def __init__(self, parameters, rates):
        self.parameters, self.rates, self.steps = list(parameters), rates, 0
        self.mean = [torch.zeros_like(p) for p in self.parameters]
        self.square = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for p, rate, m, v in zip(self.parameters, self.rates, self.mean, self.square, strict=True):
            m.lerp_(p.grad, 0.1)
            v.lerp_(p.grad.square(), 0.001)
            root = (v / (1 - 0.999**self.steps)).sqrt()
            p -= rate * torch.where(root > 0, m / (1 - 0.9**self.steps) / root, 0.0)


@pytest.mark.parametrize(("kind", "tolerance"), [("sgd", 1e-12), ("adam", 1e-10)])
def test_4_coupled_networks_stay_coupled(kind, tolerance):
    x, y = batches(100)
    ends = []
    for factor in (1.0, 4.0):
        net = network()
        scale(net, w0=factor, w2=factor)
        rate, hidden = (0.1, 0.1 * factor**2) if kind == "sgd" else (1e-3, 1e-3 * factor)
        rates = [hidden if name in HIDDEN else rate for name in parameters(net)]
        if kind == "adam":
            optimizer = AdamWithoutEpsilon(net.parameters(), rates)
        else:
            groups = [{"params": [p], "lr": r} for p, r in zip(net.parameters(), rates, strict=True)]
            optimizer = torch.optim.SGD(groups)
        for inputs, targets in zip(x, y, strict=True):
            net.zero_grad()
            loss(net, inputs, targets).backward()
            optimizer.step()
        ends.append(net(x[0]))
    assert (ends[0] - network()(x[0])).abs().max() > 0.1
    assert (ends[0] - ends[1]).abs().max() <= tolerance


def test_5_projection_is_a_learning_rate_for_each_layer():
    x, y = batches(300)
    projected = network()
    train(projected, NaP(), x, y, sgd(projected, 0.5))

    free = network()
    radii = {name: float(parameters(free)[name].detach().norm()) for name in HIDDEN}
    groups = [{"params": [p], "lr": 0.5} for p in free.parameters()]
    optimizer = torch.optim.SGD(groups)
    for inputs, targets in zip(x, y, strict=True):
        for group, (name, p) in zip(optimizer.param_groups, parameters(free).items(), strict=True):
            if name in HIDDEN:
                group["lr"] = 0.5 * (float(p.detach().norm()) / radii[name]) ** 2
        optimizer.zero_grad()
        loss(free, inputs, targets).backward()
        optimizer.step()
    growth = [float(parameters(free)[name].detach().norm()) / radii[name] for name in HIDDEN]
    assert min(growth) > 1.05
    assert (projected(x[0]) - free(x[0])).abs().max() <= 1e-10


def test_5_a_recorded_growth_replays_the_run_that_lost_its_learning_rate():
    """The other direction of check 5: what `norm` does at a constant rate, `nap` does at η c^-2."""
    x, y = batches(300)
    norm = NaP(**ARMS["norm"], record_growth_every=1)
    free = network()
    train(free, norm, x, y, sgd(free, 0.5))
    assert norm.growth.shape == (301, 2)
    assert norm.growth[-1].min() > 1.05

    replayed, constant, one_rate = network(), network(), network()
    train(replayed, NaP(schedule=Replay(norm.growth)), x, y, sgd(replayed, 0.5))
    train(one_rate, NaP(schedule=Replay(norm.growth, one_rate=True)), x, y, sgd(one_rate, 0.5))
    train(constant, NaP(), x, y, sgd(constant, 0.5))
    difference = {n: float((net(x[0]) - free(x[0])).detach().abs().max()) for n, net in
                  {"replayed": replayed, "one rate": one_rate, "constant": constant}.items()}  # fmt: skip
    assert difference["replayed"] <= 1e-10
    assert 1e-6 < difference["one rate"] < difference["constant"]


def test_6_by_hand():
    def gradient(theta):
        theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(theta[0] / theta.norm(), theta)[0]

    g = gradient([3.0, 4.0])
    assert torch.allclose(g, torch.tensor([0.128, -0.096], dtype=torch.float64), atol=1e-15)
    stepped = torch.tensor([3.0, 4.0], dtype=torch.float64) - g
    assert torch.allclose(stepped, torch.tensor([2.872, 4.096], dtype=torch.float64), atol=1e-14)
    assert float(stepped.square().sum()) == pytest.approx(25.0256, abs=1e-12)
    five = torch.tensor(5.0, dtype=torch.float64)
    held = Plan((Group(("theta",), five, 0, True),), (), power=2)
    before, projected = stepped.clone(), stepped.clone()
    project_({"theta": projected}, held)
    assert float((projected / before)[0]) == pytest.approx(0.99948840, abs=1e-8)
    assert projected.tolist() == pytest.approx([2.870531, 4.093904], abs=1e-6)

    g = gradient([6.0, 8.0])
    assert g.tolist() == pytest.approx([0.064, -0.048], abs=1e-15)
    twice = torch.tensor([6.0, 8.0], dtype=torch.float64) - 4 * g
    assert twice.tolist() == pytest.approx([5.744, 8.192], abs=1e-14)
    small = elr({"theta": torch.tensor([3.0, 4.0], dtype=torch.float64)}, held, 1.0, 1.0)["theta"]
    large = elr({"theta": torch.tensor([6.0, 8.0], dtype=torch.float64)}, held, 4.0, 1.0)["theta"]
    assert small == large == 1.0


def test_7_effective_learning_rate():
    u = torch.tensor([0.0, 4.0])
    for power, expected in ((2, 0.25), (1, 0.5)):
        held = Plan((Group(("u",), torch.tensor(2.0), 0, True),), (), power=power)
        assert elr({"u": u}, held, 0.01)["u"] == expected
        after = u.clone()
        project_({"u": after}, held)
        assert elr({"u": after}, held, 0.01)["u"] == 1.0


def test_8_projection_touches_norms_only():
    net, (x, y) = network(epsilon=1e-5, dtype=torch.float32), batches(50, dtype=torch.float32)
    held = plan(net)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    train(net, NaP(**ARMS["norm"]), x, y, optimizer)
    last = net.get_submodule("4")
    head = [last.weight.detach().clone(), last.bias.detach().clone()]
    state, logits = copy.deepcopy(optimizer.state_dict()), net(x[0]).detach()
    assert max(abs(float(c) - 1) for c in Projection(held.groups, parameters(net)).growth()) > 0.03

    project_(parameters(net), held)
    for group in held.groups:
        assert abs(float(parameters(net)[group.tensors[0]].detach().norm() / group.radius) - 1) <= 1e-6
    assert torch.equal(last.weight, head[0])
    assert torch.equal(last.bias, head[1])
    for name, slot in optimizer.state_dict()["state"].items():
        assert all(torch.equal(slot[key], state["state"][name][key]) for key in slot)
    assert (net(x[0]) - logits).norm() / logits.norm() <= 1e-5
    once = copy.deepcopy(net)
    project_(parameters(net), held)
    for a, b in zip(net.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=0)


def test_9_members_of_a_population_keep_their_own_norms():
    nets = [network(seed) for seed in range(3)]
    for factor, net in zip((1.0, 3.0, 0.2), nets, strict=True):
        scale(net, w0=factor)
    radii = [[float(parameters(net)[name].detach().norm()) for name in HIDDEN] for net in nets]
    x, y = zip(*(batches(40, seed) for seed in range(3)), strict=True)
    population = stack(nets)
    train(population, NaP(), torch.stack(x, 1), torch.stack(y, 1), sgd(population, 0.3), members=3)
    for k, net in enumerate(nets):
        train(net, NaP(), x[k], y[k], sgd(net, 0.3))
        alone, inside = parameters(net), parameters(member(population, net, k))
        for name in alone:
            torch.testing.assert_close(inside[name], alone[name], rtol=0, atol=1e-11)
        found = [float(inside[name].detach().norm()) for name in HIDDEN]
        assert found == pytest.approx(radii[k], rel=1e-12)


@pytest.mark.parametrize("members", [None, 2])
def test_10_with_both_off_the_learner_is_the_plain_one(members):
    def start():
        nets = [network(seed, dtype=torch.float32) for seed in range(members or 1)]
        return stack(nets) if members else nets[0]

    x, y = batches(20, dtype=torch.float32)
    if members:
        x, y = x[:, None].expand(-1, members, -1, -1), y[:, None].expand(-1, members, -1)
    plain, off = start(), start()
    optimizer = torch.optim.Adam(plain.parameters(), 1e-3)
    for inputs, targets in zip(x, y, strict=True):
        optimizer.zero_grad()
        each = F.cross_entropy(plain(inputs).flatten(0, -2), targets.flatten(), reduction="none")
        (each.sum() / targets.shape[-1]).backward()
        optimizer.step()
    arm = NaP(**ARMS["plain"])
    built = arm.build(off)
    assert built is off
    train(built, arm, x, y, torch.optim.Adam(off.parameters(), 1e-3), members=members)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), off.parameters(), strict=True))


def test_10_projection_every_k_steps():
    net, (x, y) = network(), batches(12)
    radius = float(net[0].weight.detach().norm())
    at_radius, steps = [], iter(range(1, 13))

    def look():
        step = next(steps)
        if abs(float(net[0].weight.detach().norm()) / radius - 1) <= 1e-12:
            at_radius.append(step)

    train(net, NaP(project_every=5), x, y, sgd(net, 0.5), look)
    assert at_radius == [5, 10]


def test_11_rows_may_be_rescaled_in_front_of_batch_norm_only():
    x = batches(1)[0][0]
    factors = torch.linspace(0.5, 2, 32, dtype=torch.float64)[:, None]
    layer, batch = network(), network()
    batch[1] = nn.BatchNorm1d(32, affine=False, eps=1e-30).double()
    for net, changes in ((layer, True), (batch, False)):
        before = net(x)
        with torch.no_grad():
            net[0].weight.mul_(factors)
        assert ((net(x) - before).abs().max() > 1e-3) == changes


def with_biases():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 32), nn.LayerNorm(32, 0.0, False), nn.ReLU(),
        nn.Linear(32, 32, bias=False), nn.LayerNorm(32, 0.0, False), nn.ReLU(), nn.Linear(32, 5),
    ).double()  # fmt: skip


def test_12_a_bias_before_a_normaliser():
    net, x = with_biases(), batches(1)[0][0]
    with pytest.raises(ValueError, match=r"'0\.bias' in front of '1'"):
        plan(net, strict=True)
    joint = plan(net, strict=True, joint_biases=True)
    assert joint.groups[0].tensors == ("0.weight", "0.bias")
    before = net(x)
    with torch.no_grad():
        net[0].weight.mul_(5)
    assert (net(x) - before).abs().max() > 1e-3
    with torch.no_grad():
        net[0].bias.mul_(5)
    assert (net(x) - before).abs().max() <= 1e-12
    project_(parameters(net), joint)
    norm = torch.cat([net[0].weight.flatten(), net[0].bias]).norm()
    assert float(norm.detach() / joint.groups[0].radius) == pytest.approx(1, abs=1e-12)
    assert (net(x) - before).abs().max() <= 1e-12


def test_13_gain_and_offset_held_together():
    torch.manual_seed(0)
    net = network(gains=True)
    net.get_submodule("4").bias = None
    x = batches(1)[0][0]
    norms = [net.get_submodule("1_norm"), net.get_submodule("3_norm")]
    with torch.no_grad():
        for norm in norms:
            norm.weight.add_(torch.rand(32, dtype=torch.float64))
            norm.bias.add_(torch.randn(32, dtype=torch.float64))
    before = net(x)
    joint = NaP(gains="joint")
    joint.begin(learner(net, sgd(net, 0.1)))
    first, last = joint.held
    assert first.tensors == ("1_norm.weight", "1_norm.bias")
    assert float(first.radius) == pytest.approx(32**0.5)

    factor = float(first.radius) / float(torch.cat([norms[0].weight, norms[0].bias]).norm())
    assert abs(factor - 1) > 0.1
    Projection((first,), parameters(net)).project_()
    assert (net(x) - before).abs().max() <= 1e-12
    factor = float(last.radius) / float(torch.cat([norms[1].weight, norms[1].bias]).norm())
    Projection((last,), parameters(net)).project_()
    assert (net(x) - factor * before).abs().max() <= 1e-12


def test_13_gain_and_offset_pulled():
    net = network(gains=True)
    pull = NaP(gains="pull", pull=0.5)
    watched = learner(net, sgd(net, 0.1))
    pull.begin(watched)
    tensors = {name: p.unsqueeze(0) for name, p in parameters(net).items()}
    assert pull.penalty(watched, tensors).tolist() == [0.0]
    with torch.no_grad():
        parameters(net)["1_norm.weight"][3] = 4.0
        parameters(net)["3_norm.bias"][5] = -2.0
    tensors = {name: p.unsqueeze(0) for name, p in parameters(net).items()}
    assert pull.penalty(watched, tensors).tolist() == [0.25 * (9 + 4)]


def test_14_a_resumed_run_keeps_its_radii():
    x, y = batches(40)
    whole = network()
    train(whole, NaP(), x, y, sgd(whole, 0.3))

    first = network()
    nap = NaP()
    train(first, nap, x[:15], y[:15], sgd(first, 0.3))
    scale(first, w0=1.7)  # a norm from which the radius could not be read off
    saved = copy.deepcopy((first.state_dict(), nap.state_dict()))

    second = network(seed=9)
    second.load_state_dict(saved[0])
    nap, watched = NaP(), learner(second, sgd(second, 0.3))
    watched.steps = 15
    nap.begin(watched)
    nap.load_state_dict(saved[1])
    project_(parameters(second), Plan(nap.groups, ()))
    continue_training(second, nap, x[15:], y[15:], watched)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_15_decoupled_decay_is_a_learning_rate():
    x, y = batches(1)
    rate, decay = 0.3, 0.2
    ends = []
    for step_rate, step_decay in ((rate, decay), (rate / (1 - rate * decay), 0.0)):
        net = network()
        held, found = plan(net), gradients(net, x[0], y[0])
        with torch.no_grad():
            for name in HIDDEN:
                parameters(net)[name].mul_(1 - step_rate * step_decay).sub_(step_rate * found[name])
        project_(parameters(net), held)
        ends.append([parameters(net)[name].detach().clone() for name in HIDDEN])
    for a, b in zip(*ends, strict=True):
        assert (a - b).abs().max() <= 1e-14


def test_our_adam_is_served_too():
    net, (x, y) = network(dtype=torch.float32), batches(30, dtype=torch.float32)
    optimizer = Adam(list(net.parameters()), 3e-3)
    watched, nap = learner(net, optimizer), NaP()
    nap.begin(watched)
    for inputs, targets in zip(x, y, strict=True):
        optimizer.step(torch.autograd.grad(loss(net, inputs, targets), list(net.parameters())))
        watched.steps += 1
        nap.after_step(watched, Batch(inputs, targets, {}))
    rates = nap.effective_learning_rates(watched)
    assert [float(rate) for rate in rates.values()] == pytest.approx([1, 1], abs=1e-6)
