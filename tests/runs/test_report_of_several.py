"""The report of several runs, environments and kinds of run on one page."""

from pathlib import Path
from typing import Any

from runs import figures
from runs.exports import summary_latex
from runs.record import Row
from runs.report import read_report
from runs.results import method_labels, read_runs
from runs.sections import render_page
from tests.runs.reported_runs import CONFIG, games, page_of, write_run


def test_scores_over_environments_by_hand(tmp_path: Path):
    """Pong: random -20.7, human 14.6; Boxing: 0.1 and 12.1. Scores 0, 0.5, 1 and 1, 1.5, 2 in each game."""
    low, high = [-20.7, -3.05, 14.6], [0.1, 6.1, 12.1]
    scores = {
        "dqn": {"Pong": low, "Boxing": high},
        "ppo": {"Pong": [x + 35.3 for x in low], "Boxing": [x + 12 for x in high]},
    }
    page = page_of(*games(tmp_path, scores))
    assert page.headings[0] == "dqn, ppo on 2 environments"
    assert "Across environments" in page.headings
    row = next(row for row in page.rows if row[0] == "dqn" and len(row) == 6)
    starts = [cell.split()[0] for cell in row]
    assert starts == ["dqn", "0.5", "0.5", "0.5", "0.5", "3"]  # IQM, median, mean, gap, seeds
    row = next(row for row in page.rows if row[0] == "ppo" and len(row) == 6)
    assert [cell.split()[0] for cell in row] == ["ppo", "1.5", "1.5", "1.5", "0", "3"]
    # Of nine pairs in a game, 1 against 1 is a tie: 1/18 of dqn over ppo.
    assert page.row("dqn over ppo")[1].startswith("0.06 [")
    assert "0 = random, 1 = human" in page.text
    assert page.row("dqn – ppo", "atari/Pong")[2].startswith("-35.3 [")


def test_environments_without_a_reference_pair_are_not_averaged(tmp_path: Path):
    runs = games(tmp_path, {"dqn": {"Pong": [1.0, 2.0], "Adventure": [1.0, 2.0]}})
    page = page_of(*runs)
    assert "No average over environments: 'atari/Adventure' has no human score" in page.text


def test_a_method_that_lacks_an_environment_is_left_out_of_the_average(tmp_path: Path):
    runs = games(tmp_path, {"dqn": {"Pong": [1.0, 2.0], "Boxing": [1.0, 2.0]}, "ppo": {"Pong": [1.0, 2.0]}})
    assert "ppo: not measured in every environment, so left out" in page_of(*runs).text


def test_methods_are_named_as_shortly_as_possible(tmp_path: Path):
    def labels(*configs: dict[str, Any]) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return method_labels(read_runs([write_run(folder / f"r{i}", c, []) for i, c in enumerate(configs)]))

    one, other = {"agent": "td3", "env": "x"}, {"agent": "sac", "env": "x"}
    assert labels(one, other) == ["td3", "sac"]
    assert labels(one, one | {"env": "y"}) == ["td3", "td3"]
    steps = [one | {"agent_config": {"n_step": n, "discount": 0.99}} for n in (1, 3)]
    assert labels(*steps, other) == ["td3 n_step=1", "td3 n_step=3", "sac"]
    assert labels(one, one) == ["r0", "r1"]
    assert labels({}, other) == ["r0", "r1"]


def test_only_settings_that_differ_are_set_side_by_side(tmp_path: Path):
    first = write_run(tmp_path / "first")
    second = write_run(tmp_path / "second", CONFIG | {"agent_config": {"discount": 0.9}, "preset": "dmc"})
    page = page_of(first, second)
    assert page.row("agent_config.discount") == ["agent_config.discount", "0.99", "0.9"]
    assert page.row("preset") == ["preset", "–", "dmc"]
    assert not [row for row in page.rows if row[0] in ("steps", "env", "options.num_envs")]
    assert page.row("Commit") == ["Commit", "10ece44"]  # the same for both
    both = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    assert "The settings of the runs are the same." in page_of(*both).text


def test_a_table_for_papers(tmp_path: Path):
    scores = {"dqn_a": {"Pong": [1.0, 3.0], "Boxing": [10.0, 12.0]}, "ppo": {"Pong": [5.0, 7.0]}}
    text = summary_latex(read_report(games(tmp_path, scores)))
    lines = text.splitlines()
    assert lines[:3] == [r"\begin{tabular}{lrr}", r"\toprule", r" & atari/Pong & atari/Boxing \\"]
    assert lines[4].startswith(r"dqn\_a & 2 {\scriptsize [")
    assert r"\textbf" not in lines[4]  # the only one in its column is not the best of anything
    assert lines[5].startswith(r"ppo & \textbf{6} {\scriptsize [")
    assert lines[5].endswith(r"& -- \\")
    assert "$-$" in lines[4]  # two seeds: the interval reaches below zero


def test_the_picture_of_several_environments_has_room_for_its_titles(tmp_path: Path):
    """The subtitle and the panels with their own titles do not lie on each other, with one row of panels or two."""
    scores = {agent: dict.fromkeys(["Pong", "Boxing", "Qbert", "Freeway"], [1.0, 3.0]) for agent in ("dqn", "ppo")}
    folders = games(tmp_path, scores)
    for chosen in (folders[:2] + folders[4:6], folders):
        report = read_report(chosen)
        panels = {place: report.lines("eval/return", place) for place in report.places}
        figure = figures.picture(panels, "steps", "return", "A title", "a subtitle " * 6)
        figure.canvas.draw()
        boxes = [axes.get_tightbbox() for axes in figure.axes if axes.get_visible()] + [
            figure.texts[-1].get_window_extent()
        ]
        assert len(boxes) == len(panels) + 1
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_a_place_that_knows_nothing_of_the_main_metric_gets_no_empty_panel(tmp_path: Path):
    """Returns of an agent and accuracies of interventions on one page."""
    rows = [Row(step, "plasticity/online_accuracy", 0.5, seed) for seed in range(3) for step in (10, 20)]
    own = {"command": "plasticity-arm", "problem": "label-shuffle", "seeds": [0, 1, 2]}
    runs = [write_run(tmp_path / "td3"), write_run(tmp_path / "sac", {**CONFIG, "agent": "sac"})]
    runs += [write_run(tmp_path / name, {**own, "intervention": name}, rows) for name in ("nap", "redo")]
    report = render_page(read_report(runs))
    assert "no curve recorded" not in report
    assert "has no metric" not in report
    assert "There is no <code>eval/return</code> of nap, redo." in report
    assert "sac – td3" in report or "td3 – sac" in report
