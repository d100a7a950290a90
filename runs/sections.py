"""What stands on the page of a report, section by section. Every number is computed here from the table of a run."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from runs import figures, page, scores, significance, statistics
from runs.compare import FEW_SEEDS, compare_read_runs
from runs.errors import UsageError
from runs.films import film_of
from runs.page import section, table, value_cell
from runs.probe_section import probe_section
from runs.report import RETURNS, Report
from runs.results import Measured, Run, differing_settings, measure, measure_over_tasks
from runs.settings import CONFIG

# Order of the small panels; what has no prefix of these comes before the speed.
_ORDER = ("loss/", "eval/", "train/", "cl/", "retrieval/", "growth/", "", "speed/")
_ACCURACY = re.compile(r"acc/task_(\d+)_after_(\d+)")
_BROAD, _NARROW, _SMALL = (8.8, 3.9), (4.1, 3.3), (3.7, 2.35)
_MOST_PANELS = 24  # in a section; the rest is in the table of final values
_MOST_PAIRS = 30
_MOST_CONFIGS = 4  # before they are folded together
_MOST_ROWS = 24  # of the table of final values; a longer one is folded


def render_page(report: Report) -> str:
    """The whole HTML page. The same runs give the same page."""
    sections = [_summary(report), *_main_curves(report), _aggregate(report), _comparison(report), _bars(report)]
    sections += [
        _films(report),
        _accuracies(report),
        probe_section(report.runs),
        *_diagnostics(report),
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


def _main_curves(report: Report) -> Iterator[str]:
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
    (lines,) = panels.values()
    label = "return" if metric in RETURNS else metric.rpartition("/")[2].replace("_", " ")
    what = f"{heading} against {report.step_label}: {_last_in_words(lines)}"
    drawings = []
    for kind, size in (("broadside", _BROAD), ("narrow", _NARROW)):
        drawing = figures.curve_panel(lines, report.step_label, label, size=size)
        svg = figures.inline_svg(drawing, what, f"{kind}-{page.slug(metric)}")
        drawings.append(f'<div class="plot {kind}">{svg}</div>')
    styles = {line.label: line.style for line in lines}
    return page.figure("".join(drawings), figures.band_note(lines), figures.hover_data(lines), styles)


def _last_in_words(lines: Sequence[figures.Line]) -> str:
    """The alternative text of a figure: where each line ends."""
    ends = [f"{line.label} ends at {line.values[:, -1].mean():.4g}" for line in lines if len(line.steps)]
    return "; ".join(ends[:12]) or "nothing recorded at common steps"


def _grid(report: Report, panels: dict[str, tuple[str, list[figures.Line]]], heading: str) -> str:
    """Small panels, title -> (metric, lines), that flow into as many columns as the screen holds."""
    legend: dict[str, int] = {}
    drawn = []
    for title, (metric, lines) in panels.items():
        legend |= {line.label: line.style for line in lines}
        drawing = figures.curve_panel(lines, report.step_label, size=_SMALL, title=title)
        prefix = page.slug(f"{heading} {metric} {title} {len(drawn)}")
        svg = figures.inline_svg(drawing, f"{title}: {_last_in_words(lines)}", prefix)
        drawn.append(page.figure(f'<div class="plot">{svg}</div>', data=figures.hover_data(lines)))
    note = figures.band_note(*(lines for _, lines in panels.values()))
    caption = f'<p class="note">{escape(note[:1].upper() + note[1:])}</p>' if note else ""
    return f'{page.legend(legend)}<div class="panels">{"".join(drawn)}</div>{caption}'


def _comparison(report: Report) -> str:
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


def _aggregate(report: Report) -> str:
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
    for kind, size in (("broadside", _BROAD), ("narrow", _NARROW)):
        drawing = figures.profile_panel(profiles, thresholds, "normalised score", size=size)
        svg = figures.inline_svg(drawing, "Performance profiles: fraction of runs above each score", f"{kind}-profile")
        drawings.append(f'<div class="plot {kind}">{svg}</div>')
    styles = {label: style for label, style, _ in profiles}
    note = "performance profiles: the fraction of runs (seeds and environments) above a score, band: 95 % interval"
    return page.figure("".join(drawings), note, styles=styles)


def _bars(report: Report) -> str:
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
            size = (_SMALL[0] if len(report.places) > 1 else 5.4, 0.75 + 0.36 * len(bars))
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


def _accuracies(report: Report) -> str:
    """The accuracy matrix of each continual run: one line for each task learnt, one column for each task tested."""
    parts = []
    for run in report.runs:
        found = {tuple(map(int, match.groups())): name for name in run.metrics if (match := _ACCURACY.fullmatch(name))}
        if not found:
            continue
        tested, learnt = (sorted({key[side] for key in found}) for side in (0, 1))
        rows = []
        for after in learnt:
            means = [measure(run, found[j, after]).summary["mean"] if (j, after) in found else None for j in tested]
            rows.append([f"after {after}", *(_shaded(mean) for mean in means)])
        caption = (
            f"{run.name}: accuracy on a task (column) after learning a task (line), mean of {len(run.seeds)} seeds"
        )
        parts.append(table(caption, ["", *(f"task {j}" for j in tested)], rows, "numbers matrix"))
    return section("Accuracy of every task", f'<div class="matrices">{"".join(parts)}</div>') if parts else ""


def _shaded(value: float | None) -> str:
    if value is None:
        return ""
    share = round(70 * min(1.0, max(0.0, value)))
    shade = f"background:color-mix(in srgb,var(--line-0) {share}%,transparent)"
    return f'<span style="{shade};display:block;padding:.1rem .4rem;border-radius:.2rem">{value:.3f}</span>'


def _diagnostics(report: Report) -> Iterator[str]:
    """Small panels of everything else that has a curve, plasticity first; folded by place if there are several."""
    left = [name for name in report.metrics if name not in {*RETURNS, report.main_metric} and not _ACCURACY.match(name)]
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
    lines = {name: found for name in names if figures.has_curve(found := report.lines(name, place))}
    constant = {
        name: found for name, found in lines.items() if len({v for line in found for v in line.values.flat}) == 1
    }
    moving = {name: found for name, found in lines.items() if name not in constant}
    titles = {name: name.removeprefix("plasticity/").replace("_", " ") for name in moving}
    kept = {titles[name]: (name, moving[name]) for name in itertools.islice(moving, _MOST_PANELS)}
    told = [f"{len(moving) - len(kept)} more are in the table of final values."] * (len(kept) < len(moving))
    told += [f"Not drawn, because constant: {', '.join(constant)}."] * bool(constant)
    notes = "".join(f'<p class="note">{escape(sentence)}</p>' for sentence in told)
    return (_grid(report, kept, heading) if kept else "") + notes


def _place_in_order(name: str) -> int:
    return next((index for index, prefix in enumerate(_ORDER) if prefix and name.startswith(prefix)), len(_ORDER) - 2)


_PLASTICITY = (
    '<p class="note">Dormant fraction: share of units whose mean activity is small beside their layer\'s (Sokar et al. '
    "2023), 0 is healthy. Effective rank: entropy rank of the features (Roy &amp; Vetterli 2007), low means collapsed "
    "features. Growing weight norms with shrinking gradients go with a loss of plasticity.</p>"
)


def _final_values(report: Report) -> str:
    """Every metric: returns first, speed last; accuracies of task after task, which are many, are in their matrix."""
    names = sorted(report.metrics, key=lambda name: (name not in RETURNS, name.startswith("speed/")))
    rows = [
        _final_row(report, measure(run, name, task))
        for name in names
        if not _ACCURACY.fullmatch(name)
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
