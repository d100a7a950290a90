"""Which environments exist, and which backend runs each: `make` and `known_ids`."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from envs.runner import Runner


class EnvironmentNotFound(ValueError):
    """No environment has this id, or its package is not installed; the message is one sentence with the nearest id."""


def known_ids() -> list[str]:
    """Every environment id that `make` accepts on this machine, sorted."""
    from envs import atari, gymnasium_vector, mujoco_batch

    return sorted({*mujoco_batch.known_ids(), *atari.known_ids(), *gymnasium_vector.known_ids()})


def check_id(env_id: str) -> None:
    """Raise EnvironmentNotFound unless `env_id` is known."""
    known = known_ids()
    if env_id in known:
        return
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(env_id.lower(), lowered, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(lowered[n]) for n in near)}?" if near else "`neoteny list envs` shows all."
    raise EnvironmentNotFound(f"unknown environment '{env_id}'. {hint}")


def make(
    env_id: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    threads: int = 0,
    **task_args: Any,
) -> Runner:
    """Build N environments of one id.

    env_id: `mujoco/HalfCheetah-v5`, `dmc/walker-walk`, `atari/Pong`, `gym/CartPole-v1`.
    seed: row i draws from a generator derived from (seed, i) only; see `runner.row_seeds`.
    threads: simulator threads, 0 = the cores this process may use.
    task_args: settings of the task, for example `row_seeds=[...]` (explicit seeds, one a row), `sticky_actions=0.0`.
    Raises EnvironmentNotFound for an unknown id, ValueError for a count below 1 or a setting the task does not have.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    check_id(env_id)
    from envs import atari, gymnasium_vector, mujoco_batch

    for backend in (mujoco_batch, atari, gymnasium_vector):
        if env_id in backend.known_ids():
            return backend.make(env_id, num_envs, seed, torch.device(device), threads, **task_args)
    raise EnvironmentNotFound(f"no backend runs '{env_id}'")
