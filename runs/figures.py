"""The figures of a report: what to draw (`Line`), the panels, and matplotlib's SVG made to fit into a page."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from runs import statistics
from runs.record import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, told apart by colour-blind readers; black is left to text, yellow is last as it is weak on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A900")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Dashes differ from neighbour to neighbour, so that a line can be named without its colour; 28 styles in all.
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1.2, 2)))
SEEDS_FOR_AN_INTERVAL = 5  # of a curve
_BINS = 60
_POINTS = 300  # of a line; more are not seen, but make the page large
_HOVER_POINTS = 100
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
_PAGE_COLOURS = {PAGE.text: "currentColor", PAGE.grid: "var(--grid)", PAGE.soft: "var(--soft)"} | {
    colour.lower(): f"var(--line-{index})" for index, colour in enumerate(COLOURS)
}


@dataclass(frozen=True)
class Line:
    """One metric of one run, and of one task where rows have tasks: what a panel draws in one style.

    style: number of the line's colour, dash and marker. steps [T], values [S, T]: at the steps all seeds share.
    single: each seed's own (steps [T_seed], values [T_seed]).
    """

    label: str
    style: int
    steps: np.ndarray
    values: np.ndarray
    single: statistics.SeedCurves

    def band(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Low [T] and high [T] of what is shaded: the mean's 95 % interval, or the range of fewer than five seeds.

        An interval at single steps that is honest with three seeds would fill the panel. None for one seed.
        """
        if len(self.values) < 2 or not len(self.steps):
            return None
        if len(self.values) < SEEDS_FOR_AN_INTERVAL:
            return self.values.min(axis=0), self.values.max(axis=0)
        return statistics.mean_curve_interval(self.values, statistics.report_generator())


@dataclass(frozen=True)
class Bar:
    """One number over seeds, to be drawn as a bar with its interval and its seeds. values [S]."""

    label: str
    style: int
    values: Sequence[float]


def lines_of(rows_by_label: Mapping[str, Sequence[Row]], name: str, styles: dict[str, int]) -> list[Line]:
    """The lines of one metric: label -> its rows of that metric; a label without measured values has no line.

    styles: label -> style, shared by all figures of a page; new labels are entered.
    Seeds that recorded at common steps keep them. Where in any run less than half of a seed's steps are common
    (episodes end when they end), all runs are averaged in bins. Long lines are thinned to means of neighbours.
    """
    lines = []
    for run, rows in rows_by_label.items():
        for task in dict.fromkeys(row.task for row in rows):
            parts = [run] if task is None else [f"{task}"] if len(rows_by_label) == 1 else [run, f"{task}"]
            own = statistics.seed_curves(rows, name, task)
            if own:
                label = " · ".join(parts)
                lines.append(Line(label, styles.setdefault(label, len(styles)), *statistics.align(own), own))
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
    band = ", band: its 95 % interval"
    if counts[-1] < SEEDS_FOR_AN_INTERVAL:
        band = ", band: from the lowest to the highest seed"
    elif counts[0] < SEEDS_FOR_AN_INTERVAL:
        band += f", or the range of fewer than {SEEDS_FOR_AN_INTERVAL} seeds"
    ended = "; a mean ends where one of its seeds does" if any(_ends_early(line) for p in panels for line in p) else ""
    return f"mean of {seeds} seeds{band}{thin}{ended}"


def _ends_early(line: Line) -> bool:
    furthest = max(int(steps[-1]) for steps, _ in line.single.values())
    return not len(line.steps) or line.steps[-1] < 0.9 * furthest


def curve_panel(
    lines: Sequence[Line],
    x_label: str,
    y_label: str = "",
    *,
    size: tuple[float, float],
    title: str = "",
    marks: Iterable[int] = (),
) -> Figure:
    """One panel of curves for a page, size in inches; a sentence in it if there is nothing to draw.

    marks: steps at which an upright line says that something begins.
    """
    figure, (axes,) = _new_figure(size)
    _draw_curves(axes, lines, x_label, y_label, PAGE)
    left, right = axes.get_xlim()
    for step in marks:
        if left <= step < right:
            axes.axvline(step, color=PAGE.soft, linewidth=0.9, linestyle=(0, (1, 2)))
    if title:
        axes.set_title(plain(title), color=PAGE.text, fontsize=10, loc="left", fontweight="bold")
    return figure


