"""Our strategies as strategies of Avalanche, and our memory as one of its plugins. Importing this imports Avalanche.

    benchmark = SplitMNIST(5)
    strategy = NeotenyStrategy(
        name="uer", config=uer.Config(), benchmark=benchmark, settings=Benchmark(data="", memory=500), evaluator=...
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)

A step is our `observe`, forward, backward and update in one, so plugins that only look (metrics, loggers, early
stopping) work as always, and those that change loss or gradients have nothing to change.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from continual import catalogue
from continual.avalanche.parts import MASKED
from continual.avalanche.streams import Layout, layout
from continual.inputs import Inputs
from continual.memory import Batch, Memory, Policy
from continual.streams import Kind, Task
from plasticity.networks.functional import evaluating
from plasticity.population import RandomStream
from plasticity.problems.streams import generator


class _Outline:
    """What our strategies have to know of a benchmark of Avalanche."""

    def __init__(self, found: Layout, benchmark: Any, settings: catalogue.Benchmark):
        sizes = [len(experience.dataset) for experience in benchmark.train_stream]
        self.batch, self._steps = settings.batch, [settings.epochs * -(-size // settings.batch) for size in sizes]
        self.kind: Kind = found.kind
        self.tasks, self.outputs = len(found.task_labels), len(found.pairs)
        first = next(iter(benchmark.train_stream)).dataset[0][0]
        self.shape, self.levels = tuple(first.shape), 255 if first.dtype == torch.uint8 else 1
        groups = found.groups
        self.scopes = (groups.unsqueeze(1) == groups).unsqueeze(0) if found.kind == "task" else None

    def steps(self, index: int) -> int:
        """Batches of an experience, of which the last may be smaller."""
        return self._steps[index]


class _Shown(nn.Module):
    """The network of one member as Avalanche sees it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.unsqueeze(0))[0]


