"""Which run is better, on the page of a report: pairs, averages over environments, final values as bars."""

from __future__ import annotations

import itertools
from html import escape

import numpy as np

from runs import figures, page, scores, significance, statistics
from runs.compare import compare_read_runs
from runs.curve_sections import BROAD, NARROW, SMALL
from runs.errors import UsageError
from runs.page import section, table, value_cell
from runs.report import RETURNS, Report

_MOST_PAIRS = 30


def comparison(report: Report) -> str:
    """Every pair of runs of one environment, on the main metric."""
    metric = report.main_metric
    rows, sentences, pairs = [], [], 0
    for place in report.places:
        runs = [run for run in report.runs if run.place == place]
        measured = any(metric in run.metrics for run in runs)
        if len(runs) < 2 or not measured or pairs + len(runs) * (len(runs) - 1) // 2 > _MOST_PAIRS:
            continue
        try:
            verdicts = compare_read_runs(runs, metric).verdicts
        except UsageError as error:
            sentences.append(str(error))
            continue
        pairs += len(verdicts)
        sentences += [verdict.sentence for verdict in verdicts] if len(report.places) == 1 else []
        for v in verdicts:
            p = "–" if v.p is None else f"{v.p:.2g}" + (" (least possible)" if v.p == v.smallest_p else "")
            cells = [escape(f"{v.a} – {v.b}"), *([escape(place)] * (len(report.places) > 1))]
            chance = (
                f"{v.probability:.2f} <span class='soft'>[{v.probability_low:.2f}, {v.probability_high:.2f}]</span>"
            )
            cells += [value_cell(v.difference, v.low, v.high), chance, p, f"{v.seeds_a}, {v.seeds_b}"]
            rows.append([*cells, "paired" if v.paired else "independent"])
    if not rows:
        return section("Comparison", *(f"<p>{escape(told)}.</p>" for told in sentences)) if sentences else ""
    head = ["Difference a – b", *(["Environment"] * (len(report.places) > 1)), "Difference [95 %]"]
    head += ["P(a ahead of b) [95 %]", "p", "Seeds", "Test"]
    words = "".join(f"<li>{escape(told)}.</li>" for told in sentences)
    note = (
        '<p class="note">P: probability that a seed of a is ahead of a seed of b (probability of improvement). p: '
        "two-sided permutation test over seeds, paired where both runs have the same seeds, Mann-Whitney else; not "
        "corrected for several comparisons (<code>neoteny compare</code> does). Few seeds cannot give a small p.</p>"
    )
    return section("Comparison", f"<ul>{words}</ul>" if words else "", table(f"Final {metric}", head, rows), note)


def aggregate(report: Report) -> str:
    """Normalised scores over several environments: mean, median, IQM, optimality gap, and performance profiles."""
    if len(report.places) < 2 or report.main_metric not in RETURNS:
        return ""
    try:
        pairs = [scores.reference_pair(place) for place in report.places]
    except ValueError as error:
        return section("Across environments", f"<p>No average over environments: {escape(str(error))}.</p>")
    tables = {label: _score_table(report, label) for label in dict.fromkeys(report.labels)}
    whole = {label: found for label, found in tables.items() if found is not None}
    left_out = [label for label, found in tables.items() if found is None]
    told = f"<p>{escape(', '.join(left_out))}: not measured in every environment, so left out.</p>" if left_out else ""
    if not whole:
        return section("Across environments", told)
    columns = {
        "IQM": statistics.interquartile_mean,
        "Median of means": statistics.median_of_task_means(len(report.places)),
        "Mean": statistics.mean,
        "Optimality gap": statistics.optimality_gap,
    }
    rows = [
        [escape(label), *(_aggregate_cell(found, of) for of in columns.values()), str(len(found))]
        for label, found in whole.items()
    ]
    meaning = ", ".join(dict.fromkeys(f"0 = {pair.low_name}, 1 = {pair.high_name} ({pair.source})" for pair in pairs))
    note = f"Scores over {len(report.places)} environments. {meaning}"
    chart = table(note, ["Method", *(f"{name} [95 %]" for name in columns), "Seeds"], rows)
    return section("Across environments", told, chart, _improvements(whole), _profiles(report, whole))


