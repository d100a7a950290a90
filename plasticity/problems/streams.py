"""The batches of a problem, for K members at once, on the training device.

Everything a member sees follows from its seed and the number of the task: another number of members, another method or
a run that was cut off sees the same. Content of tasks, order of samples and choice of images have generators of their
own. Batches are gathered from images that stay on the device; nothing passes through a data loader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from plasticity.problems import datasets
from plasticity.problems.changes import Change, ClassPairs, Constant, FlippingBits, Pool
from plasticity.problems.published import Problem

# One stream of random numbers for each purpose; new ones go to the end, so that old runs keep their numbers.
PURPOSES = (
    "initialisation", "examples", "content", "order", "intervention", "probe",
    "class_order", "memory", "augmentation", "growth",
)  # fmt: skip
_GAUSSIAN_PIXELS = 64


def generator(device: torch.device, seed: int, purpose: str, *index: int) -> torch.Generator:
    """A generator on `device` for one purpose of a seed; `index` tells apart several uses."""
    sequence = np.random.SeedSequence((seed, PURPOSES.index(purpose), *index))
    return torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))


class Task(Protocol):
    """One task of all members."""

    def batches(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Inputs [K, stop - start, B, *shape] and targets [K, stop - start, B] of steps start .. stop - 1."""
        ...

    def examples(self) -> tuple[Tensor, Tensor]:
        """A fixed sample of what the task asks for: inputs [K, M, *shape], targets [K, M], M at most 1 000."""
        ...

    def test(self) -> tuple[Tensor, Tensor]:
        """Held-out inputs [K, M, *shape] and targets [K, M], -1 for those that do not belong to the task."""
        ...


class Stream(Protocol):
    """The tasks of a problem. shape: of one input. fingerprint: of the data."""

    shape: tuple[int, ...]
    fingerprint: str

    def task(self, index: int) -> Task:
        """Task number `index`, the same whenever it is asked for. Raises ValueError if there is none."""
        ...


def open_stream(problem: Problem, seeds: Sequence[int], device: torch.device, folder: Path | None = None) -> Stream:
    """The stream of a problem for one member a seed. folder: where data sets lie.

    Raises ValueError if the data is missing or does not fit the problem.
    """
    change = _varying(problem)
    if problem.data == "bits" or isinstance(change, FlippingBits):
        if problem.data != "bits" or not isinstance(change, FlippingBits):
            raise ValueError("the data 'bits' goes with the change FlippingBits, and no other")
        return BitStream(problem, change, seeds, device)
    return ImageStream(problem, seeds, device, folder)


