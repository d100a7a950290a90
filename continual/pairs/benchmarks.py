"""Which collections of pairs there are, by name or as a path of the user's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

from continual.pairs import files, packaged
from continual.pairs.collection import Pairs
from continual.pairs.shapes import shapes_captions
from plasticity.problems.datasets import DATA_VARIABLE, DataMissing

_MOST = 20_000  # pictures of a data set of torchvision that are kept in memory


def open_pairs(
    name: str, folder: Path | None = None, size: int = 32, tasks: int | None = None, concepts: int | None = None
) -> Pairs:
    """A collection by name, or the pairs below a path. folder: of data sets, default $NEOTENY_DATA or the cache.

    size: pixels of an image's side. tasks: cut anew into so many equal parts. concepts: only so many of each part.
    Raises ValueError, one sentence, for an unknown name, data that is not here, or pairs that cannot be used.
    """
    if name in COLLECTIONS:
        pairs = COLLECTIONS[name](folder, size)
    elif is_path(name):
        pairs = files.read(Path(name), size)
    else:
        raise ValueError(f"unknown pairs '{name}': {', '.join(COLLECTIONS)}, or a folder such as ./photos")
    if tasks is not None:
        pairs = pairs.in_parts(tasks)
    return (pairs if concepts is None else pairs.limited(concepts)).resized(size)


def is_path(name: str) -> bool:
    """Whether a benchmark's name is that of a user's files."""
    return "/" in name or name.startswith(".") or name.endswith(".tar")


def _shapes(folder: Path | None, size: int) -> Pairs:
    return shapes_captions(size)


def _packaged(name: str, folder: Path | None, size: int) -> Pairs:
    return packaged.load(name, folder)


def _emoji_icons(folder: Path | None, size: int) -> Pairs:
    """Icons as a further domain behind the emoji."""
    return packaged.load("emoji", folder).resized(size).followed_by(packaged.load("icons", folder))


def _coco(folder: Path | None, size: int) -> Pairs:
    """COCO 2017 by torchvision, which needs pycocotools: train2017/ and annotations/captions_train2017.json."""
    place = packaged.data_folder(folder) / "coco"
    images, notes = place / "train2017", place / "annotations" / "captions_train2017.json"
    if not images.is_dir() or not notes.is_file():
        raise DataMissing(f"COCO captions are not on this machine: put train2017 and annotations into '{place}'")
    from torchvision.datasets import CocoCaptions

    try:
        found = CocoCaptions(str(images), str(notes))
    except ModuleNotFoundError as error:
        raise DataMissing(f"COCO captions need {error.name}: pip install {error.name}") from error
    return files.from_captions(islice((found[index] for index in range(len(found))), _MOST), "coco-captions", size)


def _flickr(folder: Path | None, size: int) -> Pairs:
    """Flickr30k by torchvision: flickr30k-images/ and results_20130124.token."""
    place = packaged.data_folder(folder) / "flickr30k"
    images, notes = place / "flickr30k-images", place / "results_20130124.token"
    if not images.is_dir() or not notes.is_file():
        how = f"put flickr30k-images and results_20130124.token into '{place}', or set ${DATA_VARIABLE}"
        raise DataMissing(f"Flickr30k is not on this machine: {how}")
    from torchvision.datasets import Flickr30k

    found = Flickr30k(str(images), str(notes))
    return files.from_captions(islice((found[index] for index in range(len(found))), _MOST), "flickr30k", size)


COLLECTIONS: dict[str, Callable[[Path | None, int], Pairs]] = {
    "emoji": partial(_packaged, "emoji"),
    "icons": partial(_packaged, "icons"),
    "emoji-icons": _emoji_icons,
    "shapes-captions": _shapes,
    "coco-captions": _coco,
    "flickr30k": _flickr,
}
