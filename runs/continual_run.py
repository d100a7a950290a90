"""One strategy on one benchmark, all seeds as one population: its settings, its training, its files.

Beside what every run has, `predictions/after_task_I.npz` holds the answer to every test sample after task I (answers
[K, N], labels [K, N], the task of each sample [N]), so that any metric can be computed later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from continual import catalogue
from continual.catalogue import Benchmark
from continual.costs import costs
from continual.experiences import Experiences
from continual.learner import Learner, Measurement
from continual.pairs.benchmarks import COLLECTIONS, is_path
from continual.presets import PRESETS
from plasticity.problems.datasets import Images
from plasticity.registry import make
from runs import compute
from runs.errors import nearest
from runs.files import write_atomically, write_json
from runs.population_run import PopulationRun, Trained, restore
from runs.record import State
from runs.recovery import add_differences
from runs.settings import CONFIG, read_config, read_fields

if TYPE_CHECKING:
    from runs.growth_run import GrowthConfig

CONTINUAL = "continual"  # the command in `config.json`
PREDICTIONS = "predictions"
_SLICE = 200  # steps between two looks at whether to stop
_LOOKS = 10  # evaluations within each task, unless told otherwise
_DERIVED = ("settings", "class_orders", "fingerprint", "dropped_samples", "task_steps")


@dataclass(frozen=True, kw_only=True)
class ContinualConfig:
    """All that defines a run: its `config.json`. overrides: fields of the benchmark that differ from its preset."""

    strategy: str
    strategy_config: dict[str, Any]
    benchmark: str
    preset: str | None
    overrides: dict[str, Any]
    seeds: tuple[int, ...]
    interventions: str
    mask_unseen: bool
    eval_every: int | None
    checkpoint_every: float
    device: str
    threads: int
    data: str | None
    tensorboard: bool
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    def resolved(self) -> Benchmark:
        """The benchmark with all its settings. Raises ValueError for an unknown name or a bad value."""
        return resolve_benchmark(self.benchmark, self.preset, self.overrides, self.strategy)

    def save(self, folder: Path, learner: Learner) -> None:
        """Write `config.json`; what the data and the learner say of themselves is for readers, and follows."""
        stream = learner.stream
        derived = {
            "settings": dataclasses.asdict(self.resolved()),
            "class_orders": stream.class_order.tolist(),
            "fingerprint": stream.fingerprint,
            "dropped_samples": stream.dropped,
            "task_steps": [task.steps for task in learner.tasks],
        }
        write_json(folder / CONFIG, {"command": CONTINUAL, **dataclasses.asdict(self), **derived})

    @classmethod
    def load(cls, folder: Path) -> ContinualConfig:
        """Read it back. Raises ValueError, one sentence, naming what is wrong with the file."""
        values = read_config(folder)
        if (command := values.pop("command")) != CONTINUAL:
            raise ValueError(f"'{folder}' was made by `neoteny {command}`, not by `neoteny {CONTINUAL}`")
        own = {name: value for name, value in values.items() if name not in _DERIVED}
        return cls(**read_fields(cls, own, folder / CONFIG))


def resolve_benchmark(name: str, preset: str | None, overrides: Mapping[str, Any], strategy: str) -> Benchmark:
    """A benchmark by name with what a preset and the user change. Raises ValueError, one sentence.

    overrides: also what the strategy's own preset changes.
    """
    if name in COLLECTIONS or is_path(name):
        raise ValueError(
            f"'{name}' has image-caption pairs and '{strategy}' learns labels; growclip learns pairs: "
            f"neoteny continual growclip --benchmark {name}"
        )
    if name not in catalogue.BENCHMARKS:
        raise ValueError(f"unknown benchmark '{name}'.{nearest(name, catalogue.BENCHMARKS)}")
    known = dict.fromkeys(["small", *PRESETS.get(strategy, {})])
    if preset is not None and preset not in known:
        raise ValueError(f"'{name}' has no preset '{preset}'.{nearest(preset, known)}")
    return catalogue.resolve(name, preset == "small", **with_tuples(overrides))


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists for them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def build(config: ContinualConfig, data: Images | Experiences | None = None) -> Learner:
    """The learner of a run, at its first step. data: its images or tasks, if they are at hand.

    Raises ValueError, one sentence, for what does not fit together, or data that is not here.
    """
    benchmark = config.resolved()
    if data is None:
        data = catalogue.open_data(benchmark, None if config.data is None else Path(config.data))
    _, settings = catalogue.KNOWN[config.strategy]
    own = settings(**with_tuples(config.strategy_config))
    learner = catalogue.open_learner(
        benchmark, config.strategy, own, config.seeds, torch.device(config.device),
        data, mask_unseen=config.mask_unseen, interventions=make(config.interventions),
    )  # fmt: skip
    shortest = min(task.steps for task in learner.tasks)
    if learner.strategy.learns_in_steps:
        learner.evaluate_every = max(1, shortest // _LOOKS) if config.eval_every is None else config.eval_every
    return learner


def train(
    config: ContinualConfig,
    folder: Path,
    tell: Callable[[int], None],
    stop_wanted: Callable[[], bool],
    differences: Sequence[str] = (),
) -> State:
    """Train a run from its newest checkpoint, or from the start, to its end, or until it should stop.

    tell: called with the steps taken. differences: what of this place is not as the config has it. Raises OSError for a
    full disk, ValueError if it cannot go on here.
    """
    compute.set_up(torch.device(config.device), config.threads)
    if len(config.seeds) == 1:  # products of one small network are faster without oneDNN's call
        torch.set_float32_matmul_precision("highest")
    learner = build(config)
    with opened(learner, folder, config, differences) as run:
        if run.is_new:
            _write_costs(config, run)
        return drive(
            learner,
            run,
            config.checkpoint_every,
            _SLICE,
            tell,
            stop_wanted,
            lambda: _write_predictions(learner, folder),
        )


class Driven(Trained, Protocol):
    """What learns task after task, for K members. index: of the task, and steps: that were taken."""

    index: int
    steps: int
    members: int
    measurements: list[Measurement]

    @property
    def total_steps(self) -> int: ...

    @property
    def done(self) -> bool: ...

    def advance(self, steps: int) -> None: ...


@contextlib.contextmanager
def opened(
    learner: Driven, folder: Path, config: ContinualConfig | GrowthConfig, differences: Sequence[str]
) -> Iterator[PopulationRun]:
    """The record of a run, the learner being put where its newest checkpoint left it; closed behind.

    differences: see `train`. Raises ValueError, one sentence, if it cannot go on here.
    """
    before = restore(learner, folder, config.seeds, config.environment)
    known = add_differences(before.get("differences", ()), differences, learner.steps)
    with contextlib.closing(PopulationRun(folder, config.seeds, learner, config.tensorboard, before, known)) as run:
        yield run


def drive(
    learner: Driven,
    run: PopulationRun,
    checkpoint_every: float,
    slice_steps: int,
    tell: Callable[[int], None],
    stop_wanted: Callable[[], bool],
    task_ended: Callable[[], None],
) -> State:
    """Take all steps that are left, or those until it should stop; record, save. task_ended: writes more files."""
    run.write_status("running", learner.steps, learner.total_steps)
    while not learner.done and not stop_wanted():
        task = learner.index
        learner.advance(slice_steps)
        _take(learner, run, task, checkpoint_every, task_ended)
        tell(learner.steps)
    state: State = "done" if learner.done else "stopped"
    run.save_if_new(learner.steps, learner.done)
    run.write_status(state, learner.steps, learner.total_steps)
    return state


def _write_costs(config: ContinualConfig, run: PopulationRun) -> None:
    """What the strategy takes, measured on another learner of the same kind, so that this one stays as it is."""
    found = costs(build(dataclasses.replace(config, seeds=config.seeds[:1])))
    run.write(0, {name: torch.full((len(config.seeds),), value, dtype=torch.float64) for name, value in found.items()})


def _take(
    learner: Driven, run: PopulationRun, task: int, checkpoint_every: float, task_ended: Callable[[], None]
) -> None:
    """Record what was measured in a slice of task number `task`; save now and then, and at the end of a task."""
    for measured in learner.measurements:
        run.write(measured.step, measured.values, measured.task)
    learner.measurements.clear()
    ended = learner.index > task
    if ended:
        task_ended()
    if learner.done:
        seconds = run.wall_seconds / learner.steps / learner.members
        run.write(learner.steps, {"speed/seconds_per_step": torch.full((learner.members,), seconds)})
    if ended or run.seconds_since_saved > checkpoint_every:
        run.save(learner.steps, learner.done)
        run.write_status("running", learner.steps, learner.total_steps)


def _write_predictions(learner: Learner, folder: Path) -> None:
    labels = [learner.stream.test(index)[1] for index in range(learner.stream.tasks)]
    tasks = np.concatenate([np.full(found.shape[1], index + 1) for index, found in enumerate(labels)])
    content = io.BytesIO()
    np.savez_compressed(
        content,
        answers=learner.predictions[-1].cpu().numpy(),
        labels=torch.cat(labels, 1).to(torch.int16).cpu().numpy(),
        tasks=tasks.astype(np.int16),
        seeds=np.array(learner.stream.seeds),
    )
    (folder / PREDICTIONS).mkdir(exist_ok=True)
    write_atomically(folder / PREDICTIONS / f"after_task_{learner.index}.npz", content.getvalue())
