"""The genome: all that defines the architecture of a dual encoder, its parameters and its cost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Norm = Literal["layernorm", "rmsnorm"]
Init = Literal["torch", "clip"]


class Towers(NamedTuple):
    """One number for each stack of blocks."""

    image: int
    text: int
    shared: int


TOWERS = Towers._fields
_PER_TOWER = ("depth", "heads", "ffn")


@dataclass(frozen=True, order=True)
class Genome:
    """A dual encoder: towers for images and texts, then blocks that both share.

    depth: blocks of each stack; `shared` may have none. width: D, of the stream, the same everywhere. heads, head_dim:
    H of each stack and d_h; their product need not be D. ffn: F, hidden neurons of a block, of each stack. embedding:
    E, of images and texts in their common space; it never grows. image_size, patch: S and p, pixels. vocabulary: V,
    tokens with padding and unknown. length: T, tokens of a text at most. epsilon: of the norms. init: "clip" draws
    what writes to the stream smaller by sqrt(2 depth). Raises ValueError, one sentence, for what cannot be built.
    """

    depth: Towers = Towers(1, 1, 1)
    width: int = 64
    heads: Towers = Towers(4, 4, 4)
    head_dim: int = 16
    ffn: Towers = Towers(128, 128, 128)
    embedding: int = 64
    image_size: int = 32
    patch: int = 8
    vocabulary: int = 2
    length: int = 16
    norm: Norm = "layernorm"
    epsilon: float = 1e-5
    init: Init = "torch"

    def __post_init__(self) -> None:
        for name in _PER_TOWER:
            object.__setattr__(self, name, _towers(name, getattr(self, name)))
        if min(self.depth.image, self.depth.text) < 1 or self.depth.shared < 0:
            raise ValueError(f"image and text towers need a block each, got depth {tuple(self.depth)}")
        for name in ("width", "head_dim", "embedding", "image_size", "patch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(*self.heads, *self.ffn) < 1:
            raise ValueError("every stack needs at least 1 head and 1 hidden neuron")
        if self.vocabulary < 2:
            raise ValueError(f"the vocabulary has at least padding and unknown, 2 tokens, got {self.vocabulary}")
        if self.image_size % self.patch:
            raise ValueError(f"patches of {self.patch} pixels do not divide an image of {self.image_size}")
        if self.norm not in ("layernorm", "rmsnorm"):
            raise ValueError(f"norm is layernorm or rmsnorm, got '{self.norm}'")
        if self.init not in ("torch", "clip"):
            raise ValueError(f"init is torch or clip, got '{self.init}'")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def parameters(self) -> int:
        """How many numbers are learned."""
        width, blocks = self.width, sum(self.depth[t] * self.block_parameters(t) for t in range(3))
        image = width * (3 * self.patch**2 + 1) + width + (self.patches + 1) * width
        text = self.vocabulary * width + width + (self.length + 1) * width
        return blocks + image + text + 2 * self._norm_parameters + 2 * width * self.embedding + 1

    @property
    def capacity(self) -> int:
        """Parameters without embeddings of tokens and positions: what a budget counts."""
        return self.parameters - self.width * (self.vocabulary + self.patches + self.length + 2)

    def block_parameters(self, tower: int) -> int:
        """Of one block of a stack, 0 to 2."""
        width, ffn, attended = self.width, self.ffn[tower], self.heads[tower] * self.head_dim
        attention = width * 3 * attended + 3 * attended + attended * width + width
        return attention + 2 * width * ffn + ffn + width + 2 * self._norm_parameters

    @property
    def _norm_parameters(self) -> int:
        return self.width * (2 if self.norm == "layernorm" else 1)

    @property
    def flops(self) -> float:
        """Of a training step, for each pair: multiply-adds count 2, the backward pass twice the forward pass.

        Products only; the last block answers for the class token alone. Logits of the batch are left out.
        """
        patches = self.patches * 3 * self.patch**2 * self.width
        encoders = self._encoder(0, self.patches + 1) + self._encoder(1, self.length + 1)
        return 3 * 2 * (patches + encoders + 2 * self.width * self.embedding)

    def _encoder(self, tower: int, tokens: int) -> int:
        stacks = [tower] * self.depth[tower] + [2] * self.depth.shared
        return sum(self._block(t, tokens, tokens) for t in stacks[:-1]) + self._block(stacks[-1], tokens, 1)

    def _block(self, tower: int, tokens: int, asked: int) -> int:
        """Multiply-adds of a block on a sequence, of which so many tokens are asked for."""
        attended = self.heads[tower] * self.head_dim
        keys = 2 * tokens * self.width * attended
        return keys + asked * (2 * self.width * attended + 2 * tokens * attended + 2 * self.width * self.ffn[tower])

    def to_json(self) -> str:
        """One line, the same for equal genomes."""
        return json.dumps(self.as_dict(), sort_keys=True)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, towers by name."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**found, **{name: found[name]._asdict() for name in _PER_TOWER}}

    @classmethod
    def from_json(cls, text: str) -> Genome:
        """Raises ValueError for what is not a genome."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not the JSON of a genome: {error}") from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Any) -> Genome:
        """Raises ValueError for what is not a genome. One number for all stacks is enough."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or not set(values) <= known:
            raise ValueError(f"a genome has the fields {', '.join(sorted(known))}")
        return cls(**values)

    def grown(self, **changes: Any) -> Genome:
        """With other values."""
        return dataclasses.replace(self, **changes)

    def dimensions(self) -> Iterator[tuple[str, int]]:
        """Everything that may grow, by name: "image_depth", "text_ffn", "width", ..."""
        for name in _PER_TOWER:
            yield from ((f"{tower}_{name}", value) for tower, value in getattr(self, name)._asdict().items())
        yield from ((name, getattr(self, name)) for name in ("width", "head_dim", "vocabulary", "length"))


def _towers(name: str, value: Any) -> Towers:
    """From one number for all, three in order, or each by its tower's name."""
    if isinstance(value, Mapping) and set(value) == set(TOWERS):
        value = [value[tower] for tower in TOWERS]
    numbers = [value] * 3 if isinstance(value, int) else list(value)
    if len(numbers) != 3 or not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"{name} is one whole number, or one for each of {', '.join(TOWERS)}, got {value}")
    return Towers(*numbers)


SMALL = Genome()
PAPER = Genome(
    depth=Towers(6, 6, 2), width=512, heads=Towers(8, 8, 8), head_dim=64, ffn=Towers(2048, 2048, 2048),
    embedding=512, image_size=224, patch=32, length=32,
)  # fmt: skip
# As far as the paper-size model may grow; of our choice, the paper's is not known.
PAPER_CAP = PAPER.grown(depth=Towers(12, 12, 6), width=1024, ffn=Towers(4096, 4096, 4096))
