"""OpenGL contexts and drivers: made, freed, shared with libraries, and what is said where there are none."""

import gc
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from envs import drawing
from envs.drawing import PROFILES
from tests.envs.pixel_runners import SMALL, pixels, uniform_actions

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def drawing_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "drawing"}


def test_contexts_go_with_the_runner(opengl):
    """Closed, closed twice, forgotten, or never finished: no thread and so no context stays."""
    before = drawing_threads()  # of tests that failed
    for _ in range(5):
        runner = pixels("dmc/pendulum-swingup", 2, threads=2, **SMALL)
        obs = runner.reset()
        copy = obs.clone()
        assert len(drawing_threads() - before) == 2
        runner.render(1, 24, 32)
        runner.close()
        runner.close()
        assert not drawing_threads() - before
        assert torch.equal(obs, copy)
    with pytest.raises(RuntimeError, match="closed"):
        runner.reset()
    forgotten = pixels("dmc/pendulum-swingup", **SMALL)
    (thread,) = drawing_threads() - before
    del forgotten
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()
    with pytest.raises(ValueError, match="camera"):
        pixels("dmc/pendulum-swingup", camera="nowhere", **SMALL)
    assert not drawing_threads() - before
    assert "LP_NUM_THREADS" not in os.environ


def test_contexts_are_made_and_freed_one_at_a_time_though_runners_are_not(monkeypatch, opengl):
    """Two threads that compiled shaders at once have crashed inside the driver."""
    inside, overlaps, calls = [0], [], []

    def counted(method):
        def call(self, *arguments):
            inside[0] += 1
            overlaps.append(inside[0] > 1)
            calls.append(method.__name__)
            method(self, *arguments)
            inside[0] -= 1

        return call

    for name in ("__init__", "close"):
        monkeypatch.setattr(drawing._Easel, name, counted(getattr(drawing._Easel, name)))

    def life() -> None:
        runner = pixels("dmc/pendulum-swingup", 2, threads=2, **SMALL)
        runner.reset()
        runner.close()

    lives = [threading.Thread(target=life) for _ in range(3)]
    for thread in lives:
        thread.start()
    for thread in lives:
        thread.join()
    assert sorted(calls) == ["__init__"] * 6 + ["close"] * 6
    assert not any(overlaps)


def compiled_code() -> int:
    """Pieces of memory that hold machine code made in this process, as a software driver makes it for shaders."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(line.split()[1] == "r-xp" and len(line.split()) == 5 for line in lines)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("profile", PROFILES)
def test_pictures_compile_nothing_once_the_contexts_are_made(profile, opengl):
    runner = pixels("dmc/walker-walk", 4, threads=2, **{**SMALL, "render_profile": profile})
    before = compiled_code()
    runner.reset()
    for action in uniform_actions(runner, 2):
        runner.step(action)
    assert compiled_code() == before
    runner.close()


def test_a_library_that_draws_in_this_thread_is_left_alone(opengl):
    """dm_control believes that the context it made current stays current."""
    from dm_control import suite

    env = suite.load("cartpole", "balance", task_kwargs={"random": 0})
    env.reset()
    before = env.physics.render(48, 48, camera_id=0)
    runner = pixels("dmc/cheetah-run", **SMALL)
    runner.reset()
    runner.render(0, 32, 32)
    np.testing.assert_array_equal(env.physics.render(48, 48, camera_id=0), before)
    runner.close()
    np.testing.assert_array_equal(env.physics.render(48, 48, camera_id=0), before)


def run_python(code: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


MAKE = """
import envs
try:
    envs.make("dmc/cartpole-balance", obs="pixels")
except RuntimeError as error:
    print(error)
"""


def test_without_opengl_one_sentence_says_what_to_install():
    broken = {
        "an unknown platform": {"MUJOCO_GL": "teapot"},
        "no library": {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"},  # which OSMesa's wrapper refuses
    }
    processes = {name: run_python(MAKE, **variables) for name, variables in broken.items()}
    for name, process in processes.items():
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, ""), name
        assert len(out.splitlines()) == 1, name
        for words in (f"MUJOCO_GL set to {broken[name]['MUJOCO_GL']}", "libegl1", "MUJOCO_GL=egl", "libosmesa6"):
            assert words in out, name


AFTER_DM_CONTROL = """
import warnings
warnings.simplefilter("ignore")
from dm_control import suite
env = suite.load("cartpole", "balance")
env.physics.render(16, 16)
warnings.simplefilter("always")
import envs
with warnings.catch_warnings(record=True) as caught:
    runner = envs.make("dmc/cartpole-balance", obs="pixels", image_size=16)
told = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
print(runner.reset().shape, runner.spec.versions["opengl"], told)
"""


def test_a_driver_that_dm_control_has_loaded_does_not_kill_us(opengl):
    """Loading PyTorch's compiler after Mesa's is a segmentation fault."""
    process = run_python(AFTER_DM_CONTROL, MUJOCO_GL="egl")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "[1, 9, 16, 16]" in out
    if "LLVM" in out and importlib.util.find_spec("triton") is not None:
        assert "load_compiler_first() before importing dm_control" in out
