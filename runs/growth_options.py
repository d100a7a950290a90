"""What the user types for `neoteny continual growclip`: the flags of a run, and its presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

GROWCLIP = "growclip"
GROWTH_EXAMPLE = "neoteny continual growclip --benchmark shapes-captions --seeds 3"


@dataclass(frozen=True, kw_only=True)
class GrowthOptions:
    """Learn image-caption pairs that arrive part by part with a dual encoder that grows."""

    benchmark: str
    """emoji, icons, emoji-icons, shapes-captions, coco-captions, flickr30k, or a folder or .tar of one's own"""
    preset: str | None = None
    """small: two cores, minutes (the default); paper: the size of the paper, for a GPU"""
    seeds: int = 3
    """how many independent repetitions"""
    seed: int = 0
    """the first seed; the others follow it"""
    tasks: int | None = None
    """cut into so many equal parts; default: by date, as the pairs have it"""
    concepts: int | None = None
    """only so many of each part"""
    steps: int = 150
    """of the optimiser, on each part"""
    first_steps: int | None = None
    """on the first part; default: the same"""
    batch_size: int = 128
    """pairs of a step, each of another concept"""
    regime: Literal["cumulative", "incremental", "incremental+replay"] = "cumulative"
    """a part is learnt from all pairs so far, itself, or itself and a memory"""
    memory: int = 200
    """concepts that are kept, of incremental+replay"""
    replay_ratio: float = 0.5
    """of a batch, from the memory"""
    held_out: float = 0.1
    """of the concepts of each part, for tests"""
    train_views: Literal["first", "both"] = "first"
    """images to train on; first: the others are for tests"""
    augment: bool = True
    """shift images by up to a sixteenth, change their brightness by up to a tenth"""
    genome: tuple[str, ...] = ()
    """of the first model, KEY=VALUE ...: depth=1,1,1 width=64 heads=4 ffn=128 patch=8 ..."""
    start: Path | None = None
    """a run with whose last genomes to begin: "large from the start" """
    follow: Path | None = None
    """a run whose growths to repeat, seed by seed, without a search"""
    study: Literal["none", "dims"] = "none"
    """dims: grow each dimension alone to one size, from the same first part"""
    eval_every: int = 0
    """steps between looks at the validation loss within a part; 0: none"""
    checkpoint_every: float = 60.0
    """seconds between checkpoints"""
    data: Path | None = None
    """folder of data sets; default: $NEOTENY_DATA, else the cache of `neoteny data fetch`"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 1
    """of the process"""
    tensorboard: bool = True
    """also write TensorBoard event files"""
    out: Path = Path("results")
    """folder of all runs"""
    name: str | None = None
    """folder of this run in --out; default: strategy and benchmark, numbered"""
    quiet: bool = False
    """no progress"""
    json: bool = False
    """print the closing summary as one JSON object on stdout"""


@dataclass(frozen=True)
class GrowthPreset:
    """Other defaults: of the options, of GrowCLIP's settings, and the first genome's name."""

    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    genome: Literal["small", "paper"] = "small"


# The paper's own schedule and optimiser are not known; sizes and the cap are of specs/growclip-and-growth.md, A.2.
PRESETS: dict[str, GrowthPreset] = {
    # With ζ = 0.5 the pairs of the emoji, less than doubling, would make room for one move only.
    "small": GrowthPreset(settings={"budget_exponent": 1.0}),
    "paper": GrowthPreset(
        options={"steps": 2000, "batch_size": 256},
        settings={"learning_rate": 5e-4, "proxy_steps": 60},
        genome="paper",
    ),
}
