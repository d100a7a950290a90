"""Which environments exist, and which backend runs each: `make` and `known_ids`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from envs.runner import Runner


class EnvironmentNotFound(ValueError):
    """No environment has this id, or its package is not installed; the message is one sentence with the nearest id."""


def known_ids() -> list[str]:
    """Every environment id that `make` accepts on this machine, sorted; of Gymnasium's only the newest versions."""
    from envs import atari, classic_control, gymnasium_vector, mujoco_batch, schedules

    backends = (mujoco_batch, classic_control, atari, gymnasium_vector, schedules)
    return sorted({name for backend in backends for name in backend.known_ids()})


def check_id(env_id: str) -> None:
    """Raise EnvironmentNotFound unless `env_id` is known. Builds nothing: a package it needs may still be missing."""
    _backend(env_id)


def _backend(env_id: str) -> ModuleType:
    """The first backend that runs this id: a native one before Gymnasium's own."""
    from envs import atari, classic_control, gymnasium_vector, mujoco_batch, schedules

    for backend in (mujoco_batch, classic_control, atari, schedules):
        if env_id in backend.known_ids():
            return backend
    if gymnasium_vector.accepts(env_id):
        return gymnasium_vector
    near = _nearest(env_id)
    hint = f"Did you mean {' or '.join(repr(name) for name in near)}?" if near else "`neoteny list envs` shows all."
    raise EnvironmentNotFound(f"unknown environment '{env_id}'. {hint}")


def _nearest(env_id: str, count: int = 3) -> list[str]:
    """Known ids that look like this one, best first; the part before the slash may be missing or wrong."""
    names = known_ids()
    whole = {name.lower(): name for name in names}
    ends = {name.lower().partition("/")[2]: name for name in names}
    near = [whole[match] for match in difflib.get_close_matches(env_id.lower(), whole, count)]
    near += [ends[match] for match in difflib.get_close_matches(env_id.lower().rpartition("/")[2], ends, count)]
    return list(dict.fromkeys(near))[:count]


def make(
    env_id: str | Sequence[str],
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    threads: int = 0,
    backend: str | None = None,
    **task_args: Any,
) -> Runner:
    """Build N environments of one id.

    env_id: `mujoco/HalfCheetah-v5`, `dmc/walker-walk`, `atari/Pong`, `gym/CartPole-v1`, or `sequence/slippery-ant`, a
    schedule of `envs.schedules`. Several ids are a sequence of tasks, one after the other (`envs.sequence`), and need
    `switch_every=` steps or `switch_episodes=` among the settings. Older versions that Gymnasium still registers are
    accepted too, and `gym/module:ID` for an environment that importing `module` registers.
    seed: row i draws from a generator derived from (seed, i) only; see `runner.row_seeds`.
    threads: simulator threads, 0 = the cores this process may use.
    backend: None, or "mujoco-warp" to simulate a native MuJoCo or dm_control task on the GPU, see `envs.mujoco_warp`.
    task_args: settings of the task, for example `row_seeds=[...]` (explicit seeds, one a row), `sticky_actions=0.0`,
    `obs="pixels"` (native MuJoCo and dm_control tasks, see `envs.pixels.make`).
    Raises EnvironmentNotFound for an unknown id or one whose package is not installed, ValueError for a count below 1
    or a setting the task does not have.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    if not isinstance(env_id, str):
        from envs import schedules

        shared = task_args if backend is None else {"backend": backend, **task_args}
        return schedules.make_listed(env_id, num_envs, seed, torch.device(device), threads, **shared)
    module = _backend(env_id)
    if backend is not None:
        if backend != "mujoco-warp":
            raise ValueError(f"backend must be 'mujoco-warp' or left away, got {backend!r}")
        module = import_module("envs.mujoco_warp")
    elif module.__name__ == "envs.mujoco_batch" and task_args.get("obs") == "pixels":
        module = import_module("envs.pixels")
        del task_args["obs"]
    return module.make(env_id, num_envs, seed, torch.device(device), threads, **task_args)
