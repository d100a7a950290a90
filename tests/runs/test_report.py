"""The report: every number on the page is the table's, nothing comes from elsewhere, nothing unescaped gets in."""

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import figures, statistics
from runs.errors import UsageError
from runs.exports import curves_csv, summary_csv
from runs.files import write_json
from runs.page import number
from runs.record import Row, write_status
from runs.report import read_report, write_report
from runs.results import Run
from runs.sections import render_page
from runs.video import write_mp4
from tests.runs.reported_runs import CONFIG, FINALS, Page, learning_rows, page_of, write_run


def test_report_writes_a_page_and_a_picture(tmp_path: Path):
    html_path, png_path = write_report([write_run(tmp_path / "run")], tmp_path / "out")
    assert (html_path, png_path) == (tmp_path / "out" / "report.html", tmp_path / "out" / "learning_curve.png")
    assert png_path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["learning_curve.png", "report.html"]
    page = Page(html_path.read_text())
    assert page.headings == [
        "td3 on dmc/cartpole-swingup",
        "Summary",
        "Return in evaluation",
        "Return while training",
        "Other measurements",
        "Final values",
        "Settings",
    ]


def test_every_format_is_a_file_and_an_unknown_one_writes_none(tmp_path: Path):
    run = write_run(tmp_path / "run")
    written = write_report([run], tmp_path / "out", ["csv", "latex", "svg", "png", "html"])
    assert sorted(path.name for path in written) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(written) == 6
    assert (tmp_path / "out" / "learning_curve.svg").read_text().rstrip().endswith("</svg>")
    with pytest.raises(UsageError, match="no format 'latx'. Did you mean 'latex'"):
        write_report([run], tmp_path / "none", ["html", "latx"])
    assert not (tmp_path / "none").exists()


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path):
    run = write_run(tmp_path / "run")
    film(run / "videos" / "step_50000_seed_0.mp4")
    html = render_page(read_report([run, write_run(tmp_path / "other")]))
    tags = Page(html).tags
    assert not {"link", "iframe", "object", "embed"} & {tag for tag, _ in tags}
    assert [attributes for tag, attributes in tags if tag == "script"] == [{}]
    for tag, attributes in tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert (value or "").startswith(("#", "data:")), f"<{tag} {name}={value}>"
    assert not re.search(r"@import|url\((?!#)|\bfetch\(|XMLHttpRequest|import\(", html)


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
    assert low is not None
    assert high is not None
    assert row[1] == f"824 [{number(low)}, {number(high)}]"  # (800 + 812 + 860) / 3
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
    assert "1 run · 3 seeds done" in page.text
    assert '"discount": 0.99' in page.text


def test_the_same_run_gives_the_same_page(tmp_path: Path):
    run = write_run(tmp_path / "run")
    assert render_page(read_report([run])) == render_page(read_report([run]))


def test_curves_hold_the_numbers_of_the_table(tmp_path: Path):
    report = read_report([write_run(tmp_path / "run")])
    (line,) = report.lines("eval/return")
    assert line.steps.tolist() == list(range(0, 50_001, 5000))
    np.testing.assert_allclose(line.values[:, -1], list(FINALS.values()))
    # Episodes end at other steps in each seed: the same straight lines, through bins.
    (line,) = report.lines("train/return")
    assert len(line.steps) == 60
    assert line.values.shape == (3, 60)
    np.testing.assert_allclose(line.values[2], 860 * (line.steps - 50_000 / 120) / 50_000, atol=4)


def test_long_curves_are_thinned_without_changing_their_mean():
    rows = [Row(step, "loss/q", float(step % 7), seed) for seed in (0, 1) for step in range(30_000)]
    (line,) = figures.lines_of({"run": rows}, "loss/q", {})
    assert line.values.shape == (2, 300)
    assert line.steps[-1] == 29_999
    assert line.values.mean() == pytest.approx(np.mean([step % 7 for step in range(30_000)]), rel=1e-12)


def line_of(values: np.ndarray, steps: np.ndarray, style: int = 0) -> figures.Line:
    return figures.Line("run", style, steps, values, {seed: (steps, own) for seed, own in enumerate(values)})


