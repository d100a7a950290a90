"""Environments: the one vectorised runner and its backends.

Here belongs what turns actions into observations: the `Runner` contract, `make`, native MuJoCo and dm_control tasks on
`mujoco.batch`, Atari on ALE's own vector environment, everything else through Gymnasium. This room knows nothing of
learning: no agent, no replay, no schedule. It imports no other room.
"""

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
    "known_ids",
    "make",
    "make_first_ready",
    "make_sequence",
]
