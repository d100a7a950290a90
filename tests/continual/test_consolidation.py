"""Strategies that hold weights, answers or gradients: against their equations, one seed and one sample at a time."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from continual.strategies.agem import projected
from continual.strategies.lwf import distillation
from continual.strategies.packnet import kept_largest
from plasticity.networks.functional import evaluating
from tests.continual.test_learner import CNN, TOY, learner

TOLD = dataclasses.replace(TOY, kind="task")
MOMENTUM = dataclasses.replace(TOLD, momentum=0.9, weight_decay=0.01, learning_rate=0.05)


def samples(found: Any, steps: int = 2) -> tuple[Tensor, Tensor]:
    """The first batches of the first task as inputs [K, n, ...] and labels [K, n]."""
    images, labels = found.stream.batches(0, 0, steps)
    return found.inputs.scaled(images.flatten(1, 2)), labels.flatten(1, 2)


def finished(name: str, tasks: int, benchmark=TOLD, seeds=(0, 1), **settings: Any) -> Any:
    found: Any = learner(name, seeds, benchmark, **settings)
    while found.index < tasks:
        found.advance(100)
    return found


@pytest.mark.parametrize("benchmark", [TOLD, dataclasses.replace(CNN, tasks=2)], ids=["task", "normalised"])
def test_the_empirical_fisher_is_the_mean_of_squared_gradients_of_single_samples(benchmark):
    found = finished("ewc", 1, benchmark)
    x, y = samples(found, found.tasks[0].steps)
    network = found.strategy.network.eval()
    wanted = [torch.zeros_like(p) for p in found.strategy.parameters]
    for k in range(2):
        scope = found.tasks[0].outputs[k] if benchmark.kind == "task" else torch.ones(10, dtype=torch.bool)
        for b in range(x.shape[1]):
            outputs = network(x[:, b : b + 1])[k].masked_fill(~scope, -torch.inf)
            loss = F.cross_entropy(outputs, y[k, b : b + 1])
            for total, g in zip(wanted, torch.autograd.grad(loss, found.strategy.parameters), strict=True):
                total[k] += g[k].square() / x.shape[1]
    for own, value in zip(found.strategy.importance, wanted, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-7)


def test_a_drawn_label_is_one_the_network_gives_among_those_that_compete():
    found = finished("ewc", 1, TOLD, fisher="sampled")
    x, y = samples(found, 1)
    x, y = x[:, :1].expand(-1, 4000, -1, -1, -1), y[:, :1].expand(-1, 4000)
    drawn = found.strategy._drawn_labels(x, y)
    own = found.tasks[0].outputs
    assert own.gather(1, drawn).all()
    chances = found.strategy.network(x[:, :1])[:, 0].masked_fill(~own, -torch.inf).softmax(1)
    counts = torch.zeros_like(chances).scatter_add_(1, drawn, torch.ones(2, 4000))
    torch.testing.assert_close(counts / 4000, chances, atol=0.03, rtol=0)


def test_the_batch_fisher_squares_means():
    found: Any = learner("ewc", (0, 1), TOLD, fisher="batch")
    found.advance(found.tasks[0].steps)
    wanted = [torch.zeros_like(p) for p in found.strategy.parameters]
    x, y = samples(found, found.tasks[0].steps)
    for part, labels in zip(x.split(TOLD.batch, 1), y.split(TOLD.batch, 1), strict=True):
        loss = found.strategy.cross_entropy(found.strategy.network(part), labels).sum()
        for total, g in zip(wanted, torch.autograd.grad(loss, found.strategy.parameters), strict=True):
            total += g.square() / found.tasks[0].steps
    for own, value in zip(found.strategy.importance, wanted, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"mode": "online", "decay": 0.7}], ids=["separate", "online"])
def test_ewc_pulls_as_its_terms_one_by_one(settings):
    strategy: Any = learner("ewc", (0, 1), strength=3.0, **settings).strategy
    random = torch.Generator().manual_seed(1)
    past = []
    for _ in range(3):
        fisher = [
            torch.rand(p.shape, generator=random) * (torch.rand(p.shape, generator=random) < 0.7)
            for p in strategy.parameters
        ]
        with torch.no_grad():
            for p in strategy.parameters:
                p += 0.1 * torch.randn(p.shape, generator=random)
        strategy.consolidate(fisher)
        past.append((fisher, [p.detach().clone() for p in strategy.parameters]))
    with torch.no_grad():
        for p in strategy.parameters:
            p += 0.1
    if settings:  # γ weighs all that is old, in F* and again in the penalty
        f = [0.7 * (c + 0.7 * b + 0.49 * a) for a, b, c in zip(*(fisher for fisher, _ in past), strict=True)]
        past = [(f, past[-1][1])]
    value = sum(
        (f * (p - anchor).square()).sum() for fisher, anchors in past
        for f, anchor, p in zip(fisher, anchors, strategy.parameters, strict=True)
    )  # fmt: skip
    wanted = torch.autograd.grad(1.5 * value, strategy.parameters)
    pull, told = strategy.penalty()
    for own, g in zip(pull, wanted, strict=True):
        torch.testing.assert_close(own, g, rtol=1e-4, atol=1e-6)
    assert told.shape == (2,)
    if settings:
        torch.testing.assert_close(told.sum(), 1.5 * value.detach(), rtol=1e-4, atol=0)


def test_si_follows_the_equations_of_the_paper():
    """Over two tasks and one step of a third, for one of two members, with gradients of autograd."""
    found: Any = learner("si", (4, 7), TOLD, strength=0.3, damping=0.01)
    strategy = found.strategy
    theta = [p[1].detach().clone().requires_grad_() for p in strategy.parameters]
    names = [name for name, _ in strategy.network.named_parameters()]
    anchor = [t.detach().clone() for t in theta]
    omega = [torch.zeros_like(t) for t in theta]
    for index in range(3):
        path = [torch.zeros_like(t) for t in theta]
        for step in range(found.tasks[index].steps if index < 2 else 1):
            images, labels = (part[1, 0] for part in found.stream.batches(index, step, step + 1))
            weights = dict(zip(names, (t.unsqueeze(0) for t in theta), strict=True))
            outputs = torch.func.functional_call(strategy.network, weights, (found.inputs.scaled(images[None]),))[0]
            loss = F.cross_entropy(outputs.masked_fill(~found.tasks[index].outputs[1], -torch.inf), labels)
            penalty = sum((o * (t - a).square()).sum() for o, t, a in zip(omega, theta, anchor, strict=True))
            plain = torch.autograd.grad(loss, theta, retain_graph=True)
            whole = torch.autograd.grad(loss + 0.3 * penalty, theta)
            with torch.no_grad():
                for t, w, g, g_plain in zip(theta, path, whole, plain, strict=True):
                    w += g_plain * TOLD.learning_rate * g
                    t -= TOLD.learning_rate * g
        if index < 2:
            for o, w, t, a in zip(omega, path, theta, anchor, strict=True):
                o.copy_((o + w / ((t.detach() - a) ** 2 + 0.01)).clamp(min=0))
                a.copy_(t.detach())
    while found.index < 2:
        found.advance(100)
    found.advance(1)
    for own, importance, t, o in zip(strategy.parameters, strategy.importance, theta, omega, strict=True):
        torch.testing.assert_close(importance[1], o, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(own[1], t, rtol=1e-4, atol=1e-5)


def test_distillation_is_a_cross_entropy_within_each_group():
    random = torch.Generator().manual_seed(0)
    now, then = (torch.randn(2, 3, 5, generator=random) for _ in range(2))
    groups = torch.tensor([[[1, 1, 0, 0, 0], [0, 0, 1, 0, 1]], [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]]).bool()
    for k in range(2):
        wanted = 0.0
        for g in range(2):
            chosen = groups[k, g]
            if chosen.any():
                p, q = ((outputs[k][:, chosen] / 2).softmax(1) for outputs in (then, now))
                wanted += float(-(p * q.log()).sum(1).mean())
        assert float(distillation(now, then, groups, 2.0)[k]) == pytest.approx(wanted, rel=1e-5)
    now.requires_grad_()
    (gradient,) = torch.autograd.grad(distillation(now, now.detach(), groups, 2.0).sum(), [now])
    assert gradient.abs().max() < 1e-6  # at its smallest where nothing changed


@pytest.mark.parametrize("benchmark", [TOY, TOLD], ids=["class", "task"])
def test_lwf_learns_from_the_network_before_the_task(benchmark):
    found = finished("lwf", 2, benchmark)
    strategy = found.strategy
    for name, p in strategy.network.named_parameters():
        assert torch.equal(strategy.teacher[name], p)
    old = torch.stack([task.outputs for task in found.tasks[:2]], 1)
    assert torch.equal(strategy.groups[:, : strategy.finished] if benchmark is TOLD else strategy.groups,
                       old if benchmark is TOLD else old.any(1, keepdim=True))  # fmt: skip
    before = {name: value.clone() for name, value in strategy.teacher.items()}
    found.advance(3)
    assert all(torch.equal(value, before[name]) for name, value in strategy.teacher.items())
    assert float(found.measurements[-1].values["loss/distillation"].min()) > 0


def test_a_gradient_against_the_memory_is_projected_for_that_member_alone():
    g = [torch.tensor([[[1.0, -2.0]], [[1.0, 2.0]]]), torch.tensor([[0.0], [1.0]])]
    r = [torch.tensor([[[0.0, 2.0]], [[1.0, 0.0]]]), torch.tensor([[0.0], [1.0]])]
    found, conflict = projected(g, r)
    assert conflict.tolist() == [True, False]
    assert found[0].tolist() == [[[1.0, 0.0]], [[1.0, 2.0]]]
    assert found[1].tolist() == [[0.0], [1.0]]


def test_agem_remembers_earlier_tasks_only_and_takes_the_projected_step():
    found = finished("agem", 1, replay_batch=8)
    strategy, first = found.strategy, found.tasks[0].outputs
    found.advance(3)
    assert first.gather(1, strategy.memory.columns["labels"]).all()
    assert strategy.memory.inserted == found.tasks[0].steps * TOLD.batch
    state = strategy.memory.state_dict()
    images, labels = (part[:, 0] for part in found.stream.batches(1, 3, 4))
    replay = strategy.memory.sample(8)
    strategy.memory.load_state_dict(state)
    losses = [
        strategy.cross_entropy(strategy.network(x), y).sum()
        for x, y in ((found.inputs.scaled(images), labels), (replay.x, replay.y))
    ]
    current, reference = (torch.autograd.grad(loss, strategy.parameters) for loss in losses)
    wanted = [
        p - TOLD.learning_rate * g for p, g in zip(strategy.parameters, projected(current, reference)[0], strict=True)
    ]
    found.advance(1)
    for own, value in zip(strategy.parameters, wanted, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-5, atol=1e-6)


def test_the_largest_free_weights_are_kept():
    weight = torch.tensor([[[0.1, -0.9], [0.5, 7.0]], [[-3.0, 2.0], [1.0, 0.0]]])
    free = torch.tensor([[[True, True], [True, False]], [[True, False], [True, True]]])
    assert kept_largest(weight, free, 2).tolist() == [[[False, True], [True, False]], [[True, False], [True, False]]]


@pytest.mark.parametrize(
    "benchmark",
    [MOMENTUM, dataclasses.replace(CNN, kind="task", optimizer="adam", learning_rate=0.01, epochs=3, tasks=2)],
    ids=["momentum", "normalised, adam"],
)
def test_packnet_forgets_nothing_to_the_bit(benchmark):
    found: Any = learner("packnet", (0, 1), benchmark)
    strategy, answers = found.strategy, []

    @torch.no_grad()
    def scores(index: int) -> Tensor:
        images, task = found.stream.test(index)[0], found.tasks[index]
        with evaluating(strategy.network):
            found_scores = strategy.predict(found.inputs.scaled(images), task)
        return found_scores.masked_fill(~task.outputs.unsqueeze(1), 0)

    while not found.done:
        found.advance(1)
        assert all(torch.equal(scores(index), then) for index, then in enumerate(answers))
        if found.step == 0:
            answers.append(scores(found.index - 1))
    learned = found.matrix.diagonal(dim1=1, dim2=2)
    assert torch.equal(found.matrix[:, -1], learned)
    assert float(learned.mean()) > 0.6
    for name, owner in strategy.owner.items():
        for member in owner:
            left = member.numel()
            for task in range(1, found.stream.tasks + 1):
                given = int((member == task).sum())
                assert given == left - round(0.5 * left)
                left -= given
            assert left == strategy.free[name]
            assert not strategy.rest[name][owner == 0].any()


@pytest.mark.parametrize("strategy", ["ewc", "si", "lwf", "agem", "packnet"])
def test_they_resume_exactly_in_the_midst_of_a_task(strategy):
    settings = {"fisher": "sampled"} if strategy == "ewc" else {}
    found = finished(strategy, 1, MOMENTUM, **settings)
    found.advance(6)  # of eight; packnet has pruned
    state = copy.deepcopy(found.state_dict())
    again: Any = learner(strategy, (0, 1), MOMENTUM, **settings)
    again.load_state_dict(state)
    for one in (found, again):
        while one.index < 3:
            one.advance(100)
    for own, other in zip(found.strategy.parameters, again.strategy.parameters, strict=True):
        assert torch.equal(own, other)
    assert torch.equal(found.matrix[:, :3], again.matrix[:, :3])
