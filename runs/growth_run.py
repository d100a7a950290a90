"""One run of GrowCLIP: its settings, its training, its files.

Beside what every run has, `growth.json` holds what happened when each part arrived (by seed: genome, candidates, what
was chosen), and `gallery.npz` what a few held-out captions find.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from continual.growth.genome import Genome
from continual.growth.growclip import Config, GrowClip
from continual.pairs.benchmarks import open_pairs
from continual.pairs.captions import Mixture
from continual.pairs.dimensions import DimensionStudy
from continual.pairs.evaluation import gallery
from continual.pairs.learner import PairLearner
from continual.pairs.stream import PairStream, StreamConfig
from runs import compute
from runs.continual_run import CONTINUAL, drive, opened, with_tuples
from runs.files import read_json, write_atomically, write_json
from runs.growth_section import GALLERY, HISTORY
from runs.record import State
from runs.settings import CONFIG, read_config, read_fields

_SLICE = 10  # steps between two looks at whether to stop
_DERIVED = ("fingerprint", "parts", "pairs", "held_out", "vocabularies", "task_steps")


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """All that defines a run: its `config.json`. genomes, paths: of each seed; an empty path: that of the strategy."""

    strategy: str
    strategy_config: dict[str, Any]
    benchmark: str
    preset: str | None
    genomes: tuple[Any, ...]
    paths: tuple[Any, ...]
    stream: dict[str, Any]
    tasks: int | None
    concepts: int | None
    steps: int
    first_steps: int | None
    study: str
    seeds: tuple[int, ...]
    eval_every: int
    checkpoint_every: float
    device: str
    threads: int
    data: str | None
    tensorboard: bool
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path, learner: PairLearner) -> None:
        """Write `config.json`; what the data say of themselves is for readers, and follows."""
        stream, parts = learner.stream, range(learner.stream.parts)
        derived = {
            "fingerprint": stream.pairs.fingerprint(),
            "parts": list(stream.pairs.part_names),
            "pairs": [stream.seen(part) for part in parts],
            "held_out": [len(stream.concepts("held_out", part)) for part in parts],
            "vocabularies": list(stream.vocabularies),
            "task_steps": list(learner.plan),
        }
        write_json(folder / CONFIG, {"command": CONTINUAL, **dataclasses.asdict(self), **derived})

    @classmethod
    def load(cls, folder: Path) -> GrowthConfig:
        """Read it back. Raises ValueError, one sentence, naming what is wrong with the file."""
        values = read_config(folder)
        own = {name: value for name, value in values.items() if name not in (*_DERIVED, "command")}
        return cls(**read_fields(cls, own, folder / CONFIG))

    def settings(self, index: int) -> Config:
        """GrowCLIP's, for one seed. Raises ValueError for what cannot be."""
        own = with_tuples(self.strategy_config)
        if self.paths[index]:
            own["path"] = tuple(self.paths[index])
        return Config(**own)


def build(config: GrowthConfig) -> PairLearner:
    """The learner of a run, at its first step.

    Raises ValueError, one sentence, for what does not fit together, or data that is not here.
    """
    genomes = [Genome.from_dict(values) for values in config.genomes]
    folder = None if config.data is None else Path(config.data)
    pairs = open_pairs(config.benchmark, folder, genomes[0].image_size, config.tasks, config.concepts)
    options = StreamConfig(**{**config.stream, "mixture": Mixture(**config.stream["mixture"])})
    stream = PairStream(pairs, options, torch.device(config.device))
    steps = [config.steps] * stream.parts
    steps[0] = config.first_steps or config.steps
    known = stream.vocabularies[0]
    settings = [config.settings(index) for index in range(len(config.seeds))]
    clips = [
        GrowClip(own, genome.grown(vocabulary=known), seed, torch.device(config.device))
        for own, genome, seed in zip(settings, genomes, config.seeds, strict=True)
    ]
    if config.study == "dims":
        return DimensionStudy(stream, steps, clips, config.eval_every)
    for own, clip in zip(settings, clips, strict=True):
        _check_budget(own, clip.genome, [stream.seen(part) for part in range(stream.parts)])
    return PairLearner(stream, steps, clips, config.eval_every)


def _check_budget(settings: Config, genome: Genome, pairs: Sequence[int]) -> None:
    """Raises ValueError, one sentence, for a model that is asked to grow and never could."""
    largest, least = settings.largest, genome.capacity
    if largest is not None and least > largest:
        raise ValueError(
            f"the first genome has {least:,} parameters without embeddings, more than --largest {largest:,}"
        )
    if settings.choice not in ("search", "random") or not settings.budget_exponent:
        return
    if not settings.space.names:
        raise ValueError("every move is disabled, so nothing can grow; enable one, or say --choice fixed")
    cap = settings.budget.cap(least, pairs[0], pairs[-1])
    moves = settings.space.candidates(genome, cap, settings.budget, force_growth=False)
    if len(moves) == 1 and len(pairs) > 1:
        smallest = min(move.genome.capacity for move in settings.space.moves(genome))
        raise ValueError(
            f"no growth ever fits: the smallest makes {smallest:,} parameters without embeddings, and the budget "
            f"ends at {min(int(cap), largest or int(cap)):,}; raise --budget-exponent or --largest, or "
            "say --choice fixed"
        )


def train(
    config: GrowthConfig,
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
    learner = build(config)
    learner.stop_wanted = stop_wanted
    with opened(learner, folder, config, differences) as run:
        return drive(
            learner, run, config.checkpoint_every, _SLICE, tell, stop_wanted, lambda: _write_growth(learner, folder)
        )


def _write_growth(learner: PairLearner, folder: Path) -> None:
    """What happened so far, and what the first seed's model finds."""
    write_json(folder / HISTORY, {str(seed): history for seed, history in learner.history.items()})
    content = io.BytesIO()
    found = gallery(learner.clips[0].model, learner.stream, learner.learnt_part)
    np.savez_compressed(content, **found, allow_pickle=False)
    write_atomically(folder / GALLERY, content.getvalue())


def read_growths(folder: Path) -> Mapping[int, list[dict[str, Any]]]:
    """What happened in a run, by seed. Raises ValueError, one sentence, if the run has not come so far."""

    try:
        found = read_json(folder / HISTORY)
    except OSError as error:
        raise ValueError(f"'{folder}' has no {HISTORY}: no part of it has been learnt, or it is no such run") from error
    return {int(seed): history for seed, history in found.items()}
