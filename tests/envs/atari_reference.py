"""Gymnasium's own preprocessing of an Atari game, fed with the starts that ALE's vector environment drew."""

from __future__ import annotations

import ale_py
import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from envs import atari
from envs.atari_settings import Settings
from envs.runner import Step

NOOP, FIRE = 0, 1  # in the minimal action sets of the games used here


class Start(gymnasium.Wrapper):
    """Plays given single frames after each reset; this also ends a game that these frames would end."""

    actions: list[int]

    def reset(self, **options):
        result = self.env.reset(**options)
        for action in self.actions:
            self.env.step(action)
        return result


class Reference:
    """One game through `AtariPreprocessing` and `FrameStackObservation`, observations channel first as a runner's."""

    def __init__(self, game: str, settings: Settings) -> None:
        gymnasium.register_envs(ale_py)
        self.game = gymnasium.make(
            f"ALE/{game}-v5",
            frameskip=1,
            repeat_action_probability=settings.sticky_actions,
            full_action_space=settings.full_action_set,
            max_num_frames_per_episode=settings.max_frames,  # counted with those of the start, unlike ALE's vector
            disable_env_checker=True,
        )
        self.console = self.game.unwrapped
        self.start = Start(self.game)
        self.settings = settings
        frames = AtariPreprocessing(
            self.start,
            noop_max=0,
            frame_skip=settings.frame_skip,
            screen_size=settings.image_size,
            grayscale_obs=settings.grayscale,
        )
        self.env = FrameStackObservation(frames, settings.frame_stack, padding_type="zero")

    def reset(self, start_frames: int = 0) -> torch.Tensor:
        """start_frames: how many frames ALE's vector environment played before the first action."""
        fire = self.settings.fire_on_reset
        self.start.actions = [FIRE] * min(start_frames, fire) + [NOOP] * max(start_frames - fire, 0)
        return self._channels_first(self.env.reset()[0])

    def step(self, action: int) -> tuple[torch.Tensor, float, bool, bool, int]:
        """Observation, raw reward, terminated, truncated, lives."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._channels_first(obs), float(reward), terminated, truncated, info["lives"]

    def _channels_first(self, obs: np.ndarray) -> torch.Tensor:
        size = self.settings.image_size
        return torch.from_numpy(np.moveaxis(obs, -1, 1).reshape(-1, size, size) if obs.ndim == 4 else obs)


def start_frames(runner: atari.AtariRunner, row: int = 0) -> int:
    """Frames that the row's present episode had before its first action."""
    return runner._record.start_frames[row][-1]


def draw_actions(runner: atari.AtariRunner, steps: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(runner.action_spec.count, (steps, runner.num_envs), generator=generator)


def assert_equal_steps(left: Step, right: Step) -> None:
    for name in Step.__slots__:
        assert torch.equal(getattr(left, name), getattr(right, name)), name
