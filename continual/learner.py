"""The loop: tasks in turn, evaluation on all of them, the accuracy matrix. One learner is a population of seeds.

What members learn from and what is measured on them has an axis of K members in front, one for each seed, in the order
of the seeds. Nothing here depends on the strategy but its contract (`continual.strategy`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from continual import metrics
from continual.inputs import Inputs
from continual.memory import Batch
from continual.strategy import Metrics, Strategy
from continual.streams import Task, TaskStream
from plasticity.networks.functional import evaluating

_GATHERED = 32 << 20  # bytes of stored images that are gathered at a time
_MOST_STEPS = 64  # whose images are gathered at a time
_TESTED = 250  # samples of each member that are tested at a time


@dataclass(frozen=True)
class Measurement:
    """Numbers of all members, [K] by name, at a step; of one task, or of none."""

    step: int
    values: Metrics
    task: int | None = None


class Learner:
    """A strategy on a stream.

    evaluate_every: steps between evaluations within a task, for what happens between its ends; None: none. tests: of
    each task, samples that these evaluations look at. mask_unseen: classes of which no label was seen yet are no
    answer. Raises ValueError if stream and strategy do not fit together.
    """

    def __init__(
        self,
        stream: TaskStream,
        strategy: Strategy,
        inputs: Inputs,
        evaluate_every: int | None = None,
        tests: int | None = 200,
        mask_unseen: bool = True,
    ):
        self.stream, self.strategy, self.inputs = stream, strategy, inputs
        self.evaluate_every, self.tests, self.mask_unseen = evaluate_every, tests, mask_unseen
        self.members = len(stream.seeds)
        self.tasks = [stream.task(index, strategy.trains_on) for index in range(stream.tasks)]
        self.index = self.step = self.steps = 0  # the task, the step in it, all steps
        self.measurements: list[Measurement] = []  # until someone takes them
        nothing = torch.full((self.members, stream.tasks, stream.tasks), torch.nan, dtype=torch.float64)
        self.matrix = nothing  # [K, T, T], nan for what is to come
        self.untrained = nothing[:, 0].clone()
        self.evaluations: list[tuple[int, Tensor]] = []  # tasks finished, accuracies [K, T]
        self.predictions: list[Tensor] = []  # after each task, of all test samples, int16 [K, N]
        self._logged: list[Metrics] = []

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return sum(task.steps for task in self.tasks)

    @property
    def done(self) -> bool:
        return self.index >= self.stream.tasks

    def advance(self, steps: int) -> None:
        """Take up to `steps` steps, no further than the end of the present task."""
        if self.steps == 0:
            self._begin()
        task = self.tasks[self.index]
        if self.step == 0:
            if self.index > 0:
                self.strategy.at_boundary()
            self.strategy.begin_task(task)
        self.learn(min(steps, task.steps - self.step))
        self._log()
        if self.step == task.steps:
            if self.strategy.reviews:
                self._logged.append(self.strategy.review(self._first_pass(), task))
                self._log()
            self.strategy.end_task(task)
            self._end_task()

    def learn(self, steps: int) -> None:
        """Take so many steps of the present task, and nothing else."""
        task, stop = self.tasks[self.index], self.step + steps
        while self.step < stop:
            end = min(self.step + self._gathered, stop)
            images, labels = self.stream.batches(self.index, self.step, end, self.strategy.trains_on)
            for offset in range(end - self.step):
                self._learn(images[:, offset], labels[:, offset], task)

    def _first_pass(self) -> Iterator[Batch]:
        """The batches of the first pass over the present task, as they came, without augmentation."""
        steps = self.tasks[self.index].steps // self.stream.epochs
        for start in range(0, steps, self._gathered):
            end = min(start + self._gathered, steps)
            images, labels = self.stream.batches(self.index, start, end, self.strategy.trains_on)
            for x, y in zip(images.unbind(1), labels.unbind(1), strict=True):
                yield Batch(x, y, self.inputs.scaled(x), y, {})

    @property
    def _gathered(self) -> int:
        stream = self.stream
        batch_bytes = self.members * stream.batch * torch.Size(stream.shape).numel()
        return max(1, min(_MOST_STEPS, _GATHERED // batch_bytes))

    def _learn(self, images: Tensor, labels: Tensor, task: Task) -> None:
        self.strategy.seen.scatter_(1, labels, True)
        batch = Batch(images, labels, *self.inputs.train(images, labels), {})
        self._logged.append(self.strategy.observe(batch, task))
        self.step += 1
        self.steps += 1
        if self.evaluate_every and self.step % self.evaluate_every == 0 and self.step < task.steps:
            self._look()

    def _begin(self) -> None:
        """Accuracies of the network as it was drawn."""
        self.untrained = torch.stack([self._accuracy(*self.answers(task.index)) for task in self.tasks], 1)

    def _look(self) -> None:
        """Accuracies on the tasks so far, in the midst of one."""
        found = torch.full_like(self.untrained, torch.nan)
        for index in range(self.index + 1):
            found[:, index] = self._accuracy(*self.answers(index, self.tests))
        self.evaluations.append((self.index, found))
        self.measurements.append(Measurement(self.steps, {"cl/accuracy_on_seen": found.nanmean(1)}))
        for index in range(self.index + 1):
            self.measurements.append(Measurement(self.steps, {"cl/accuracy": found[:, index]}, index + 1))

    def _log(self) -> None:
        """The means over these steps of what the strategy told."""
        names = dict.fromkeys(name for told in self._logged for name in told)
        means = {name: torch.stack([told[name] for told in self._logged if name in told]).mean(0) for name in names}
        if means:
            self.measurements.append(Measurement(self.steps, means))
        self._logged.clear()

    @torch.no_grad()
    def answers(self, index: int, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Predicted and true outputs [K, M] of the test samples of a task. most: of so many of them."""
        images, labels = self.stream.test(index, most)
        task = self.tasks[index]
        # In a fixed random order: samples may come class by class, and where a batch is normalised by itself, one that
        # is all of a class has lost what tells them apart.
        device, count = labels.device, labels.shape[1]
        order = torch.randperm(count, generator=torch.Generator(device).manual_seed(0), device=device)
        found = torch.zeros_like(labels)
        with evaluating(self.strategy.network):
            for part in order.tensor_split(-(-count // _TESTED)):
                found[:, part] = self.choose(self.inputs.scaled(images[:, part]), task)
        return found, labels

    def choose(self, x: Tensor, task: Task) -> Tensor:
        """The strategy's answer to inputs [K, B, *shape] of a task, which it is told only if samples say it: [K, B]."""
        scores = self.strategy.predict(x, task if task.labelled else None)
        allowed = None
        if task.labelled:
            allowed = None if self.strategy.answers_with_all else task.outputs
        elif self.mask_unseen:
            seen = self.strategy.seen
            allowed = seen | ~seen.any(1, keepdim=True)
        if allowed is not None:
            scores = scores.masked_fill(~allowed.unsqueeze(1), -torch.inf)
        return scores.argmax(2)

    @staticmethod
    def _accuracy(answers: Tensor, labels: Tensor) -> Tensor:
        return (answers == labels).double().mean(1)

    def _end_task(self) -> None:
        found = [self.answers(index) for index in range(self.stream.tasks)]
        self.predictions.append(torch.cat([answers.to(torch.int16) for answers, _ in found], 1))
        row = torch.stack([self._accuracy(*pair) for pair in found], 1)
        self.matrix = self.matrix.to(row.device)
        self.matrix[:, self.index] = row
        seen = torch.full_like(row, torch.nan)
        seen[:, : self.index + 1] = row[:, : self.index + 1]
        self.evaluations.append((self.index + 1, seen))
        self.index, self.step = self.index + 1, 0
        after = self.index
        cells = {f"acc/task_{j + 1}_after_{after}": row[:, j] for j in range(self.stream.tasks)}
        self.measurements.append(Measurement(self.steps, cells | self.summary()))
        self.measurements += self._proxy_norms()
        self.measurements += [Measurement(self.steps, told, task) for task, told in self.strategy.measurements()]

    def _proxy_norms(self) -> Iterator[Measurement]:
        """Mean length of the head's weights of the classes of each task."""
        for task in self.tasks:
            norms = self.strategy.head_of(task).norm(dim=2)  # [K, C]
            own = task.outputs.float()
            values = {"plasticity/proxy_norm": (norms * own).sum(1) / own.sum(1)}
            yield Measurement(self.steps, values, task.index + 1)

    def summary(self) -> Metrics:
        """The metrics of the field for the tasks finished so far, [K] by name; nan where they are not defined."""
        k = self.index - 1
        square = self.matrix[:, : self.index, : self.index]
        finished = torch.stack([row for _, row in self.evaluations], 1)[:, :, : self.index]
        learned = [tasks for tasks, _ in self.evaluations]
        within = {
            "cl/average_accuracy": metrics.average_accuracy(square),
            "cl/average_incremental_accuracy": metrics.average_incremental_accuracy(square),
            "cl/learning_accuracy": metrics.learning_accuracy(square),
        }
        if self.evaluate_every:
            within["cl/average_anytime_accuracy"] = metrics.average_anytime_accuracy(finished)
        if k < 1:
            return within
        across = {
            "cl/forgetting": metrics.forgetting(square),
            "cl/bwt": metrics.backward_transfer(square),
            "cl/fwt": metrics.forward_transfer(square, self.untrained[:, : self.index]),
            "cl/minimum_accuracy": metrics.minimum_accuracy(finished, learned),
            "cl/worst_case_accuracy": metrics.worst_case_accuracy(square, finished, learned),
        }
        if self.evaluate_every:
            across["cl/stability_gap"] = metrics.stability_gap(square, finished, learned)
        return within | across

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, as tensors and plain values."""
        random = self.inputs.random
        return {
            "strategy": self.strategy.state_dict(),
            "augmentation": [] if random is None else [g.get_state() for g in random.generators],
            "position": [self.index, self.step, self.steps],
            "matrix": self.matrix,
            "untrained": self.untrained,
            "evaluated_after": [tasks for tasks, _ in self.evaluations],
            "evaluations": [row for _, row in self.evaluations],
            "predictions": self.predictions,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly. Raises ValueError if the state is of another run."""
        if state["matrix"].shape != self.matrix.shape:
            raise ValueError(f"the saved matrix is {list(state['matrix'].shape)}, here {list(self.matrix.shape)}")
        self.strategy.load_state_dict(state["strategy"])
        if self.inputs.random is not None:
            for generator, saved in zip(self.inputs.random.generators, state["augmentation"], strict=True):
                generator.set_state(saved)
        device = self.stream.device
        self.index, self.step, self.steps = state["position"]
        self.matrix, self.untrained = state["matrix"].to(device), state["untrained"].to(device)
        rows = [row.to(device) for row in state["evaluations"]]
        self.evaluations = list(zip(state["evaluated_after"], rows, strict=True))
        self.predictions = [answers.to(device) for answers in state["predictions"]]
