"""`shapes-captions`: drawn shapes and sentences about them, no files needed (specs/growclip-and-growth.md, D.3).

6 shapes x 8 colours x 3 sizes x 9 places, and optionally two objects with a relation. New shapes and colours arrive
part by part. View 0 is filled on white, view 1 an outline on grey. The same arguments give the same bytes everywhere.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import torch

from continual.pairs.collection import Concept, Pairs

# Each with the part in which it arrives, and a synonym.
_SHAPES = {
    "circle": (0, "disc"),
    "square": (0, "box"),
    "triangle": (1, "wedge"),
    "diamond": (2, "rhombus"),
    "cross": (3, "plus"),
    "ring": (4, "hoop"),
}
_COLOURS = {
    "red": (0, "crimson", (214, 39, 40)),
    "green": (0, "emerald", (44, 140, 60)),
    "blue": (0, "azure", (31, 90, 200)),
    "yellow": (0, "golden", (235, 200, 30)),
    "purple": (1, "violet", (128, 60, 170)),
    "orange": (2, "amber", (255, 127, 14)),
    "black": (3, "dark", (25, 25, 25)),
    "pink": (4, "rose", (240, 130, 180)),
}
_SIZES = {"small": ("little", 0.075), "medium": ("middling", 0.115), "large": ("big", 0.155)}  # half of the width
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_OUTLINE, _GREY = 0.04, 190


@cache
def shapes_captions(size: int = 32, relations: int = 0) -> Pairs:
    """1 296 concepts in 5 parts, two views each. size: pixels. relations: pairs of objects more in each part."""
    single = [_single(*words) for words in itertools.product(_SHAPES, _COLOURS, _SIZES, range(9))]
    found = [*single, *_related(single, relations)] if relations else single
    found.sort(key=lambda drawn: drawn[0].version)
    concepts = [concept for concept, _ in found]
    pictures = np.stack([_draw(objects, size, view) for _, objects in found for view in (0, 1)])
    return Pairs(
        name="shapes-captions",
        images=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
        concept=torch.arange(len(concepts)).repeat_interleave(2),
        view=torch.arange(2).repeat(len(concepts)),
        concepts=concepts,
        parts=torch.tensor([concept.version[0] for concept in concepts]),
        views=("filled", "outline"),
        part_names=tuple(f"part {index + 1}" for index in range(5)),
    )


_Object = tuple[str, tuple[int, int, int], float, tuple[float, float]]  # shape, colour, half width, centre (y, x)


def _single(shape: str, colour: str, size: str, place: int) -> tuple[Concept, list[_Object]]:
    row, column = divmod(place, 3)
    synonym, half = _SIZES[size]
    where = f"{_ROWS[row]} {_COLUMNS[column]}"
    concept = Concept(
        captions=(f"{size} {colour} {shape} {where}", f"a {size} {colour} {shape} in the {where}"),
        tags=(synonym, _COLOURS[colour][1], _SHAPES[shape][1], _ROWS[row], _COLUMNS[column]),
        category=shape,
        subcategory=colour,
        version=(max(_SHAPES[shape][0], _COLOURS[colour][0]),),
    )
    centre = (0.2 + 0.3 * row, 0.2 + 0.3 * column)
    return concept, [(shape, _COLOURS[colour][2], half, centre)]


def _related(single: list[tuple[Concept, list[_Object]]], count: int) -> list[tuple[Concept, list[_Object]]]:
    """`count` pairs of objects in each part: "small red circle above large blue square"."""
    draw = np.random.default_rng(0)
    found = []
    for part in range(5):
        known = [drawn for drawn in single if drawn[0].version[0] <= part and drawn[0].captions[0].endswith("centre")]
        known = [drawn for drawn in known if "middle" in drawn[0].captions[0]]
        chosen = draw.permutation(len(known) ** 2)
        pairs = [divmod(int(number), len(known)) for number in chosen]
        pairs = [(a, b) for a, b in pairs if a != b and part in (known[a][0].version[0], known[b][0].version[0])]
        for (a, b), relation in zip(pairs[:count], itertools.cycle(("above", "left of"))):
            (first, (one,)), (second, (two,)) = known[a], known[b]
            texts = [concept.captions[0].removesuffix(" middle centre") for concept in (first, second)]
            near, far = ((0.25, 0.5), (0.75, 0.5)) if relation == "above" else ((0.5, 0.25), (0.5, 0.75))
            concept = Concept((f"{texts[0]} {relation} {texts[1]}",), (), first.category, first.subcategory, (part,))
            found.append((concept, [(*one[:3], near), (*two[:3], far)]))
    return found


def _draw(objects: list[_Object], size: int, view: int) -> np.ndarray:
    """uint8 [size, size, 3]; edges fall off over a pixel."""
    axis = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(axis, axis, indexing="ij")
    picture = np.full((size, size, 3), 255.0 if view == 0 else _GREY)
    for shape, colour, half, (down, across) in objects:
        inside = _depth(shape, y - down, x - across, half)
        if view == 1:
            inside = _OUTLINE / 2 - np.abs(inside - _OUTLINE / 2)
        cover = np.clip(inside * size + 0.5, 0, 1)[..., None]
        picture = picture * (1 - cover) + np.array(colour) * cover
    return picture.round().astype(np.uint8)


def _depth(shape: str, y: np.ndarray, x: np.ndarray, half: float) -> np.ndarray:
    """How far inside of a shape a point is, below 0 outside."""
    radius = np.hypot(y, x)
    if shape == "circle":
        return half - radius
    if shape == "square":
        return half * 0.9 - np.maximum(np.abs(y), np.abs(x))
    if shape == "triangle":
        return np.minimum(half * 0.8 - y, (y + half - 1.8 * np.abs(x)) / np.hypot(1, 1.8))
    if shape == "diamond":
        return (half * 1.2 - np.abs(y) - np.abs(x)) / np.sqrt(2)
    if shape == "cross":
        near, far = np.minimum(np.abs(y), np.abs(x)), np.maximum(np.abs(y), np.abs(x))
        return np.minimum(half * 0.35 - near, half * 1.1 - far)
    return half * 0.3 - np.abs(radius - half * 0.8)  # a ring
