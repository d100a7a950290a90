"""Many MuJoCo simulations of one model on a C++ thread pool, through the C interface `mjb_*` (mujoco/mjbatch.h).

The Python class `mujoco.batch.Batch` wraps the same pool but hides its handle, and three of the reference environments
can only be reproduced with `mjb_apply`, which that class lacks; so the pool is held here directly, by ctypes.

Axes: N simulations (rows). All arrays are float64 and live: state arrays may be written, derived arrays change with
every call.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from envs.graphics import choose_platform, import_mujoco

choose_platform()

Model = Any  # mujoco.MjModel; the package carries no types
Data = Any  # mujoco.MjData

STAGE_NONE, STAGE_POSITION, STAGE_VELOCITY, STAGE_ACCELERATION = 0, 1, 2, 3  # mjtStage
STATE_FIELDS = ("time", "qpos", "qvel", "act", "ctrl")  # those the tasks use; each is a bit of mjtState

Pointer = ctypes.c_void_p


class _Config(ctypes.Structure):
    _fields_ = [("nthread", ctypes.c_int), ("persistent", ctypes.c_bool)]


class _LogConfig(ctypes.Structure):
    _fields_ = [
        ("to_console", ctypes.c_bool),
        ("to_file", ctypes.c_bool),
        ("file", ctypes.c_char * 1024),
        ("topics", ctypes.c_int),
    ]


@functools.cache
def engine() -> Any:
    """The `mujoco` package, imported on first use. Raises OpenGLMissing if MUJOCO_GL is set to what is not there."""
    return import_mujoco()


@functools.cache
def _library() -> ctypes.CDLL:
    """The engine that the `mujoco` package has loaded.

    Arguments go without `argtypes`, which saves 0.2 us a call: Python integers become C ints, so every pointer must be
    a c_void_p.
    """
    package = Path(engine().__file__).parent
    found = [*package.glob("libmujoco.so*"), *package.glob("libmujoco*.dylib")]
    if not found:
        raise RuntimeError(f"no MuJoCo library in {package}; the batch backend runs on Linux and macOS")
    library = ctypes.CDLL(str(found[0]))
    for name in (
        "mjb_makeBatch",
        "mjb_state",
        "mjb_stateComponent",
        "mjb_warning",
        "mjb_status",
        "mjb_output",
        "mjb_expand",
    ):
        getattr(library, name).restype = ctypes.c_void_p
    library.mjb_error.restype = ctypes.c_char_p
    library.mju_getLogConfig.restype = _LogConfig
    return library


@contextlib.contextmanager
def compiler_unheard() -> Iterator[None]:
    """Within, models compile without a word on outdated attributes, which concern their packages' authors.

    Nor does the engine write a log file, from now on: `Simulations` raises its warnings.
    """
    library = _library()
    config = library.mju_getLogConfig()
    shown, config.to_console, config.to_file = config.to_console, False, False
    library.mju_setLogConfig(config)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        config.to_console = shown
        library.mju_setLogConfig(config)


def load_model(path: str, edit: Callable[[Any], None] | None = None) -> Model:
    """Compile a model file of an installed package, which `edit` may change as a mujoco.MjSpec before."""
    with compiler_unheard():
        spec = engine().MjSpec.from_file(path)
        if edit is not None:
            edit(spec)
        return spec.compile()


def _array(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(memoryview((ctypes.c_char * size).from_address(address)), dtype).reshape(shape)


class SimulationDiverged(FloatingPointError):
    """Some simulations met NaN, infinite or huge numbers; `rows` (int) are those, the others went on.

    The engine has set those rows back to the model's default state.
    """

    def __init__(self, message: str, rows: np.ndarray):
        super().__init__(message)
        self.rows = rows


class Simulations:
    """N simulations of `model` on `threads` threads, the caller's included. Results do not depend on `threads`.

    With persistent=True every simulation keeps its own MjData, which `bind` then reflects. Every call raises
    FloatingPointError naming the first row whose simulation failed or warned; it is a SimulationDiverged where the
    engine has set the state back, so that the rows concerned may be reset and the others used.
    """

    def __init__(self, model: Model, num_envs: int, threads: int, persistent: bool):
        mujoco = engine()
        self._library = _library()
        error = ctypes.create_string_buffer(1000)
        config = _Config(threads, persistent)
        handle = self._library.mjb_makeBatch(Pointer(model._address), num_envs, ctypes.byref(config), error, 1000)
        if not handle:
            raise RuntimeError(f"MuJoCo cannot make {num_envs} simulations: {error.value.decode()}")
        self._handle = handle = Pointer(handle)
        self._free = weakref.finalize(self, self._library.mjb_deleteBatch, handle)
        self.model = model
        self.num_envs = num_envs
        self.persistent = persistent
        self._template = mujoco.MjData(model)
        number = np.dtype(np.float64)
        self.state = _array(self._library.mjb_state(handle), (num_envs, self._library.mjb_nstate(handle)), number)
        kinds = int(mujoco.mjtWarning.mjNWARNING)
        address = self._library.mjb_warning(handle)
        self._warnings = _array(address, (num_envs, kinds, 2), np.dtype(np.int32))  # last info, count
        self._status = _array(self._library.mjb_status(handle), (num_envs,), np.dtype(np.int32))
        self._no_warnings = self._warnings.tobytes()
        self._functions: dict[str, ctypes.c_void_p] = {}  # a look-up costs as much as the call
        self._step = self._library.mjb_step

    def bind(self, name: str) -> np.ndarray:
        """The live array [N, ...] of an MjData field: a view of the state, or read-only and copied out by each call."""
        if not hasattr(self._template, name):
            raise ValueError(f"MuJoCo has no field '{name}' in MjData")
        template = np.asarray(getattr(self._template, name))
        size, element = ctypes.c_int(), ctypes.c_int()
        if name in STATE_FIELDS:
            bit = getattr(engine().mjtState, f"mjSTATE_{name.upper()}")
            address = self._library.mjb_stateComponent(self._handle, int(bit), ctypes.byref(size))
            offset = (address - self.state.ctypes.data) // self.state.itemsize
            return self.state[:, offset : offset + size.value].reshape(self.num_envs, *template.shape)
        address = self._library.mjb_output(self._handle, name.encode(), ctypes.byref(size), ctypes.byref(element))
        if not address:
            raise ValueError(f"MuJoCo has no derived field '{name}'")
        dtype = template.dtype if template.dtype.itemsize == element.value else np.dtype(f"i{element.value}")
        array = _array(address, (self.num_envs, *template.shape), dtype)
        array.flags.writeable = False
        return array

    def expand(self, name: str) -> np.ndarray:
        """Give a model field its own value in every simulation: the live, writable array [N, ...]."""
        template = np.asarray(
            getattr(self.model.opt, name.removeprefix("opt.")) if name.startswith("opt.") else getattr(self.model, name)
        )
        size, element = ctypes.c_int(), ctypes.c_int()
        address = self._library.mjb_expand(self._handle, name.encode(), ctypes.byref(size), ctypes.byref(element))
        if not address:
            raise ValueError(f"MuJoCo has no per-simulation model field '{name}'")
        dtype = np.dtype(f"{template.dtype.kind}{element.value}")
        return _array(address, (self.num_envs, *template.shape), dtype)

    def step(self, substeps: int, stage: int = STAGE_NONE, rows: np.ndarray | None = None) -> None:
        """Advance by `substeps`, then bring derived fields up to date as far as `stage`."""
        pointer, count = (None, 0) if rows is None else self._ids(rows)
        failed = self._step(self._handle, pointer, count, substeps, stage)
        if failed or self._warnings.tobytes() != self._no_warnings:
            self._check(failed)

    def forward(self, rows: np.ndarray | None = None, stage: int = STAGE_ACCELERATION) -> None:
        """Compute the derived fields of the present state as far as `stage`; STAGE_NONE only copies them out."""
        pointer, count = self._ids(rows)
        self._check(self._library.mjb_forward(self._handle, pointer, count, stage))

    def reset(self, rows: np.ndarray | None = None, stage: int = STAGE_NONE) -> None:
        """Set simulations to the model's defaults, clear their warnings, then compute as far as `stage`."""
        pointer, count = self._ids(rows)
        self._check(self._library.mjb_reset(self._handle, pointer, count, None, stage))

    def apply(self, function: str, rows: np.ndarray | None = None, save: bool = False) -> None:
        """Run an engine function of (mjModel*, mjData*) on every simulation; needs persistent=True.

        save: store the state that the function leaves. Derived fields are not copied out: call forward(STAGE_NONE).
        The engine passes two further arguments; the System V and AArch64 conventions let a callee ignore them, which
        the C standard does not promise, so tests/envs/test_mujoco_simulation.py checks it.
        """
        if not self.persistent:
            raise ValueError("apply needs persistent simulations")
        pointer, count = self._ids(rows)
        if function not in self._functions:
            self._functions[function] = ctypes.cast(getattr(self._library, function), Pointer)
        address = self._functions[function]
        self._check(self._library.mjb_apply(self._handle, pointer, count, address, None, int(save)))

    def data(self, row: int) -> Data:
        """A new MjData with the state of one simulation and all derived fields computed from it, for drawing."""
        model, data = copy.copy(self.model), engine().MjData(self.model)
        self.copy_out(row, model, data)
        engine().mj_forward(model, data)
        return data

    def copy_out(self, row: int, model: Model, data: Data) -> None:
        """Write one simulation into copies of the model and an MjData of it; may be called from several threads.

        Derived fields are those of the last call if the simulations are persistent, and left alone otherwise.
        """
        self._library.mjb_getModel(self._handle, row, Pointer(model._address))
        self._library.mjb_getData(self._handle, row, Pointer(data._address))

    @property
    def closed(self) -> bool:
        return not self._free.alive

    def close(self) -> None:
        """Free the simulations. The arrays of `bind` and `expand` point nowhere afterwards."""
        self._free()

    def _ids(self, rows: np.ndarray | None) -> tuple[ctypes.c_void_p | None, int]:
        if rows is None or rows.size == self.num_envs:
            return None, 0
        if rows.dtype != np.int32 or not rows.flags.c_contiguous:
            raise ValueError("rows must be a contiguous int32 array")
        return rows.ctypes.data_as(Pointer), rows.size

    def _check(self, failed: int) -> None:
        if failed == 0 and self._warnings.tobytes() == self._no_warnings:
            return
        if failed:
            row = int(np.flatnonzero(self._status)[0])
            raise FloatingPointError(f"row {row}: {self._library.mjb_error(self._handle, row).decode()}")
        rows, kinds = np.nonzero(self._warnings[:, :, 1])
        warning = engine().mjtWarning
        names = [warning(int(kind)).name.removeprefix("mjWARN_").lower() for kind in kinds]
        self._warnings[...] = 0
        for row, name in zip(rows, names, strict=True):
            if name not in ("badqpos", "badqvel", "badqacc"):
                meaning = f"NaN, infinite or huge {name[3:]}" if name.startswith("bad") else name
                raise FloatingPointError(f"row {row}: the simulation warns of {meaning}")
        raise SimulationDiverged(f"row {rows[0]}: the simulation warns of NaN, infinite or huge {names[0][3:]}", rows)
