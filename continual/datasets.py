"""Labelled images for continual learning: those of `plasticity.problems.datasets`, more from a user's folder, or one's
own tensors.

Every loader names exactly one data set and never falls back to another. Images are uint8 [N, C, H, W] (one's own may
be float, of any shape), labels int64 [N]. See specs/offline-data-sources.md.
"""

from __future__ import annotations

import dataclasses
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plasticity.problems import datasets
from plasticity.problems.datasets import DATA_VARIABLE, DataMissing, Images

CACHE_VARIABLE = "NEOTENY_CACHE"  # where decoded images are kept; default: ~/.cache/neoteny


def load(name: str, folder: Path | None = None) -> Images:
    """A data set by name. folder: where the user keeps data sets; default: $NEOTENY_DATA.

    Raises ValueError for an unknown name, DataMissing (a ValueError) with how to place it if it is not here.
    """
    if name not in LOADERS:
        return datasets.load(name, folder)
    if folder is None and DATA_VARIABLE in os.environ:
        folder = Path(os.environ[DATA_VARIABLE])
    return LOADERS[name](folder)


def names() -> list[str]:
    """All data sets that `load` knows."""
    return [*datasets.LOADERS, *LOADERS]


def from_tensors(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], name: str = "tensors") -> Images:
    """One's own data. train, test: inputs [N, ...] uint8 or float, labels [N] of whole numbers.

    Raises ValueError if a label is no class 0 .. C - 1, a class is missing in one of the two parts, or shapes differ.
    """
    (x, y), (test_x, test_y) = train, test
    if len(x) != len(y) or len(test_x) != len(test_y) or not len(y) or not len(test_y):
        raise ValueError(f"'{name}' needs as many labels as inputs, and some of both, in training and test data")
    if x.shape[1:] != test_x.shape[1:] or x.dtype != test_x.dtype:
        raise ValueError(f"training and test inputs of '{name}' differ in shape or type")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"inputs of '{name}' must be uint8 or float, got {x.dtype}")
    if y.is_floating_point() or test_y.is_floating_point():
        raise ValueError(f"labels of '{name}' must be whole numbers, got {y.dtype}")
    y, test_y = y.long(), test_y.long()
    known, tested = y.unique(), test_y.unique()
    if not torch.equal(known, torch.arange(len(known))):
        raise ValueError(f"labels of '{name}' must be 0 .. C - 1, got {known[:10].tolist()}")
    if not torch.equal(known, tested):
        unknown = sorted(set(known.tolist()) ^ set(tested.tolist()))[0]
        raise ValueError(f"class {unknown} of '{name}' is only in one of training and test data")
    levels = 255 if x.dtype == torch.uint8 else 1
    return Images(name, x, y, test_x, test_y, levels, "tensors")


def from_datasets(train: Any, test: Any, name: str = "dataset") -> Images:
    """One's own `torch.utils.data.Dataset`s of (input, label) pairs, read once into memory.

    Inputs are tensors, arrays or PIL pictures of one shape. Raises what `from_tensors` raises.
    """
    return from_tensors(_read_all(train), _read_all(test), name)


def subset(found: Images, train_per_class: int | None, test_per_class: int | None) -> Images:
    """The first so many images of each class, in the order of the data set; None: all.

    Data sets sorted by class or not give the same number of each. Raises ValueError if a class has fewer.
    """
    if train_per_class is None and test_per_class is None:
        return found
    train = _first(found.train_labels, train_per_class, f"training images of '{found.name}'")
    test = _first(found.test_labels, test_per_class, f"test images of '{found.name}'")
    return dataclasses.replace(
        found,
        train_images=found.train_images[train],
        train_labels=found.train_labels[train],
        test_images=found.test_images[test],
        test_labels=found.test_labels[test],
    )