def picture(panels: Mapping[str, Sequence[Line]], x_label: str, y_label: str, title: str, subtitle: str) -> Figure:
    """Learning curves with a title in print colours, one panel a place, to be saved as a picture."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (8.4, 4.4) if len(panels) == 1 else (3.6 * columns, 2.5 * rows + 1)
    figure, places = _new_figure(size, rows, columns)
    for axes, (place, lines) in zip(places, panels.items(), strict=False):
        _draw_curves(axes, lines, x_label, y_label, PRINT)
        if len(panels) > 1:
            axes.set_title(plain(place), color=PRINT.text, fontsize=10, loc="left")
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"{plain(title)}\n", linespacing=1.35, x=0.015, ha="left", color=PRINT.text, fontweight="bold")
    # Out of the layout, where a long sentence would squeeze the panels; the title's empty line holds its place.
    top = 1 - 0.36 / size[1]
    figure.text(0.015, top, plain(subtitle), color=PRINT.soft, fontsize=8.5, va="top").set_in_layout(False)
    handles = {
        label: handle for axes in places for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if len(handles) > 1:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower left",
            ncols=4,
            frameon=False,
            labelcolor=PRINT.text,
        )
    return figure


def bar_panel(bars: Sequence[Bar], title: str, *, size: tuple[float, float], ink: Ink = PAGE) -> Figure:
    """Horizontal bars of means with 95 % intervals and each seed as a ring, first bar at the top."""
    figure, (axes,) = _new_figure(size)
    for place, bar in enumerate(bars):
        _draw_bar(axes, place, bar, ink)
    axes.set_yticks(range(len(bars)), [plain(_shortened(bar.label)) for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    _finish_axes(axes, ink, grid="x")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.05)
    axes.autoscale_view(scaley=False)
    axes.axvline(0, color=ink.soft, linewidth=0.8)
    axes.set_title(plain(title), color=ink.text, fontsize=10, loc="left", fontweight="bold")
    return figure


def profile_panel(
    profiles: Sequence[tuple[str, int, np.ndarray]],
    thresholds: np.ndarray,
    x_label: str,
    *,
    size: tuple[float, float],
    ink: Ink = PAGE,
) -> Figure:
    """Performance profiles: (label, style, scores [S, K]) each; thresholds [T]."""
    figure, (axes,) = _new_figure(size)
    for label, style, scores in profiles:
        colour, dash, _ = _style(style)
        gid = f"line{style}-{label}"
        if len(scores) > 1:
            low, high = statistics.performance_profile_interval(scores, thresholds, statistics.report_generator())
            axes.fill_between(thresholds, low, high, color=colour, alpha=0.18, linewidth=0, gid=gid)
        share = statistics.performance_profile(scores, thresholds)
        axes.plot(thresholds, share, linestyle=dash, color=colour, linewidth=2, label=label, gid=gid)
    _finish_axes(axes, ink)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(x_label, color=ink.soft)
    axes.set_ylabel("fraction of runs above", color=ink.soft)
    return figure


def swatch(style: int) -> str:
    """The stroke and marker of a line as a small <svg>, for legends on the page."""
    colour, dash, _ = _style(style)
    pattern = "" if dash == "-" else f' stroke-dasharray="{" ".join(str(round(2 * part)) for part in dash[1])}"'
    shape = _SHAPES[style % len(MARKERS)].format(colour=f"var(--line-{COLOURS.index(colour)})")
    stroke = f'stroke="var(--line-{COLOURS.index(colour)})" stroke-width="2.5"{pattern}'
    return f'<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true"><path d="M0 6H34" {stroke}/>{shape}</svg>'


def inline_svg(figure: Figure, label: str, prefix: str) -> str:
    """A figure as an <svg> element: no background, text and grid in the page's colours.

    prefix: goes before every id, because several figures stand in one page. The same figure gives the same bytes.
    Lines and bands get `class="line"` and their label as `data-line`; the element says where its axes are.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="line\d+-([^"]*)">', r'<g class="line" data-line="\1">', svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    axes = figure.axes[0]
    place, (left, right) = axes.get_position(), axes.get_xlim()
    where = f'data-axes="{place.x0:.4f} {place.x1:.4f} {1 - place.y1:.4f} {1 - place.y0:.4f} {left:.8g} {right:.8g}"'
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}" {where}', 1)


def hover_data(lines: Sequence[Line]) -> str:
    """What the page's script shows under the pointer, as JSON: label, steps, mean, and the bounds of a band."""
    found = []
    for line in lines:
        if not len(line.steps):
            continue
        at = np.unique(np.linspace(0, len(line.steps) - 1, _HOVER_POINTS).round().astype(np.int64))
        rows = [line.values.mean(axis=0), *(line.band() or ())]
        columns = [[float(f"{value:.4g}") for value in row[at]] for row in rows]
        found.append([line.label, line.steps[at].tolist(), *columns])
    return json.dumps(found, separators=(",", ":"))


_SHAPES = (
    '<circle cx="17" cy="6" r="4" fill="{colour}"/>',
    '<path d="M13 2h8v8h-8z" fill="{colour}"/>',
    '<path d="M17 1l5 9h-10z" fill="{colour}"/>',
    '<path d="M17 1l5 5-5 5-5-5z" fill="{colour}"/>',
    '<path d="M17 11l5-9h-10z" fill="{colour}"/>',
    '<path d="M15.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z" fill="{colour}"/>',
    '<path d="M13 2l8 8M21 2l-8 8" stroke="{colour}" stroke-width="3"/>',
)