class NeotenyStrategy(SupervisedTemplate):
    """One of our strategies, of one seed.

    benchmark: what it is going to learn, for the number of its classes and tasks. settings: network, optimiser, size of
    batches and memory, epochs. mask_unseen: classes of which no label was seen yet are no answer. Raises ValueError for
    what does not fit together.
    """

    def __init__(
        self,
        *,
        name: str,
        config: Any,
        benchmark: Any,
        settings: catalogue.Benchmark,
        seed: int = 0,
        device: torch.device | str = "cpu",
        plugins: list[Any] | None = None,
        evaluator: Any = default_evaluator,
        eval_mb_size: int = 250,
        eval_every: int = -1,
        peval_mode: str = "epoch",
        mask_unseen: bool = True,
    ):
        if name not in catalogue.STRATEGIES:
            raise ValueError(f"unknown strategy '{name}', it is one of {', '.join(catalogue.STRATEGIES)}")
        if catalogue.STRATEGIES[name][0].trains_on != "task":
            raise ValueError(f"'{name}' trains on more than the experience that Avalanche hands to it")
        self.layout, self.mask_unseen = layout(benchmark), mask_unseen
        about = _Outline(self.layout, benchmark, settings)
        self.setting = catalogue.make_setting(settings, about, [seed], torch.device(device))
        self.ours = catalogue.make_strategy(name, config, self.setting)
        self.tasks = [
            self._task(index, experience, about.steps(index), settings.epochs)
            for index, experience in enumerate(benchmark.train_stream)
        ]
        shown = _Shown(self.ours.network)
        super().__init__(
            model=shown,
            # The template asks for one; our strategy has its own, and this one never takes a step.
            optimizer=torch.optim.SGD(shown.parameters(), lr=settings.learning_rate),
            train_mb_size=settings.batch,
            train_epochs=settings.epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=plugins,
            evaluator=evaluator,
            eval_every=eval_every,
            peval_mode=peval_mode,
        )
        self._begun = 0  # experiences

    def _task(self, index: int, experience: Any, steps: int, epochs: int) -> Task:
        label = self.layout.task_labels[index]
        outputs = self.layout.outputs_of(torch.tensor([int(y) for y in experience.dataset.targets]), label)
        own = torch.zeros(1, self.setting.outputs, dtype=torch.bool, device=self.ours.seen.device)
        own[0, outputs] = True
        return Task(index, own, self.setting.labelled, steps, epochs)

    def _before_training_exp(self, **kwargs: Any) -> None:
        super()._before_training_exp(**kwargs)
        if self._begun:
            self.ours.at_boundary()
        self.ours.begin_task(self._present())
        self._begun += 1

    def _present(self) -> Task:
        assert self.experience is not None
        return self.tasks[self.experience.current_experience]

    def _after_training_exp(self, **kwargs: Any) -> None:
        task = self._present()
        if self.ours.reviews:
            self.ours.review(self._batches(), task)
        self.ours.end_task(task)
        super()._after_training_exp(**kwargs)

    def _batches(self) -> Any:
        data: Any = self.adapted_dataset
        for x, y, *rest in DataLoader(data, batch_size=self.train_mb_size, collate_fn=data.collate_fn):
            yield self._batch(x.to(self.device), y.to(self.device), rest[-1] if rest else None, augmented=False)

    def _batch(self, x: Tensor, y: Tensor, tasks: Tensor | None, augmented: bool) -> Batch:
        """Samples of Avalanche as a batch of ours, of one member."""
        label = 0 if tasks is None else int(tasks[0])
        images, labels = x.unsqueeze(0), self.layout.outputs_of(y, label).unsqueeze(0)
        if augmented:
            return Batch(images, labels, *self.setting.inputs.train(images, labels), {})
        return Batch(images, labels, self.setting.inputs.scaled(images), labels, {})

    def training_epoch(self, **kwargs: Any) -> None:
        """As in the template, with our step in the place of forward, backward and update."""
        for mbatch in self.dataloader:
            if self._stop_training:
                break
            self.mbatch = mbatch
            self._unpack_minibatch()
            self._before_training_iteration(**kwargs)
            self._before_forward(**kwargs)
            self.mb_output = self.forward()
            self._after_forward(**kwargs)
            batch = self._batch(self.mb_x, self.mb_y, self._told(), augmented=True)
            self.ours.seen.scatter_(1, batch.labels, True)
            self._before_backward(**kwargs)
            metrics = self.ours.observe(batch, self._present())
            self.loss = metrics["loss/current"].mean()
            self._after_backward(**kwargs)
            self._before_update(**kwargs)
            self._after_update(**kwargs)
            self._after_training_iteration(**kwargs)

    def _told(self) -> Tensor | None:
        mbatch: Any = self.mbatch
        return mbatch[-1] if len(mbatch) > 2 else None

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Scores [B, labels] of the batch before the step on it, for metrics; an output that cannot be has -1000."""
        told, task, label = self._told(), None, 0
        if self.setting.labelled:
            assert told is not None
            label = int(told[0])
            task = self.tasks[self.layout.task_labels.index(label)]
        with evaluating(self.ours.network):
            scores = self.ours.predict(self.setting.inputs.scaled(self.mb_x.unsqueeze(0)), task)[0]
        own = [(c, y) for c, (t, y) in enumerate(self.layout.pairs) if not self.setting.labelled or t == label]
        outputs, labels = (list(part) for part in zip(*own, strict=True))
        if task is None and self.mask_unseen:
            scores = scores.masked_fill(~self.ours.seen, MASKED)
        width = 1 + max(y for _, y in self.layout.pairs)
        return scores.new_full((len(scores), width), MASKED).index_copy_(
            1, torch.tensor(labels, device=scores.device), scores[:, outputs]
        )


class ExperienceReplay(SupervisedPlugin):
    """Our memory in Avalanche's own loop: adds weight × loss on samples drawn from it, from the second step on.

    capacity, policy, classes, seed: of the memory. Differs from Avalanche's ReplayPlugin as online replay does: it
    replays within the first experience too, and each loss is a mean of its own.
    """

    def __init__(
        self,
        capacity: int,
        classes: int,
        replay_batch: int = 10,
        policy: Policy = "reservoir",
        weight: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.replay_batch, self.weight = replay_batch, weight
        random = RandomStream([generator(torch.device(device), seed, "memory", 0)])
        self.memory = Memory(capacity, policy, 1, classes, Inputs(1), random)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Draw before the present batch is offered to the memory."""
        if not self.memory.empty:
            replay = self.memory.sample(self.replay_batch)
            strategy.loss += self.weight * strategy._criterion(strategy.model(replay.x[0]), replay.y[0])

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Offer the batch."""
        x, y = strategy.mb_x.unsqueeze(0), strategy.mb_y.unsqueeze(0)
        self.memory.insert(Batch(x, y, x, y, {}))
