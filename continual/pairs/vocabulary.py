"""The words of captions as numbers; the vocabulary grows when new pairs arrive."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PADDING, UNKNOWN, FIRST = 0, 1, 2
_WORD = re.compile(r"[a-z0-9']+")


def split(text: str) -> list[str]:
    """The words of a text: lower case, runs of letters, digits and apostrophes."""
    return _WORD.findall(text.lower())


class Vocabulary:
    """Words and their numbers, from 2 on: 0 is padding, 1 every unknown word. Numbers never change.

    words: those known already, in the order of their numbers.
    """

    def __init__(self, words: Sequence[str] = ()):
        self.words: list[str] = []
        self._numbers: dict[str, int] = {}
        for word in words:
            self._add(word)

    def __len__(self) -> int:
        """Numbers in use, with padding and the unknown word: rows of a token embedding."""
        return FIRST + len(self.words)

    def grow(self, texts: Iterable[str]) -> int:
        """Learn the words of new texts, in alphabetical order, so that the order of texts says nothing. How many."""
        new = sorted({word for text in texts for word in split(text)} - self._numbers.keys())
        for word in new:
            self._add(word)
        return len(new)

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """Tokens int64 [N, length]; longer texts are cut. Raises ValueError, one sentence, for a text without words."""
        rows = []
        for text in texts:
            numbers = [self._numbers.get(word, UNKNOWN) for word in split(text)[:length]]
            if not numbers:
                raise ValueError(f"the caption {text!r} has no word (letters a-z and digits make words)")
            rows.append(numbers + [PADDING] * (length - len(numbers)))
        return torch.tensor(rows, dtype=torch.int64).view(-1, length)

    def _add(self, word: str) -> None:
        if word in self._numbers:
            raise ValueError(f"the word '{word}' is in the vocabulary already")
        self._numbers[word] = len(self)
        self.words.append(word)
