"""Files that are either the old version or the new one, never half of one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; a file written there takes the place of `path` when the block ends.

    The content is on the disk before the name changes, and the new name before this returns. If the block raises, the
    temporary file is removed and `path` is as it was. A killed process may leave a hidden `.NAME.*.part` behind.
    Raises FileNotFoundError if the folder does not exist or the block wrote nothing.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: its folder does not exist")
    # Random, because a shared disk may see the same process number on two machines.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Write a whole file (text as UTF-8); a reader sees the old content or the new, also after a power cut.

    Raises FileNotFoundError if the folder does not exist, OSError as the disk reports it (full, read-only).
    """
    content = data.encode() if isinstance(data, str) else data
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_new(path: Path, data: bytes | memoryview) -> None:
    """Write a file that does not exist yet and wait until its content is on the disk. Its name is not: sync the folder.

    Raises FileExistsError rather than write into a file that may be linked to another name, OSError as the disk does.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that never changes a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as indented, strict JSON, atomically. ValueError for nan or infinity, TypeError for objects."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a strict JSON file. Raises FileNotFoundError, or ValueError naming the file if it is damaged."""
    content = Path(path).read_bytes()
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def parse_json(content: bytes) -> Any:
    """Strict JSON in UTF-8 to plain values. Raises ValueError, also for NaN and Infinity, which JSON does not have."""
    return json.loads(content.decode(), parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def sync(path: Path) -> None:
    """Block until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
