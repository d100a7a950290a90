"""Small stand-ins for environments: specs, steps and generators with values a test can choose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agents.agent import PURPOSES
from envs import ContinuousActionSpec, DiscreteActionSpec, ObservationSpec, Step
from plasticity.population import RandomStream

VECTOR = ObservationSpec((3,))
FRAMES = ObservationSpec((4, 36, 36), torch.uint8, stacked_frames=4)
BOX = ContinuousActionSpec(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
BUTTONS = DiscreteActionSpec(3)
CPU = torch.device("cpu")
# Hyper-parameters that all agents have, and what makes each agent small and take one gradient step for each step.
SMALL = {"warmup_steps": 8, "replay_capacity": 200, "batch_size": 16, "hidden": (16, 16)}
ONE_UPDATE_A_STEP = {
    "crossq": {"critic_hidden": (16, 16)},
    "dqn": {"update_every": 1},
    "qrdqn": {"update_every": 1, "quantiles": 9},
    "rainbow": {"update_every": 1},
    "symphony": {"updates_per_step": 1, "nodes": 4},
    "td7": {"checkpoints": False, "embedding": 8, "target_update_every": 5},
}
# Agents with discrete actions, which value all of them by one network, `net`.
VALUING_ACTIONS = ("dqn", "qrdqn", "rainbow")
# Every switch of Symphony's successor.
SAYA = {
    "weighting": "bell",
    "batch_average": True,
    "soft_target": True,
    "trained_slope": True,
    "encoder_features": 4,
    "bottleneck": 6,
    "gradient_dropout": True,
    "annealed_epsilon": True,
    "shared_noise": True,
}
# Agents whose options are those of TD3: n-step returns, LayerNorm, a replay apart from the warm-up.
OPTIONED = ("beer", "ddpg", *VALUING_ACTIONS, "sac", "td3")
# Agents that learn from a replay, after a warm-up.
REPLAYING = (*OPTIONED, "crossq", "symphony")
# And those whose seeds are no population.
ANY_REPLAYING = (*REPLAYING, "td7")
# Those whose networks NaP takes.
TAKING_NAP = tuple(name for name in REPLAYING if name != "crossq")


def stream(seed: int | Sequence[int] = 0, device: torch.device = CPU) -> RandomStream:
    """Of one seed, or of a population. Generators stay on the CPU, where there always are some."""
    if isinstance(seed, int):
        return RandomStream(torch.Generator().manual_seed(seed), device)
    return RandomStream([torch.Generator().manual_seed(one) for one in seed], device)


def streams(seed: int | Sequence[int] = 0, device: torch.device = CPU) -> dict[str, RandomStream]:
    """One for each purpose of an agent."""
    if isinstance(seed, int):
        return {name: stream(100 * seed + i, device) for i, name in enumerate(PURPOSES)}
    return {name: stream([100 * one + i for one in seed], device) for i, name in enumerate(PURPOSES)}


def make_step(
    obs: Tensor,
    reward: float | Tensor = 0.0,
    terminated: bool | Tensor = False,
    truncated: bool | Tensor = False,
    final_obs=None,
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


def fake_gradients(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Stands in for `torch.autograd.grad` where autograd's engine cannot run."""
    assert loss.requires_grad
    assert loss.shape == ()
    return [torch.empty_like(parameter) for parameter in parameters]
