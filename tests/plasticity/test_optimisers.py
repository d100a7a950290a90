"""What holds for every optimiser of the shelf: one contract, populations as if alone, exact state, no waiting."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from plasticity.intervention import Learner
from plasticity.interventions.adaptive_batch import AdaptiveBatch
from plasticity.interventions.seednorm import WithSeeDNorm
from plasticity.networks.stacked import member, stack
from plasticity.networks.structure import find_structure
from plasticity.optimisers.adagrad import AdAdaGrad, AdaGrad
from plasticity.optimisers.adamp import AdamP, WithAdamP
from plasticity.optimisers.lipschitz import ConstrainedMuon, WithLipschitz
from plasticity.optimisers.muon import Muon, WithMuon, hidden_matrices
from plasticity.optimisers.normuon import NorMuon, WithNorMuon
from plasticity.optimisers.sgdp import SGDP, WithSGDP
from plasticity.optimisers.trac import TRAC, WithTRAC
from plasticity.optimisers.upgd import UPGD, WithUPGD

K = 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def generators(members):
    return [torch.Generator().manual_seed(100 + k) for k in members]


def matrices(net, stacked):
    chosen, others = hidden_matrices(net, dict(net.named_parameters()), stacked)
    return [{"params": chosen}, {"params": others, "adam": True}]


def constrained(net, stacked):
    chosen = [p for p in net.parameters() if p.dim() - stacked > 1]
    others = [p for p in net.parameters() if p.dim() - stacked < 2]
    return [{"params": chosen}, {"params": others, "kind": "adam"}]


# Each makes the optimiser for a network whose members have these numbers.
OPTIMISERS = {
    "adamp": lambda n, s, m: AdamP(n.parameters(), 0.02, weight_decay=0.1, delta=0.5, stacked=s),
    "adamp-nesterov": lambda n, s, m: AdamP(n.parameters(), 0.02, nesterov=True, delta=0.5, stacked=s),
    "sgdp": lambda n, s, m: SGDP(n.parameters(), 0.05, 0.9, weight_decay=0.1, delta=0.5, stacked=s),
    "sgdp-buffer": lambda n, s, m: SGDP(n.parameters(), 0.05, 0.9, delta=0.5, project_buffer=True, stacked=s),
    "muon": lambda n, s, m: Muon(matrices(n, s), weight_decay=0.1, stacked=s),
    "muon-exact": lambda n, s, m: Muon(matrices(n, s), ns="exact", scale="match_rms_adamw", stacked=s),
    "normuon": lambda n, s, m: NorMuon(matrices(n, s), weight_decay=0.1, stacked=s),
    "normuon-rms": lambda n, s, m: NorMuon(matrices(n, s), scale="rms", stacked=s),
    "soft-cap": lambda n, s, m: ConstrainedMuon(constrained(n, s), 0.05, weight_decay=0.1, stacked=s),
    "hard-cap": lambda n, s, m: ConstrainedMuon(constrained(n, s), 0.01, 0.7, "spectral_hard_cap", "adam", stacked=s),
    "hammer": lambda n, s, m: ConstrainedMuon(constrained(n, s), 0.05, 0.7, "spectral_hammer", stacked=s),
    "normalize": lambda n, s, m: ConstrainedMuon(constrained(n, s), 0.05, 0.7, "spectral_normalize", stacked=s),
    "stiefel": lambda n, s, m: ConstrainedMuon(constrained(n, s), 0.05, 0.7, "stiefel", "muon_stiefel", stacked=s),
    "svd-clip": lambda n, s, m: ConstrainedMuon(constrained(n, s), 0.05, 0.7, "svd_clip", "muon_exact", stacked=s),
    "spectral-decay": lambda n, s, m: ConstrainedMuon(
        constrained(n, s), 0.05, 0.7, "spectral_weight_decay", spectral_decay=0.01, stacked=s
    ),
    "upgd": lambda n, s, m: UPGD(n.parameters(), 0.05, generators(m), 0.1, weight_decay=0.1, stacked=s),
    "upgd-free": lambda n, s, m: UPGD(n.parameters(), 0.05, generators(m), 0.1, protecting=False, stacked=s),
    "upgd-local": lambda n, s, m: UPGD(n.parameters(), 0.05, generators(m), 0.1, local=True, stacked=s),
    "upgd-adaptive": lambda n, s, m: UPGD(n.parameters(), 0.05, generators(m), 0.1, adaptive=True, stacked=s),
    "trac": lambda n, s, m: TRAC(AdamP(n.parameters(), 0.02, delta=0.0, stacked=s), first_scale=0.1),
    "adagrad": lambda n, s, m: AdaGrad(n.parameters(), 0.1, weight_decay=0.1, stacked=s),
    "adagrad-row": lambda n, s, m: AdaGrad(n.parameters(), 0.1, "row", stacked=s),
    "adadagrad": lambda n, s, m: AdAdaGrad(n.parameters(), 0.1, eta=2.0, weight_decay=0.1, stacked=s),
    "adadagrad-coordinate": lambda n, s, m: AdAdaGrad(n.parameters(), 0.1, 2.0, granularity="coordinate", stacked=s),
}  # fmt: skip
WAITS = {"muon-exact", "svd-clip"}  # for a singular value decomposition


def members():
    made = []
    for k in range(K):
        torch.manual_seed(k)
        made.append(network())
    return made


def train(net, optimizer, inputs, targets, steps):
    """inputs [steps, ([K,] B, ...)]. Each member's gradient is that of its own mean loss."""
    for x, y in zip(inputs[steps], targets[steps], strict=True):
        optimizer.zero_grad()
        outputs = net(x)
        F.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="sum").div(y.shape[-1]).backward()
        optimizer.step()


