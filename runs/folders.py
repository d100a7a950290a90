"""Where a run lands: a new folder with its settings in it, whole or not at all."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from envs.cores import available_cores
from runs.config import CONFIG
from runs.errors import UsageError
from runs.files import sync


def new_run_folder(out: Path, name: str | None, stem: str, save: Callable[[Path], None]) -> Path:
    """Make OUT/NAME and let `save` write `config.json` into it, last. name: None for `stem`, numbered if it is taken.

    Raises UsageError if the folder exists or cannot be made; nothing is left behind then.
    """
    if name is not None:
        if Path(name).name != name or name in ("", ".", ".."):
            raise UsageError(f"--name must be a plain folder name, got '{name}'")
        folder = out / name
        if folder.exists():
            resumable = (folder / CONFIG).exists()
            way = f"continue it with `neoteny resume {folder}`, or " if resumable else ""
            raise UsageError(f"the run '{folder}' exists already; {way}choose another --name or remove it")
    else:
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        folder = next(path for name in names if not (path := out / name).exists())
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    try:
        folder.mkdir(parents=True)
        save(folder)
        for path in made:
            sync(path.parent)
    except OSError as error:
        if folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        for path in made[1:]:
            if path.is_dir():
                path.rmdir()
        raise UsageError(f"cannot write to '{folder}': {error.strerror}") from error
    return folder


def describe_machine() -> dict[str, Any]:
    """Where a result is made: commit, machine, versions. Plain values."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        versions["neoteny"] = version("neoteny")
    except PackageNotFoundError:  # imported from a checkout that is not installed
        versions["neoteny"] = "not installed"
    return {"commit": _commit(), "machine": f"{_processor()}, {available_cores()} cores", "versions": versions}


def _commit() -> str | None:
    """Of the checkout this code runs from, None outside of one."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or os.uname().machine
