"""How models grew, on the page of a report: what was chosen when, from which candidates, and what captions find."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from runs import page
from runs.files import read_json
from runs.page import section, table
from runs.report import Report
from runs.results import Run

HISTORY, GALLERY = "growth.json", "gallery.npz"  # files of a run whose models may grow
_Record = Mapping[str, Any]
_PIXELS = 64  # of an image on the page
_SIZES = ("depth", "width", "heads", "head_dim", "ffn", "vocabulary")


def growth_section(report: Report) -> str:
    """Of every run whose models may grow; empty without one."""
    parts = [part for run in report.runs for part in _of_run(run)]
    note = (
        '<p class="note">Parameters in the budget are those without embeddings of tokens and positions. A candidate '
        "is judged by loss × (cost / cost of staying)<sup>w</sup>, the loss a mean over repetitions on the same "
        "batches; differences between candidates are often within what another draw of batches changes.</p>"
    )
    return section("How the models grew", *parts, note) if parts else ""


def _of_run(run: Run) -> Iterator[str]:
    if not (run.path / HISTORY).is_file():
        return
    history: dict[str, list[_Record]] = read_json(run.path / HISTORY)
    yield _growths(run, history)
    tables = [
        _candidates(seed, record) for seed, records in history.items() for record in records if record["candidates"]
    ]
    if tables:
        yield f"<details><summary>{escape(run.name)}: {len(tables)} searches</summary>{''.join(tables)}</details>"
    if (run.path / GALLERY).is_file():
        yield _gallery(run)


def _growths(run: Run, history: Mapping[str, Sequence[_Record]]) -> str:
    names = run.config.get("parts") or []
    rows = []
    for seed, records in history.items():
        for record in records:
            part = record["part"]
            name = names[part] if part < len(names) else f"part {part + 1}"
            cap = page.number(record["cap"]) if "cap" in record else "–"
            chosen = record["chosen"] if "cap" in record else "–"
            rows.append(
                [
                    f"{escape(str(name))}, seed {seed}",
                    page.number(record["pairs"]),
                    escape(chosen),
                    page.number(record["parameters"]),
                    page.number(record["capacity"]),
                    cap,
                    escape(_sizes(record["genome"])),
                ]  # fmt: skip
            )
    head = ["Part", "Pairs so far", "Growth", "Parameters", "In the budget", "Budget", "Architecture"]
    return table(f"{run.name}: growths", head, rows)


def _sizes(genome: Mapping[str, Any]) -> str:
    """'depth 1/1/2, width 64, ...', stacks in the order image, text, shared."""
    said = []
    for name in _SIZES:
        value = genome[name]
        numbers = [str(number) for number in value.values()] if isinstance(value, Mapping) else [str(value)]
        said.append(f"{name} {numbers[0] if len(set(numbers)) == 1 and name != 'depth' else '/'.join(numbers)}")
    return ", ".join(said)


def _candidates(seed: str, record: _Record) -> str:
    rows = [
        [
            f"<strong>{escape(row['name'])}</strong>" if row["name"] == record["chosen"] else escape(row["name"]),
            page.number(row["parameters"]),
            " ".join(f"{loss:.4f}" for loss in row["losses"]),
            page.number(row["cost"]),
            f"{row['score']:.4f}",
        ]  # fmt: skip
        for row in sorted(record["candidates"], key=lambda row: row["score"])
    ]
    weight = f", w = {record['cost_weight']:.3g}" if record.get("cost_weight") is not None else ""
    caption = f"Candidates of seed {seed} at part {record['part'] + 1}{weight}"
    return table(caption, ["Growth", "Parameters", "Loss of each repetition", "Cost", "Score"], rows)


def _gallery(run: Run) -> str:
    with np.load(run.path / GALLERY, allow_pickle=False) as found:
        captions, images, right, rank = (found[key] for key in ("captions", "images", "right", "rank"))
    rows = [
        [
            escape(str(caption)),
            str(int(place) + 1),
            *(_picture(image, bool(hit)) for image, hit in zip(own, hits, strict=True)),
        ]
        for caption, own, hits, place in zip(captions, images, right, rank, strict=True)
    ]
    head = ["Caption", "Rank of its image", *(f"{place + 1}." for place in range(images.shape[1]))]
    caption = f"{run.name}: what held-out captions find among held-out images, first seed (framed: the right one)"
    return table(caption, head, rows)


def _picture(image: np.ndarray, right: bool) -> str:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    frame = "outline:3px solid var(--line-2)" if right else "outline:1px solid var(--grid)"
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="" width="{_PIXELS}" height="{_PIXELS}" style="{frame}" src="data:image/png;base64,{data}">'