STEPS = 6
INPUTS = random(STEPS, K, 8, 1, 4, 4)
TARGETS = torch.randint(3, (STEPS, K, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_members_of_a_population_train_as_if_alone(name):
    networks = members()
    population = stack(networks)
    optimizer = OPTIMISERS[name](population, True, range(K))
    train(population, optimizer, INPUTS, TARGETS, slice(None))
    for k, net in enumerate(networks):
        start = [p.detach().clone() for p in net.parameters()]
        train(net, OPTIMISERS[name](net, False, [k]), INPUTS[:, k], TARGETS[:, k], slice(None))
        together = member(population, network(), k)
        for p, q, before in zip(net.parameters(), together.parameters(), start, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)
            assert not torch.equal(p, before)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_saved_state_continues_exactly(name, stacked):
    net = stack(members()) if stacked else members()[0]
    which = range(K) if stacked else [0]
    inputs, targets = (INPUTS, TARGETS) if stacked else (INPUTS[:, 0], TARGETS[:, 0])
    optimizer = OPTIMISERS[name](net, stacked, which)
    train(net, optimizer, inputs, targets, slice(0, 3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(net)
    resumed = OPTIMISERS[name](other, stacked, which)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    if isinstance(optimizer, UPGD):
        for source, saved in zip(resumed.generators, optimizer.generators, strict=True):
            source.set_state(saved.get_state())
    train(net, optimizer, inputs, targets, slice(3, None))
    train(other, resumed, inputs, targets, slice(3, None))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    other_optimizer = {**optimizer.state_dict(), "shared": {"x": INPUTS}}
    with pytest.raises(ValueError, match="saved state"):
        resumed.load_state_dict(other_optimizer)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_proposals_are_the_step_and_gradients_are_only_read(name):
    net, twin = members()[0], members()[0]
    x, y = INPUTS[0, 0], TARGETS[0, 0]
    ours, plain = OPTIMISERS[name](net, False, [0]), OPTIMISERS[name](twin, False, [0])
    for step in range(4):
        for one in (net, twin):
            one.zero_grad()
            F.cross_entropy(one(x), y).backward()
        unused = list(net.parameters())[0] if step == 3 else None
        if unused is not None:
            unused.grad = list(twin.parameters())[0].grad = None
        kept = {p: p.grad.clone() for p in net.parameters() if p.grad is not None}
        before = {p: p.detach().clone() for p in net.parameters()}
        proposal = ours.propose()
        assert all(torch.equal(p, q) for p, q in before.items())
        assert [id(p) for p in ours.proposed] == [
            id(p) for group in ours.param_groups for p in group["params"] if p is not unused
        ]
        proposal = [step.clone() for step in proposal]
        ours.apply(torch.tensor([0.5]))
        for p, change in zip(ours.proposed, proposal, strict=True):
            torch.testing.assert_close(p.detach(), before[p] + 0.5 * change, rtol=1e-12, atol=1e-15)
            p.data.copy_(before[p] + change)
        plain.step()
        assert all(torch.equal(p.grad, kept[p]) for p in kept)
        if unused is not None:
            assert unused.grad is None
            assert torch.equal(unused.detach(), before[unused])
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    movement = ours.movement()
    assert {len(values) for values in movement.values()} == {len(ours.proposed)}


def test_movement_by_hand():
    p = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = SGDP([p], lr=1.0)
    p.grad = torch.tensor([[-1.0, -7.0]])
    optimizer.step()  # to (4, 11) without projection
    assert optimizer.movement()["norm"][0] == pytest.approx(5.0)
    assert optimizer.movement()["relative_step"][0] == pytest.approx(50**0.5 / 5)
    assert optimizer.movement()["angle"][0].cos() == pytest.approx((3 * 4 + 4 * 11) / (5 * 137**0.5))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_closure_and_sparse_gradients(name):
    net = members()[0]
    optimizer = OPTIMISERS[name](net, False, [0])

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(INPUTS[0, 0]), TARGETS[0, 0])
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    next(net.parameters()).grad = torch.zeros_like(next(net.parameters())).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("name", [name for name in OPTIMISERS if name not in WAITS])
def test_steps_run_on_a_fake_gpu_without_waiting_for_it(name, monkeypatch):
    """FakeTensorMode refuses host and device mixed, and any read of a tensor's value."""
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    population = stack([net.float() for net in members()])
    structure = find_structure(population)
    monkeypatch.setattr("plasticity.optimisers.muon.find_structure", lambda network: structure)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in population.modules():
            for key, p in module._parameters.items():
                if p is not None:
                    module._parameters[key] = nn.Parameter(torch.empty(p.shape, device="cuda"))
        optimizer = OPTIMISERS[name](population, True, range(K))
        for _ in range(2):
            for p in population.parameters():
                p.grad = torch.empty_like(p)
            optimizer.propose()
            optimizer.apply(torch.ones(K, device="cuda"))
        assert {p.device.type for p in population.parameters()} == {"cuda"}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda p: AdamP(p, lr=-1.0), "lr"),
        (lambda p: AdamP(p, betas=(1.0, 0.9)), "betas"),
        (lambda p: AdamP(p, weight_decay=-0.1), "weight_decay"),
        (lambda p: AdamP(p, delta=-0.1), "delta"),
        (lambda p: SGDP(p, 0.1, momentum=1.0), "momentum"),
        (lambda p: SGDP(p, 0.1, 0.9, nesterov=True, project_buffer=True), "nesterov"),
        (lambda p: Muon(p, momentum=1.0), "momentum"),
        (lambda p: Muon(p, ns_steps=0), "ns_steps"),
        (lambda p: Muon(p, scale="large"), "scale 'large'"),
        (lambda p: NorMuon(p, beta2=1.0), "beta2"),
        (lambda p: NorMuon(p, ns="svd"), "ns 'svd'"),
        (lambda p: ConstrainedMuon(p, max_norm=0.0), "max_norm"),
        (lambda p: ConstrainedMuon(p, constraint="clip"), "constraint 'clip'"),
        (lambda p: UPGD(p, 0.1, sigma=-1.0), "sigma"),
        (lambda p: UPGD(p, 0.1, beta_utility=1.0), "beta_utility"),
        (lambda p: TRAC(AdamP(p), betas=(0.9, 1.0)), "betas"),
        (lambda p: AdaGrad(p, granularity="tensor"), "granularity 'tensor'"),
        (lambda p: AdaGrad(p, initial=-1.0), "initial"),
        (lambda p: AdAdaGrad(p, eta=0.0), "eta"),
        (lambda p: AdAdaGrad(p, first=4, largest=2), "largest"),
    ],
)
def test_bad_settings(make, problem):
    with pytest.raises(ValueError, match=problem):
        make([nn.Parameter(torch.ones(2, 2))])