def test_what_the_panel_draws_is_mean_band_and_single_seeds():
    steps = np.array([0, 10, 20])
    values = np.arange(5)[:, None] * np.array([0.0, 1.0, 2.0])
    axes = figures.curve_panel([line_of(values, steps)], "environment steps", "return", size=(6, 4)).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("environment steps", "return")
    drawn = [np.asarray(drawn.get_ydata()).tolist() for drawn in axes.lines]
    assert drawn == [*values.tolist(), [0.0, 2.0, 4.0]]
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    low, high = statistics.mean_curve_interval(values, statistics.report_generator())
    assert set(band[:, 1]) == {*low, *high}


def test_the_band_of_few_seeds_is_their_range_and_says_so():
    steps = np.array([0, 10])
    line = line_of(np.array([[0.0, 1.0], [0.0, 5.0], [2.0, 3.0]]), steps)
    band = line.band()
    assert band is not None
    assert [bound.tolist() for bound in band] == [[0, 1], [2, 5]]
    assert figures.band_note([line]) == (
        "mean of 3 seeds, band: from the lowest to the highest seed, thin: single seeds"
    )
    assert line_of(np.array([[0.0, 1.0]]), steps).band() is None


def test_lines_differ_without_their_colour():
    """Of the first 28 styles no two share dash and marker, and neighbours differ in both."""
    steps = np.arange(9)
    lines = [line_of(np.full((1, 9), 1.0 * style), steps, style) for style in range(28)]
    drawn = [line for line in figures.curve_panel(lines, "", size=(6, 4)).axes[0].lines if line.get_marker() != "None"]
    looks = [(str(line.get_linestyle()) + str(line._unscaled_dash_pattern), line.get_marker()) for line in drawn]
    assert len(set(looks)) == 28
    for first, second in zip(looks, looks[1:], strict=False):
        assert first[0] != second[0]
        assert first[1] != second[1]


def test_one_seed_is_a_line_without_a_band_and_the_page_says_so(tmp_path: Path):
    run = write_run(tmp_path / "run", CONFIG | {"seeds": [4]}, learning_rows({4: 700.0}))
    page = page_of(run)
    assert "One seed, so a line without a band" in page.text
    assert "Fewer than 3 seeds: intervals and tests mean little" in page.text
    assert page.row("eval/return")[1:] == ["700", "700", "700"]
    report = read_report([run])
    assert len(figures.curve_panel(report.lines("eval/return"), "", size=(6, 4)).axes[0].collections) == 0


def test_several_runs_are_overlaid_by_name(tmp_path: Path):
    first = write_run(tmp_path / "a" / "quick")
    second = write_run(tmp_path / "b" / "slow", CONFIG | {"agent": "sac"}, learning_rows({0: 500.0, 1: 600.0}))
    page = page_of(first, second)
    assert page.headings[0] == "td3, sac on dmc/cartpole-swingup"
    assert page.row("eval/return", "quick")[2].startswith("824 ")
    assert page.row("eval/return", "slow")[2].startswith("550 ")
    assert page.row("agent") == ["agent", "td3", "sac"]  # a setting that differs
    assert [line.label for line in read_report([first, second]).lines("eval/return")] == ["td3", "sac"]
    assert page.row("td3 – sac")[4] == "3, 2"
    assert "td3 is ahead" in page.text or "td3 is better than sac" in page.text


def test_runs_with_the_same_folder_name_are_told_apart(tmp_path: Path):
    runs = [write_run(tmp_path / seed / "run") for seed in ("a", "b")]
    assert [run.name for run in read_report(runs).runs] == ["a/run", "b/run"]
    with pytest.raises(ValueError, match="given twice"):
        read_report([runs[0], runs[0] / ".." / "run"])


def test_tasks_are_lines_of_their_own(tmp_path: Path):
    rows = [Row(step, "eval/return", float(step), 0, task) for step in (0, 10) for task in ("walk", "run")]
    report = read_report([write_run(tmp_path / "run", rows=rows)])
    assert [line.label for line in report.lines("eval/return")] == ["walk", "run"]
    page = Page(render_page(report))
    assert page.row("eval/return · walk")[1] == "10"
    assert "eval/return at the end of training, mean over tasks, over seeds" in page.text


