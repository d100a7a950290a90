"""The report of one or several runs: one HTML page that needs nothing else, and a picture of the learning curve.

Everything on the page is computed from `metrics.jsonl`, `config.json` and `status.json`. Curves are inline SVG whose
text, axes and grid take the page's colours, so that it reads well in light and in dark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runs import figures, statistics
from runs.files import read_json, replacing, write_atomically
from runs.record import STATUS, TABLE, Row, read_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG = "config.json"
PAGE = "report.html"
PICTURE = "learning_curve.png"

_RETURNS = {"eval/return": "Return in evaluation", "train/return": "Return while training"}
_SECTIONS = {
    "loss/": "Losses",
    "eval/": "Evaluation",
    "train/": "Training",
    "acc/": "Accuracy",
    "cl/": "Continual learning",
    "plasticity/": "Plasticity",
    "": "Other measurements",
    "speed/": "Speed",
}


@dataclass(frozen=True)
class Run:
    """One run folder as read: its name, settings, state, and rows by metric."""

    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    metrics: dict[str, list[Row]]

    @property
    def seeds(self) -> list[int]:
        """Seeds that were asked for, and any other that has rows."""
        recorded = {row.seed for rows in self.metrics.values() for row in rows}
        return sorted(recorded.union(self.config.get("seeds") or []))

    @property
    def command(self) -> str:
        return self.config.get("command") or "train"


@dataclass(frozen=True)
class Report:
    """What the sections of a page share: the runs, and the lines of every metric in the order of first appearance."""

    runs: list[Run]
    lines: dict[str, list[figures.Line]]

    @property
    def several(self) -> bool:
        return len(self.runs) > 1

    @property
    def title(self) -> str:
        """'td3, sac on dmc/walker-walk'; the run names where the runs have nothing in common."""
        whos, wheres = zip(*(_who_and_where(run) for run in self.runs), strict=True)
        who, where = ", ".join(dict.fromkeys(filter(None, whos))), set(wheres)
        if len(where) == 1 and (found := where.pop()):
            return f"{who} on {found}" if who else found
        return ", ".join(run.name for run in self.runs)

    @property
    def step_label(self) -> str:
        commands = {run.command for run in self.runs}
        labels = {"train": "environment steps", "offline": "updates"}
        return labels.get(commands.pop(), "steps") if len(commands) == 1 else "steps"


def write_report(folders: Sequence[Path | str], out: Path | str) -> tuple[Path, Path]:
    """Write `out/report.html` and `out/learning_curve.png` about the runs in `folders`; `out` is created if missing.

    Returns both paths. Raises ValueError if no folder is given, one is not a run, or a file of a run is damaged.
    """
    report = read_report(folders)
    out = Path(out)
    page = render_page(report)
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / PICTURE) as temporary:
        _picture(report).savefig(temporary, format="png", dpi=160)
    write_atomically(out / PAGE, page)
    return out / PAGE, out / PICTURE


def read_report(folders: Sequence[Path | str]) -> Report:
    """Read run folders. A missing file counts as empty; ValueError for a folder with neither settings nor table."""
    paths = [Path(folder) for folder in folders]
    runs = [_read_run(path, name) for path, name in zip(paths, _distinct_names(paths), strict=True)]
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    lines = {name: figures.lines_of({run.name: run.metrics.get(name, []) for run in runs}, name) for name in names}
    return Report(runs, lines)


def render_page(report: Report) -> str:
    """The whole HTML page."""
    title = escape(report.title)
    parts = [f"<h1>{title}</h1>", *_states(report), _settings(report), *_return_sections(report)]
    parts += [*_final_values(report), *_other_sections(report), *_complete_settings(report)]
    return _FRAME.format(title=title, style=_STYLE, body="\n".join(parts))


def _read_run(path: Path, name: str) -> Run:
    if not (path / CONFIG).is_file() and not (path / TABLE).is_file():
        raise ValueError(f"{path} is not a run folder: it has neither {CONFIG} nor {TABLE}")
    config, status = (read_json(path / file) if (path / file).is_file() else {} for file in (CONFIG, STATUS))
    metrics: dict[str, list[Row]] = {}
    for row in read_table(path) if (path / TABLE).is_file() else []:
        metrics.setdefault(row.name, []).append(row)
    return Run(name, config, status, metrics)


def _picture(report: Report) -> Figure:
    """The learning curve alone: eval/return, else train/return, else the first metric that has a curve."""
    candidates = (*_RETURNS, *report.lines)
    name = next((name for name in candidates if figures.has_curve(report.lines.get(name, []))), "")
    lines = report.lines.get(name, [])
    subtitle = " · ".join(filter(None, [name, figures.band_note(lines)]))
    title = report.title if len(report.title) <= 60 else f"{len(report.runs)} runs"
    y_label = "return" if name in _RETURNS or not name else name.split("/", 1)[-1].replace("_", " ")
    return figures.picture(lines, report.step_label, y_label, title, subtitle)


def _return_sections(report: Report) -> Iterator[str]:
    learns_returns = any(run.command in ("train", "offline") for run in report.runs)
    for name, heading in _RETURNS.items():
        lines = report.lines.get(name, [])
        if not lines and not learns_returns:
            continue
        yield f"<h2>{heading}</h2>"
        without = [run.name for run in report.runs if name not in run.metrics]
        if without:
            subject = f"{', '.join(without)}: there are" if report.several else "This run has"
            yield f"<p>{escape(subject)} no <code>{name}</code> rows, so nothing is drawn for it here.</p>"
        if lines:
            figure = figures.learning_curve(lines, report.step_label, "return")
            yield _figure(figures.inline_svg(figure, f"{heading} against {report.step_label}", _slug(name)), lines)


def _other_sections(report: Report) -> Iterator[str]:
    """Small multiples of everything else that has a curve, by prefix."""
    left = [name for name, lines in report.lines.items() if name not in _RETURNS and figures.has_curve(lines)]
    for prefix, heading in _SECTIONS.items():
        names = [name for name in left if _section_of(name) == prefix]
        if not names:
            continue
        panels = {name.removeprefix(prefix).replace("_", " "): report.lines[name] for name in names}
        svg = figures.inline_svg(figures.small_multiples(panels, report.step_label), heading, _slug(prefix or "other"))
        yield f"<h2>{heading}</h2>\n" + _figure(svg, *panels.values())


def _section_of(name: str) -> str:
    return next((prefix for prefix in _SECTIONS if prefix and name.startswith(prefix)), "")


def _figure(svg: str, *panels: Sequence[figures.Line]) -> str:
    note = figures.band_note(*panels)
    return f"<figure>\n{svg}\n<figcaption>{escape(note[:1].upper() + note[1:])}.</figcaption>\n</figure>"


def _final_values(report: Report) -> Iterator[str]:
    """Final values: returns first, speed last; accuracies of task after task, which are many, folded away."""
    names = sorted(report.lines, key=lambda name: (name not in _RETURNS, name.startswith("speed/")))
    folded = [name for name in names if name.startswith("acc/")]
    yield "<h2>Final values</h2>"
    yield _final_table(report, [name for name in names if name not in folded])
    if folded:
        yield f"<details><summary>Accuracies ({len(folded)})</summary>{_final_table(report, folded)}</details>"


def _final_table(report: Report, names: Sequence[str]) -> str:
    """A line for each metric, run and task."""
    lines = []
    for name in names:
        for run in report.runs:
            rows = run.metrics.get(name, [])
            for task in dict.fromkeys(row.task for row in rows):
                label = name if task is None else f"{name} · {task}"
                lines.append(_final_line(label, run, statistics.final_values(rows, name, task), report.several))
    if not lines:
        return "<p>Nothing has been recorded yet.</p>"
    head = ["Metric", *(["Run"] * report.several), "Mean [interval]", "IQM [interval]", "Each seed"]
    one_seed = any(len(run.seeds) == 1 for run in report.runs)
    return (
        '<div class="wide"><table class="numbers">\n'
        f"<thead><tr>{''.join(f'<th>{column}</th>' for column in head)}</tr></thead>\n"
        "<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>\n"
        '<p class="note">The last row of each seed. IQM: interquartile mean, the mean of the middle half of the seeds. '
        f"Intervals: 95 %, percentile bootstrap over seeds, {statistics.RESAMPLES:,} resamples."
        f"{' One seed has no interval.' if one_seed else ''}</p>"
    )


def _final_line(label: str, run: Run, final: dict[int, float | None], several: bool) -> str:
    summary = statistics.summarise(final.values())
    known = np.array([value for value in final.values() if value is not None])
    iqm_interval: tuple[float | None, float | None] = (None, None)
    if len(known) > 1:
        iqm_interval = statistics.stratified_bootstrap_interval(
            known[:, None], statistics.interquartile_mean, statistics.report_generator()
        )
    each = [f'<span title="seed {seed}">{_number(value)}</span>' for seed, value in final.items()]
    cells = [
        f"{_number(summary['mean'])} {_interval(summary['low'], summary['high'])}",
        f"{_number(summary['iqm'])} {_interval(*iqm_interval)}",
        " ".join(each),
    ]
    names = [f'<th scope="row">{escape(label)}</th>'] + [f"<td>{escape(run.name)}</td>"] * several
    return f"<tr>{''.join(names)}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _states(report: Report) -> Iterator[str]:
    """One line a run: how far it came, and why it is not complete."""
    for run in report.runs:
        state = str(run.status.get("state", "state unknown"))
        step, of = run.status.get("step"), run.status.get("of")
        reached = f" at step {step:,} of {of:,}" if isinstance(step, int) and isinstance(of, int) else ""
        error = f": {run.status['error']}" if run.status.get("error") else ""
        name = f"<strong>{escape(run.name)}</strong> " if report.several else ""
        known = state if state in ("running", "done", "stopped", "failed") else "unknown"
        yield f'<p class="state">{name}<span class="chip {known}">{escape(state)}</span>{escape(reached + error)}</p>'


def _settings(report: Report) -> str:
    columns = [_settings_of(run) for run in report.runs]
    head = "".join(f"<th>{escape(run.name)}</th>" for run in report.runs)
    head = f"<thead><tr><td></td>{head}</tr></thead>\n" if report.several else ""
    lines = []
    for key in dict.fromkeys(key for column in columns for key in column):
        cells = "".join(f"<td>{escape(column.get(key, '–'))}</td>" for column in columns)
        lines.append(f'<tr><th scope="row">{escape(key)}</th>{cells}</tr>')
    table = f'<table class="settings">\n{head}<tbody>\n' + "\n".join(lines) + "\n</tbody></table>"
    return f'<h2>Settings</h2>\n<div class="wide">{table}</div>'


def _settings_of(run: Run) -> dict[str, str]:
    """What a reader needs to know where the numbers come from; keys that the run does not have are left out."""
    config, machine = run.config, run.config.get("environment") or {}
    env = config.get("env")
    versions = machine.get("versions") or {}
    entries = {
        "Environment": ", ".join(map(str, env)) if isinstance(env, list) else env,
        "Benchmark": config.get("benchmark"),
        "Agent": config.get("agent"),
        "Strategy": config.get("strategy"),
        "Steps": f"{config['steps']:,}" if isinstance(config.get("steps"), int) else config.get("steps"),
        "Seeds": ", ".join(map(str, run.seeds)),
        "Commit": machine.get("commit"),
        "Machine": machine.get("machine"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Wall time": _duration(run.status.get("wall_seconds", config.get("wall_seconds"))),
    }
    return {key: _plain(value) for key, value in entries.items() if value not in (None, "")}


def _complete_settings(report: Report) -> Iterator[str]:
    yield "<h2>Complete settings</h2>"
    for run in report.runs:
        text = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
        yield f"<details><summary>{escape(run.name)}/{CONFIG}</summary><pre>{text}</pre></details>"


def _who_and_where(run: Run) -> tuple[str, str]:
    """What learnt, and on what; empty where the settings do not say."""
    env = run.config.get("env") or run.config.get("benchmark") or run.config.get("problem")
    where = " → ".join(map(str, env)) if isinstance(env, list) else str(env or "")
    return str(run.config.get("agent") or run.config.get("strategy") or ""), where


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell the folders apart."""
    if not paths:
        raise ValueError("a report needs at least one run folder")
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError("a run folder is given twice")
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]


