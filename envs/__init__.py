"""Environments: the one vectorised runner and its backends.

Here belongs what turns actions into observations: the `Runner` contract, `make`, native MuJoCo and dm_control tasks on
`mujoco.batch`, native classic control, Atari on ALE's own vector environment, everything else through Gymnasium. This
room knows nothing of learning: no agent, no replay, no schedule. It imports no other room.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from envs.atari_first_ready import make_first_ready
from envs.registry import EnvironmentNotFound, known_ids, make
from envs.runner import (
    ActionSpec,
    ContinuousActionSpec,
    DiscreteActionSpec,
    ObservationSpec,
    Runner,
    RunnerSpec,
    Step,
)
from envs.sequence import Segment, make_sequence

if TYPE_CHECKING:
    from envs.gymnasium_adapter import as_gymnasium
    from envs.stable_baselines3_adapter import as_stable_baselines3

__all__ = [
    "ActionSpec",
    "ContinuousActionSpec",
    "DiscreteActionSpec",
    "EnvironmentNotFound",
    "ObservationSpec",
    "Runner",
    "RunnerSpec",
    "Segment",
    "Step",
    "as_gymnasium",
    "as_stable_baselines3",
    "known_ids",
    "make",
    "make_first_ready",
    "make_sequence",
]

# Each in a module of its own that imports the library it adapts to.
_ADAPTERS = {"as_gymnasium": "envs.gymnasium_adapter", "as_stable_baselines3": "envs.stable_baselines3_adapter"}


def __getattr__(name: str) -> Any:
    if name not in _ADAPTERS:
        raise AttributeError(f"module 'envs' has no attribute '{name}'")
    return getattr(import_module(_ADAPTERS[name]), name)