def sequence_rows(shift: float = 0.0) -> list[Row]:
    """Two tasks in turn, A at 0 and B at 100, two seeds; layers and networks are measured too."""
    returns = {0: (1.0, -50.0), 50: (6.0, -50.0), 100: (11.0, -40.0), 150: (8.0, -20.0), 200: (5.0, -10.0)}
    rows = []
    for seed in (0, 1):
        for step, values in returns.items():
            rows += [Row(step, "eval/return", v + shift, seed, t) for v, t in zip(values, "AB", strict=True)]
        for after, step in enumerate((0, 100, 200)):
            pair = enumerate(returns[step])
            rows += [Row(step, f"return/task_{j}_after_{after}", v + shift, seed) for j, v in pair]
        rows += [Row(0, "sequence/task", 0, seed, "A"), Row(100, "sequence/task", 1, seed, "B")]
        rows += [Row(200, "cl/forgetting", 6.0, seed), Row(200, "cl/fwt", 10.0, seed)]
        for step, task in ((50, "A"), (100, "A"), (150, "B"), (200, "B")):
            rows.append(Row(step, "plasticity/dormant_fraction", step / 1000, seed, task))
            for layer in ("net.1", "net.3"):
                rows.append(Row(step, f"plasticity/dormant_fraction/net/{layer}", step / 500, seed, task))
    return rows


def test_a_sequence_has_a_panel_for_each_task_its_matrix_and_what_was_kept(tmp_path: Path):
    config = {**CONFIG, "env": ["A", "B"], "seeds": [0, 1]}
    run = write_run(tmp_path / "run", config, sequence_rows())
    html = render_page(read_report([run]))
    page = Page(html)
    assert "Tasks in turn" in page.headings
    assert page.row("untrained") == ["untrained", "1", "-50"]
    assert page.row("after A") == ["after A", "11", "-40"]
    assert page.row("after B") == ["after B", "5", "-10"]
    assert page.row("cl/forgetting")[1].startswith("6")
    assert "Dotted: a task begins, A at 0, B at 100." in page.text
    titles = [dict(attributes).get("aria-label") or "" for tag, attributes in page.tags if tag == "svg"]
    assert [title.partition(":")[0] for title in titles[:2]] == ["A", "B"]
    assert "dormant fraction: td3 ends at 0.2" in " ".join(titles)  # one line, whatever the task
    assert "dormant fraction/net, layers: net.1 ends at 0.4; net.3 ends at 0.4" in " ".join(titles)
    assert not [row for row in page.rows if row and row[0].startswith(("return/task", "sequence/task"))]
    other = write_run(tmp_path / "other", config, sequence_rows(1.0))
    both = Page(render_page(read_report([run, other])))
    lines = [attributes["data-line"] for _, attributes in both.tags if "data-line" in attributes]
    assert set(lines) >= {"run", "other"}
    assert len([row for row in both.rows if row and row[0] == "cl/fwt"]) >= 2


def test_a_run_without_evaluation_gets_a_sentence(tmp_path: Path):
    rows = [row for row in learning_rows() if row.name != "eval/return"]
    run = write_run(tmp_path / "run", rows=rows)
    assert "There is no eval/return of any run" in page_of(run).text
    write_report([run], tmp_path / "out")


def test_a_continual_run_is_not_asked_for_returns(tmp_path: Path):
    config = {"command": "continual", "strategy": "er", "benchmark": "split-digits", "seeds": [0, 1]}
    rows = [Row(i, "cl/average_accuracy", 1 / i, seed) for i in range(1, 6) for seed in (0, 1)]
    rows += [Row(5, "acc/task_1_after_5", 0.75, seed) for seed in (0, 1)]
    report = read_report([write_run(tmp_path / "run", config, rows)])
    assert report.step_label == "batches of the stream"
    page = Page(render_page(report))
    assert page.row("after 5") == ["after 5", "0.750"]
    assert page.headings == [
        "er on split-digits",
        "Summary",
        "Average accuracy",
        "Accuracy of every task",
        "Final values",
        "Settings",
    ]


