"""Pairs from a user's files: a folder, a table, shards of tar, or a data set of torchvision.

- a folder with `captions.csv` or `captions.jsonl`: columns image and caption, optionally concept, view, tags (divided
  by ;), category, subcategory, part or version;
- a folder of images, each with a text file of the same name, one caption a line;
- a folder of .tar shards (or one), whose members of one name are a sample: NAME.jpg with NAME.txt or NAME.json;
- torchvision's CocoCaptions and Flickr30k: `from_captions`.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from continual.pairs.collection import Concept, Pairs

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_TABLES = ("captions.csv", "captions.jsonl")
_Row = tuple[str, bytes, Mapping[str, Any]]  # name of the picture for messages, its bytes, what is said of it


def read(path: Path, size: int = 64) -> Pairs:
    """All pairs below a path. size: pixels of the square that images are cut and scaled to.

    Raises ValueError, one sentence, for a path without pairs, an image that cannot be read, an empty caption.
    """
    if not path.exists():
        raise ValueError(f"there is no '{path}'")
    return _collected(path.name.removesuffix(".tar"), _rows(path), size, str(path))


def from_captions(found: Iterable[tuple[Any, list[str]]], name: str, size: int = 64) -> Pairs:
    """One's own data set of (PIL picture, captions), such as torchvision's CocoCaptions or Flickr30k."""
    images, concepts = [], []
    for picture, captions in found:
        images.append(_squared(picture, size))
        concepts.append(Concept(tuple(captions)))
    return _pairs(name, images, list(range(len(images))), [0] * len(images), concepts, {})


def _rows(path: Path) -> Iterator[_Row]:
    if path.is_file() and path.suffix == ".tar":
        return _samples([path])
    table = next((path / name for name in _TABLES if (path / name).is_file()), None)
    if table is not None:
        return _listed(table)
    shards = sorted(path.glob("*.tar"))
    if shards:
        return _samples(shards)
    return _beside(path)


def _listed(table: Path) -> Iterator[_Row]:
    text = table.read_text(encoding="utf-8")
    try:
        rows = list(csv.DictReader(io.StringIO(text))) if table.suffix == ".csv" else _lines(text)
    except ValueError as error:
        raise ValueError(f"'{table}' is no table of JSON lines: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not row.get("image") or "caption" not in row:
            raise ValueError(f"row {number} of '{table}' needs an image and a caption, got {dict(row)}")
        image = table.parent / str(row["image"])
        if not image.is_file():
            raise ValueError(f"row {number} of '{table}' names '{row['image']}', which is not there")
        yield str(image), image.read_bytes(), row


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _beside(folder: Path) -> Iterator[_Row]:
    for image in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES):
        text = image.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"'{image}' has no caption: '{text.name}' is not beside it")
        captions = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        category = "" if image.parent == folder else image.parent.name
        yield str(image), image.read_bytes(), {"caption": captions, "category": category}


def _samples(shards: list[Path]) -> Iterator[_Row]:
    """Members of a shard with one name up to the first dot of their last part, as WebDataset writes them."""
    for shard in shards:
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as files:
            for member in files:
                content = files.extractfile(member) if member.isfile() else None
                if content is not None:
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    members.setdefault(folder + slash + stem, {})[f".{ending.lower()}"] = content.read()
        for name, parts in members.items():
            image = next((parts[ending] for ending in parts if ending in PICTURES), None)
            told = json.loads(parts[".json"]) if ".json" in parts else {}
            told |= {"caption": parts[".txt"].decode()} if ".txt" in parts else {}
            if image is None or "caption" not in told:
                raise ValueError(f"'{name}' in '{shard}' needs an image and a caption (.txt, or a .json with caption)")
            yield f"{shard}:{name}", image, told


def _collected(name: str, rows: Iterable[_Row], size: int, place: str) -> Pairs:
    images, numbers, views, concepts = [], [], [], []
    known: dict[str, int] = {}
    view_names: dict[str, int] = {}
    for picture, content, told in rows:
        captions = told["caption"] if isinstance(told["caption"], list) else [str(told["caption"] or "").strip()]
        if not captions or not all(captions):
            raise ValueError(f"the caption of '{picture}' is empty")
        key = str(told.get("concept") or captions[0])  # equal captions are of one concept
        if key not in known:
            known[key] = len(concepts)
            concepts.append(_concept(captions, told))
        images.append(_decoded(picture, content, size))
        numbers.append(known[key])
        views.append(view_names.setdefault(str(told.get("view") or "image"), len(view_names)))
    if not images:
        raise ValueError(f"'{place}' has no pairs: no captions.csv, captions.jsonl, .tar shards, or images with .txt")
    if len(view_names) > 2:
        raise ValueError(f"'{place}' has {len(view_names)} views ({', '.join(view_names)}), at most two are told apart")
    return _pairs(name, images, numbers, views, concepts, view_names)


def _pairs(
    name: str,
    images: list[np.ndarray],
    numbers: list[int],
    views: list[int],
    concepts: list[Concept],
    view_names: Mapping[str, int],
) -> Pairs:
    versions = sorted({concept.version for concept in concepts})
    parts = [versions.index(concept.version) for concept in concepts]
    pairs = Pairs(
        name=name,
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        concept=torch.tensor(numbers),
        view=torch.tensor(views),
        concepts=concepts,
        parts=torch.tensor(parts),
        views=tuple(view_names) or ("image",),
        part_names=tuple(".".join(map(str, version)) for version in versions),
    )
    return pairs if len(versions) > 1 else pairs.in_parts(min(5, len(concepts)))


def _concept(captions: list[str], told: Mapping[str, Any]) -> Concept:
    tags = told.get("tags") or ()
    listed = tags.split(";") if isinstance(tags, str) else tags
    version = str(told.get("part") or told.get("version") or 0)
    try:
        numbers = tuple(int(part) for part in version.split("."))
    except ValueError:
        raise ValueError(f"part or version must be numbers such as 3 or 12.1, got '{version}'") from None
    return Concept(
        tuple(map(str, captions)), tuple(str(tag).strip() for tag in listed if str(tag).strip()),
        str(told.get("category") or ""), str(told.get("subcategory") or ""), numbers,
    )  # fmt: skip


def _decoded(name: str, content: bytes, size: int) -> np.ndarray:
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"'{name}' is no image that can be read: {error}") from error
    return _squared(picture, size)


def _squared(picture: Any, size: int) -> np.ndarray:
    """The middle square of a PIL picture, scaled, uint8 [size, size, 3]; what is transparent white."""
    from PIL import Image, ImageOps

    picture = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return np.asarray(ImageOps.fit(flat, (size, size), Image.Resampling.BICUBIC))
