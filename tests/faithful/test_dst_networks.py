"""Dynamic sparse training of every network of the study, and on a GPU."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from continual import datasets
from continual.catalogue import Benchmark, open_learner
from continual.inputs import Inputs
from continual.memory import Batch
from continual.networks.classifier import NETWORKS, Classifier
from continual.sparse.rules import GROWTHS
from continual.strategies import dst
from continual.strategies.dst import DST
from continual.strategy import Setting
from continual.streams import Task
from plasticity.adam import Adam
from plasticity.networks.stacked import stack
from plasticity.population import RandomStream
from plasticity.sgd import SGD as PlainSGD
from tests.faithful.test_dst import learn


@pytest.mark.parametrize("name", ["cnn-bn", "lenet5", "resnet18", "vgg-like", "mobilenetv2", "resnet18-reduced"])
def test_every_network_of_the_study_is_trained_sparse(name):
    """Two members, two batches: layers are found, masked, moved and frozen, whatever they are."""
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 4
    data = datasets.from_tensors((images, labels), (images[:8], labels[:8]))
    sizes = {"resnet18": (4, 8, 8, 8), "resnet18-reduced": (4, 4, 4, 4), "vgg-like": (4, 4, 4, 8, 8, 8)}
    sizes |= {"mobilenetv2": (4, 4, 4, 4, 8, 8, 8, 8, 16), "cnn-bn": (4, 8, 16), "lenet5": (16,)}
    benchmark = Benchmark(
        data="mine", kind="task", tasks=2, network=name, hidden=sizes[name], optimizer="adam", learning_rate=1e-3
    )
    config = dst.Config(update_every=1, growth="gradient", init="erk")
    found = open_learner(benchmark, "dst", config, (0,), data=data)
    strategy = learn(found, 2)
    named = dict(strategy.network.named_parameters())
    assert set(strategy.masked) == {name for name in named if not name.endswith("bias")}
    assert not list(strategy.network.named_buffers())
    assert float(found.summary()["cl/bwt"].abs().max()) == 0


def test_the_published_sizes_of_networks():
    with torch.device("meta"):
        built = {name: NETWORKS[name]((3, 32, 32), (), 100) for name in ("vgg-like", "mobilenetv2")}
    weights = {name: [p for p in network.parameters() if p.dim() > 1] for name, network in built.items()}
    assert len(weights["mobilenetv2"]) == 53
    assert sum(p.numel() for p in weights["mobilenetv2"]) == 2_189_760 + 128_000
    assert len(weights["vgg-like"]) == 15
    assert weights["vgg-like"][-2].shape == (512, 512)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_task_on_a_gpu_neither_waits_for_numbers_nor_mixes_devices(optimizer, monkeypatch):
    """Traced without values: FakeTensorMode refuses both. Policies read numbers, once a task, so there is none here."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(DST, "_settings", lambda self, task: [self.config] * 2)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, parameters: [torch.empty_like(p) for p in parameters])

    def network(bias: bool) -> Classifier:
        layers = [NETWORKS["cnn-bn"]((1, 8, 8), (4, 8), 4) for _ in range(2)]
        members = [Classifier(torch.nn.Sequential(*one[:-1]), one[-1]) for one in map(list, layers)]
        return cast(Classifier, stack(members))

    def made(trained: Classifier) -> Any:
        parameters = list(trained.parameters())
        return Adam(parameters, 1e-3) if optimizer == "adam" else PlainSGD(parameters, 0.1, 0.9)

    for growth, bn in zip(GROWTHS, itertools.cycle(("batch", "per_task_stats")), strict=False):
        with FakeTensorMode(), cuda:
            random = RandomStream([torch.Generator() for _ in range(2)], cuda)
            scopes = torch.ones(2, 4, 4, dtype=torch.bool)
            setting = Setting(
                members=2, shape=(1, 8, 8), outputs=4, tasks=2, batch=8, steps=(2, 2), labelled=True, scopes=scopes,
                network=network, fresh=lambda bias, source: network(bias), optimizer=made, inputs=Inputs(1), memory=0,
                random=lambda: random,  # noqa: B023
            )  # fmt: skip
            strategy = DST(setting, dst.Config(growth=growth, bn=bn, update_every=1))
            x, y = torch.rand(2, 8, 1, 8, 8), torch.zeros(2, 8, dtype=torch.int64)
            for index in range(2):
                task = Task(index, torch.ones(2, 4, dtype=torch.bool), True, 2, 1)
                strategy.begin_task(task)
                for _ in range(2):
                    metrics = strategy.observe(Batch(x, y, x, y, {}), task)
                strategy.end_task(task)
            told = [value for _, values in strategy.measurements() for value in values.values()]
            shown = strategy.predict(x, Task(0, task.outputs, True, 2, 1))
        assert {value.device.type for value in (*metrics.values(), *told, shown)} == {"cuda"}
