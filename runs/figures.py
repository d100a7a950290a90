"""The figures of a report: what to draw (`lines_of`), the panels, and matplotlib's SVG made to fit into a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from runs import statistics
from runs.record import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, told apart by colour-blind readers; black is left to text, yellow is last as it is weak on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_DASHES = ("-", "--", ":", "-.")  # told apart again once the colours are used up
_BINS = 60
_POINTS = 400  # of a line; more are not seen, but make the page large
_FEW = 4  # lines in a panel up to which the single seeds are drawn too


@dataclass(frozen=True)
class Ink:
    """Colours of everything that is not a curve: text, grid, and secondary text."""

    text: str
    grid: str
    soft: str


PRINT = Ink("#1f2328", "#e1e4e8", "#57606a")
# Stand-ins that matplotlib writes and `inline_svg` turns into the page's own colours, whichever those are.
PAGE = Ink("#010203", "#040506", "#070809")
_PAGE_COLOURS = {PAGE.text: "currentColor", PAGE.grid: "var(--grid)", PAGE.soft: "var(--soft)"}


@dataclass(frozen=True)
class Line:
    """One metric of one run, and of one task where rows have tasks: what a panel draws in one colour.

    steps [T], values [S, T]: at the steps all seeds share. single: each seed's own (steps [T_seed], values [T_seed]).
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    single: statistics.SeedCurves


def lines_of(rows_by_run: Mapping[str, Sequence[Row]], name: str) -> list[Line]:
    """The lines of one metric: run name -> its rows of that metric; runs without measured values have no line.

    Seeds that recorded at common steps keep them. Where in any run less than half of a seed's steps are common
    (episodes end when they end), all runs are averaged in bins. Long lines are thinned to means of neighbours.
    """
    lines = []
    for run, rows in rows_by_run.items():
        for task in dict.fromkeys(row.task for row in rows):
            parts = [run] if task is None else [f"{task}"] if len(rows_by_run) == 1 else [run, f"{task}"]
            own = statistics.seed_curves(rows, name, task)
            if own:
                lines.append(Line(" · ".join(parts), *statistics.align(own), own))
    if any(2 * len(line.steps) < min(len(steps) for steps, _ in line.single.values()) for line in lines):
        lines = [_binned(line) for line in lines]
    return [_thinned(line) for line in lines]


def has_curve(lines: Iterable[Line]) -> bool:
    """One point is a result for the table, not a curve."""
    return any(len(steps) > 1 for line in lines for steps, _ in line.single.values())


def band_note(*panels: Sequence[Line]) -> str:
    """What the eye sees in a figure: how many seeds, and whether there is a band. Empty without lines."""
    counts = sorted({len(line.single) for lines in panels for line in lines})
    if not counts:
        return ""
    if counts == [1]:
        return "one seed, so a line without a band"
    seeds = f"{counts[-1]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    thin = ", thin: single seeds" if any(len(lines) <= _FEW for lines in panels) else ""
    alone = "; one seed has no band" if counts[0] == 1 else ""
    return f"mean of {seeds} seeds, band: its 95 % bootstrap interval{thin}{alone}"


def learning_curve(lines: Sequence[Line], x_label: str, y_label: str, ink: Ink = PAGE) -> Figure:
    """One large panel; a sentence in it if there is nothing to draw."""
    figure, (axes,) = _new_figure(8.4, 4.2, 1, 1)
    _draw_panel(axes, lines, ink)
    axes.set_xlabel(x_label, color=ink.text)
    axes.set_ylabel(y_label, color=ink.text)
    if not lines:
        axes.text(0.5, 0.5, "no curve recorded yet", transform=axes.transAxes, ha="center", color=ink.text)
    _add_legend(figure, axes, len(lines), ink)
    return figure


def picture(lines: Sequence[Line], x_label: str, y_label: str, title: str, subtitle: str) -> Figure:
    """The learning curve with a title, in print colours, to be saved as a picture."""
    figure = learning_curve(lines, x_label, y_label, PRINT)
    axes = figure.axes[0]
    axes.set_title(title, loc="left", color=PRINT.text, fontweight="bold", pad=24)
    # Out of the layout, where a long sentence would squeeze the panel; the title's pad holds its place.
    axes.text(0, 1.035, subtitle, transform=axes.transAxes, color=PRINT.soft, fontsize=8.5).set_in_layout(False)
    return figure


def small_multiples(panels: Mapping[str, Sequence[Line]], x_label: str, ink: Ink = PAGE) -> Figure:
    """One small panel for each title, three in a row, sharing the meaning of the colours."""
    columns = 3
    rows = -(-len(panels) // columns)
    fullest = max(panels.values(), key=len)
    figure, places = _new_figure(8.4, 2.1 * rows + 0.3 * (len(fullest) > 1), rows, columns)
    for index, (axes, (title, lines)) in enumerate(zip(places, panels.items(), strict=False)):
        _draw_panel(axes, lines, ink)
        axes.set_title(title, color=ink.text, fontsize=9.5, loc="left")
        axes.tick_params(labelsize=8)
        if index + columns >= len(panels):
            axes.set_xlabel(x_label, color=ink.soft, fontsize=8.5)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    _add_legend(figure, places[list(panels.values()).index(fullest)], len(fullest), ink)
    return figure


def inline_svg(figure: Figure, label: str, prefix: str) -> str:
    """A figure as an <svg> element: no background, text and grid in the page's colours.

    prefix: goes before every id, because several figures stand in one page. The same figure gives the same bytes.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _new_figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, which would keep global state and may ask for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def _draw_panel(axes: Axes, lines: Sequence[Line], ink: Ink) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        dash = _DASHES[index // len(COLOURS) % len(_DASHES)]
        if len(line.single) > 1 and len(lines) <= _FEW:
            for steps, values in line.single.values():
                axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.4)
        if not len(line.steps):
            continue
        if len(line.single) > 1:
            low, high = statistics.mean_curve_interval(line.values, statistics.report_generator())
            axes.fill_between(line.steps, low, high, color=colour, alpha=0.2, linewidth=0)
        marker = "o" if len(line.steps) < 3 else None
        axes.plot(line.steps, line.values.mean(axis=0), dash, color=colour, lw=2, marker=marker, label=line.label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(True, axis="y", color=ink.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.tick_params(color=ink.grid, labelcolor=ink.text, length=3)
    axes.yaxis.get_offset_text().set_color(ink.text)
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(ink.grid)


def _add_legend(figure: Figure, axes: Axes, count: int, ink: Ink) -> None:
    """Below the panels, where it hides no curve. One line needs none."""
    if count > 1:
        handles, labels = axes.get_legend_handles_labels()
        columns = min(count, 3)
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, labelcolor=ink.text)


def _binned(line: Line) -> Line:
    """A line through bins; single episodes would bury the mean, so each seed is drawn through the same bins."""
    steps, values = statistics.align_in_bins(line.single, _BINS)
    return Line(line.label, steps, values, {seed: (steps, own) for seed, own in zip(line.single, values, strict=True)})


def _thinned(line: Line) -> Line:
    single = {seed: _means_of_neighbours(*own) for seed, own in line.single.items()}
    return Line(line.label, *_means_of_neighbours(line.steps, line.values), single)


def _means_of_neighbours(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means along the last axis, at most _POINTS of them; a mean stands at its last step."""
    if len(steps) <= _POINTS:
        return steps, values
    starts = np.linspace(0, len(steps), _POINTS + 1).astype(np.int64)
    means = np.add.reduceat(values, starts[:-1], axis=-1) / np.diff(starts)
    return steps[starts[1:] - 1], means
