"""The options of `neoteny probe`, apart so that its help does not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

FAMILIES = ("labels", "network", "next")  # of targets


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What the networks of a checkpoint can still learn, compared with fresh ones of the same kind."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run, or a file with the state_dict of a torch module"""
    families: tuple[str, ...] = FAMILIES
    """targets: drawn labels, outputs of a random network, next tasks"""
    step: int | None = None
    """which checkpoint; default: the newest"""
    seeds: int = 3
    """how many of the run's seeds, its first ones"""
    network: str | None = None
    """only this one, such as actor, critics, or an intervention"""
    layers: bool = True
    """also layer by layer"""
    draws: int = 5
    """how often targets are drawn"""
    steps: int = 300
    """training steps"""
    batch_size: int = 64
    samples: int = 256
    """inputs that are trained on; half as many are held out"""
    learning_rate: float | None = None
    """also tried: a third and three times it; default: that of the run"""
    builder: str | None = None
    """of a file: MODULE:FUNCTION that builds its network"""
    inputs: Path | None = None
    """of a file: its inputs, .pt or .npy, [N, ...]"""
    input_shape: tuple[int, ...] = ()
    """of a file: shape of one input, to be drawn from the normal distribution"""
    outputs: Literal["classes", "numbers"] = "classes"
    """of a file: what its outputs are"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 1
    out: Path | None = None
    """where the results go; default: into the run, or beside the file"""
    quiet: bool = False
    """no progress and no table"""
    json: bool = False
    """print everything measured as one JSON object on stdout"""
