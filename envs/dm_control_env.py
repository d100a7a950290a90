"""dm_control suite tasks with the interface of a Gymnasium environment."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np

from envs.graphics import load_compiler_first

# `dm_control.suite.ALL_TASKS` of dm-control 1.0.50, kept here because importing it takes seconds; a test compares.
SUITE: dict[str, tuple[str, ...]] = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse", "two_poles", "three_poles"),
    "cheetah": ("run",),
    "dog": ("stand", "walk", "trot", "run", "fetch"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run", "run_pure_state"),
    "humanoid_CMU": ("stand", "walk", "run"),
    "lqr": ("lqr_2_1", "lqr_6_2"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("walk", "run", "escape", "fetch"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}


_NO_LIMIT = 1e10  # mjMAXVAL


class DmControlEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One suite task: observations flattened in the order of the task's own spec, actions in the task's own bounds.

    The generator is the task's RandomState(seed), as `suite.load(domain, task, {"random": seed})` makes it; a reset
    without a seed continues it. An episode whose last discount is 0 has terminated, one whose last discount is not 0
    has run into its time limit.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    def __init__(self, domain: str, task: str, seed: int = 0, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.render_size: tuple[int, int] = (480, 480)  # height, width
        self._name = (domain, task)
        self._load(seed)
        spec = self._env.action_spec()
        low, high = (np.broadcast_to(bound, spec.shape) for bound in (spec.minimum, spec.maximum))
        # dm_control writes the simulator's largest number where an actuator has no limit.
        low, high = np.where(low <= -_NO_LIMIT, -np.inf, low), np.where(high >= _NO_LIMIT, np.inf, high)
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float64)
        size = sum(math.prod(part.shape) for part in self._env.observation_spec().values())
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def _load(self, seed: int) -> None:
        load_compiler_first()  # importing the suite starts OpenGL
        from dm_control import suite

        self._env = suite.load(*self._name, task_kwargs={"random": np.random.RandomState(seed)})
        self._loaded_seed: int | None = seed

    @property
    def horizon(self) -> int | None:
        """Steps until the task's own time limit, None if it has none."""
        limit = self._env._step_limit  # the only place where dm_control keeps it
        return None if math.isinf(limit) else math.ceil(limit)

    @property
    def random(self) -> np.random.RandomState:
        """The generator of this task; some tasks draw from it when they are loaded too, and during an episode."""
        return self._env.task.random

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        # A task may draw its model from the generator (lqr does), so another seed means another environment.
        if seed is not None and seed != self._loaded_seed:
            self._load(seed)
        self._loaded_seed = None
        with _opengl_named(self._name):  # quadruped-escape uploads its terrain
            return _flatten(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        step = self._env.step(action)
        last = step.last()
        terminated = last and step.discount == 0
        return _flatten(step.observation), step.reward, terminated, last and not terminated, {}

    def render(self) -> np.ndarray:
        """The first camera's picture, uint8 [height, width, 3], of `render_size`. RuntimeError without OpenGL."""
        with _opengl_named(self._name):
            return self._env.physics.render(*self.render_size, camera_id=0)

    def close(self) -> None:
        self._env.close()


@contextlib.contextmanager
def _opengl_named(name: tuple[str, str]) -> Iterator[None]:
    import mujoco

    try:
        yield
    except mujoco.FatalError as error:  # pyright: ignore[reportAttributeAccessIssue]
        advice = "install EGL or OSMesa and set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
        raise RuntimeError(f"dmc/{'-'.join(name)} needs OpenGL here and found none: {advice}") from error


def _flatten(observation: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(part) for part in observation.values()])