@pytest.mark.parametrize("config", [{}, {"seeds": None, "environment": None, "env": ["a", "b"], "steps": "many"}])
def test_every_key_and_row_is_optional(tmp_path: Path, config: dict[str, Any]):
    page = page_of(write_run(tmp_path / "run", config, [Row(0, "eval/return", 2.0, 7)]))
    assert page.row("eval/return")[1] == "2"


def test_a_run_without_numbers_is_named_and_alone_refused(tmp_path: Path):
    empty, run = write_run(tmp_path / "empty", rows=[]), write_run(tmp_path / "run")
    with pytest.raises(UsageError, match=r"empty': nothing has been recorded yet, so there is nothing to report"):
        write_report([empty], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "empty: nothing has been recorded yet." in page_of(empty, run).text


def test_a_failed_run_says_why_and_missing_values_stay_missing(tmp_path: Path):
    rows = [*learning_rows(), Row(55_000, "eval/return", float("nan"), 1)]
    run = write_run(tmp_path / "run", rows=rows)
    write_status(run, "failed", 1234, 50_000, error="FloatingPointError: row 3")
    page = page_of(run)
    assert "failed at step 1,234 of 50,000: FloatingPointError: row 3" in page.text
    assert "seed 1: the last eval/return, at step 55,000, is missing (nan)" in page.text
    assert page.row("eval/return")[3].split() == ["800", "missing", "860"]
    assert page.row("eval/return")[1].startswith("830 [")  # (800 + 860) / 2
    assert page.row("td3")[1] == "2 of 3"


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
    assert html.count("<script") == 1
    page = Page(html)
    assert bad in page.text
    assert f"{bad} · {bad}" in {row[0] for row in page.rows if row}
    assert not re.search(r"\son\w+=", re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL))


