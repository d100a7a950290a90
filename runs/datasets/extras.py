"""What data files need beyond the core's packages; imported when used."""

from __future__ import annotations

import importlib
from types import ModuleType

from runs.errors import UsageError


def require_h5py() -> ModuleType:
    """The module h5py. Raises UsageError with the command that installs it."""
    return _require("h5py", "HDF5 files")


def require_minari() -> ModuleType:
    """The module minari. Raises UsageError with the command that installs it."""
    require_h5py()
    return _require("minari", "Minari's datasets")


def _require(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{what} need the package {name}: pip install 'neoteny[offline]'") from error
