"""What must happen before a simulator starts OpenGL in this process, and what to say where it does not start."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_MESA_THREADS = "LP_NUM_THREADS"


class OpenGLMissing(RuntimeError):
    """Nothing can be drawn here; the message is one sentence with the packages and the MUJOCO_GL that would help."""


def opengl_missing(error: Exception) -> OpenGLMissing:
    """The exception to raise for whatever an OpenGL platform raised; each has types of its own."""
    chosen = os.environ.get("MUJOCO_GL") or "nothing"
    reason = " ".join(str(error).split()) or type(error).__name__
    return OpenGLMissing(
        f"cannot draw: OpenGL does not start with MUJOCO_GL set to {chosen} ({reason}); install the Debian package "
        "libegl1 and set MUJOCO_GL=egl, or install libosmesa6 and set MUJOCO_GL=osmesa"
    )


def choose_platform() -> None:
    """Draw with EGL, which needs no display. Call before `mujoco` is first imported: it chooses only then.

    Also where there is a display: MuJoCo's own choice there, GLFW, makes contexts on the main thread only.
    """
    if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
        with contextlib.suppress(OSError):  # without the library, choosing EGL would make that import fail
            ctypes.CDLL("libEGL.so.1")
            os.environ["MUJOCO_GL"] = "egl"


def import_mujoco() -> ModuleType:
    """The `mujoco` package. Raises OpenGLMissing if MUJOCO_GL names a platform that cannot be loaded."""
    if os.environ.get("MUJOCO_GL", "").strip().lower() == "osmesa":
        load_compiler_first()  # with OSMesa, importing mujoco already loads the driver
    try:
        return importlib.import_module("mujoco")
    except ModuleNotFoundError:
        raise
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise opengl_missing(error) from error


def new_context(width: int, height: int) -> Any:
    """An OpenGL context for off-screen drawing, with `make_current` and `free`, of the platform that MUJOCO_GL names.

    Not `mujoco.GLContext`, whose platform was chosen when somebody, perhaps another library, first imported mujoco.
    """
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    name = f"mujoco.{chosen}" if sys.platform == "linux" and chosen in ("egl", "osmesa") else "mujoco"
    return importlib.import_module(name).GLContext(width, height)


@functools.cache
def load_compiler_first() -> None:
    """Load PyTorch's compiler back end (triton) before Mesa's OpenGL driver; call before either starts.

    Both bring an LLVM. Loading triton after the driver kills the process with a segmentation fault (torch 2.14.1, Mesa
    22.3), and `torch.optim` loads it unasked; loading it before is safe and takes 0.1 s. Where another library has
    already started the driver (dm_control does when it is imported), this only warns.
    """
    if importlib.util.find_spec("triton") is None or "triton._C.libtriton" in sys.modules:
        return
    if _driver_is_loaded():
        warnings.warn(
            "Mesa's OpenGL driver was loaded before PyTorch's compiler, so that the first torch.optim optimiser will "
            "crash this process: call envs.graphics.load_compiler_first() before importing dm_control",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    importlib.import_module("triton._C.libtriton")


def _driver_is_loaded() -> bool:
    """Whether the LLVM of Mesa's software driver is in this process."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "libLLVM" in maps.read_text()


@contextlib.contextmanager
def mesa_threads(count: int) -> Iterator[None]:
    """Let Mesa's software driver draw with `count` threads of its own, 0: with those that call it.

    Only the first context that a process makes counts; elsewhere, and if the user has set LP_NUM_THREADS, it changes
    nothing. The variable is taken back, because child processes would inherit it.
    """
    if _MESA_THREADS in os.environ:
        yield
        return
    os.environ[_MESA_THREADS] = str(count)
    try:
        yield
    finally:
        del os.environ[_MESA_THREADS]