def _shortened(text: str) -> str:
    """At most 24 letters, so that the name of a bar leaves room for the bar."""
    return text if len(text) <= 24 else f"{text[:12]}…{text[-11:]}"


def plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _style(style: int) -> tuple[str, Any, str]:
    return COLOURS[style % len(COLOURS)], DASHES[style % len(DASHES)], MARKERS[style % len(MARKERS)]


def _new_figure(size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, which would keep global state and may ask for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def _draw_curves(axes: Axes, lines: Sequence[Line], x_label: str, y_label: str, ink: Ink) -> None:
    for line in lines:
        _draw_line(axes, line, single=len(lines) <= _FEW)
    _finish_axes(axes, ink)
    _format_steps(axes)
    _look_at_the_curves(axes, lines)
    axes.set_xlabel(x_label, color=ink.soft)
    axes.set_ylabel(y_label, color=ink.soft)
    if not lines:
        axes.text(0.5, 0.5, "no curve recorded yet", transform=axes.transAxes, ha="center", color=ink.text)


def _draw_line(axes: Axes, line: Line, single: bool) -> None:
    colour, dash, marker = _style(line.style)
    gid = f"line{line.style}-{line.label}"
    if single and len(line.single) > 1:
        for steps, values in line.single.values():
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.45, gid=gid)
    if not len(line.steps):
        return
    band = line.band()
    if band:
        axes.fill_between(line.steps, *band, color=colour, alpha=0.18, linewidth=0, gid=gid)
    spaced = max(1, len(line.steps) // 8)
    # Markers of several lines stand at different steps, so that they do not hide each other.
    first = (line.style * spaced // 3) % spaced
    axes.plot(
        line.steps,
        line.values.mean(axis=0),
        linestyle=dash,
        color=colour,
        linewidth=2,
        marker=marker,
        markersize=5.5,
        markevery=(first, spaced),
        label=plain(line.label),
        gid=gid,
    )


def _draw_bar(axes: Axes, place: int, bar: Bar, ink: Ink) -> None:
    colour, _, _ = _style(bar.style)
    values = np.asarray(bar.values, dtype=np.float64)
    gid = f"line{bar.style}-{bar.label}"
    axes.barh(place, values.mean(), height=0.6, color=colour, alpha=0.35)
    axes.plot(values, np.full(len(values), place), "o", mfc="none", mec=ink.text, markersize=4.5, mew=0.9, gid=gid)
    if len(values) >= 3:
        low, high = statistics.stratified_bootstrap_interval(
            values[:, None], statistics.mean, statistics.report_generator()
        )
        axes.plot([low, high], [place, place], "|-", color=ink.text, linewidth=1.6, markersize=9, gid=gid)


def _look_at_the_curves(axes: Axes, lines: Sequence[Line]) -> None:
    """Wide bands of few seeds may leave the panel; what was measured fills it."""
    bounds = [(values.min(), values.max()) for line in lines for _, values in line.single.values()]
    if not bounds:
        return
    low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - room), min(top, high + room))


def _finish_axes(axes: Axes, ink: Ink, grid: str = "y") -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    values = axes.yaxis if grid == "y" else axes.xaxis
    values.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if max(map(abs, axes.get_ylim() if grid == "y" else axes.get_xlim())) >= 10_000:
        values.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, axis=grid, color=ink.grid, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.tick_params(color=ink.grid, labelcolor=ink.text, length=3, labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set_color(ink.text)
    axes.margins(x=0.01)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(ink.grid)


def _format_steps(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlim(left=0)


def _binned(line: Line) -> Line:
    """A line through bins; single episodes would bury the mean, so each seed is drawn through the same bins."""
    last = max(int(steps[-1]) for steps, _ in line.single.values())
    single = {seed: statistics.align_in_bins({seed: own}, _BINS, last) for seed, own in line.single.items()}
    steps, values = statistics.align_in_bins(line.single, _BINS, last)
    return Line(line.label, line.style, steps, values, {seed: (at, own[0]) for seed, (at, own) in single.items()})


def _thinned(line: Line) -> Line:
    single = {seed: _means_of_neighbours(*own) for seed, own in line.single.items()}
    return Line(line.label, line.style, *_means_of_neighbours(line.steps, line.values), single)


def _means_of_neighbours(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means along the last axis, at most _POINTS of them; a mean stands at its last step."""
    if len(steps) <= _POINTS:
        return steps, values
    starts = np.linspace(0, len(steps), _POINTS + 1).astype(np.int64)
    means = np.add.reduceat(values, starts[:-1], axis=-1) / np.diff(starts)
    return steps[starts[1:] - 1], means
