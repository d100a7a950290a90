"""Small stand-ins for environments: specs, steps and generators with values a test can choose."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from agents.agent import PURPOSES
from envs import ContinuousActionSpec, DiscreteActionSpec, ObservationSpec, Step

VECTOR = ObservationSpec((3,))
FRAMES = ObservationSpec((4, 36, 36), torch.uint8, stacked_frames=4)
BOX = ContinuousActionSpec(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
BUTTONS = DiscreteActionSpec(3)
CPU = torch.device("cpu")


def generators(seed: int = 0, device: torch.device = CPU) -> dict[str, torch.Generator]:
    return {name: torch.Generator(device).manual_seed(100 * seed + i) for i, name in enumerate(PURPOSES)}


def make_step(
    obs: Tensor, reward: float | Tensor = 0.0, terminated: bool = False, truncated: bool = False, final_obs=None
) -> Step:
    """A Step of len(obs) rows, all with the same reward and flags unless given as tensors."""
    rows = len(obs)
    flags = [torch.as_tensor(flag).expand(rows).clone() for flag in (terminated, truncated)]
    return Step(
        obs=obs,
        reward=torch.as_tensor(reward, dtype=torch.float32).expand(rows).clone(),
        terminated=flags[0],
        truncated=flags[1],
        final_obs=obs if final_obs is None else final_obs,
        episode_return=torch.zeros(rows),
        episode_length=torch.zeros(rows, dtype=torch.int64),
        episode_ended=flags[0] | flags[1],
    )
