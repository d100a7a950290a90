"""A text that every machine has: the documentation strings of Python's standard library."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def docstrings(length: int) -> str:
    """The first so many characters of them, module by module in the order of the alphabet, ASCII only.

    Which ones follows from Python's version. Raises ValueError if there are fewer.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found, characters = [], 0
    for path in sorted(root.glob("*.py")):
        for text in _of(path):
            found.append(text)
            characters += len(text)
        if characters >= length:
            return "".join(found)[:length]
    raise ValueError(f"the standard library has {characters} characters of documentation, {length} are wanted")


def _of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text.encode("ascii", "ignore").decode() + "\n\n" for text in texts if text]


def encoded(text: str) -> tuple[list[str], Tensor]:
    """Its alphabet, in order, and the text as places in it, int64 [N]."""
    alphabet = sorted(set(text))
    place = {letter: index for index, letter in enumerate(alphabet)}
    return alphabet, torch.tensor([place[letter] for letter in text])