def _first(labels: Tensor, per_class: int | None, what: str) -> Tensor:
    if per_class is None:
        return torch.arange(len(labels))
    counts = labels.bincount()
    if int(counts.min()) < per_class:
        raise ValueError(f"{what}: class {int(counts.argmin())} has {int(counts.min())}, not {per_class}")
    order = labels.argsort(stable=True)
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return order[place < per_class].sort().values


def _read_all(found: Any) -> tuple[Tensor, Tensor]:
    inputs, labels = [], []
    for x, y, *_ in (found[index] for index in range(len(found))):
        inputs.append(x if isinstance(x, Tensor) else _picture(x))
        labels.append(int(y))
    if not inputs:
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return torch.stack(inputs), torch.tensor(labels)


def _picture(x: Any) -> Tensor:
    """A PIL picture or array, channels last as these have them, as a tensor with channels first."""
    array = torch.from_numpy(np.array(x))
    if array.dtype != torch.uint8:
        return array
    return array.unsqueeze(0) if array.ndim == 2 else array.permute(2, 0, 1).contiguous()


def notmnist(folder: Path | None = None) -> Images:
    """10 000 notMNIST letters A-J, 28 x 28 pixels: 800 of each class for training, 200 for testing."""
    stems = [f"notmnist_t10k-{kind}.gz" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    paths = [None if folder is None else folder / stem for stem in stems]
    if not all(path is not None and path.is_file() for path in paths):
        raise DataMissing(
            f"the data set 'notmnist' is not on this machine: put {' and '.join(stems)} into ${DATA_VARIABLE} or --data"
        )
    images, labels = (torch.from_numpy(datasets.read_idx(path)) for path in paths if path is not None)
    return datasets.split_per_class("notmnist", images.unsqueeze(1), labels.long(), 200, 255, str(folder))


def cifar10_jpeg(folder: Path | None = None) -> Images:
    """CIFAR-10 as JPEG, 50 000 + 10 000 colour images of 32 x 32 pixels: `cifar10-jpeg.tar.xz`, or the folder in it.

    JPEG loses a little, so accuracies are not exactly those of CIFAR-10. Decoded once, then kept in the cache.
    """
    archive, unpacked = (None, None) if folder is None else (folder / "cifar10-jpeg.tar.xz", folder / "cifar10-jpeg")
    if archive is not None and archive.is_file():
        state = archive.stat()
        parts = _cached(f"cifar10-jpeg-{state.st_size}.npz", lambda: _from_tar(archive))
    elif unpacked is not None and (unpacked / "train").is_dir():
        parts = [_from_folder(unpacked / part, 32) for part in ("train", "test")]
    else:
        raise DataMissing(
            "the data set 'cifar10-jpeg' is not on this machine: put cifar10-jpeg.tar.xz (train/CLASS/*.jpg and "
            f"test/CLASS/*.jpg), or the folder cifar10-jpeg with these two, into ${DATA_VARIABLE} or --data"
        )
    return _images("cifar10-jpeg", parts, str(archive if archive is not None and archive.is_file() else unpacked))


def cifar10_100(folder: Path | None = None) -> Images:
    """The 10 classes of CIFAR-10 and behind them the first 50 of CIFAR-100, as in von Oswald et al. 2020."""
    try:
        first, second = datasets.load("cifar10", folder), datasets.load("cifar100", folder)
    except DataMissing as error:
        raise DataMissing(
            "the data set 'cifar10-100' is not on this machine: put torchvision's folders 'cifar-10-batches-py' and "
            f"'cifar-100-python' below ${DATA_VARIABLE} or --data"
        ) from error

    def joined(x: Tensor, y: Tensor, more_x: Tensor, more_y: Tensor) -> tuple[Tensor, Tensor]:
        wanted = more_y < 50
        return torch.cat([x, more_x[wanted]]), torch.cat([y, more_y[wanted] + 10])

    train = joined(first.train_images, first.train_labels, second.train_images, second.train_labels)
    test = joined(first.test_images, first.test_labels, second.test_images, second.test_labels)
    return Images("cifar10-100", *train, *test, first.levels, f"{first.source}, {second.source}")


def miniimagenet(folder: Path | None = None) -> Images:
    """miniImageNet, 100 classes of 84 x 84 pixels: 500 of each for training, 100 for testing.

    As in the sibling code of UER's authors, the 64/16/20 meta-learning classes are merged and a sixth of each class is
    held out, drawn from a seed.
    """
    names = [f"mini-imagenet-cache-{part}.npz" for part in ("train", "val", "test")]
    place = None if folder is None else folder / "miniimagenet"
    if place is None or not all((place / name).is_file() for name in names):
        raise DataMissing(
            "the data set 'miniimagenet' is not on this machine: save the array `image_data` [N, 84, 84, 3] of each of "
            f"its three pickles as {', '.join(names)} in miniimagenet below ${DATA_VARIABLE} or --data"
        )
    arrays = [np.load(place / name, allow_pickle=False)["image_data"] for name in names]
    pixels = torch.from_numpy(np.concatenate(arrays)).permute(0, 3, 1, 2).contiguous()
    per_class = 600 if len(pixels) % 600 == 0 else len(pixels)
    labels = torch.arange(len(pixels)) // per_class
    return datasets.split_per_class("miniimagenet", pixels, labels, per_class // 6, 255, str(place))


def tinyimagenet(folder: Path | None = None) -> Images:
    """TinyImageNet, 200 classes of 64 x 64 pixels, 500 of each for training, 50 for testing (its validation part)."""
    place = None if folder is None else folder / "tiny-imagenet-200"
    if place is None or not (place / "train").is_dir() or not (place / "val" / "val_annotations.txt").is_file():
        raise DataMissing(
            "the data set 'tinyimagenet' is not on this machine: put its folder tiny-imagenet-200 into "
            f"${DATA_VARIABLE} or --data"
        )
    parts = _cached("tinyimagenet.npz", lambda: _tiny_parts(place))
    return _images("tinyimagenet", parts, str(place))


def omniglot(folder: Path | None = None) -> Images:
    """Characters of 8 alphabets, 28 x 28 pixels, 15 of each for training, 5 for testing (Lake et al. 2015).

    Of the two small background sets, with alphabets that both have taken once; in alphabetical order, `groups` are the
    alphabets. Drawn in 105 x 105 black and white pixels; ink is bright here. Decoded once, then kept in the cache.
    """
    names = [f"images_background_small{number}.zip" for number in (1, 2)]
    paths = [] if folder is None else [path for name in names for path in folder.glob(f"**/{name}")]
    if len(paths) != len(names):
        raise DataMissing(
            f"the data set 'omniglot' is not on this machine: put {' and '.join(names)} "
            f"(github.com/brendenlake/omniglot) into ${DATA_VARIABLE} or --data"
        )
    sizes = "-".join(str(path.stat().st_size) for path in paths)
    (x, y), (alphabets, _) = _cached(f"omniglot-{sizes}.npz", lambda: _drawn_characters(paths))
    whole = datasets.split_per_class("omniglot", torch.from_numpy(x), torch.from_numpy(y), 5, 255, str(paths[0].parent))
    return dataclasses.replace(whole, groups=tuple(alphabets.tolist()))


LOADERS: dict[str, Callable[[Path | None], Images]] = {
    "notmnist": notmnist,
    "cifar10-jpeg": cifar10_jpeg,
    "cifar10-100": cifar10_100,
    "miniimagenet": miniimagenet,
    "tinyimagenet": tinyimagenet,
    "omniglot": omniglot,
}

_Part = tuple[np.ndarray, np.ndarray]  # images [N, C, H, W] uint8, labels [N] int64


def _images(name: str, parts: list[_Part], source: str) -> Images:
    (x, y), (test_x, test_y) = ((torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in parts)
    return Images(name, x, y, test_x, test_y, 255, source)


def _cached(name: str, make: Callable[[], list[_Part]]) -> list[_Part]:
    """What `make` gives, from the cache if it was made before."""
    folder = Path(os.environ.get(CACHE_VARIABLE, Path.home() / ".cache" / "neoteny"))
    path = folder / name
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    if path.is_file():
        with np.load(path, allow_pickle=False) as kept:
            x, y, test_x, test_y = (kept[key] for key in keys)
        return [(x, y), (test_x, test_y)]
    parts = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{name}.{os.getpid()}.npz")
        np.savez(temporary, **dict(zip(keys, [array for part in parts for array in part], strict=True)))
        temporary.replace(path)
    except OSError:  # a home that cannot be written: decode again next time
        return parts
    return parts


def _decode(content: bytes, size: int) -> np.ndarray:
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    if pixels.shape != (size, size, 3):
        raise ValueError(f"a picture has {pixels.shape[:2]} pixels, not {size} x {size}")
    return pixels.transpose(2, 0, 1)


def _from_tar(archive: Path) -> list[_Part]:
    """train/CLASS/NAME.jpg and test/CLASS/NAME.jpg; classes in alphabetical order, images in that of their names."""
    found: dict[str, list[tuple[str, str, np.ndarray]]] = {"train": [], "test": []}
    with tarfile.open(archive) as files:
        for member in files:
            *_, part, label, name = ["", "", *member.name.split("/")][-3:]
            content = files.extractfile(member) if member.isfile() and part in found else None
            if content is not None and name.endswith(".jpg"):
                found[part].append((label, name, _decode(content.read(), 32)))
    return [_stacked(found[part]) for part in ("train", "test")]


def _from_folder(folder: Path, size: int) -> _Part:
    paths = sorted(folder.glob("*/*.jpg"))
    return _stacked([(path.parent.name, path.name, _decode(path.read_bytes(), size)) for path in paths])


def _stacked(pictures: list[tuple[str, str, np.ndarray]]) -> _Part:
    pictures = sorted(pictures, key=lambda picture: picture[:2])
    classes = sorted({label for label, _, _ in pictures})
    return np.stack([pixels for _, _, pixels in pictures]), np.array([classes.index(c) for c, _, _ in pictures])


def _tiny_parts(place: Path) -> list[_Part]:
    train = [
        (path.parents[1].name, path.name, _decode(path.read_bytes(), 64))
        for path in sorted((place / "train").glob("*/images/*.JPEG"))
    ]
    lines = (place / "val" / "val_annotations.txt").read_text().splitlines()
    test = [
        (label, name, _decode((place / "val" / "images" / name).read_bytes(), 64))
        for name, label, *_ in (line.split("\t") for line in lines)
    ]
    return [_stacked(train), _stacked(test)]


def _drawn_characters(archives: list[Path]) -> list[_Part]:
    """Pictures and classes, and in place of a second part the number of characters of each alphabet, twice."""
    from PIL import Image

    drawn: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for archive in archives:
        with zipfile.ZipFile(archive) as files:
            for path in files.namelist():
                *_, alphabet, character, name = ["", "", *path.split("/")][-3:]
                if name.endswith(".png"):
                    picture = (
                        Image.open(io.BytesIO(files.read(path))).convert("L").resize((28, 28), Image.Resampling.BOX)
                    )
                    drawn.setdefault(alphabet, {}).setdefault(character, {})[name] = 255 - np.asarray(picture)[None]
    characters = [own for alphabet in sorted(drawn) for _, own in sorted(drawn[alphabet].items())]
    labels = np.repeat(np.arange(len(characters)), [len(own) for own in characters])
    pictures = np.stack([picture for own in characters for _, picture in sorted(own.items())])
    sizes = np.array([len(drawn[alphabet]) for alphabet in sorted(drawn)])
    return [(pictures, labels), (sizes, sizes)]