def test_what_is_not_a_run_is_refused_before_anything_is_written(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a run folder"):
        write_report([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ValueError, match="no run folder"):
        write_report([], tmp_path / "out")
    run = write_run(tmp_path / "run")
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seeds_of_a_run_are_those_asked_for_and_those_recorded():
    run = Run(Path("r"), "r", {"seeds": [0, 1]}, {}, {"x": [Row(0, "x", 1.0, 5)]})
    assert run.seeds == [0, 1, 5]


def film(path: Path, frames: int = 6, size: int = 32) -> Path:
    """A small video of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    write_mp4(path, (random.integers(0, 255, (size, size, 3), dtype=np.uint8) for _ in range(frames)), fps=10)
    return path


def test_the_newest_film_is_in_the_page(tmp_path: Path):
    run = write_run(tmp_path / "run")
    film(run / "videos" / "step_9000_seed_0.mp4")
    film(run / "videos" / "step_10000_seed_0.mp4")
    page = page_of(run)
    assert "What it looks like" in page.headings
    ((_, video),) = [tag for tag in page.tags if tag[0] == "video"]
    assert (video["src"] or "").startswith("data:video/mp4;base64,")
    assert "step_10000" in (video["aria-label"] or "")


def test_a_large_film_is_a_picture_and_a_broken_one_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write_run(tmp_path / "run")
    path = film(run / "videos" / "step_1_seed_0.mp4", frames=10)
    monkeypatch.setattr("runs.films._LARGEST", 100)
    ((_, image),) = [tag for tag in page_of(run).tags if tag[0] == "img"]
    assert (image["src"] or "").startswith("data:image/png;base64,")
    assert image["alt"]
    path.write_bytes(b"no video" * 100)
    assert "What it looks like" not in page_of(run).headings


def test_a_seed_that_ended_early_is_shown_and_left_out_of_the_mean(tmp_path: Path):
    rows = [row for row in learning_rows() if row.seed != 1 or row.step < 20_000]
    rows.append(Row(19_500, "loss/actor", float("nan"), 1))
    page = page_of(write_run(tmp_path / "run", CONFIG | {"seeds": [0, 1, 2, 3]}, rows))
    assert "seed 1 has no eval/return after step 15,000; loss/actor became nan at step 19,500" in page.text
    assert "seed 3 has no eval/return; it is in no mean below" in page.text
    assert page.row("eval/return")[1].startswith("830 [")
    assert page.row("eval/return")[3].split() == ["800", "243.6", "at", "step", "15,000", "860", "missing"]
    assert page.row("td3")[1] == "2 of 4"
    assert "a mean ends where one of its seeds does" in page.text


def test_a_table_for_spreadsheets(tmp_path: Path):
    report = read_report([write_run(tmp_path / "run")])
    rows = {row["metric"]: row for row in csv.DictReader(io.StringIO(summary_csv(report)))}
    row = rows["eval/return"]
    assert (float(row["mean"]), row["seeds"], row["seeds_asked"]) == (824.0, "3", "3")
    assert row["values"] == "0:800.0 1:812.0 2:860.0"
    low, high = (statistics.summarise(FINALS.values())[key] for key in ("low", "high"))
    assert (float(row["low"]), float(row["high"])) == (low, high)
    curve = [row for row in csv.DictReader(io.StringIO(curves_csv(report))) if row["metric"] == "eval/return"]
    assert [int(row["step"]) for row in curve] == list(range(0, 50_001, 5000))
    assert float(curve[-1]["mean"]) == 824.0
    assert float(curve[-1]["low"]) < 824 < float(curve[-1]["high"])


def test_constant_measurements_are_named_and_not_drawn(tmp_path: Path):
    rows = [*learning_rows(), *(Row(step, "eval/length", 200.0, seed) for step in (0, 9) for seed in range(3))]
    page = page_of(write_run(tmp_path / "run", rows=rows))
    assert "Not drawn, because constant: eval/length, speed/steps_per_second." in page.text


def test_hovering_shows_the_numbers_of_the_table(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run"))
    data = next(json.loads(a["data-lines"] or "") for tag, a in page.tags if tag == "figure" and "data-lines" in a)
    ((label, steps, mean, low, high),) = data
    assert (label, steps[-1], mean[-1], low[-1], high[-1]) == ("td3", 50_000, 824.0, 800.0, 860.0)
    svg = next(a for tag, a in page.tags if tag == "svg" and "data-axes" in a)
    left, right, top, bottom, first, last = map(float, (svg["data-axes"] or "").split())
    assert 0 < left < right <= 1
    assert 0 <= top < bottom < 1
    assert first == 0
    assert last >= 50_000


def test_dollars_in_names_are_no_formulas(tmp_path: Path):
    config = CONFIG | {"agent": "a$b$_^{", "env": "$x_"}
    write_report([write_run(tmp_path / "r", config), write_run(tmp_path / "s")], tmp_path / "out")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here")
def test_the_accuracy_matrix_keeps_its_labels_on_one_line_at_phone_width(tmp_path: Path):
    """As a browser lays it out: every cell of ten tasks is one line high, and the table scrolls instead."""
    rows = [Row(t, f"acc/task_{u}_after_{t}", 0.5, seed) for seed in range(3) for t in range(10) for u in range(10)]
    page = render_page(read_report([write_run(tmp_path / "run", {"command": "continual", "strategy": "er"}, rows)]))
    measure = """<script>const told = [...document.querySelectorAll('.matrix :is(th, td)')].map(c => c.offsetHeight);
    document.title = `${told.length} cells, ${Math.max(...told)} px of ${innerWidth}`;</script></body>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", measure))
    frame = "<iframe src='page.html' width=390 height=900 onload='document.title = contentDocument.title'></iframe>"
    (tmp_path / "frame.html").write_text(frame)
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000", "--dump-dom"]
    told = subprocess.run([*command, str(tmp_path / "frame.html")], capture_output=True, text=True, timeout=100)
    found = re.search(r"<title>(\d+) cells, (\d+) px of 390</title>", told.stdout)
    assert found, told.stderr
    assert int(found[1]) == 11 * 11
    assert 10 < int(found[2]) < 45  # two lines are 50 and more
