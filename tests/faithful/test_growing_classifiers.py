"""Classifiers that grow keep what they compute (specs/growclip-and-growth.md, A.4 and A.8), and the strategy `grow`."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from continual import datasets
from continual.catalogue import Benchmark, open_learner
from continual.growth.classifiers import GrowableClassifier
from continual.learner import Learner
from continual.memory import Batch
from continual.networks.classifier import Classifier, draw
from continual.strategies import grow
from continual.strategies.grow import Grow

BLOBS = datasets.load("blobs")
TOY = Benchmark(data="blobs", hidden=(16, 16), memory=20)
HIDDEN = {"mlp": (8, 8), "cnn": (4, 8), "vit": (8, 2, 12, 2)}


def perturbed(name: str, dtype: torch.dtype, widening: Any = "unread") -> GrowableClassifier:
    source = torch.Generator().manual_seed(0)
    drawn = draw(name, (1, 8, 8), HIDDEN[name], 5, True, (), source)
    assert isinstance(drawn, Classifier)
    with torch.no_grad():
        for tensor in [*drawn.parameters(), *drawn.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=source))
    return GrowableClassifier.of(drawn, (1, 8, 8), widening).to(dtype)


def images(dtype: torch.dtype) -> Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(4), dtype=dtype)


@pytest.mark.parametrize("widening", ["unread", "duplicated"])
@pytest.mark.parametrize("name", HIDDEN)
def test_growth_keeps_the_function(name, widening):
    """Each move alone, and six in a chain; batch normalisation in training too."""
    for dtype, near, training in (
        (torch.float64, 1e-12, False),
        (torch.float64, 1e-12, True),
        (torch.float32, 1e-5, False),
    ):
        model, source = perturbed(name, dtype, widening).train(training), torch.Generator().manual_seed(2)
        x, wanted = images(dtype), copy.deepcopy(model)(images(dtype))
        for move in model.moves() if dtype == torch.float64 else ():
            before = copy.deepcopy(model.state_dict())
            new, slots = model.grow(move, source)
            assert new.cost() > model.cost()
            assert slots.keys() == dict(new.named_parameters()).keys()
            assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
            assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in new.parameters())
            for n, parameter in new.named_parameters():
                own = slots[n]
                if own.source is not None and widening == "unread":
                    old = dict(model.named_parameters())[own.source]
                    assert torch.equal(parameter[own.inherited], own.gather(old)[own.inherited])
            if move.name == "stack":
                assert not torch.allclose(new(x), wanted, atol=1e-3)
            else:
                torch.testing.assert_close(new(x), wanted, rtol=0, atol=near)
        chain, start = model, model.parameter_count
        for index in range(6):
            moves = [move for move in chain.moves() if move.name != "stack"]
            chain = chain.grow(moves[(2 * index) % len(moves)], source)[0]
        assert chain.parameter_count > 2 * start
        torch.testing.assert_close(chain(x), wanted, rtol=0, atol=near)


@pytest.mark.parametrize("name", HIDDEN)
def test_all_that_is_new_learns_within_two_steps(name):
    model, x = perturbed(name, torch.float64), images(torch.float64)
    for move in model.moves():
        new = model.grow(move, torch.Generator().manual_seed(1))[0]
        before = {n: p.detach().clone() for n, p in new.named_parameters()}
        optimizer = torch.optim.SGD(new.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(new(x), torch.arange(6) % 5).backward()
            optimizer.step()
        frozen = {n for n, p in new.named_parameters() if torch.equal(p, before[n])}
        # A batch that is normalised does not see the offset of what was normalised before.
        assert all("qkv.bias" not in n and "bias" in n for n in frozen), (move.name, frozen)
        for n, p in new.named_parameters():
            if p.dim() > 1 and n not in frozen and "features.0" not in n:
                rows = (p != before[n]).flatten(1).any(1)
                assert rows.float().mean() > 0.4, (move.name, n)


def learner(benchmark: Benchmark = TOY, seeds=(0, 1), **settings: Any) -> Learner:
    return open_learner(benchmark, "grow", grow.Config(**settings), seeds, data=BLOBS)


def of(found: Learner) -> Grow:
    assert isinstance(found.strategy, Grow)
    return found.strategy


def advanced(found: Learner, steps: int | None = None) -> Learner:
    goal = found.total_steps if steps is None else steps
    while found.steps < goal:
        found.advance(goal - found.steps)
    return found


def test_growth_along_a_path_changes_no_answer():
    found = advanced(learner(path=("width", "depth", "width_1"), choice="path"), 8)
    strategy, hidden = of(found), []
    x = BLOBS.test_images[:30].float().div(255).expand(2, -1, -1, -1, -1)
    for task in (1, 2):
        before, old = strategy.predict(x, None), strategy.known.clone()
        strategy.begin_task(found.tasks[task])
        now = strategy.predict(x, None)
        for k in range(2):
            torch.testing.assert_close(now[k][:, old[k]], before[k][:, old[k]], rtol=0, atol=1e-5)
        hidden.append(strategy.genome.hidden)
    assert hidden == [(24, 24), (24, 24, 24)]
    mixed = advanced(learner(inherit=0.5), 8)
    before = of(mixed).predict(x, None)
    of(mixed).begin_task(mixed.tasks[1])
    assert float((of(mixed).predict(x, None) - before)[..., 0].abs().amax().detach()) > 0.01


def test_rows_of_the_head_come_with_their_classes():
    found = advanced(learner(choice="none", memory=0), 8)
    strategy, tasks = of(found), found.tasks
    head = strategy.network.head
    before = head.weight.detach().clone()
    strategy.begin_task(tasks[1])
    assert torch.equal((head.weight != before).any(2), tasks[1].outputs)
    assert head.bias is not None
    new = head.bias[tasks[1].outputs]
    assert bool((new <= 0).all())
    assert float(new.detach().abs().max()) <= 1e-3
    learned = head.weight.detach().clone()
    advanced(found, 12)
    later = ~strategy.known
    assert torch.equal(head.weight[later], learned[later])  # what has no row yet does not learn
    told = {name: value for _, values in strategy.measurements() for name, value in values.items()}
    assert told["growth/parameters"].tolist() == [64 * 16 + 16 + 16 * 16 + 16 + 4 * 17] * 2


def test_a_search_keeps_the_candidate_with_the_smallest_score():
    found = learner(choice="search", proxy_steps=4, zeta=1.0)
    advanced(found, 9)
    strategy = of(found)
    names = [candidate.move.name for candidate in strategy.candidates]
    assert names == ["width", "width_1", "width_2", "depth"]
    advanced(found, 11)
    losses = [torch.stack(c.losses).clone() for c in strategy.candidates]
    assert all(len(one) == 3 for one in losses)
    candidates = list(strategy.candidates)
    advanced(found, 12)
    scores = []
    for candidate, own in zip(candidates, losses, strict=True):
        later = strategy.trials[candidate.move.name][0]
        assert not torch.equal(own[2], later)
        scores.append(strategy.trials[candidate.move.name][1])
    assert strategy.candidates == [candidates[scores.index(min(scores))]]
    costs = [GrowableClassifier(c.move.genome, None).cost() for c in candidates]
    wanted = float(strategy.trials["depth"][0].mean()) * (costs[3] / min(costs)) ** 0.02
    assert strategy.trials["depth"][1] == pytest.approx(wanted)
    assert strategy.network is strategy.candidates[0].network
    still = learner(choice="search", zeta=0.0)
    advanced(still, 9)
    assert [c.move.name for c in of(still).candidates] == ["hold"]


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ("mlp", {"choice": "search", "proxy_steps": 4, "inherit": 0.9, "cost_weight": None}),
        ("cnn", {"path": ("depth", "width"), "widening": "duplicated"}),
        ("vit", {"path": ("stack", "depth", "width")}),
        ("mlp", {"choice": "random"}),
        ("mlp", {"choice": "large"}),
    ],
)
def test_it_resumes_exactly_also_in_the_midst_of_a_search(network, settings):
    benchmark = dataclasses.replace(TOY, network=network, hidden=HIDDEN[network])
    whole, cut = learner(benchmark, **settings), None
    for steps in (10, 13):
        advanced(whole, steps)
        cut = cut or copy.deepcopy(whole.state_dict())
    assert cut is not None
    again = learner(benchmark, **settings)
    again.load_state_dict(cut)
    advanced(again, 13)
    a, b = (of(one).network.state_dict() for one in (whole, again))
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert of(again).trials.keys() == of(whole).trials.keys()


def test_members_grow_alike_and_update_without_the_host():
    """On a device whose numbers cannot be read."""
    found = advanced(learner(), 9)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images, labels = (mode.from_tensor(part[:, 0]) for part in found.stream.batches(1, 3, 4))
        batch = Batch(images, labels, *found.inputs.train(images, labels), {})
        assert all(value.shape == (2,) for value in of(found).observe(batch, found.tasks[1]).values())


def test_what_cannot_grow_says_so():
    for settings, benchmark, said in (
        ({"path": ("hight",)}, TOY, "'hight' of path is no way to grow this network; width, width_1"),
        ({}, dataclasses.replace(TOY, network="cnn-bn", hidden=(4, 8)), "are --network mlp, cnn or vit"),
    ):
        with pytest.raises(ValueError, match=said):
            learner(benchmark, **settings)
    model = perturbed("mlp", torch.float32)
    move = dataclasses.replace(model.moves()[0], genome=model.genome)
    with pytest.raises(ValueError, match="is no growth of"):
        model.grow(move, torch.Generator())
