"""Dynamic sparse training against the exact checks of specs/dynamic-sparse-training.md, section 15."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch

from continual import datasets
from continual.catalogue import Benchmark, open_learner
from continual.learner import Learner
from continual.sparse.masks import counted, density
from continual.sparse.rules import GROWTHS, PRUNES
from continual.strategies import dst, naive
from continual.strategies.dst import DST
from plasticity.sgd import SGD as PlainSGD

TOY = Benchmark(
    data="blobs", kind="task", network="mlp-bn", hidden=(32, 16), epochs=3, optimizer="adam", learning_rate=0.005
)
SGD = dataclasses.replace(
    TOY, optimizer="sgd", learning_rate=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
)  # fmt: skip
BLOBS = datasets.load("blobs")


def learner(benchmark: Benchmark = TOY, seeds=(0, 1), **settings: Any) -> Learner:
    return open_learner(benchmark, "dst", dst.Config(**({"update_every": 4} | settings)), seeds, data=BLOBS)


def of(found: Learner) -> DST:
    assert isinstance(found.strategy, DST)
    return found.strategy


def learn(found: Learner, tasks: int) -> DST:
    while found.index < tasks:
        found.advance(1000)
    return of(found)


def masks_of(strategy: DST, task: int) -> dict[str, torch.Tensor]:
    return {name: strategy.store.mask(task, name) for name in strategy.masked}


# A task


def test_2_uniform_gives_every_layer_the_density():
    strategy = of(learner(density=0.3, growth="none"))
    strategy.begin_task(learner().tasks[0])
    for name, mask in strategy.subnetwork.masks.items():
        size = mask[0].numel()
        assert mask.flatten(1).sum(1).tolist() == [round(0.3 * size)] * 2, name
    assert counted(torch.tensor([1e-6, 0.5, 1.0]), 10).tolist() == [1, 5, 10]


def test_bernoulli_masks_have_the_density_on_average_and_members_differ():
    found = learner(dataclasses.replace(TOY, hidden=(256, 256)), density=0.2, growth="none", mask_sampling="bernoulli")
    strategy = of(found)
    strategy.begin_task(found.tasks[0])
    for mask in strategy.subnetwork.masks.values():
        size = mask[0].numel()
        counts = mask.flatten(1).sum(1)
        assert ((counts / size - 0.2).abs() < 5 * math.sqrt(0.16 / size)).all()
    assert len(set(strategy.subnetwork.masks["features.1.weight"].flatten(1).sum(1).tolist())) == 2


@pytest.mark.parametrize("prune", PRUNES)
@pytest.mark.parametrize("growth", GROWTHS)
def test_5_and_6_a_layer_keeps_its_size_and_inactive_weights_are_zero(growth, prune):
    found = learner(growth=growth, prune=prune, init="erk")
    strategy = of(found)
    sizes = None
    for _ in range(18):
        found.advance(1)
        now = strategy.subnetwork
        counts = {name: mask.flatten(1).sum(1).tolist() for name, mask in now.masks.items()}
        sizes = sizes or counts
        assert counts == sizes
        assert not any((weight * ~now.masks[name]).any() for name, weight in strategy.weights.items())
    moved = [torch.equal(mask, now.fired[name]) for name, mask in now.masks.items()]
    assert all(moved) if growth == "none" else not all(moved)


def gradients_of(found: Learner) -> dict[str, torch.Tensor]:
    """Of the next batch, before anything is masked."""
    strategy = of(found)
    images, labels = (part[:, 0] for part in found.stream.batches(found.index, found.step, found.step + 1))
    loss = strategy.cross_entropy(strategy.network(found.inputs.scaled(images)), labels)
    return dict(zip(strategy.weights, torch.autograd.grad(loss.sum(), list(strategy.weights.values())), strict=True))


def test_6_and_15_gradients_reach_inactive_weights_but_not_other_tasks_rows():
    found = learner(growth="gradient")
    found.advance(2)
    strategy, gradients = of(found), gradients_of(found)
    for name, gradient in gradients.items():
        assert (gradient * ~strategy.subnetwork.masks[name]).any(), name
    head, own = gradients["head.weight"], found.tasks[0].outputs
    assert torch.equal(head.any(2), own)


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("benchmark", [TOY, SGD], ids=["adam", "sgd"])
def test_7_in_training_what_is_grown_is_wanted_most(growth, benchmark):
    found = learner(benchmark, growth=growth, regrow="stored")
    learn(found, 1)
    found.advance(3)
    strategy = of(found)
    before = {name: mask.clone() for name, mask in strategy.subnetwork.masks.items()}
    dense = gradients_of(found)
    found.advance(1)
    for name, mask in strategy.subnetwork.masks.items():
        score = strategy._growth.wanted(name, dense[name])
        owned = strategy.store.owned[name]
        new = mask & ~before[name]
        assert new.any()
        assert not (new & owned).any()
        passed_over = ~mask & ~before[name] & ~owned
        for k in range(2):
            if passed_over[k].any():
                assert score[k][new[k]].min() >= score[k][passed_over[k]].max()


def test_8_unfired_growth_takes_what_was_never_active():
    found = learner(growth="unfired", density=0.1)
    strategy = of(found)
    found.advance(1)
    first = {name: mask.flatten(1).sum(1) for name, mask in strategy.subnetwork.masks.items()}
    removed = dict.fromkeys(first, torch.zeros(2, dtype=torch.int64))
    for _ in range(15):
        now = strategy.subnetwork
        before, fired = dict(now.masks), dict(now.fired)
        found.advance(1)
        for name, mask in now.masks.items():
            come = mask & ~before[name]
            assert not (come & fired[name]).any()
            removed[name] = removed[name] + come.flatten(1).sum(1)
    for name, ever in strategy.subnetwork.fired.items():
        assert removed[name].sum() > 0
        assert torch.equal(ever.flatten(1).sum(1), first[name] + removed[name])


OPTIONS: dict[str, dict[str, Any]] = {
    "random": {"growth": "random"},
    "gradient-erk": {"growth": "gradient", "init": "erk"},
    "own rows": {"growth": "unfired", "classifier": "own_rows", "head_bias": True},
    "statistics": {"growth": "gradient", "bn": "per_task_stats", "prune": "taylor"},
    "reinit": {"growth": "momentum", "free_weight_init": "reinit", "mask_sampling": "bernoulli"},
}


@pytest.mark.parametrize("benchmark", [TOY, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_9_to_12_earlier_tasks_stay_as_they_are_to_the_bit(options, benchmark):
    found = learner(benchmark, **options)
    images = [found.inputs.scaled(found.stream.test(task)[0]) for task in range(5)]
    networks, outputs, owned = [], [], []
    for task in range(3):
        strategy = learn(found, task + 1)
        store = strategy.store
        # w · m == V · mask: what was trained is what is tested.
        for name, weight in strategy.weights.items():
            assert torch.equal(weight.detach(), store.subnetwork(task)[name]), name
        networks.append({name: value.clone() for name, value in store.subnetwork(task).items()})
        union = {n: torch.stack([store.mask(j, n) for j in range(task + 1)]).any(0) for n in strategy.weights}
        assert all(torch.equal(union[name], store.owned[name]) for name in union)
        owned.append(int(sum(mask.sum() for mask in union.values())))
        with torch.no_grad():
            strategy.network.eval()
            outputs.append(strategy.predict(images[task], found.tasks[task]))
            for earlier in range(task + 1):
                again = strategy.predict(images[earlier], found.tasks[earlier])
                assert torch.equal(again, outputs[earlier])
            strategy.network.train()
        for earlier, network in enumerate(networks):
            assert all(torch.equal(store.subnetwork(earlier)[name], value) for name, value in network.items())
    assert owned == sorted(owned)
    assert float(found.summary()["cl/bwt"].abs().max()) == 0
    assert any((store.mask(1, name) & store.mask(0, name)).any() for name in strategy.masked)  # they do share


def test_10_fixed_masks_overlap_by_chance():
    found = learner(dataclasses.replace(TOY, hidden=(128, 128), epochs=1), seeds=range(4), growth="none", init="erk")
    strategy = learn(found, 2)
    first, second = masks_of(strategy, 0), masks_of(strategy, 1)
    for name in strategy.masked:
        share = float(density([first[name]])[0])
        both = float(density([first[name] & second[name]]).mean()) / float(density([second[name]])[0])
        assert both == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / second[name].sum()) + 1e-9)


def test_11_the_gradient_of_what_is_owned_is_zero(monkeypatch):
    found = learner()
    strategy = learn(found, 1)
    found.advance(1)
    told: list[list[torch.Tensor]] = []
    step = strategy.optimizer.step
    monkeypatch.setattr(strategy.optimizer, "step", lambda gradients: (told.append(list(gradients)), step(gradients)))
    found.advance(5)
    for gradients in told:
        for name, owned in strategy.store.owned.items():
            gradient = gradients[strategy._place[name]]
            assert not (gradient * owned).any()
            assert (gradient * ~owned).any()


@pytest.mark.parametrize("regrow", ["stored", "zero"])
def test_12_what_is_grown_onto_another_tasks_weight(regrow):
    found = learner(growth="random", regrow=regrow, density=0.4)
    strategy = learn(found, 1)
    found.advance(3)
    now = strategy.subnetwork
    before = {name: mask.clone() for name, mask in now.masks.items()}
    found.advance(1)
    for name, mask in now.masks.items():
        come, owned = mask & ~before[name], strategy.store.owned[name]
        values = strategy.weights[name][come & owned]
        assert len(values)
        wanted = strategy.store.values[name][come & owned]
        assert torch.equal(values, wanted if regrow == "stored" else torch.zeros_like(wanted))
        assert not strategy.weights[name][come & ~owned].any()


def test_13_the_used_capacity_of_fixed_masks():
    benchmark = dataclasses.replace(TOY, epochs=1, hidden=(128, 128))
    found = learner(benchmark, growth="none", density=0.2)
    strategy = learn(found, 5)
    used = density(strategy.store.owned[name] for name in strategy.masked)
    size = sum(mask[0].numel() for mask in strategy.store.owned.values())
    assert (used - 0.6723).abs().max() < 3 * math.sqrt(0.6723 * 0.3277 / size)
    last = [m.values for m in found.measurements if "sparse/used_capacity" in m.values][-1]
    assert torch.equal(last["sparse/used_capacity"], used)


def test_14_dense_it_is_ordinary_training_and_then_only_biases_change():
    benchmark = dataclasses.replace(TOY, network="mlp", epochs=1)
    dense = learner(benchmark, density=1.0, growth="none", checkpoint="last", milestones=(), head_bias=True)
    plain = open_learner(benchmark, "naive", naive.Config(), (0, 1), data=BLOBS)
    plain.advance(8)
    strategy = learn(dense, 1)
    for (name, own), other in zip(strategy.network.named_parameters(), plain.strategy.parameters, strict=True):
        # Ordinary training takes these derivatives by hand, so the last digits differ.
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6, msg=name)
    before = {name: p.detach().clone() for name, p in strategy.network.named_parameters()}
    learn(dense, 2)
    changed = {name for name, p in strategy.network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.endswith("bias")}
    assert float(dense.summary()["cl/bwt"].abs().max()) == 0  # each task has its own


def test_shared_biases_drift():
    benchmark = dataclasses.replace(TOY, network="mlp", learning_rate=0.02)
    found = learner(benchmark, bias="shared", head_bias=True)
    strategy = learn(found, 1)
    images = found.inputs.scaled(found.stream.test(0)[0])
    before = strategy.predict(images, found.tasks[0])
    learn(found, 3)
    assert not torch.equal(strategy.predict(images, found.tasks[0]), before)


RESUMED: dict[str, dict[str, Any]] = {
    "unfired": {"growth": "unfired", "regrow": "zero", "policy": "free-capacity-density"},
    "gradient": {"growth": "gradient", "bn": "per_task_stats", "classifier": "own_rows"},
    "momentum": {"growth": "momentum", "init": "erk"},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=list(RESUMED))
@pytest.mark.parametrize("benchmark", [TOY, SGD], ids=["adam", "sgd"])
def test_16_saved_in_the_middle_of_the_second_task_it_goes_on_to_the_bit(options, benchmark):
    whole = learner(benchmark, **options)
    learn(whole, 1)
    whole.advance(11)
    state = copy.deepcopy(whole.state_dict())
    resumed = learner(benchmark, **options)
    resumed.load_state_dict(state)
    for found in (whole, resumed):
        learn(found, 3)
    one, other = (of(found).state_dict() for found in (whole, resumed))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert torch.equal(whole.matrix.nan_to_num(-1), resumed.matrix.nan_to_num(-1))


# What the settings do beside that


def test_the_kept_epoch_is_that_which_fits_best():
    found = learner(learning_rate_benchmark := dataclasses.replace(TOY, epochs=4), growth="random")
    strategy, seen = of(found), []
    for _ in range(4):
        found.advance(7)
        right = strategy._right.clone()
        images, labels = (part[:, 0] for part in found.stream.batches(0, found.step, found.step + 1))
        with torch.no_grad():
            outputs = strategy.network(found.inputs.scaled(images))
        right += dst.right_answers(outputs, labels, found.tasks[0].outputs)
        found.advance(1) if found.step < learning_rate_benchmark.epochs * 8 - 1 else None
        seen.append(right)
    best = torch.stack(seen)
    learn(found, 1)
    torch.testing.assert_close(strategy.learned["accuracy"], best.amax(0) / 8)


@pytest.mark.parametrize("nesterov", [False, True])
def test_descent_is_that_of_torch(nesterov):
    start, gradients = torch.randn(4, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 4)
    own, other = start.clone(), start.clone().requires_grad_()
    descent = PlainSGD([own], 0.1, 0.9, 0.01, nesterov)
    torchs = torch.optim.SGD([other], 0.1, 0.9, weight_decay=0.01, nesterov=nesterov)
    for scale in (1.0, -0.5, 2.0):
        descent.step([scale * gradients])
        other.grad = scale * gradients
        torchs.step()
    torch.testing.assert_close(own, other.detach())


def test_the_learning_rate_falls_after_half_and_three_quarters():
    found = learner(dataclasses.replace(TOY, epochs=8))
    rates = []
    for _ in range(8):
        found.advance(8)
        rates.append(of(found).optimizer.learning_rate / 0.005)
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_member_whose_ways_are_all_zero_begins_anew():
    found = learner(dataclasses.replace(TOY, epochs=1), density=0.1, growth="none")
    strategy = learn(found, 1)
    for name, owned in strategy.store.owned.items():
        strategy.store.owned[name] = torch.zeros_like(owned)  # as if the first task had nothing to share
    found.advance(1)
    assert strategy._restarted.all()
    for name, mask in strategy.subnetwork.masks.items():
        assert torch.equal(strategy.weights[name].detach() != 0, mask)
    while found.index < 2:
        found.advance(100)
    told = [m.values["sparse/restarted"].tolist() for m in found.measurements if "sparse/restarted" in m.values]
    assert told == [[0, 0], [1, 1]]


def test_all_outputs_may_compete():
    options = {"growth": "none", "density": 0.05}
    told, open_ = (learner(TOY, **options, eval_slice=slice_) for slice_ in (True, False))
    for found in (told, open_):
        learn(found, 2)
    answers = open_.answers(0)[0]
    assert torch.equal(
        answers, of(open_).predict(open_.inputs.scaled(open_.stream.test(0)[0]), open_.tasks[0]).argmax(2)
    )
    assert told.tasks[0].outputs.gather(1, told.answers(0)[0]).all()


def test_every_part_of_a_test_has_all_classes(monkeypatch):
    """A batch that is normalised by itself and has one class only loses what makes the class."""
    found = learner(TOY, growth="none")
    images, labels = found.stream.test(1)
    monkeypatch.setattr("continual.learner._TESTED", 9)
    kept = []
    monkeypatch.setattr(found, "choose", lambda x, task: kept.append(x) or x.flatten(2).sum(2).mul(1000).long())
    wanted = found.inputs.scaled(images).flatten(2).sum(2).mul(1000).long()
    assert torch.equal(found.answers(1)[0], wanted)
    assert [x.shape[1] for x in kept] == [7, 7, 6]
    for x in kept:
        for k in range(2):
            places = [int((found.inputs.scaled(images[k]) == one).flatten(1).all(1).nonzero()) for one in x[k]]
            assert set(labels[k, places].tolist()) == set(labels[k].tolist())


# Settings from task to task


def test_settings_of_each_task():
    given = {"density_per_task": (0.1, 0.2, 0.3, 0.4, 0.5), "growth_per_task": ("random", "gradient") * 2 + ("none",)}
    found = learner(dataclasses.replace(TOY, epochs=1), **given, init_per_task=("erk",) * 5)
    for task, growth in enumerate(given["growth_per_task"]):
        found.advance(1)
        strategy = of(found)
        assert [own.growth for own in strategy.settings] == [growth] * 2
        share = density(strategy.subnetwork.masks[name] for name in strategy.masked)
        assert share.tolist() == pytest.approx([given["density_per_task"][task]] * 2, abs=0.002)
        learn(found, task + 1)


def test_policies_of_ours():
    found = learner(dataclasses.replace(TOY, epochs=1), policy="explore-then-exploit", growth="unfired")
    rules = [own.growth for task in found.tasks for own in of(found)._settings(task)[:1]]
    assert rules == ["unfired", "unfired", "unfired", "gradient", "gradient"]
    found = learner(dataclasses.replace(TOY, epochs=1), policy="free-capacity-density", density=0.5, growth="none")
    learn(found, 5)
    sizes = [m.values["sparse/density"] for m in found.measurements if "sparse/density" in m.values]
    assert sizes[0].tolist() == pytest.approx([0.2, 0.2], abs=0.01)
    assert all(float(size.min()) > 0.15 for size in sizes)
    found = learner(dataclasses.replace(TOY, epochs=1), policy="erk-then-uniform", density=0.3, growth="none")
    inits = []
    for task in range(5):
        found.advance(1)
        inits.append(of(found).settings[0].init)
        learn(found, task + 1)
    assert inits[0] == "erk"
    assert inits[-1] == "uniform"


@pytest.mark.parametrize(
    ("settings", "benchmark", "sentence"),
    [
        ({"density": 0.0}, TOY, "density must be above 0"),
        ({"density_per_task": (0.1, 2.0)}, TOY, "density must be above 0 and at most 1, got 2"),
        ({"growth": "rigl"}, TOY, "growth must be one of random, unfired, gradient, momentum, none, got 'rigl'"),
        ({"prune": "set", "strict": True}, TOY, "strict is for --prune magnitude"),
        ({"prune_rate": 0.1, "prune_rate_min": 0.2}, TOY, "the second not above the first"),
        ({"update_every": 0}, TOY, "update_every must be at least 1, got 0"),
        ({"update_every": 24}, TOY, "the topology would never change: update_every is 24, and a task has 24 batches"),
        ({"update_stop": 1.5}, TOY, r"update_stop must be in \[0, 1\]"),
        ({"milestones": (1.5,)}, TOY, "milestones must be parts of a task"),
        ({"growth_per_task": ("random",) * 3}, TOY, "growth_per_task needs a value for each of the 5 tasks, got 3"),
        (
            {"growth": "momentum"},
            dataclasses.replace(SGD, momentum=0.0, nesterov=False),
            "growth by momentum needs an optimiser with",
        ),
        ({}, dataclasses.replace(TOY, batch=1), "batch normalisation needs more than one sample"),
        ({}, dataclasses.replace(TOY, kind="class"), "'dst' needs to be told the task of each sample"),
        ({"classifier": "own_rows"}, dataclasses.replace(TOY, network="mlp", hidden=()), "no layer to make sparse"),
    ],
)
def test_what_does_not_fit_is_said_at_once(settings, benchmark, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        learner(benchmark, **settings)
    assert "\n" not in str(caught.value)


def test_small_run_as_the_spec_saw_it():
    """Section 14: 5 tasks of 2 digits, here 80 batches of 32 each."""
    digits = Benchmark(
        data="digits", kind="task", network="mlp-bn", hidden=(128, 64), batch=32, epochs=10, optimizer="adam",
        learning_rate=1e-3, train_per_class=134, test_per_class=40,
    )  # fmt: skip
    used, accuracy = {}, {}
    for growth in ("gradient", "random"):
        config = dst.Config(growth=growth, update_every=6)
        found = open_learner(digits, "dst", config, range(2))
        strategy = learn(found, 5)
        told = found.summary()
        assert float(told["cl/bwt"].abs().max()) == 0
        accuracy[growth] = float(told["cl/average_accuracy"].mean())
        used[growth] = float(density(strategy.store.owned[name] for name in strategy.masked).mean())
    assert accuracy["gradient"] > 0.97
    assert accuracy["gradient"] > accuracy["random"]
    assert 0.70 < used["gradient"] < 0.84
    assert used["random"] < 0.60
