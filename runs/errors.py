"""Bad input: what it is, and how the nearest valid name is found."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST = 30  # names in one sentence


class UsageError(ValueError):
    """Bad input: the message is one sentence, the command ends with exit code 2, and nothing was written."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean …?' with the nearest known names; if none is near, the list, or its beginning."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    if near:
        return f" Did you mean {' or '.join(repr(name) for name in near)}?"
    if len(known) > _MOST:
        known = [*known[:5], f"… ({len(known)} in all)"]
    return f" It is one of {', '.join(known)}." if known else ""
