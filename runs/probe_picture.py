"""The pictures of a probe: learning curves of checkpoint and fresh network, and what each layer brings back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runs import figures
from runs.files import replacing

_STYLES = {"fresh": 0, "checkpoint": 1}


def draw_curves(result: dict[str, Any], path: Path) -> Path:
    """One panel for each network and family: score on each batch before it is learnt. Returns the path."""
    steps = result["settings"]["steps"]
    panels = {f"{row['network']}, {row['family']}": _lines(row, steps) for row in result["networks"]}
    subtitle = "accuracy, or share of variance explained; band: 95 % interval of the mean over draws and seeds"
    title = f"What {Path(result['run']).name} can still learn"
    figure = figures.picture(panels, "training steps", "score", title, subtitle)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
    return path


def draw_layers(result: dict[str, Any], path: Path) -> Path | None:
    """Bars: how much of the score each re-initialised layer brings back. None, and no file, without layers."""
    several = len({row["network"] for row in result["networks"]}) > 1
    bars = [
        figures.Bar(
            f"{layer}, {row['family'].split()[-1]}" + f", {row['network']}" * several, index, found["recovered_values"]
        )
        for index, row in enumerate(result["networks"])
        for layer, found in row["layers"].items()
    ]
    if not bars:
        return None
    size = 8.4, 0.9 + 0.3 * len(bars)
    title = "Score gained by re-initialising one layer alone; rings: single draws of targets"
    figure = figures.bar_panel(bars, title, size=size, ink=figures.PRINT)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
    return path


def _lines(row: dict[str, Any], steps: int) -> list[figures.Line]:
    lines = []
    for kind, style in _STYLES.items():
        values = np.asarray(row["curves"][kind])
        edges = np.linspace(0, steps, values.shape[1] + 1)
        at = ((edges[:-1] + edges[1:]) / 2).round().astype(np.int64)
        single = {number: (at, own) for number, own in enumerate(values)}
        lines.append(figures.Line(kind, style, at, values, single))
    return lines