def _number(value: float | None) -> str:
    """Four significant digits, no exponent where it can be read without: 1234.5 -> '1,234', 0.00012 -> '0.00012'."""
    if value is None:
        return '<span class="missing">missing</span>'
    if value == 0 or 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f'<span class="soft">[{_number(low)}, {_number(high)}]</span>'


def _duration(seconds: Any) -> str | None:
    if not isinstance(seconds, (int, float)):
        return None
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #57606a; --grid: #e1e4e8; --tint: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --ink: #e6e8eb; --soft: #9aa4b0; --grid: #343b45; --tint: #1c2128; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; }
figure { margin: 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption, .note { color: var(--soft); font-size: .875rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1rem .35rem 0;
  border-bottom: 1px solid var(--grid); }
th { font-weight: 600; }
thead th, .settings th { color: var(--soft); font-weight: 500; white-space: nowrap; }
.numbers { font-variant-numeric: tabular-nums; }
.numbers td { white-space: nowrap; }
.numbers td:last-child { white-space: normal; min-width: 9rem; }
.numbers td:last-child span { display: inline-block; margin-right: .6em; }
.soft { color: var(--soft); }
.missing { color: var(--soft); font-style: italic; }
.state { margin: .25rem 0; }
.chip { border: 1px solid currentColor; border-radius: 1em; padding: .05em .7em; font-size: .85rem; font-weight: 600; }
.done { color: light-dark(#00694c, #3fc89a); } .running { color: light-dark(#0063a0, #62b5f0); }
.stopped { color: light-dark(#8a5a00, #e6a93c); } .failed { color: light-dark(#b34700, #ff8a4c); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .85em; }
pre { background: var(--tint); padding: 1rem; border-radius: .4rem; overflow-x: auto; }
summary { cursor: pointer; }
"""
