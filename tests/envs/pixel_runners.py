"""Runners that show pictures, for tests."""

import numpy as np
import torch

import envs
from envs.pixels import PixelRunner

SMALL = {"obs": "pixels", "image_size": 20, "render_profile": "fast"}


def pixels(env_id: str, num_envs: int = 1, **settings) -> PixelRunner:
    runner = envs.make(env_id, num_envs, **{"obs": "pixels", **settings})
    assert isinstance(runner, PixelRunner)
    return runner


def uniform_actions(runner, steps: int, seed: int = 0) -> torch.Tensor:
    """[steps, N, A] float64, within the bounds."""
    spec = runner.action_spec
    drawn = np.random.default_rng(seed).uniform(spec.low, spec.high, (steps, runner.num_envs, spec.size))
    return torch.from_numpy(drawn)
