"""The bridge to Avalanche, with avalanche-lib itself: both ways, side by side, and cut off in between."""

from __future__ import annotations

import dataclasses
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from continual import BASELINES, datasets
from continual.avalanche.baselines import SETTINGS, AvalancheStrategy
from continual.catalogue import KNOWN, STRATEGIES, Benchmark, make_setting, open_learner, open_stream
from continual.experiences import Experiences, ExperienceStream
from continual.learner import Learner
from runs.cli import main
from runs.continual import prepare
from runs.continual_run import build, train
from tests.runs.same_run import assert_same

pytest.importorskip("avalanche")
BLOBS = datasets.load("blobs")
TOY = Benchmark(data="blobs", hidden=(16,), memory=20)
TOLD = dataclasses.replace(TOY, kind="task", momentum=0.5)
RUNNING = sorted(set(SETTINGS) - {"avalanche-gem"})


def opened(name: str, benchmark: Benchmark = TOY, seeds=(0,), data: Any = BLOBS, **settings: Any) -> Any:
    return open_learner(benchmark, name, KNOWN[name][1](**settings), seeds, data=data)


def advanced(found: Learner, tasks: int) -> Learner:
    while found.index < tasks:
        found.advance(1000)
    return found


def kept(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint keeps it: tensors and plain values only."""
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    return torch.load(content, weights_only=True)


def weights(found: Learner) -> list[Tensor]:
    return [p.detach() for p in found.strategy.network.parameters()]


def test_names_are_those_of_the_page_of_help():
    assert tuple(SETTINGS) == BASELINES


@pytest.mark.parametrize(
    ("name", "benchmark"),
    [(name, TOY) for name in RUNNING] + [(f"avalanche-{name}", TOLD) for name in ("lwf", "agem", "der")],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_a_strategy_of_avalanche_resumes_exactly_and_a_seed_is_what_it_is_alone(name, benchmark):
    settings = {"lambda_reg": 0.01} if name == "avalanche-mas" else {}  # with 1 the weights are soon not finite
    together, again = (opened(name, benchmark, (3, 8), **settings) for _ in range(2))
    drawn, before = weights(together)[0].clone(), (torch.get_rng_state(), random.getstate())
    advanced(together, 2)
    again.load_state_dict(kept(together.state_dict()))
    advanced(together, 3)
    advanced(again, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights(together), weights(again), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(together.predictions, again.predictions, strict=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert not torch.equal(weights(together)[0], drawn)
    if name in ("avalanche-naive", "avalanche-agem", "avalanche-der", "avalanche-mir") and benchmark is TOY:
        alone = advanced(opened(name, benchmark, (8,)), 3)
        assert torch.equal(together.matrix[1, :3], alone.matrix[0, :3])


PAIRS = {
    "naive": ({}, {}),
    "ewc": ({"fisher": "batch", "strength": 20.0}, {"ewc_lambda": 10.0}),  # they have no factor 1/2
    "ewc, online": (
        {"fisher": "batch", "strength": 20.0, "mode": "online", "decay": 0.5},
        {"ewc_lambda": 5.0, "mode": "online", "decay_factor": 0.5},  # nor γ in the penalty
    ),
    "lwf": ({}, {}),
}


@pytest.mark.parametrize("benchmark", [TOY, TOLD], ids=["class", "task"])
@pytest.mark.parametrize("name", PAIRS)
def test_side_by_side_with_avalanche_weights_and_matrices_agree(name, benchmark):
    """Same network, samples, order, optimiser, seeds; float rounding is all that differs."""
    ours, theirs = PAIRS[name]
    own = advanced(opened(name.split(",")[0], benchmark, (0, 1), **ours), 5)
    other = advanced(opened(f"avalanche-{name.split(',')[0]}", benchmark, (0, 1), **theirs), 5)
    for a, b in zip(weights(own), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert float((own.matrix - other.matrix).abs().max()) <= 0.05  # one test sample of twenty
    assert float((own.matrix != other.matrix).double().mean()) < 0.05
    losses = [
        [m.values["loss/current"] for m in found.measurements if "loss/current" in m.values] for found in (own, other)
    ]
    if name == "naive":
        torch.testing.assert_close(torch.stack(losses[0]).float(), torch.stack(losses[1]).float(), rtol=1e-3, atol=1e-4)


def test_side_by_side_er_with_our_memory_in_their_loop():
    """Avalanche's own replay draws otherwise (docs/results/continual.md), so the memory is shared: a plugin of ours."""
    from continual.avalanche.strategy import ExperienceReplay

    own = advanced(opened("er", TOY, (4, 9)), 5)
    stream = open_stream(TOY, BLOBS, (4, 9), torch.device("cpu"))
    setting = make_setting(TOY, stream, (4, 9), torch.device("cpu"))
    strategy = AvalancheStrategy(
        setting, SETTINGS["avalanche-naive"](), lambda k: [ExperienceReplay(20, 10, seed=(4, 9)[k])]
    )
    other = advanced(Learner(stream, strategy, setting.inputs), 5)
    for a, b in zip(weights(own), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert torch.equal(own.matrix, other.matrix)


def tensors(tasks: int = 4, per_task: int = 40, size: int = 2) -> Any:
    """Experiences of two classes each, as Avalanche has them."""
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(tasks * size).repeat_interleave(per_task // size)
    images = torch.randn(len(labels), 1, 4, 4, generator=source) + labels.view(-1, 1, 1, 1)
    return [(images[labels // size == t], labels[labels // size == t]) for t in range(tasks)]


def benchmark_of(parts: Any, told: bool, test: Any = None) -> Any:
    from avalanche.benchmarks.scenarios.deprecated.generic_benchmark_creation import (
        create_multi_dataset_generic_benchmark,
    )

    from continual.avalanche.parts import dataset

    train = [dataset(x, y, t if told else 0) for t, (x, y) in enumerate(parts)]
    return create_multi_dataset_generic_benchmark(train, train if test is None else test)


@pytest.mark.parametrize("told", [False, True])
def test_a_benchmark_of_avalanche_is_a_stream(told):
    from continual.avalanche.streams import experiences_of

    parts = tensors()
    zero_based = [(x, y % 2) for x, y in parts] if told else parts
    found = experiences_of(benchmark_of(zero_based, told))
    assert found.kind == ("task" if told else "class")
    stream = ExperienceStream(found, (0, 1), batch=10)
    assert (stream.tasks, stream.outputs, stream.shape, stream.levels) == (4, 8, (1, 4, 4), 1)
    for index, (x, y) in enumerate(parts):
        images, labels = stream.batches(index, 0, 4)
        for member in range(2):  # each sees all samples once, in an order of its own
            order = images[member].flatten(0, 1).flatten(1).sum(1).argsort()
            wanted = x.flatten(1).sum(1).argsort()
            assert torch.equal(images[member].flatten(0, 1)[order], x[wanted])
            assert torch.equal(labels[member].flatten()[order], y[wanted])  # outputs of their own for each task
        assert not torch.equal(labels[0], labels[1]) or not torch.equal(images[0], images[1])
        assert torch.equal(stream.test(index)[1][0], y)
        assert stream.task(index).outputs[0].nonzero().flatten().tolist() == [2 * index, 2 * index + 1]
    learner = opened("er", dataclasses.replace(TOY, epochs=8), (0, 1), found)
    advanced(learner, 4)
    assert float(learner.summary()["cl/learning_accuracy"].mean()) > (0.6 if told else 0.3)
    if told:
        assert stream.scopes is not None
        assert stream.scopes[0, 3].nonzero().flatten().tolist() == [2, 3]


def test_domains_and_a_single_experience_to_test_on():
    from avalanche.benchmarks import class_incremental_benchmark

    from continual.avalanche.parts import dataset
    from continual.avalanche.streams import experiences_of

    parts = tensors()
    same = [(x, y % 2) for x, y in parts]
    found = experiences_of(benchmark_of(same, told=False))
    assert (found.kind, len(found.groups)) == ("domain", 2)
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    whole = dataset(images, labels, 0)
    one = experiences_of(benchmark_of(parts, False, [whole]))
    assert [y.unique().tolist() for _, y in one.test] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    newer = class_incremental_benchmark(
        {"train": whole, "test": whole}, num_experiences=4, class_order=[6, 7, 0, 1, 2, 3, 5, 4]
    )
    read = experiences_of(newer)
    assert [sorted(y.unique().tolist()) for _, y in read.train] == [[6, 7], [0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="4 tasks to train on and 2 to test"):
        Experiences("x", "class", parts, parts[:2], torch.zeros(8))
    with pytest.raises(ValueError, match="has 40 training samples, too few for a batch of 50"):
        ExperienceStream(found, (0,), batch=50)


@pytest.mark.parametrize(("name", "told"), [("er", False), ("ewc", False), ("packnet", True)])
def test_a_strategy_of_ours_in_avalanche_is_what_it_is_here(name, told, tmp_path, capsys):
    """Its accuracies by Avalanche's own metrics are our matrix, and its loggers get what they want."""
    from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics, loss_metrics
    from avalanche.logging import CSVLogger, InteractiveLogger, TensorboardLogger, TextLogger
    from avalanche.training.plugins import EvaluationPlugin

    from continual.avalanche.strategy import NeotenyStrategy
    from continual.avalanche.streams import experiences_of

    data = experiences_of(benchmark_of([(x, y % 2) for x, y in tensors()] if told else tensors(), told))
    settings = dataclasses.replace(TOY, epochs=1)
    config = STRATEGIES[name][1](**({"strength": 10.0} if name == "ewc" else {}))
    ours: Any = open_learner(settings, name, config, (3,), data=data)
    stream = ours.stream
    in_order = []  # the experiences with their samples as our stream has them
    for index in range(4):
        images, labels = (part[0].flatten(0, 1) for part in stream.batches(index, 0, 4))
        in_order.append((images, labels % 2 if told else labels))
    theirs = benchmark_of(in_order, told)
    out = io.StringIO()
    loggers = [
        TextLogger(out),
        InteractiveLogger(),
        TensorboardLogger(tmp_path / "tb"),
        CSVLogger(str(tmp_path / "csv")),
    ]
    evaluator = EvaluationPlugin(
        accuracy_metrics(minibatch=True, epoch=True, experience=True, stream=True),
        loss_metrics(epoch=True, experience=True), forgetting_metrics(experience=True), loggers=loggers,
    )  # fmt: skip
    strategy = NeotenyStrategy(
        name=name, config=config, benchmark=theirs, settings=settings, seed=3, evaluator=evaluator
    )
    advanced(ours, 4)
    rows = []
    for experience in theirs.train_stream:
        strategy.train(experience, shuffle=False)
        told_metrics = strategy.eval(theirs.test_stream)
        task = "/Task{:03d}" if told else "/Task000"
        rows.append([told_metrics[f"Top1_Acc_Exp/eval_phase/test_stream{task.format(i)}/Exp{i:03d}"] for i in range(4)])
    for a, b in zip(weights(ours), strategy.ours.network.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), ours.matrix[0])
    assert "Top1_Acc_Epoch" in out.getvalue()
    assert np.isfinite([value for key, value in told_metrics.items() if "Loss" in key]).all()


def test_a_run_stopped_between_tasks_and_resumed_is_the_same_run(tmp_path):
    arguments = ["--benchmark", "split-blobs", "--seeds", "2", "--no-tensorboard", "--quiet"]
    config, _ = prepare("avalanche-der", arguments)
    for folder, looks in (("whole", 99), ("run", 2)):
        (tmp_path / folder).mkdir()
        config.save(tmp_path / folder, build(config))
        left = iter([False] * looks + [True] * 99)
        train(config, tmp_path / folder, lambda steps: None, lambda left=left: next(left))
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def fashion_files(folder: Path, per_class: int = 12) -> None:
    """A small Fashion-MNIST as torchvision keeps it."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    source = np.random.default_rng(0)
    labels = np.repeat(np.arange(10, dtype=np.uint8), per_class)
    images = source.integers(0, 256, (len(labels), 28, 28)).astype(np.uint8)
    for part in ("train", "t10k"):
        header = np.array([0x803, len(labels), 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, len(labels)], ">i4").tobytes() + labels.tobytes()
        )


def test_a_classic_benchmark_from_a_folder_and_never_from_the_network(tmp_path, capsys):
    fashion_files(tmp_path / "data")
    options = ["--seeds", "2", "--no-tensorboard", "--quiet", "--out", str(tmp_path), "--data"]
    classic = ["--benchmark", "avalanche:SplitFMNIST"]
    assert main(["continual", "er", *classic, "--kind", "task", *options, str(tmp_path / "data"), "--name", "er"]) == 0
    for arguments, sentence in (
        ([*classic, *options, str(tmp_path)], "torchvision's 'FashionMNIST' is not on this machine: put its folder"),
        ([*classic, "--kind", "domain", *options, str(tmp_path / "data")], "SplitFMNIST is no domain-incremental"),
        ([*classic, "--blurry", "0.1", *options, str(tmp_path / "data")], "takes no blurry"),
        ([*classic, "--tasks", "3", *options, str(tmp_path / "data")], "cannot be made with 3 tasks"),
    ):
        capsys.readouterr()
        assert main(["continual", "er", *arguments]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["avalanche-ewc", "--with", "redo"], "interventions act in our own strategies"),
        (["avalanche-ewc", "--augmentation", "doubled"], "take --augmentation none"),
        (["avalanche-ewc", "--mode", "both"], "Avalanche's EWC does not take these settings"),
        (["avalanche-gem"], "needs a solver that is not installed: pip install quadprog"),
        (["avalanche-ew"], "Did you mean"),
    ],
)
def test_what_avalanche_cannot_do_is_one_sentence(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("continual.avalanche.baselines.find_spec", lambda name: None)
    out = ["--benchmark", "split-blobs", "--seeds", "1", "--out", str(tmp_path), "--quiet"]
    assert main(["continual", *arguments, *out]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_avalanche_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("continual.avalanche.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'neoteny\[avalanche\]'"):
        opened("avalanche-naive")