def test_other_bad_input():
    vector = nn.Parameter(torch.ones(3))
    for kind in (Muon, NorMuon, ConstrainedMuon):
        with pytest.raises(ValueError, match="matri"):
            kind([vector])
    vector.grad = torch.ones(3)
    without_generators = UPGD([vector], 0.1)
    with pytest.raises(ValueError, match="a generator for each of 1"):
        without_generators.step()


def test_which_parameters_muon_takes():
    net = members()[0]
    names = {id(p): name for name, p in net.named_parameters()}
    chosen, others = hidden_matrices(net, dict(net.named_parameters()), False)
    assert [names[id(p)] for p in chosen] == ["3.weight", "6.weight"]  # no first convolution, no head
    assert len(chosen) + len(others) == len(names)
    mlp = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    assert [p.shape for p in hidden_matrices(mlp, dict(mlp.named_parameters()), False)[0]] == [(5, 4), (5, 5)]


INTERVENTIONS = {
    "adamp": WithAdamP(),
    "sgdp": WithSGDP(),
    "muon": WithMuon(),
    "normuon": WithNorMuon(),
    "upgd": WithUPGD(),
    "trac": WithTRAC(),
    "lipschitz": WithLipschitz(),
    "adaptive-batch": AdaptiveBatch(),
}


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_interventions_train_a_population_and_report(name):
    intervention = INTERVENTIONS[name]
    population = stack([intervention.build(net) for net in members()])
    optimizer = intervention.optimizer(population, dict(population.named_parameters()), 0.01, stacked=True)
    learner = Learner(
        population, find_structure(population), optimizer, K, generators(range(K)), lambda source: network()
    )
    intervention.begin(learner)

    def loss():
        with torch.no_grad():
            return float(F.cross_entropy(population(INPUTS[0]).flatten(0, 1), TARGETS[0].flatten()))

    before = loss()
    train(population, optimizer, INPUTS[:1].expand(20, *INPUTS.shape[1:]), TARGETS[:1].expand(20, K, 8), slice(None))
    assert loss() < before
    metrics = intervention.metrics(learner)
    assert all(value.shape == (K,) and value.isfinite().all() for value in metrics.values())
    assert (metrics != {}) == (name in ("adamp", "sgdp", "lipschitz", "adaptive-batch"))
    if name == "lipschitz":
        assert max(float(value.max()) for value in metrics.values()) <= 2 * (1 + 1e-5)


def test_seednorm_with_adamp_trains():
    net = WithSeeDNorm().build(network())
    optimizer = WithAdamP().optimizer(net, dict(net.named_parameters()), 0.01, stacked=False)
    start = net[7].beta.detach().clone()
    train(net, optimizer, INPUTS[:, 0], TARGETS[:, 0], slice(None))
    assert not torch.equal(net[7].beta, start)