class ImageStream:
    """Tasks on a fixed pool of labelled images, or of inputs drawn from N(0, 1)."""

    def __init__(self, problem: Problem, seeds: Sequence[int], device: torch.device, folder: Path | None = None):
        self.problem, self.seeds, self.device = problem, tuple(seeds), device
        self._low, self._high = (-1.0, 1.0) if problem.centred else (0.0, 1.0)
        if problem.data == "gaussian":
            self._gaussian_pool()
        else:
            self._image_pool(datasets.load(problem.data, folder))
        if problem.loss != "cross_entropy" or self.classes > problem.outputs:
            raise ValueError(f"{self.classes} classes need cross_entropy and as many outputs, got {problem.outputs}")

    def _image_pool(self, found: datasets.Images) -> None:
        images, labels = found.train_images, found.train_labels
        if self.problem.all_images:
            images, labels = torch.cat([images, found.test_images]), torch.cat([labels, found.test_labels])
        self.fingerprint, self._levels = found.fingerprint(), found.levels
        self.shape = tuple(images.shape[1:])
        self._images, labels = images.to(self.device), labels.to(self.device)
        self._test_images, self._test_labels = found.test_images.to(self.device), found.test_labels.to(self.device)
        self.classes = 2 if isinstance(_varying(self.problem), ClassPairs) else found.classes
        count = len(labels) if self.problem.examples is None else self.problem.examples
        if count > len(labels):
            raise ValueError(f"{self.problem.data} has {len(labels)} images, the problem wants {count}")
        self._chosen = self._for_each(
            lambda g: torch.randperm(len(labels), generator=g, device=self.device)[:count], "examples"
        )
        self._pools = [Pool(labels[rows], self._test_labels, images[0].numel(), found.classes) for rows in self._chosen]

    def _gaussian_pool(self) -> None:
        problem, count = self.problem, self.problem.examples or 256
        self.fingerprint, self.shape, self._levels = "gaussian", (_GAUSSIAN_PIXELS,), 1
        drawn = self._for_each(
            lambda g: torch.randn(count, _GAUSSIAN_PIXELS, generator=g, device=self.device), "examples"
        )
        self._images = drawn.flatten(0, 1)
        self._test_images, self._test_labels = self._images[:0], torch.zeros(0, dtype=torch.int64, device=self.device)
        self.classes = problem.outputs
        members = torch.arange(len(self.seeds), device=self.device)
        self._chosen = torch.arange(count, device=self.device) + members[:, None] * count
        labels = torch.arange(count, device=self.device) % problem.outputs
        self._pools = [Pool(labels, self._test_labels, _GAUSSIAN_PIXELS, problem.outputs)] * len(self.seeds)

    def _for_each(self, draw: Callable[[torch.Generator], Tensor], purpose: str, *index: int) -> Tensor:
        return torch.stack([draw(generator(self.device, seed, purpose, *index)) for seed in self.seeds])

    def task(self, index: int) -> ImageTask:
        problem = self.problem
        contents = [
            problem.change.content(index, pool, lambda k, seed=seed: generator(self.device, seed, "content", k))
            for pool, seed in zip(self._pools, self.seeds, strict=True)
        ]
        orders = [
            self._order(content.rows, len(content.labels), generator(self.device, seed, "order", index))
            for content, seed in zip(contents, self.seeds, strict=True)
        ]
        permutations = [content.permutation for content in contents if content.permutation is not None]
        tests = [content.test_labels for content in contents if content.test_labels is not None]
        return ImageTask(
            self,
            torch.stack(orders),
            torch.stack([content.labels for content in contents]),
            torch.stack(permutations) if permutations else None,
            torch.stack(tests) if tests else None,
        )

    def _order(self, rows: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        """Which image each step sees: [T, B], numbers in the member's pool."""
        total = self.problem.steps * self.problem.batch_size
        size = count if rows is None else len(rows)
        if self.problem.with_replacement:
            drawn = torch.randint(size, (total,), generator=generator, device=self.device)
        else:
            passes = -(-total // size)
            drawn = torch.cat([torch.randperm(size, generator=generator, device=self.device) for _ in range(passes)])[
                :total
            ]
        drawn = drawn if rows is None else rows[drawn]
        return drawn.view(self.problem.steps, self.problem.batch_size)

    def scaled(self, images: Tensor) -> Tensor:
        """What the network sees of stored images."""
        if images.is_floating_point():
            return images
        scaled = images.float().mul_((self._high - self._low) / self._levels)
        return scaled.add_(self._low) if self._low else scaled

    @property
    def images(self) -> Tensor:
        """The whole pool as stored: [N, *shape]."""
        return self._images

    @property
    def test_images(self) -> Tensor:
        return self._test_images

    def pool_rows(self, member_rows: Tensor) -> Tensor:
        """[K, M] numbers in each member's own pool -> numbers in `images`."""
        return self._chosen.gather(1, member_rows)


@dataclass(frozen=True)
class ImageTask:
    """order: [K, T, B], rows of the members' pools. labels: [K, N]. permutation: [K, D]. test_labels: [K, M]."""

    stream: ImageStream
    order: Tensor
    labels: Tensor
    permutation: Tensor | None
    test_labels: Tensor | None

    def batches(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        members, _, batch = self.order.shape
        rows = self.order[:, start:stop].reshape(members, -1)
        x, y = self._shown(rows)
        return x.view(members, stop - start, batch, *x.shape[2:]), y.view(members, stop - start, batch)

    def examples(self) -> tuple[Tensor, Tensor]:
        rows = self.order.flatten(1)[:, :1000]
        return self._shown(rows)

    def test(self) -> tuple[Tensor, Tensor]:
        if self.test_labels is None:
            raise ValueError("labels of this problem are made up, so nothing can be held out")
        images = self.stream.test_images.expand(len(self.order), *self.stream.test_images.shape)
        return self._seen(images), self.test_labels

    def _shown(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        # An eighth of the time of an index by a matrix.
        images = self.stream.images.index_select(0, self.stream.pool_rows(rows).flatten()).unflatten(0, rows.shape)
        return self._seen(images), self.labels.gather(1, rows)

    def _seen(self, images: Tensor) -> Tensor:
        if self.permutation is not None:
            flat = images.flatten(2)
            places = self.permutation.unsqueeze(1).expand(-1, flat.shape[1], -1)
            images = flat.gather(2, places).view(images.shape)
        return self.stream.scaled(images)


class BitStream:
    """Regression on 20 bits (Dohare et al. 2024): 15 change slowly, 5 are drawn anew at each step.

    The target is a fixed network of 100 threshold units: weights ±1 from 20 bits and a constant, unit i fires where its
    input exceeds 0.7 (m + 1) - S_i, m = 20, S_i its number of negative weights; output weights ±1, and one of a
    constant. Targets are [K, n, B, 1].
    """

    bits, slow, units, beta = 20, 15, 100, 0.7

    def __init__(self, problem: Problem, change: FlippingBits, seeds: Sequence[int], device: torch.device):
        self.problem, self.change, self.seeds, self.device = problem, change, tuple(seeds), device
        self.shape, self.fingerprint, self.classes = (self.bits,), "bits", 0
        if problem.loss != "squared_error" or problem.outputs != 1:
            raise ValueError("the data 'bits' needs loss squared_error and one output")
        self._held = isinstance(problem.change, Constant)
        drawn = [self._signs(generator(device, seed, "examples"), (self.units, self.bits + 2)) for seed in self.seeds]
        weights = torch.stack(drawn)
        self._inner, self._outer = weights[:, :, : self.bits + 1], weights[:, :, self.bits + 1]
        negative = (self._inner < 0).sum(2)
        self._threshold = self.beta * (self.bits + 1) - negative
        constants = [self._signs(generator(device, seed, "examples", 1), (1,)) for seed in self.seeds]
        self._constant = torch.stack(constants)

    def _signs(self, source: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(2, shape, generator=source, device=self.device).float() * 2 - 1

    def target(self, inputs: Tensor) -> Tensor:
        """inputs [K, M, 20] of 0 and 1 -> [K, M]."""
        with_constant = F.pad(inputs, (0, 1), value=1.0)
        fires = (torch.bmm(with_constant, self._inner.mT) > self._threshold.unsqueeze(1)).float()
        return torch.einsum("kmu,ku->km", fires, self._outer) + self._constant

    def slow_bits(self, seed: int, task: int) -> Tensor:
        """[15] of 0 and 1 in task number `task`."""
        first = generator(self.device, seed, "content", 0)
        bits = torch.randint(2, (self.slow,), generator=first, device=self.device)
        if self._held or task == 0:
            return bits.float()
        if self.change.all_bits:
            drawn = generator(self.device, seed, "content", task)
            return torch.randint(2, (self.slow,), generator=drawn, device=self.device).float()
        for index in range(1, task + 1):
            drawn = generator(self.device, seed, "content", index)
            flipped = torch.randint(self.slow, (1,), generator=drawn, device=self.device)
            bits = torch.where(torch.arange(self.slow, device=self.device) == flipped, 1 - bits, bits)
        return bits.float()

    def task(self, index: int) -> BitTask:
        samples = self.problem.steps * self.problem.batch_size
        inputs = []
        for seed in self.seeds:
            drawn = generator(self.device, seed, "order", index)
            fast = torch.randint(2, (samples, self.bits - self.slow), generator=drawn, device=self.device).float()
            inputs.append(torch.cat([self.slow_bits(seed, index).expand(samples, -1), fast], 1))
        x = torch.stack(inputs)
        return BitTask(x, self.target(x).unsqueeze(2), self.problem.batch_size)


@dataclass(frozen=True)
class BitTask:
    """inputs [K, T * B, 20], targets [K, T * B, 1]."""

    inputs: Tensor
    targets: Tensor
    batch_size: int

    def batches(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        part = slice(start * self.batch_size, stop * self.batch_size)
        x, y = self.inputs[:, part], self.targets[:, part]
        shape = (len(x), stop - start, self.batch_size)
        return x.reshape(*shape, -1), y.reshape(*shape, 1)

    def examples(self) -> tuple[Tensor, Tensor]:
        return self.inputs[:, :1000], self.targets[:, :1000]

    def test(self) -> tuple[Tensor, Tensor]:
        raise ValueError("the inputs of this problem are drawn, so none are held out")


def _varying(problem: Problem) -> Change:
    """The change itself, also of a stationary twin."""
    change = problem.change
    return change.of if isinstance(change, Constant) and change.of is not None else change
