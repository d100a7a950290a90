"""Pictures of many simulations, drawn by threads that each own one OpenGL context.

A context is made, used and freed in one thread and never current in another: drivers do not allow more, and a library
that draws in the caller's thread (dm_control does) keeps its own context there. MuJoCo releases Python's lock while it
draws, so threads help wherever the driver lets them: two threads draw 1.9 x as many "fast" pictures as one. Mesa's
software rasteriser is one for the whole process and serialises the expensive passes, so "reference" pictures gain from
the driver's own threads instead (1.4 x with two). Pictures depend on neither.

A context compiles its shaders with its first picture. Two threads that did so at once have crashed inside Mesa 22.3, so
contexts are made, draw a first picture and are freed one at a time in the whole process.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from envs.graphics import load_compiler_first, mesa_threads, new_context, opengl_missing
from envs.mujoco_simulation import Simulations, engine

Model = Any  # mujoco.MjModel; the package carries no types


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How well a picture is drawn."""

    multisamples: int | None  # samples a pixel; None: as the model says
    facets: float  # share of the facets with which the model draws round shapes
    shadows: bool
    reflections: bool


_one_context_at_a_time = threading.Lock()  # where one is made, compiles its shaders or is freed

FREE_CAMERA = -1  # stands where it sees the whole model

PROFILES = {
    "reference": Profile(multisamples=None, facets=1.0, shadows=True, reflections=True),
    "fast": Profile(multisamples=0, facets=0.5, shadows=False, reflections=False),
}


@dataclass(frozen=True)
class View:
    """What is drawn of every simulation. camera: name or number of one in it, or FREE_CAMERA; sizes in pixels."""

    camera: int | str
    height: int
    width: int
    profile: str = "reference"

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"a picture needs at least one pixel, got {self.height} x {self.width}")
        if self.profile not in PROFILES:
            raise ValueError(f"render_profile must be one of {', '.join(PROFILES)}, got '{self.profile}'")


def camera_number(model: Model, camera: int | str) -> int:
    """The number of a model's camera, -1 for the free one. Raises ValueError naming the model's cameras otherwise."""
    if camera == FREE_CAMERA:
        return FREE_CAMERA
    names = [model.camera(number).name for number in range(model.ncam)]
    if isinstance(camera, str) and camera in names:
        return names.index(camera)
    if isinstance(camera, int) and 0 <= camera < model.ncam:
        return camera
    known = ", ".join(f"{number} ('{name}')" for number, name in enumerate(names))
    raise ValueError(f"the model has no camera {camera!r}; it has {known}")


class Drawing:
    """Draws simulations of one model through one view. `opengl`: the driver that draws, with its version.

    threads: pictures of one call are dealt out to them in turn.
    up_to_date: derive positions from the state before drawing; else draw what the last call of the simulator derived,
    as the reference environments do, which needs persistent simulations.
    Raises OpenGLMissing if no context can be made, ValueError for a camera that the model does not have.
    """

    def __init__(self, simulations: Simulations, view: View, threads: int, up_to_date: bool):
        camera_number(simulations.model, view.camera)
        load_compiler_first()
        self.view = view
        self._requests: list[SimpleQueue[Any]] = []
        self._threads: list[threading.Thread] = []
        # If this object is forgotten instead of closed. Not at exit: contexts may still be current in their threads
        # when the platform shuts down, but must not be touched after that.
        self._stop = weakref.finalize(self, _stop_all, self._requests)
        self._stop.atexit = False
        # Software drawing at reference quality is spent in the rasteriser, at fast quality outside of it.
        rasterisers = threads if threads > 1 and PROFILES[view.profile].shadows else 0
        try:
            with mesa_threads(rasterisers):
                for _ in range(threads):
                    self.opengl = self._start_thread(simulations, up_to_date)
        except BaseException:
            self.close()
            raise

    def _start_thread(self, simulations: Simulations, up_to_date: bool) -> str:
        requests: SimpleQueue[Any] = SimpleQueue()
        ready: Future[str] = Future()
        arguments = (simulations, self.view, up_to_date, ready, requests)
        thread = threading.Thread(target=_draw_on_request, args=arguments, name="drawing", daemon=True)
        self._requests.append(requests)
        self._threads.append(thread)
        thread.start()
        return ready.result()

    def draw(self, rows: Sequence[int] | np.ndarray, pictures: Sequence[np.ndarray] | np.ndarray) -> None:
        """Draw simulation rows[i] into pictures[i], uint8 [3, height, width], for all i. The arrays may be views."""
        if not self._stop.alive:
            raise RuntimeError("the drawing is closed")
        pairs = list(zip((int(row) for row in rows), pictures, strict=True))
        count = len(self._requests)
        done: list[Future[None]] = []
        for number, requests in enumerate(self._requests[: len(pairs)]):
            done.append(Future())
            requests.put((pairs[number::count], done[-1]))
        wait(done)
        for future in done:
            future.result()

    def close(self) -> None:
        """Free the contexts, each in its thread, and wait for that."""
        self._stop()
        for thread in self._threads:
            thread.join()


