"""Made-up runs for reports, and a page as its parts."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from runs.files import write_json
from runs.record import Record, Row, write_status
from runs.report import read_report
from runs.sections import render_page

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

    VOID = frozenset(["meta", "br", "hr", "img", "link", "input", "wbr"])

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


def games(tmp_path: Path, scores: dict[str, dict[str, list[float]]]) -> list[Path]:
    """Runs of agents on Atari games, one seed for each final return."""
    folders = []
    for agent, by_game in scores.items():
        for game, finals in by_game.items():
            rows = [Row(step, "eval/return", f * step / 100, s) for s, f in enumerate(finals) for step in (0, 50, 100)]
            config = {"command": "train", "agent": agent, "env": f"atari/{game}", "seeds": list(range(len(finals)))}
            folders.append(write_run(tmp_path / f"{agent}-{game}", config, rows))
    return folders
