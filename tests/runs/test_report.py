"""The report: every number on the page is the table's, nothing comes from elsewhere, nothing unescaped gets in."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import figures, statistics
from runs.files import write_json
from runs.record import Record, Row, write_status
from runs.report import Run, read_report, render_page, write_report

CONFIG: dict[str, Any] = {
    "command": "train",
    "agent": "td3",
    "env": "dmc/cartpole-swingup",
    "steps": 50_000,
    "seeds": [0, 1, 2],
    "agent_config": {"discount": 0.99},
    "options": {"num_envs": 4},
    "environment": {"commit": "10ece44", "machine": "2 cores", "versions": {"torch": "2.14.1", "mujoco": "3.17.0"}},
}
FINALS = {0: 800.0, 1: 812.0, 2: 860.0}


def write_run(folder: Path, config: dict[str, Any] | None = None, rows: list[Row] | None = None) -> Path:
    config = CONFIG if config is None else config
    rows = learning_rows() if rows is None else rows
    with Record(folder, range(100), tensorboard=False) as record:
        record.write(rows)
    write_json(folder / "config.json", config)
    write_status(folder, "done", 50_000, 50_000, wall_seconds=873.0)
    return folder


def learning_rows(finals: dict[int, float] = FINALS) -> list[Row]:
    """Straight lines from 0 to each seed's final value; episodes end at steps of each seed's own."""
    rows = []
    for seed, final in finals.items():
        rows += [Row(step, "eval/return", final * step / 50_000, seed) for step in range(0, 50_001, 5000)]
        rows += [Row(step, "train/return", final * step / 50_000, seed) for step in range(100 + seed, 50_000, 313)]
        rows += [Row(step, "loss/critic", 1 / (1 + step), seed) for step in range(500, 50_001, 500)]
        rows += [Row(step, "speed/steps_per_second", 400.0, seed) for step in range(500, 50_001, 5000)]
        rows.append(Row(50_000, "cl/forgetting", 0.125, seed))
    return rows


class Page(HTMLParser):
    """Tags balanced, ids, headings, table cells and text of a page."""

    VOID = frozenset(["meta", "br", "hr", "img", "link", "input"])

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if {"h1", "h2"} & set(self.open):
            self.headings[-1] += data

    def row(self, *start: str) -> list[str]:
        return next(row for row in self.rows if row[: len(start)] == list(start))


def page_of(*folders: Path) -> Page:
    return Page(render_page(read_report(folders)))


def test_report_writes_a_page_and_a_picture(tmp_path: Path):
    html_path, png_path = write_report([write_run(tmp_path / "run")], tmp_path / "out")
    assert (html_path, png_path) == (tmp_path / "out" / "report.html", tmp_path / "out" / "learning_curve.png")
    assert png_path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["learning_curve.png", "report.html"]
    page = Page(html_path.read_text())
    assert page.headings == [
        "td3 on dmc/cartpole-swingup",
        "Settings",
        "Return in evaluation",
        "Return while training",
        "Final values",
        "Losses",
        "Speed",
        "Complete settings",
    ]


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path):
    html = render_page(read_report([write_run(tmp_path / "run")]))
    tags = Page(html).tags
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert (value or "").startswith("#"), f"<{tag} {name}={value}>"
    assert not re.search(r"@import|url\((?!#)", html)


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path: Path):
    html = render_page(read_report([write_run(tmp_path / "run")]))
    tags = Page(html).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    references = re.findall(r'(?:href="|url\()#([^")]+)', html)
    assert references
    assert set(references) <= set(ids)


def test_final_values_are_those_of_the_table(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run"))
    low, high = (statistics.summarise(FINALS.values())[key] for key in ("low", "high"))
    row = page.row("eval/return")
    assert row[1] == f"824 [{low:.4g}, {high:.4g}]"  # (800 + 812 + 860) / 3
    assert row[2].startswith("824 [")  # the interquartile mean of three is their mean
    assert row[3].split() == ["800", "812", "860"]
    assert page.row("cl/forgetting")[1:] == ["0.125 [0.125, 0.125]", "0.125 [0.125, 0.125]", "0.125 0.125 0.125"]


def test_settings_and_state_are_shown(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run"))
    settings = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert settings == {
        "Environment": "dmc/cartpole-swingup",
        "Agent": "td3",
        "Steps": "50,000",
        "Seeds": "0, 1, 2",
        "Commit": "10ece44",
        "Machine": "2 cores",
        "Versions": "torch 2.14.1, mujoco 3.17.0",
        "Wall time": "14 min 33 s",
    }
    assert "done at step 50,000 of 50,000" in page.text
    assert '"discount": 0.99' in page.text


def test_the_same_run_gives_the_same_page(tmp_path: Path):
    run = write_run(tmp_path / "run")
    assert render_page(read_report([run])) == render_page(read_report([run]))


def test_curves_hold_the_numbers_of_the_table(tmp_path: Path):
    report = read_report([write_run(tmp_path / "run")])
    (line,) = report.lines["eval/return"]
    assert line.steps.tolist() == list(range(0, 50_001, 5000))
    np.testing.assert_allclose(line.values[:, -1], list(FINALS.values()))
    # Episodes end at other steps in each seed: the same straight lines, through bins.
    (line,) = report.lines["train/return"]
    assert len(line.steps) == 60
    assert line.values.shape == (3, 60)
    np.testing.assert_allclose(line.values[2], 860 * (line.steps - 50_000 / 120) / 50_000, atol=4)


def test_long_curves_are_thinned_without_changing_their_mean():
    rows = [Row(step, "loss/q", float(step % 7), seed) for seed in (0, 1) for step in range(100_000)]
    (line,) = figures.lines_of({"run": rows}, "loss/q")
    assert line.values.shape == (2, 400)
    assert line.steps[-1] == 99_999
    assert line.values.mean() == pytest.approx(np.mean([step % 7 for step in range(100_000)]), rel=1e-12)


def test_what_the_panel_draws_is_mean_band_and_single_seeds():
    steps = np.array([0, 10, 20])
    values = np.array([[0.0, 1.0, 2.0], [0.0, 3.0, 6.0], [0.0, 5.0, 10.0]])
    line = figures.Line("run", steps, values, {seed: (steps, values[seed]) for seed in range(3)})
    axes = figures.learning_curve([line], "environment steps", "return").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("environment steps", "return")
    drawn = [np.asarray(drawn.get_ydata()).tolist() for drawn in axes.lines]
    assert drawn == [*values.tolist(), [0.0, 3.0, 6.0]]
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    low, high = statistics.mean_curve_interval(values, statistics.report_generator())
    assert set(band[:, 1]) == {*low, *high}


def test_one_seed_is_a_line_without_a_band_and_the_page_says_so(tmp_path: Path):
    run = write_run(tmp_path / "run", CONFIG | {"seeds": [4]}, learning_rows({4: 700.0}))
    page = page_of(run)
    assert "One seed, so a line without a band." in page.text
    assert "One seed has no interval." in page.text
    assert page.row("eval/return")[1:] == ["700 ", "700 ", "700"]
    report = read_report([run])
    assert len(figures.learning_curve(report.lines["eval/return"], "", "").axes[0].collections) == 0


def test_several_runs_are_overlaid_by_name(tmp_path: Path):
    first = write_run(tmp_path / "a" / "quick")
    second = write_run(tmp_path / "b" / "slow", CONFIG | {"agent": "sac"}, learning_rows({0: 500.0, 1: 600.0}))
    page = page_of(first, second)
    assert page.headings[0] == "td3, sac on dmc/cartpole-swingup"
    assert page.row("eval/return", "quick")[2].startswith("824 ")
    assert page.row("eval/return", "slow")[2].startswith("550 ")
    assert page.row("Agent") == ["Agent", "td3", "sac"]
    assert [line.label for line in read_report([first, second]).lines["eval/return"]] == ["quick", "slow"]


def test_runs_with_the_same_folder_name_are_told_apart(tmp_path: Path):
    runs = [write_run(tmp_path / seed / "run") for seed in ("a", "b")]
    assert [run.name for run in read_report(runs).runs] == ["a/run", "b/run"]
    with pytest.raises(ValueError, match="given twice"):
        read_report([runs[0], runs[0] / ".." / "run"])


def test_tasks_are_lines_of_their_own(tmp_path: Path):
    rows = [Row(step, "eval/return", float(step), 0, task) for step in (0, 10) for task in ("walk", "run")]
    report = read_report([write_run(tmp_path / "run", rows=rows)])
    assert [line.label for line in report.lines["eval/return"]] == ["walk", "run"]
    assert Page(render_page(report)).row("eval/return · walk")[1] == "10 "


def test_a_run_without_evaluation_gets_a_sentence(tmp_path: Path):
    rows = [row for row in learning_rows() if row.name != "eval/return"]
    run = write_run(tmp_path / "run", rows=rows)
    assert "This run has no eval/return rows" in page_of(run).text
    write_report([run], tmp_path / "out")


def test_a_continual_run_is_not_asked_for_returns(tmp_path: Path):
    config = {"command": "continual", "strategy": "er", "benchmark": "split-digits", "seeds": [0, 1]}
    rows = [Row(i, "cl/average_accuracy", 1 / i, seed) for i in range(1, 6) for seed in (0, 1)]
    rows += [Row(5, "acc/task_1_after_5", 0.75, seed) for seed in (0, 1)]
    report = read_report([write_run(tmp_path / "run", config, rows)])
    assert report.step_label == "steps"
    page = Page(render_page(report))
    assert page.row("acc/task_1_after_5")[3] == "0.75 0.75"
    assert "Accuracies (1)" in page.text
    assert page.headings == [
        "er on split-digits",
        "Settings",
        "Final values",
        "Continual learning",
        "Complete settings",
    ]


@pytest.mark.parametrize("config", [{}, {"seeds": None, "environment": None, "env": ["a", "b"], "steps": "many"}])
def test_every_key_and_row_is_optional(tmp_path: Path, config: dict[str, Any]):
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "config.json", config)
    html_path, _ = write_report([tmp_path / "run"], tmp_path / "out")
    assert "Nothing has been recorded yet." in Page(html_path.read_text()).text


def test_a_failed_run_says_why_and_missing_values_stay_missing(tmp_path: Path):
    rows = [*learning_rows(), Row(55_000, "eval/return", float("nan"), 1)]
    run = write_run(tmp_path / "run", rows=rows)
    write_status(run, "failed", 1234, 50_000, error="FloatingPointError: row 3")
    page = page_of(run)
    assert "failed at step 1,234 of 50,000: FloatingPointError: row 3" in page.text
    assert page.row("eval/return")[1].startswith("830 [")  # (800 + 860) / 2
    assert page.row("eval/return")[3].split() == ["800", "missing", "860"]


def test_everything_from_outside_is_escaped(tmp_path: Path):
    """A script as name of the run, the agent, a metric, a task, a version and the error must stay text."""
    bad = "<script>alert('&\"')</script>"
    config = CONFIG | {"agent": bad, "env": [bad], "environment": {"commit": bad, "versions": {bad: bad}}}
    rows = [
        Row(step, name, float(step), 0, task) for step in (0, 9) for name in ("eval/return", bad) for task in (bad, 2)
    ]
    run = write_run(tmp_path / bad.replace("/", "!"), config, rows)
    write_json(run / "status.json", {"state": bad, "error": bad, "step": bad, "of": 2})
    html = render_page(read_report([run, write_run(tmp_path / "other")]))
    assert "<script" not in html
    page = Page(html)
    assert bad in page.text
    assert f"{bad} · {bad}" in {row[0] for row in page.rows if row}


def test_what_is_not_a_run_is_refused_before_anything_is_written(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a run folder"):
        write_report([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ValueError, match="at least one"):
        write_report([], tmp_path / "out")
    run = write_run(tmp_path / "run")
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seeds_of_a_run_are_those_asked_for_and_those_recorded():
    run = Run("r", {"seeds": [0, 1]}, {}, {"x": [Row(0, "x", 1.0, 5)]})
    assert run.seeds == [0, 1, 5]
