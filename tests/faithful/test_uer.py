"""UER and its online protocol against the exact checks of specs/uer-and-online-cl.md, section 8."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from continual import datasets
from continual.catalogue import BENCHMARKS, STRATEGIES, Benchmark, open_learner, resolve
from continual.memory import Batch
from continual.networks.classifier import draw
from continual.strategies.uer import UER, Config, cosine_logits, dot_logits

TOY = Benchmark(data="blobs", hidden=(16,), memory=20, network="mlp")
BLOBS = datasets.load("blobs")


def learner(strategy="uer", seeds=(0,), benchmark=TOY, **settings):
    config = STRATEGIES[strategy][1](**settings)
    return open_learner(benchmark, strategy, config, seeds, data=BLOBS)


def uer(**settings) -> UER:
    strategy = learner(**settings).strategy
    assert isinstance(strategy, UER)
    return strategy


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_batch(x: torch.Tensor, y: torch.Tensor) -> Batch:
    return Batch(x, y, x, y, {})


def cross_entropy(logits: torch.Tensor, label: int) -> float:
    return float(torch.nn.functional.cross_entropy(logits.view(1, -1), torch.tensor([label])))


def test_1_the_head_has_no_bias_and_the_backbone_its_published_size():
    assert uer().network.head.bias is None
    source = torch.Generator().manual_seed(0)
    for bias, count in ((False, 1_094_740), (True, 1_094_750)):
        network = draw("resnet18-reduced", (3, 32, 32), (), 10, bias, (), source)
        assert sum(p.numel() for p in network.parameters()) == count
    large = draw("resnet18-reduced", (3, 84, 84), (), 100, False, (), source)
    assert large.get_parameter("head.weight").shape == (100, 640)
    assert network.get_parameter("head.weight").shape == (10, 160)


def test_2_cosine_logits_know_no_lengths_and_dot_logits_are_linear():
    z, w = drawn(1, 5, 8), drawn(1, 4, 8, seed=1)
    scaled = w * torch.tensor([3.0, 0.1, 7.0, 1.0]).view(1, 4, 1)
    torch.testing.assert_close(cosine_logits(5 * z, scaled, 0.09), cosine_logits(z, w, 0.09), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dot_logits(5 * z, w), 5 * dot_logits(z, w))
    torch.testing.assert_close(dot_logits(z, scaled)[..., 2], 7 * dot_logits(z, w)[..., 2])


def test_3_a_dot_logit_is_norm_times_angle():
    z, w, tau = drawn(1, 5, 8), drawn(1, 4, 8, seed=1), 0.09
    norms = z.norm(dim=2).unsqueeze(2) * w.norm(dim=2).unsqueeze(1)
    torch.testing.assert_close(dot_logits(z, w), norms * tau * cosine_logits(z, w, tau), rtol=1e-4, atol=1e-6)


def gradients_of_proxies(strategy: UER, which: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = drawn(1, 10, 1, 8, 8).abs(), torch.arange(10).view(1, 10)
    loss = strategy.losses(as_batch(x, y), as_batch(x.flip(1), y))[which]
    (gradient,) = torch.autograd.grad(loss.sum(), [strategy.network.head.weight])
    return gradient[0], strategy.network.head.weight.detach()[0]


def test_4_new_data_cannot_push_norms_and_replay_can():
    strategy = uer()
    gradient, weight = gradients_of_proxies(strategy, 0)
    along = (gradient * weight).sum(1).abs()
    assert (along <= 1e-5 * gradient.norm(dim=1) * weight.norm(dim=1)).all()
    assert gradient.norm() > 0.01
    gradient, weight = gradients_of_proxies(strategy, 1)
    assert (gradient * weight).sum(1).abs().max() > 1e-3


def test_5_the_gradient_is_the_sum_of_both_terms():
    strategy = uer(replay_weight=0.5)
    x, y = drawn(1, 6, 1, 8, 8).abs(), torch.tensor([[0, 1, 2, 3, 4, 5]])
    batches = as_batch(x, y), as_batch(x.flip(1), y.flip(1))

    def gradients(combine):
        return torch.autograd.grad(combine(*strategy.losses(*batches)).sum(), strategy.parameters)

    whole, new, old = (gradients(f) for f in (lambda a, b: a + 0.5 * b, lambda a, b: a, lambda a, b: b))
    for g, g_new, g_old in zip(whole, new, old, strict=True):
        torch.testing.assert_close(g, g_new + 0.5 * g_old, atol=1e-6, rtol=1e-5)


def test_6_losses_by_hand():
    classes, proxies = 4, torch.eye(4).unsqueeze(0)
    z = proxies[:, :1]
    assert cross_entropy(cosine_logits(z, proxies, 1.0), 0) == pytest.approx(math.log(math.e + classes - 1) - 1)
    assert cross_entropy(dot_logits(2 * z, proxies), 0) == pytest.approx(math.log(math.exp(2) + classes - 1) - 2)
    zero = torch.zeros(1, 1, 4, requires_grad=True)
    for logits in (cosine_logits(zero, proxies, 0.09), dot_logits(zero, proxies)):
        assert cross_entropy(logits, 1) == pytest.approx(math.log(classes))
        loss = torch.nn.functional.cross_entropy(logits.view(1, -1), torch.tensor([1]))
        assert torch.autograd.grad(loss, zero)[0].isfinite().all()


def test_7_prediction_is_by_dot_product_among_the_classes_seen():
    found = learner()
    strategy, network = found.strategy, found.strategy.network
    network.features = torch.nn.Identity()
    weight = torch.zeros(1, 10, 2)
    weight[0, 0], weight[0, 1] = torch.tensor([10.0, 0.0]), torch.tensor([0.9, 0.9])
    network.head.weight = torch.nn.Parameter(weight)
    z = torch.ones(1, 1, 2)
    assert int(cosine_logits(z, weight, 0.09).argmax()) == 1
    strategy.seen[0, :2] = True
    assert int(found.choose(z, found.tasks[0])) == 0
    strategy.seen[0, 0] = False
    assert int(found.choose(z, found.tasks[0])) == 1
    strategy.config = Config(predict_logits="cosine")
    strategy.seen[0, 0] = True
    assert int(found.choose(z, found.tasks[0])) == 1


def test_8_replay_begins_with_the_second_batch_and_never_shows_the_batch_itself(monkeypatch):
    found = learner()
    shown: list[tuple[Batch, Batch | None]] = []
    losses = found.strategy.losses
    monkeypatch.setattr(found.strategy, "losses", lambda b, r: (shown.append((b, r)), losses(b, r))[1])
    found.advance(8)
    assert shown[0][1] is None
    assert all(replay is not None for _, replay in shown[1:])
    for batch, replay in shown[1:]:
        new = {image.numpy().tobytes() for image in batch.images[0]}
        assert not new & {image.numpy().tobytes() for image in replay.images[0]}


def test_9_with_dot_products_alone_it_is_er_without_bias_step_by_step():
    ours = learner(current_logits="dot")
    theirs = learner("er", head_bias=False)
    for one in (ours, theirs):
        for _ in range(3):
            one.advance(8)
    assert ours.steps == 24
    for a, b in zip(ours.strategy.parameters, theirs.strategy.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.equal(learner().strategy.parameters[0], ours.strategy.parameters[0])


def test_10_the_memory_keeps_pixels_that_were_not_augmented():
    found = learner(benchmark=dataclasses.replace(TOY, augmentation="doubled"))
    found.advance(8)
    known = {image.numpy().tobytes(): int(y) for image, y in zip(BLOBS.train_images, BLOBS.train_labels, strict=True)}
    columns = found.strategy.memory.columns
    kept = zip(columns["images"][0], columns["labels"][0], strict=True)
    assert all(known[image.numpy().tobytes()] == int(label) for image, label in kept)
    drawn_again = found.strategy.memory.sample(5)
    assert drawn_again.x.shape[1] == drawn_again.y.shape[1] == 10  # each beside its copy
    assert not torch.equal(drawn_again.x[:, :5], drawn_again.x[:, 5:])


def test_14_classes_that_do_not_divide_are_refused_so_none_is_lost():
    with pytest.raises(ValueError, match="10 classes do not divide into 3 tasks"):
        learner(benchmark=dataclasses.replace(TOY, tasks=3))


def test_15_a_run_that_goes_on_from_its_state_is_the_run_that_was_not_interrupted():
    benchmark = dataclasses.replace(TOY, network="cnn", hidden=(4, 8), augmentation="crop-flip")
    whole, first, second = (learner(seeds=(0, 1), benchmark=benchmark) for _ in range(3))
    whole.evaluate_every = first.evaluate_every = second.evaluate_every = 3
    for steps in (8, 8):
        whole.advance(steps)
    first.advance(8)
    first.advance(3)  # in the middle of a task
    second.load_state_dict(first.state_dict())
    second.advance(5)
    assert torch.equal(whole.matrix.nan_to_num(-1), second.matrix.nan_to_num(-1))
    flat = [torch.utils._pytree.tree_flatten(one.state_dict()) for one in (whole, second)]
    assert flat[0][1] == flat[1][1]
    for a, b in zip(flat[0][0], flat[1][0], strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) if isinstance(a, torch.Tensor) else a == b


def test_16_evaluation_changes_nothing():
    found = learner(benchmark=dataclasses.replace(TOY, network="cnn", hidden=(4, 8)))
    found.advance(8)
    before = {name: value.clone() for name, value in found.strategy.network.state_dict().items()}
    memory = [t.clone() for t in found.strategy.memory.columns.values()]
    numbers = [g.clone() for g in found.strategy.memory.state_dict()["numbers"]["generators"]]
    found.answers(0)
    assert all(torch.equal(value, before[name]) for name, value in found.strategy.network.state_dict().items())
    assert found.strategy.network.training
    assert all(torch.equal(a, b) for a, b in zip(memory, found.strategy.memory.columns.values(), strict=True))
    after = found.strategy.memory.state_dict()["numbers"]["generators"]
    assert all(torch.equal(a, b) for a, b in zip(numbers, after, strict=True))


def test_17_in_class_incremental_data_the_task_of_a_test_sample_is_not_used():
    found = learner()
    for _ in range(3):
        found.advance(8)
    x = found.inputs.scaled(BLOBS.test_images.unsqueeze(0))
    mixed = found.choose(x, found.tasks[0])
    for task in found.tasks:
        assert torch.equal(found.choose(x, task), mixed)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.choose(x[:, order], found.tasks[0]), mixed[:, order])


def test_defaults_are_those_of_the_sibling_code():
    config, colour = Config(), BENCHMARKS["split-cifar10"]
    assert (config.tau, config.replay_batch, config.replay_weight, config.policy) == (0.09, 10, 1.0, "reservoir")
    assert (colour.batch, colour.learning_rate, colour.epochs, colour.momentum) == (10, 0.1, 1, 0.0)
    assert (colour.network, colour.memory, colour.augmentation) == ("resnet18-reduced", 200, "doubled")
    assert (resolve("split-cifar100").tasks, resolve("split-cifar100").memory) == (10, 1000)


@pytest.mark.parametrize(
    "settings",
    [{"tau": 0.0}, {"tau": -1.0}, {"replay_batch": 0}, {"memory": -1}, {"softmax_scope": "some"},
     {"current_logits": "angle"}, {"policy": "fifo"}, {"memory_iterations": 0}],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError):
        Config(**settings)


def test_norms_of_the_newest_classes_are_the_smallest_and_forgetting_is_halved():
    """Section 7, what is robust: on digits, ten seeds, UER forgets at most half of what ER does and learns less fast;
    predicting by the cosine collapses; lengths of proxies fall in the order of learning."""
    found = {}
    for name, settings in (("uer", {}), ("er", {}), ("cosine", {"predict_logits": "cosine"}), ("naive", {})):
        strategy = "uer" if name == "cosine" else name
        own = open_learner(resolve("split-digits"), strategy, STRATEGIES[strategy][1](**settings), range(10))
        while not own.done:
            own.advance(100)
        found[name] = {key: float(value.mean()) for key, value in own.summary().items()}
        norms = [m.values["plasticity/proxy_norm"] for m in own.measurements if "plasticity/proxy_norm" in m.values]
        found[name]["last norm"] = float((norms[-1] / norms[-5]).mean())
    assert found["uer"]["cl/forgetting"] < 0.5 * found["er"]["cl/forgetting"]
    assert found["uer"]["cl/learning_accuracy"] < found["er"]["cl/learning_accuracy"] - 0.05
    assert min(found[n]["cl/average_accuracy"] for n in ("uer", "er")) > found["naive"]["cl/average_accuracy"] + 0.35
    assert found["cosine"]["cl/average_accuracy"] < found["uer"]["cl/average_accuracy"] - 0.2
    assert found["uer"]["last norm"] < 0.75 < found["er"]["last norm"] + 0.1
