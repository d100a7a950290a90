"""What stands on the page of a report, section by section. Every number is computed from the table of a run.

Here: what heads the page, the summary, the table of final values, settings. Curves, comparisons and matrices have files
of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from runs import page, statistics
from runs.compare import FEW_SEEDS
from runs.comparison_sections import aggregate, bars_section, comparison
from runs.curve_sections import diagnostics, main_curves
from runs.films import film_of
from runs.growth_section import growth_section
from runs.matrix_section import in_a_matrix, matrices, sequences
from runs.page import section, table, value_cell
from runs.probe_section import probe_section
from runs.report import RETURNS, Report
from runs.results import Measured, Run, differing_settings, measure, measure_over_tasks
from runs.settings import CONFIG

_MOST_CONFIGS = 4  # before they are folded together
_MOST_ROWS = 24  # of the table of final values; a longer one is folded


def render_page(report: Report) -> str:
    """The whole HTML page. The same runs give the same page."""
    sections = [_summary(report), *main_curves(report), aggregate(report), comparison(report), bars_section(report)]
    sections += [
        _films(report),
        sequences(report),
        matrices(report),
        probe_section(report.runs),
        growth_section(report),
        *diagnostics(report),
        _final_values(report),
        _settings(report),
    ]
    return page.whole_page(report.title, _lead(report), [found for found in sections if found])


def _lead(report: Report) -> str:
    """How much there is, its state, and everything that a reader must know before believing the numbers."""
    places = [place for place in report.places if place]
    seeds = sum(len(run.seeds) for run in report.runs)
    counts = [f"{len(report.runs)} run{'s' * report.several}", f"{seeds} seed{'s' * (seeds != 1)}"]
    counts += [f"{len(places)} environments"] if len(places) > 1 else []
    states = dict.fromkeys(run.state for run in report.runs)
    chips = " ".join(_chip(state) for state in states)
    warnings = list(dict.fromkeys(_warnings(report)))
    box = "".join(f"<p>{escape(warning)}</p>" for warning in warnings)
    return f'<p class="lead">{" · ".join(counts)} {chips}</p>' + (f'<div class="warnings">{box}</div>' if box else "")


def _chip(state: str) -> str:
    known = state if state in ("running", "done", "stopped", "failed") else "unknown"
    return f'<span class="chip {known}">{escape(state)}</span>'


def _warnings(report: Report) -> Iterator[str]:
    for run in report.runs:
        name = f"{run.name}: " if report.several else ""
        if not run.metrics:
            yield f"{name}nothing has been recorded yet."
        step, of = run.status.get("step"), run.status.get("of")
        if run.state in ("failed", "stopped", "running") and isinstance(step, int) and isinstance(of, int):
            error = f": {run.status['error']}" if run.status.get("error") else ""
            yield f"{name}{run.state} at step {step:,} of {of:,}{error}."
        if report.main_metric in run.metrics:
            for lost in run.lost_seeds(report.main_metric):
                yield f"{name}{lost}; it is in no mean below, so the rest may flatter the method."
    few = [run.name for run in report.runs if run.seeds and len(run.seeds) < FEW_SEEDS]
    if few:
        which = f" ({', '.join(few)})" if report.several else ""
        yield f"Fewer than {FEW_SEEDS} seeds{which}: intervals and tests mean little; five or more are customary."


def _summary(report: Report) -> str:
    metric = report.main_metric
    several_places, several_states = len(report.places) > 1, len({run.state for run in report.runs}) > 1
    head = ["Run", *(["Environment"] * several_places), *(["State"] * several_states), "Seeds"]
    head += [f"{metric}, mean [95 %]", "IQM [95 %]", "Mean over steps", "Wall time"]
    rows = []
    for run, label in zip(report.runs, report.labels, strict=True):
        found, area = measure_over_tasks(run, metric), _area(report, run)
        s = found.summary
        cells = [escape(label if several_places or not report.several else run.name)]
        cells += [escape(run.place)] * several_places
        cells += [_chip(run.state)] * several_states
        cells += [_seed_count(run, found), value_cell(s["mean"], s["low"], s["high"])]
        cells += [value_cell(s["iqm"], found.iqm_low, found.iqm_high), page.number(area) if area is not None else "–"]
        rows.append([*cells, page.duration(run.status.get("wall_seconds")) or "–"])
    tasks = ", mean over tasks" if any(len(run.tasks(metric)) > 1 for run in report.runs) else ""
    note = f"{metric} at the end of training{tasks}, over seeds"
    return section("Summary", table(note, head, rows), _METHOD)


_METHOD = (
    '<p class="note">IQM: interquartile mean, the mean of the middle half of the seeds. Intervals: 95 %, bootstrap '
    f"over seeds ({statistics.RESAMPLES:,} resamples), widened for few seeds as the t distribution widens a normal "
    "one; one seed has none. Mean over steps: area under the curve over its width, a measure of speed and level.</p>"
)


def _seed_count(run: Run, found: Measured) -> str:
    measured, asked = len(found.values), len(run.seeds)
    return f"{measured}" if measured == asked else f"<strong>{measured} of {asked}</strong>"


def _area(report: Report, run: Run) -> float | None:
    """Mean over steps of the main metric, up to where the shortest run of the same place ended."""
    metric = report.main_metric
    if run.tasks(metric) != [None]:
        return None
    peers = [peer for peer in report.runs if peer.place == run.place and metric in peer.metrics]
    horizon = min(max(row.step for row in peer.metrics[metric]) for peer in peers)
    areas = statistics.area_under_curve(statistics.seed_curves(run.metrics[metric], metric), horizon).values()
    return statistics.summarise(areas)["mean"]


def _films(report: Report) -> str:
    found = [(run, film_of(run.path)) for run in report.runs]
    shown = [
        f"<figure>{film}<figcaption>{escape(run.name)}</figcaption></figure>" for run, film in found if film is not None
    ]
    return section("What it looks like", f'<div class="films">{"".join(shown)}</div>') if shown else ""


def _final_values(report: Report) -> str:
    """Every metric: returns first, speed last; accuracies of task after task, which are many, are in their matrix."""
    names = sorted(report.metrics, key=lambda name: (name not in RETURNS, name.startswith("speed/")))
    rows = [
        _final_row(report, measure(run, name, task))
        for name in names
        if not in_a_matrix(name)
        for run in report.runs
        for task in run.tasks(name)
    ]
    if not rows:
        return section("Final values", "<p>Nothing has been recorded yet.</p>")
    head = ["Metric", *(["Run"] * report.several), "Mean [95 %]", "IQM [95 %]", "Each seed"]
    chart = table("The last value of each seed", head, rows)
    if len(rows) > _MOST_ROWS:
        chart = f"<details><summary>{len(rows)} metrics and runs</summary>{chart}</details>"
    return section("Final values", chart)


def _final_row(report: Report, found: Measured) -> list[str]:
    endings = found.run.endings(found.metric, found.task)
    each = []
    for seed in dict.fromkeys([*found.run.seeds, *endings]):
        ending = endings.get(seed)
        text = value_cell(ending.value if ending else None)
        if ending and not ending.complete and ending.value is not None:
            text = f'<span class="missing">{page.number(ending.value)} at step {ending.step:,}</span>'
        each.append(f'<span title="seed {seed}">{text}</span>')
    s = found.summary
    cells = [escape(found.name), *([escape(found.run.name)] * report.several)]
    cells += [value_cell(s["mean"], s["low"], s["high"]), value_cell(s["iqm"], found.iqm_low, found.iqm_high)]
    return [*cells, f'<span class="seeds">{" ".join(each)}</span>']


def _settings(report: Report) -> str:
    """Where the numbers come from: what differs between the runs, versions and machine, and everything, folded."""
    parts = []
    if report.several:
        differing = differing_settings(report.runs)
        rows = [[_breakable(key), *(_setting(value) for value in values)] for key, values in differing.items()]
        told = "<p>The settings of the runs are the same.</p>"
        head = ["Setting", *(run.name for run in report.runs)]
        parts.append(table("Settings that differ", head, rows, "settings") if rows else told)
    parts += _provenance(report)
    configs = [
        f"<details><summary>{escape(run.name)}/{CONFIG}</summary>"
        f"<pre>{escape(json.dumps(run.config, indent=2, ensure_ascii=False))}</pre></details>"
        for run in report.runs
    ]
    if len(configs) > _MOST_CONFIGS:
        configs = [f"<details><summary>Every {CONFIG}</summary>{''.join(configs)}</details>"]
    return section("Settings", *parts, *configs)


def _breakable(name: str) -> str:
    """The name of a setting as HTML that may go on in the next line after a dot or an underscore."""
    return escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _setting(value: Any) -> str:
    return "–" if value is None else escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _provenance(report: Report) -> Iterator[str]:
    """What all runs share as one list, what they do not as a table with a line a run."""
    columns = [_origin(run) for run in report.runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    shared = [key for key in keys if all(column.get(key) == columns[0].get(key) for column in columns)]
    if shared:
        rows = [[escape(key), escape(columns[0][key])] for key in shared]
        caption = "The same for all runs" if report.several else "Where the numbers come from"
        yield table(caption, ["", ""], rows, "settings")
    own = [key for key in keys if key not in shared]
    if own:
        rows = [
            [escape(run.name), *(escape(column.get(key, "–")) for key in own)]
            for run, column in zip(report.runs, columns, strict=True)
        ]
        yield table("Where the numbers of each run come from", ["Run", *own], rows, "settings")


def _origin(run: Run) -> dict[str, str]:
    """What a reader needs to know where the numbers come from; keys that the run does not have are left out."""
    config, machine = run.config, run.config.get("environment") or {}
    versions = machine.get("versions") or {}
    entries = {
        "Environment": run.place,
        "Agent": run.learner,
        "Steps": f"{config['steps']:,}" if isinstance(config.get("steps"), int) else config.get("steps"),
        "Seeds": ", ".join(map(str, run.seeds)),
        "Commit": str(machine.get("commit") or "")[:10],
        "Machine": machine.get("machine"),
        "Device": config.get("device"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Wall time": page.duration(run.status.get("wall_seconds", config.get("wall_seconds"))),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items() if value}
