"""What must happen before a simulator starts OpenGL in this process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys


def choose_platform() -> None:
    """Draw with EGL where there is no display. Call before `mujoco` is first imported: it chooses only then."""
    if sys.platform == "linux" and not {"DISPLAY", "MUJOCO_GL"} & set(os.environ):
        with contextlib.suppress(OSError):  # without the library, choosing EGL would make that import fail
            ctypes.CDLL("libEGL.so.1")
            os.environ["MUJOCO_GL"] = "egl"


@functools.cache
def load_compiler_first() -> None:
    """Load PyTorch's compiler back end (triton) before Mesa's OpenGL driver; call before either starts.

    Both bring an LLVM. Loading triton after the driver kills the process with a segmentation fault (torch 2.14.1, Mesa
    22.3), and `torch.optim` loads it unasked; loading it before is safe and takes 0.1 s.
    """
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton._C.libtriton")
