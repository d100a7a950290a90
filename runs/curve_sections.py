"""Curves on the page of a report: returns first, then plasticity and everything else that changes over steps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from runs import figures, page
from runs.matrix_section import in_a_matrix
from runs.page import section
from runs.report import RETURNS, Report

# Order of the small panels; what has no prefix of these comes before the speed.
_ORDER = ("loss/", "eval/", "train/", "cl/", "retrieval/", "growth/", "", "speed/")
BROAD, NARROW, SMALL = (8.8, 3.9), (4.1, 3.3), (3.7, 2.35)  # inches
_MOST_PANELS = 24  # in a section; the rest is in the table of final values


def main_curves(report: Report) -> Iterator[str]:
    """Returns in evaluation and while training, or whatever else the runs are judged by."""
    learns_returns = any(run.command in ("train", "offline") for run in report.runs)
    headings = dict(RETURNS) if learns_returns else {}
    main = report.main_metric
    if main not in headings and main in report.metrics and figures.has_curve(report.lines(main)):
        headings = {main: _title_of(main), **headings}
    for metric, heading in headings.items():
        without = [run.name for run in report.runs if metric not in run.metrics]
        told = ""
        if without:
            whose = ", ".join(without) if len(without) < len(report.runs) else "any run"
            told = f'<p class="note">There is no <code>{metric}</code> of {escape(whose)}.</p>'
        panels = {place: lines for place in report.places if (lines := report.lines(metric, place))}
        drawn = _curves(report, metric, heading, panels) if panels else ""
        yield section(heading, told, drawn)


def _title_of(metric: str) -> str:
    words = metric.rpartition("/")[2].replace("_", " ")
    return words[:1].upper() + words[1:]


def _curves(report: Report, metric: str, heading: str, panels: dict[str, list[figures.Line]]) -> str:
    """One place: a large panel, drawn once for wide and once for narrow screens. Several: one small panel each."""
    if len(report.places) > 1:
        return _grid(report, {place: (metric, lines) for place, lines in panels.items()}, heading)
    ((place, lines),) = panels.items()
    changes = report.task_changes(place)
    if changes:
        tasks = dict.fromkeys(changes.values())
        each = {task: (metric, found) for task in tasks if (found := report.lines(metric, place, task))}
        begun = ", ".join(f"{name} at {step:,}" for step, name in changes.items())
        return _grid(report, each, heading, changes) + f'<p class="note">Dotted: a task begins, {escape(begun)}.</p>'
    label = "return" if metric in RETURNS else metric.rpartition("/")[2].replace("_", " ")
    what = f"{heading} against {report.step_label}: {_last_in_words(lines)}"
    drawings = []
    for kind, size in (("broadside", BROAD), ("narrow", NARROW)):
        drawing = figures.curve_panel(lines, report.step_label, label, size=size)
        svg = figures.inline_svg(drawing, what, f"{kind}-{page.slug(metric)}")
        drawings.append(f'<div class="plot {kind}">{svg}</div>')
    styles = {line.label: line.style for line in lines}
    return page.figure("".join(drawings), figures.band_note(lines), figures.hover_data(lines), styles)


def _last_in_words(lines: Sequence[figures.Line]) -> str:
    """The alternative text of a figure: where each line ends."""
    ends = [f"{line.label} ends at {line.values[:, -1].mean():.4g}" for line in lines if len(line.steps)]
    return "; ".join(ends[:12]) or "nothing recorded at common steps"


def _grid(
    report: Report,
    panels: dict[str, tuple[str, list[figures.Line]]],
    heading: str,
    marks: Iterable[int] = (),
) -> str:
    """Small panels, title -> (metric, lines), that flow into as many columns as the screen holds. marks: of steps."""
    legend: dict[str, int] = {}
    drawn = []
    for title, (metric, lines) in panels.items():
        legend |= {line.label: line.style for line in lines}
        drawing = figures.curve_panel(lines, report.step_label, size=SMALL, title=title, marks=marks)
        prefix = page.slug(f"{heading} {metric} {title} {len(drawn)}")
        svg = figures.inline_svg(drawing, f"{title}: {_last_in_words(lines)}", prefix)
        drawn.append(page.figure(f'<div class="plot">{svg}</div>', data=figures.hover_data(lines)))
    note = figures.band_note(*(lines for _, lines in panels.values()))
    caption = f'<p class="note">{escape(note[:1].upper() + note[1:])}</p>' if note else ""
    return f'{page.legend(legend)}<div class="panels">{"".join(drawn)}</div>{caption}'


def diagnostics(report: Report) -> Iterator[str]:
    """Small panels of everything else that has a curve, plasticity first; folded by place if there are several."""
    left = [name for name in report.metrics if name not in {*RETURNS, report.main_metric} and not in_a_matrix(name)]
    plasticity = [name for name in left if name.startswith("plasticity/")]
    others = sorted((name for name in left if name not in plasticity), key=_place_in_order)
    for heading, names, note in (("Plasticity", plasticity, _PLASTICITY), ("Other measurements", others, "")):
        parts = []
        for place in report.places:
            grid = _measurements(report, names, place, f"{heading} {place}" if len(report.places) > 1 else heading)
            folded = f"<details{'' if any(parts) else ' open'}><summary>{escape(place)}</summary>{grid}</details>"
            parts.append(folded if len(report.places) > 1 and grid else grid)
        if any(parts):
            yield section(heading, *parts, note)


def _measurements(report: Report, names: Sequence[str], place: str, heading: str) -> str:
    """The panels of one place; what never changes is named instead of drawn."""
    alone = [name for name in names if not _is_of_layer(name)]
    lines = {name: found for name in alone if figures.has_curve(found := report.lines(name, place))}
    lines |= _layers(report, [name for name in names if _is_of_layer(name)], place)
    constant = {
        name: found for name, found in lines.items() if len({v for line in found for v in line.values.flat}) == 1
    }
    moving = {name: found for name, found in lines.items() if name not in constant}
    titles = {name: name.removeprefix("plasticity/").replace("_", " ") for name in moving}
    kept = {titles[name]: (name, moving[name]) for name in itertools.islice(moving, _MOST_PANELS)}
    told = [f"{len(moving) - len(kept)} more are in the table of final values."] * (len(kept) < len(moving))
    told += [f"Not drawn, because constant: {', '.join(constant)}."] * bool(constant)
    notes = "".join(f'<p class="note">{escape(sentence)}</p>' for sentence in told)
    return (_grid(report, kept, heading, report.task_changes(place)) if kept else "") + notes


def _is_of_layer(name: str) -> bool:
    """Whether a metric is of one layer of a network: plasticity/WHAT/NETWORK/LAYER."""
    return name.startswith("plasticity/") and name.count("/") > 2


def _layers(report: Report, names: Sequence[str], place: str) -> dict[str, list[figures.Line]]:
    """Of a single run, one panel for each WHAT/NETWORK, with a line for each layer; several runs have their table."""
    found: dict[str, list[figures.Line]] = {}
    for name in names if not report.several else ():
        what, _, layer = name.rpartition("/")
        for line in report.lines(name, place):
            label = layer if layer not in report.labels else f"layer {layer}"
            style = report.styles.setdefault(label, len(report.styles))
            found.setdefault(f"{what}, layers", []).append(dataclasses.replace(line, label=label, style=style))
    return {name: lines for name, lines in found.items() if figures.has_curve(lines)}


def _place_in_order(name: str) -> int:
    return next((index for index, prefix in enumerate(_ORDER) if prefix and name.startswith(prefix)), len(_ORDER) - 2)


_PLASTICITY = (
    '<p class="note">Dormant fraction: share of units whose mean activity is small beside their layer\'s (Sokar et al. '
    "2023), 0 is healthy. Effective rank: entropy rank of the features (Roy &amp; Vetterli 2007), low means collapsed "
    "features. Growing weight norms with shrinking gradients go with a loss of plasticity.</p>"
)
