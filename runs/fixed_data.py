"""What a run has to do with fixed data: agents get them, and offline runs are told in normalised scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from envs.runner import ContinuousActionSpec
from runs import checkpoint
from runs.config import RunConfig
from runs.datasets.source import DataSource
from runs.record import Row


def give_data(agent: Any, config: RunConfig, seeds: Sequence[int]) -> None:
    """Let the agent of a run read its data, and go on from the run it was offline in, if there is one.

    Raises Damaged or ValueError if data or checkpoint are not there any more, or not what they were.
    """
    assert config.data is not None, "this run has no data"
    spec = agent.specs[1]
    assert isinstance(spec, ContinuousActionSpec)
    data = DataSource.load(config.data).open_for(spec)
    agent.read(data.transitions, config.steps)
    if config.initial is not None:
        for index, seed in enumerate(seeds):
            agent.go_on_from(checkpoint.read_seed(Path(config.initial), seed, with_rings=False)["agent"], index)


def score_rows(config: RunConfig, step: int, seed: int, return_: float) -> Iterator[Row]:
    """`eval/score_WHO`, 0 to 100 between the two returns of each reference pair; none for runs without data."""
    if config.data is not None:
        for name, (low, high) in config.data["references"].items():
            yield Row(step, f"eval/score_{name}", 100 * (return_ - low) / (high - low), seed)
