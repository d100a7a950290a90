"""The learner: its matrix, populations, kinds, and the strategies beside UER by what defines them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from continual import NAMES, datasets
from continual.catalogue import BENCHMARKS, SMALL, STRATEGIES, Benchmark, make_strategy, open_learner
from continual.costs import costs
from continual.inputs import Inputs, crop_and_flip, rotated, strongly_augmented
from continual.learner import Learner
from continual.memory import POLICIES, Batch
from continual.networks.classifier import NETWORKS
from continual.strategies.er_ace import classes_of
from continual.strategy import Labelled
from plasticity.registry import make
from plasticity.registry import names as registry_names
from tests.plasticity.test_interventions import SETTINGS

TOY = Benchmark(data="blobs", hidden=(16,), memory=20)
CNN = dataclasses.replace(TOY, network="cnn", hidden=(4, 8))
BLOBS = datasets.load("blobs")


def learner(strategy="er", seeds=(0,), benchmark=TOY, **settings) -> Learner:
    if STRATEGIES[strategy][0].needs_task_labels:
        benchmark = dataclasses.replace(benchmark, kind="task")
    return open_learner(benchmark, strategy, STRATEGIES[strategy][1](**settings), seeds, data=BLOBS)


def trained(*arguments, **settings) -> Learner:
    found = learner(*arguments, **settings)
    while not found.done:
        found.advance(100)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seeds_as_a_population_are_what_they_are_alone(strategy):
    """With batch normalisation, augmentation and memories; the last digits differ as products are grouped otherwise."""
    benchmark = dataclasses.replace(CNN, augmentation="crop-flip", tasks=2, learning_rate=0.02)
    together, alone = trained(strategy, (3, 8, 5), benchmark), trained(strategy, (8,), benchmark)
    own = together.strategy.network.state_dict()
    for name, value in alone.strategy.network.state_dict().items():
        torch.testing.assert_close(own[name][1], value[0], rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(together.matrix[1], alone.matrix[0], atol=0.03, rtol=0)
    columns = alone.strategy.memory.columns
    for name in ("images", "labels") if columns else ():
        assert torch.equal(together.strategy.memory.columns[name][1], columns[name][0])


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_keep_members_apart(policy):
    together, alone = trained("er", (3, 8), policy=policy), trained("er", (8,), policy=policy)
    torch.testing.assert_close(together.matrix[1], alone.matrix[0], atol=0.011, rtol=0)


# Settings with which each acts within some thirty steps.
ACTING = {
    **{name: on for name, (on, _) in SETTINGS.items()},
    "redo": "redo(threshold=0.6,every=7,samples=20)",
    "nap": "nap",
    "seednorm": "seednorm",
}
REFUSED = {"churn", "safe-step", "adaptive-batch"}
SEVERAL = (
    "nap+redo(threshold=0.6,every=7,samples=20)+shrink-perturb",
    "muon+l2-init+reset-head",
    "cbp(rate=0.02,maturity=3)+weight-clip(factor=0.9)",
    "trac",
)


def kept(strategy: str, text: str, seeds: Sequence[int] = (0,), **settings: Any) -> Learner:
    config = STRATEGIES[strategy][1]()
    return open_learner(
        dataclasses.replace(TOY, tasks=2, epochs=2, **settings),
        strategy,
        config,
        seeds,
        data=BLOBS,
        interventions=make(text),
    )


def advanced(found: Learner, steps: int) -> dict[str, torch.Tensor]:
    goal = found.steps + steps
    while found.steps < goal:
        found.advance(goal - found.steps)
    return {name: p.detach().clone() for name, p in found.strategy.network.named_parameters()}


def test_every_intervention_by_name_is_tested():
    assert ACTING.keys() == set(registry_names()) - {"none"}


@pytest.mark.parametrize("name", ACTING)
def test_an_intervention_acts_in_a_strategy_or_is_refused(name):
    if name in REFUSED:
        with pytest.raises(ValueError, match="strategies take for example nap") as caught:
            kept("er", ACTING[name])
        assert "\n" not in str(caught.value)
        return
    adam = {"optimizer": "adam", "learning_rate": 0.01}
    plain = advanced(kept("er", "none", **adam), 60)
    found = advanced(kept("er", ACTING[name], **adam), 60)  # over the boundary between the two tasks
    assert all(value.isfinite().all() for value in found.values())
    assert any(n not in plain or v.shape != plain[n].shape or not torch.equal(v, plain[n]) for n, v in found.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("text", SEVERAL)
def test_interventions_of_a_population_are_those_of_its_seeds_and_resume_exactly(text, optimizer):
    settings = {"optimizer": optimizer, "learning_rate": 0.01, "momentum": 0.9}
    together = kept("uer", text, (3, 8), **settings)
    half = advanced(together, 30)
    alone = advanced(kept("uer", text, (8,), **settings), 30)
    for name, value in half.items():
        torch.testing.assert_close(value[1], alone[name][0], rtol=1e-3, atol=1e-4)
    state = copy.deepcopy(together.state_dict())
    again = kept("uer", text, (3, 8), **settings)
    again.load_state_dict(state)
    whole, resumed = advanced(together, 40), advanced(again, 40)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_strategy_that_reads_its_head_refuses_another_one():
    with pytest.raises(ValueError, match="'uer' reads the weights of its head"):
        kept("uer", "injection")


def test_the_matrix_is_what_the_kept_predictions_say():
    found = trained("er", (0, 1))
    labels = torch.cat([found.stream.test(index)[1] for index in range(5)], 1)
    right = torch.stack([answers == labels for answers in found.predictions], 1).double()  # [K, T, N]
    assert torch.equal(right.view(2, 5, 5, 20).mean(3), found.matrix)
    assert torch.equal(found.matrix.triu(1), torch.zeros(2, 5, 5, dtype=torch.float64))  # nothing unseen is answered
    assert found.evaluations[-1][0] == 5


def test_joint_learns_most_naive_forgets_and_cumulative_does_not():
    longer = dataclasses.replace(TOY, hidden=(64,), epochs=3)
    found = {name: trained(name, range(3), longer).summary() for name in ("naive", "joint", "cumulative")}
    accuracy = {name: float(summary["cl/average_accuracy"].mean()) for name, summary in found.items()}
    assert accuracy["naive"] < 0.35
    assert accuracy["joint"] > 0.7
    assert accuracy["cumulative"] > 0.9
    assert float(found["naive"]["cl/forgetting"].mean()) > 0.6


def test_telling_the_task_helps_and_only_its_outputs_compete():
    told = trained("naive", range(3), dataclasses.replace(TOY, kind="task"))
    hidden = trained("naive", range(3))
    assert float(told.summary()["cl/average_accuracy"].mean()) > 0.7
    assert float(hidden.summary()["cl/average_accuracy"].mean()) < 0.35
    answers, labels = told.answers(0)
    own = told.tasks[0].outputs
    assert own.gather(1, answers).all()
    assert own.gather(1, labels).all()
    strategy = told.strategy
    outputs = torch.zeros(3, 4, 10)
    assert strategy.cross_entropy(outputs, labels[:, :4]).tolist() == pytest.approx([0.6931472] * 3)  # of two, not ten


@pytest.mark.parametrize("change", ["permuted", "rotated"])
def test_domains_share_outputs(change):
    benchmark = dataclasses.replace(TOY, change=change, kind="domain", tasks=2, hidden=(64,), epochs=4)
    found = trained("er", (0,), benchmark)
    assert found.matrix.shape == (1, 2, 2)
    assert float(found.matrix[0, 1].min()) > (0.8 if change == "permuted" else 0.4)  # turned noise is blurred


def test_er_is_two_separate_means():
    found = learner("er", replay_batch=4, replay_weight=0.25)
    found.advance(1)
    strategy, memory = found.strategy, found.strategy.memory
    state = memory.state_dict()
    images, labels = (part[:, 0] for part in found.stream.batches(0, 1, 2))
    replay = memory.sample(4)
    memory.load_state_dict(state)
    outputs = strategy.network(found.inputs.scaled(images))[0], strategy.network(replay.x)[0]
    loss = F.cross_entropy(outputs[0], labels[0]) + 0.25 * F.cross_entropy(outputs[1], replay.y[0])
    wanted = [
        p - 0.1 * g for p, g in zip(strategy.parameters, torch.autograd.grad(loss, strategy.parameters), strict=True)
    ]
    found.advance(1)
    for parameter, value in zip(strategy.parameters, wanted, strict=True):
        torch.testing.assert_close(parameter, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["class", "task"])
@pytest.mark.parametrize("changes", [{}, {"momentum": 0.9, "nesterov": True}, {"optimizer": "adam"}], ids=str)
def test_labels_are_learned_by_hand_as_by_autograd(kind, changes):
    benchmark = dataclasses.replace(TOY, kind=kind, **changes)
    by_hand, traced = (learner("naive", (0, 1), benchmark).strategy for _ in range(2))
    traced.network.head.register_forward_hook(lambda *_: None)  # who looks inside gets autograd
    assert by_hand.network.by_hand() is not None
    assert traced.network.by_hand() is None
    source = torch.Generator().manual_seed(0)
    outputs = by_hand.setting.outputs
    allowed = torch.rand(2, 3, outputs, generator=source) < 0.5
    for _ in range(4):
        x = [torch.rand(2, n, *BLOBS.train_images.shape[1:], generator=source) for n in (3, 5)]
        y = [torch.randint(outputs, (2, n), generator=source) for n in (3, 5)]
        parts = [Labelled(x[0], y[0], allowed=allowed.scatter(2, y[0].unsqueeze(2), True)), Labelled(x[1], y[1], 0.3)]
        for one, other in zip(by_hand.learn(*parts), traced.learn(*parts), strict=True):
            torch.testing.assert_close(one, other)
    for one, other in zip(by_hand.parameters, traced.parameters, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_er_ace_lets_only_the_classes_of_the_batch_compete():
    present = classes_of(torch.tensor([[1, 1, 3], [0, 2, 2]]), 4)
    assert present[:, 0].tolist() == [[False, True, False, True], [True, False, True, False]]
    found = learner("er_ace")
    found.advance(8)
    head = found.strategy.network.head
    images, labels = (part[:, 0] for part in found.stream.batches(1, 0, 1))
    strategy = found.strategy
    outputs = strategy.network(found.inputs.scaled(images))
    loss = strategy.cross_entropy(outputs, labels, classes_of(labels, 10))
    (gradient,) = torch.autograd.grad(loss.sum(), [head.bias])
    moved = gradient[0].nonzero().flatten().tolist()
    assert moved == labels[0].unique().tolist()


def test_der_remembers_outputs_as_they_were_before_the_step():
    found = learner("der", benchmark=dataclasses.replace(TOY, augmentation="doubled"))
    network = found.strategy.network
    images, _ = found.stream.batches(0, 0, 1)
    with torch.no_grad():
        then = network(found.inputs.scaled(images[:, 0]))
    found.advance(1)
    torch.testing.assert_close(found.strategy.memory.columns["outputs"][:, :10], then)
    plain, label_too = (learner(name) for name in ("der", "derpp"))
    for one in (plain, label_too):
        one.advance(3)
    told = [set(one.measurements[-1].values) for one in (plain, label_too)]
    assert told == [{"loss/current", "loss/outputs"}, {"loss/current", "loss/outputs", "loss/replay"}]


def test_time_and_memory_do_not_grow_with_tasks():
    found = learner("er", seeds=(0, 1))
    sizes = []
    while not found.done:
        found.advance(8)
        sizes.append(sum(c.nbytes for c in found.strategy.memory.columns.values()))
    assert len(set(sizes)) == 1
    assert found.strategy.memory.nbytes == 21 * (64 + 8)


def test_costs_by_hand():
    """A step of ER on 64-16-10 with 10 + 10 samples: 2 · 20 · (64 · 16 + 16 · 10) forward, as much for the weights'
    gradients, and 2 · 20 · 16 · 10 for what goes back to the hidden layer."""
    found = costs(learner("er"))
    assert found["cost/parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    forward = 2 * 20 * (64 * 16 + 16 * 10)
    assert found["cost/flops_per_step"] == 2 * forward + 2 * 20 * 160
    assert found["cost/memory_bytes"] == 21 * (64 + 8)
    naive = costs(learner("naive"))
    assert naive["cost/flops_per_step"] == found["cost/flops_per_step"] / 2
    assert naive["cost/memory_bytes"] == 0


def test_the_names_for_the_page_of_help_are_those_there_are():
    assert (*STRATEGIES, "growclip") == NAMES


def test_strategies_need_what_they_say():
    class Told(STRATEGIES["naive"][0]):
        needs_task_labels = True

    found = learner("naive")
    with pytest.raises(ValueError, match="needs to be told the task of each sample"):
        Told(found.strategy.setting, STRATEGIES["naive"][1]())
    with pytest.raises(ValueError, match="unknown strategy 'nave'"):
        make_strategy("nave", None, found.strategy.setting)
    with pytest.raises(ValueError, match="memory of 5 is smaller than the 10 classes"):
        learner("er", memory=5, policy="ring")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_update_passes_no_number_to_the_host(strategy):
    """Traced without values, where reading one fails."""
    found = learner(strategy, seeds=(0, 1))
    found.advance(3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images, labels = (mode.from_tensor(part[:, 0]) for part in found.stream.batches(0, 3, 4))
        batch = Batch(images, labels, *found.inputs.train(images, labels), {})
        metrics = found.strategy.observe(batch, found.tasks[0])
        assert all(value.shape == (2,) for value in metrics.values())


def test_augmentations():
    x = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    middle = torch.full((6, 16), 0.5)
    torch.testing.assert_close(crop_and_flip(x, middle), x, atol=1e-5, rtol=0)  # no shift, not mirrored
    mirrored = middle.clone()
    mirrored[:, 2] = 0.4
    torch.testing.assert_close(crop_and_flip(x, mirrored), x.flip(3), atol=1e-5, rtol=0)
    shifted = middle.clone()
    shifted[:, 0] = 0.99  # four pixels to the right of what is seen
    torch.testing.assert_close(crop_and_flip(x, shifted)[..., :-4], x[..., 4:], atol=1e-5, rtol=0)
    torch.testing.assert_close(rotated(x, torch.full((6,), 90.0)), torch.rot90(x, 1, (2, 3)), atol=1e-4, rtol=0)
    whole = middle.clone()
    whole[:, 0], whole[:, 5:9], whole[:, 9] = 0.9999, 0.5, 0.9  # nearly all of the area, no jitter
    torch.testing.assert_close(strongly_augmented(x, whole), x, atol=0.01, rtol=0)
    grey = whole.clone()
    grey[:, 10] = 0.1
    told = strongly_augmented(x, grey)
    torch.testing.assert_close(told[:, 0], told[:, 2])
    drawn = torch.rand(500, 16, generator=torch.Generator().manual_seed(1))
    many = strongly_augmented(x[:1].expand(500, -1, -1, -1), drawn)
    assert many.min() >= 0
    assert many.max() <= 1
    assert many.std(0).mean() > 0.1
    neutral = drawn.clone()
    neutral[:, 5:8], neutral[:, 9] = 0.5, 0.1  # only the hue
    turned = strongly_augmented(torch.full((500, 3, 4, 4), 0.5), neutral)
    torch.testing.assert_close(turned, torch.full_like(turned, 0.5), atol=1e-3, rtol=0)  # grey has no hue
    with pytest.raises(ValueError, match="unknown augmentation"):
        Inputs(255, "mixup")


def test_every_benchmark_can_be_built_with_data_of_its_shape():
    shapes = {"digits": (1, 8, 8), "blobs": (1, 8, 8), "mnist": (1, 28, 28), "cifar": (3, 32, 32), "mini": (3, 84, 84)}
    for name, benchmark in BENCHMARKS.items():
        shape = next((s for key, s in shapes.items() if key in benchmark.data), (3, 64, 64))
        network = NETWORKS[benchmark.network](shape, benchmark.hidden, 10)
        assert network.eval()(torch.zeros(1, *shape)).shape == (1, 10)
        dataclasses.replace(benchmark, **SMALL.get(name, {}))