def _score_table(report: Report, label: str) -> np.ndarray | None:
    """Normalised final scores [S, K] of a method, for the seeds that were measured in every environment."""
    runs = {run.place: run for run, own in zip(report.runs, report.labels, strict=True) if own == label}
    if set(runs) != set(report.places):
        return None
    finals = [runs[place].means_over_tasks(report.main_metric) for place in report.places]
    seeds = sorted(set.intersection(*(set(values) for values in finals)))
    if not seeds:
        return None
    columns = [
        scores.normalise(place, [own[seed] for seed in seeds]) for place, own in zip(report.places, finals, strict=True)
    ]
    return np.stack(columns, axis=1)


def _aggregate_cell(found: np.ndarray, statistic: statistics.Statistic) -> str:
    bounds: tuple[float | None, float | None] = (None, None)
    if len(found) > 1:
        bounds = statistics.stratified_bootstrap_interval(found, statistic, statistics.report_generator())
    return value_cell(float(statistic(found.reshape(-1))), *bounds)


def _improvements(whole: dict[str, np.ndarray]) -> str:
    rows = []
    for a, b in itertools.combinations(whole, 2):
        chance = significance.probability_of_improvement(whole[a], whole[b])
        runs_a, tasks = whole[a].shape
        low, high = significance.probability_of_improvement_interval(chance, runs_a, len(whole[b]), tasks)
        rows.append([escape(f"{a} over {b}"), f"{chance:.2f} <span class='soft'>[{low:.2f}, {high:.2f}]</span>"])
    return table("Averaged over environments", ["Pair", "Probability of improvement [95 %]"], rows) if rows else ""


def _profiles(report: Report, whole: dict[str, np.ndarray]) -> str:
    everything = np.concatenate([found.reshape(-1) for found in whole.values()])
    thresholds = np.linspace(min(0.0, everything.min()), everything.max() * 1.02 + 1e-9, 101)
    profiles = [(label, report.styles[label], found) for label, found in whole.items()]
    drawings = []
    for kind, size in (("broadside", BROAD), ("narrow", NARROW)):
        drawing = figures.profile_panel(profiles, thresholds, "normalised score", size=size)
        svg = figures.inline_svg(drawing, "Performance profiles: fraction of runs above each score", f"{kind}-profile")
        drawings.append(f'<div class="plot {kind}">{svg}</div>')
    styles = {label: style for label, style, _ in profiles}
    note = "performance profiles: the fraction of runs (seeds and environments) above a score, band: 95 % interval"
    return page.figure("".join(drawings), note, styles=styles)


def bars_section(report: Report) -> str:
    """Final values: a panel an environment, or an environment with tasks, if there is more than one bar to draw."""
    metric, drawn = report.main_metric, []
    for place in report.places:
        bars = []
        for run, label in zip(report.runs, report.labels, strict=True):
            for task in run.tasks(metric) if run.place == place else []:
                values = list(run.final_values(metric, task).values())
                name = label if task is None else f"{task}" if not report.several else f"{label} · {task}"
                if values:
                    bars.append(figures.Bar(name, report.styles.setdefault(name, len(report.styles)), values))
        if len(bars) > 1:
            size = (SMALL[0] if len(report.places) > 1 else 5.4, 0.75 + 0.36 * len(bars))
            svg = figures.inline_svg(
                figures.bar_panel(bars, place or metric, size=size),
                f"Final {metric} on {place}: " + "; ".join(f"{b.label} {np.mean(b.values):.4g}" for b in bars),
                page.slug(f"bars {place} {len(drawn)}"),
            )
            drawn.append(page.figure(f'<div class="plot">{svg}</div>'))
    if not drawn:
        return ""
    note = f"Final {metric}. Bar: mean of the seeds; line: its 95 % interval (three seeds or more); rings: seeds."
    kind = "panels" if len(drawn) > 1 else "panels broad"
    heading = "Final values by environment" if len(report.places) > 1 else "Final values by run"
    return section(heading, f'<div class="{kind}">{"".join(drawn)}</div><p class="note">{note}</p>')
