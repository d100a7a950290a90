"""Skips what needs OpenGL where there is none."""

import functools

import pytest

import envs
from envs.graphics import OpenGLMissing
from tests.envs.pixel_runners import SMALL


@functools.cache
def opengl_missing() -> str | None:
    try:
        envs.make("dmc/pendulum-swingup", **SMALL).close()
    except OpenGLMissing as error:
        return str(error)
    return None


@pytest.fixture
def opengl() -> None:
    if message := opengl_missing():
        pytest.skip(message)