def _stop_all(requests: list[SimpleQueue[Any]]) -> None:
    for queue in requests:
        queue.put(None)


def _draw_on_request(
    simulations: Simulations, view: View, up_to_date: bool, ready: Future[str], requests: SimpleQueue[Any]
) -> None:
    """The life of a drawing thread."""
    try:
        with _one_context_at_a_time:
            easel = _Easel(simulations, view, up_to_date)
    except Exception as error:  # noqa: BLE001 - each OpenGL platform raises types of its own; the caller gets it
        ready.set_exception(opengl_missing(error))
        return
    ready.set_result(easel.opengl)
    while (request := requests.get()) is not None:
        pairs, done = request
        try:
            for row, picture in pairs:
                easel.draw(row, picture)
            done.set_result(None)
        except Exception as error:  # noqa: BLE001 - not swallowed: the caller raises it
            done.set_exception(error)
        del request, pairs, done  # the arrays belong to the caller, who may free them
    with _one_context_at_a_time:
        easel.close()


class _Easel:
    """One OpenGL context and what MuJoCo needs to draw in it; everything happens in the thread that makes it."""

    def __init__(self, simulations: Simulations, view: View, up_to_date: bool):
        mujoco = engine()
        profile = PROFILES[view.profile]
        self._simulations, self._up_to_date = simulations, up_to_date
        self._model = model = copy.copy(simulations.model)
        self._data = mujoco.MjData(model)
        # Clearing the whole buffer takes time, so it is as large as the picture. The pixels are the same.
        model.vis.global_.offheight, model.vis.global_.offwidth = view.height, view.width
        quality = model.vis.quality
        if profile.multisamples is not None:
            quality.offsamples = profile.multisamples
        quality.numslices = max(3, round(quality.numslices * profile.facets))
        quality.numstacks = max(2, round(quality.numstacks * profile.facets))
        self._platform = new_context(view.width, view.height)
        try:
            self._platform.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
            self.opengl = _driver()
        except BaseException:
            self._platform.free()
            raise
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = profile.shadows
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = profile.reflections
        self._option, self._perturbation = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._option.flags[mujoco.mjtVisFlag.mjVIS_RANGEFINDER] = False  # as dm_control draws; no v5 task has any
        self._camera = mujoco.MjvCamera()
        if camera_number(model, view.camera) == FREE_CAMERA:
            mujoco.mjv_defaultFreeCamera(model, self._camera)
        else:
            self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
            self._camera.fixedcamid = camera_number(model, view.camera)
        self._rectangle = mujoco.MjrRect(0, 0, view.width, view.height)
        self._pixels = np.empty((view.height, view.width, 3), np.uint8)
        mujoco.mj_forward(model, self._data)
        self._draw_data()

    def draw(self, row: int, picture: np.ndarray) -> None:
        mujoco, model, data = engine(), self._model, self._data
        self._simulations.copy_out(row, model, data)
        if self._up_to_date:
            mujoco.mj_forward(model, data)
        self._draw_data()
        picture[...] = self._pixels[::-1].transpose(2, 0, 1)  # OpenGL begins with the lowest line

    def _draw_data(self) -> None:
        mujoco, scene = engine(), self._scene
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(
            self._model, self._data, self._option, self._perturbation, self._camera, everything, scene
        )
        mujoco.mjr_render(self._rectangle, scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rectangle, self._context)

    def close(self) -> None:
        self._context.free()
        self._platform.free()


def _driver() -> str:
    """The name and version of the OpenGL driver whose context is current."""
    from OpenGL import GL

    return ", ".join(bytes(GL.glGetString(name) or b"").decode() for name in (GL.GL_RENDERER, GL.GL_VERSION))
