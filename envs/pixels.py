"""Pixel observations of the native MuJoCo and dm_control tasks: pictures instead of numbers, all else unchanged.

`MujocoBatch` simulates, rewards and resets; this runner draws what a camera sees and stacks frames. Rewards, ends and
seeds are those of the same task without pixels. At the default quality a frame equals, byte for byte, what dm_control's
`physics.render` or Gymnasium's `render_mode="rgb_array"` draws of the same moment (tests/envs/test_pixels.py).

A stack is zero before the first frame of an episode, as in our Atari, so that a replay can store each frame once.
DrQ-v2 and its relatives repeat the first frame instead; the first `frame_stack - 1` observations of an episode differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.cores import available_cores
from envs.drawing import View
from envs.host_step import MemoryRing, StepMemory, check_task_args, take_row_seeds
from envs.mujoco_batch import PIXEL_SETTINGS, MujocoBatch, make_task, task_settings
from envs.runner import ActionSpec, ObservationSpec, Step
from envs.tasks.dm_control import ControlTask

COLOURS = 3


def make(
    env_id: str,
    num_envs: int,
    seed: int,
    device: torch.device,
    threads: int,
    *,
    image_size: int | Sequence[int] = 84,
    frame_stack: int = 3,
    camera: int | str | None = None,
    render_profile: str = "reference",
    action_repeat: int = 1,
    **task_args: Any,
) -> PixelRunner:
    """Build N environments that show pictures: `envs.make(..., obs="pixels")`.

    image_size: height and width in pixels, or one number for both.
    frame_stack: frames in an observation.
    camera: name or number of a camera of the model; None: 0 for dm_control, "track" for Gymnasium's robots.
    render_profile: "reference", or "fast": no multisampling, shadows or reflections, rounder shapes with half the
    facets; 30 to 40 times faster in software, and not the pictures of published results.
    action_repeat: control steps of dm_control for each action; their rewards are summed, only the last is drawn. The
    end of an episode cuts the action short.
    task_args: `row_seeds` and the fields of the task's class.
    Raises ValueError for a bad or unknown setting, OpenGLMissing where nothing can be drawn.
    """
    seeds, settings = take_row_seeds(task_args, seed, num_envs)
    check_task_args(env_id, settings, ("obs", "row_seeds", *PIXEL_SETTINGS, *task_settings(env_id)))
    for name, value in (("frame_stack", frame_stack), ("action_repeat", action_repeat)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    task = make_task(env_id, **settings)
    if action_repeat > 1 and not isinstance(task, ControlTask):
        raise ValueError(f"{env_id} has no action_repeat, because a row may end before the others; set frame_skip")
    view = View(task.camera if camera is None else camera, *_height_and_width(image_size), render_profile)
    threads = min(threads or available_cores(), num_envs)
    states = MujocoBatch(env_id, task, seeds, torch.device("cpu"), threads, torch.float32, persistent=True)
    try:
        return PixelRunner(states, view, frame_stack, action_repeat, device, threads)
    except BaseException:
        states.close()
        raise


def _height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    sides = list(image_size) if isinstance(image_size, list | tuple) else [image_size, image_size]
    whole = [side for side in sides if isinstance(side, int) and side >= 1]
    if len(sides) != 2 or whole != sides:
        raise ValueError(f"image_size must be one number of pixels or (height, width), got {image_size!r}")
    return whole[0], whole[1]


class PixelRunner:
    """Pictures of the environments of a `MujocoBatch`; fulfils `envs.runner.Runner`.

    Observations are uint8 [N, 3 * frame_stack, height, width]: frames oldest first, red, green and blue of each.
    """

    def __init__(
        self, states: MujocoBatch, view: View, frame_stack: int, action_repeat: int, device: torch.device, threads: int
    ):
        self._states, self._repeat = states, action_repeat
        self._drawing = states.drawing(view, threads, up_to_date=False)
        self.num_envs = states.num_envs
        self.device = device
        shape = (COLOURS * frame_stack, view.height, view.width)
        self.observation_spec = ObservationSpec(shape, torch.uint8, frame_stack)
        self.action_spec: ActionSpec = states.action_spec
        self._memory = MemoryRing(self.observation_spec, self.num_envs, device)
        self._written: StepMemory | None = None
        self._action: Tensor | None = None
        self._lengths = np.zeros(self.num_envs, np.int64)  # actions of each row's episode so far
        self.diverged_episodes = 0
        self._settings = {
            "obs": "pixels",
            "image_size": [view.height, view.width],
            "frame_stack": frame_stack,
            "camera": view.camera,
            "render_profile": view.profile,
            "action_repeat": action_repeat,
        }
        spec = states.spec
        assert spec.horizon is not None
        self.spec = dataclasses.replace(
            spec,
            horizon=math.ceil(spec.horizon / action_repeat),
            action_repeat=action_repeat,
            settings={**spec.settings, **self._settings},
            versions={**spec.versions, "opengl": self._drawing.opengl},
        )

    def reset(self) -> Tensor:
        """Start a new episode in every row. Returns obs [N, 3 * frame_stack, H, W]."""
        self._states.reset()
        memory = self._memory.next()
        memory.obs[:, :-COLOURS] = 0
        self._draw(range(self.num_envs), memory.obs)
        self._written = memory
        self._lengths[...] = 0
        return memory.upload_obs()

    def step(self, action: Tensor) -> Step:
        """Take one action in every row; see `envs.runner.Runner.step`."""
        self.send(action)
        return self.recv()

    def send(self, action: Tensor) -> None:
        """Hand over actions [N, A]; `recv` simulates and draws. Raises ValueError as `MujocoBatch.step`."""
        if action.device.type != self.device.type:
            raise ValueError(f"action must be on {self.device}, it is on {action.device}")
        values = action.detach().to("cpu", copy=self._repeat > 1)
        self._states.send(values)
        self._action = values

    def recv(self) -> Step:
        """The outcome of the actions sent."""
        before, memory = self._written, self._memory.next()
        step = self._simulate(memory, before)
        assert before is not None  # or the simulation has asked for a reset
        ended = step.episode_ended.numpy()
        memory.terminated[...] = step.terminated.numpy()
        memory.truncated[...] = step.truncated.numpy()
        memory.episode_ended[...] = ended
        memory.episode_return[...] = step.episode_return.numpy()
        self._lengths += 1
        memory.episode_length[...] = self._lengths * ended
        self._lengths[ended] = 0
        self.diverged_episodes = self._states.diverged_episodes
        memory.obs[:, :-COLOURS] = before.obs[:, COLOURS:]
        self._draw(range(self.num_envs), memory.obs)
        any_ended = bool(ended.any())
        if any_ended:
            memory.obs[ended, :-COLOURS] = 0
            memory.final_obs[~ended] = memory.obs[~ended]
        self._written = memory
        return memory.publish(any_ended)

    def change_model(self, factors: Mapping[str, float], rows: Sequence[int] | None = None, now: bool = False) -> None:
        """See `MujocoBatch.change_model`."""
        self._states.change_model(factors, rows, now)

    def _simulate(self, memory: StepMemory, before: StepMemory | None) -> Step:
        """Simulate the actions sent. Writes the rewards, and what rows showed last whose episode ends."""

        def keep_last_picture(rows: np.ndarray, diverged: np.ndarray | None) -> None:
            assert before is not None
            memory.final_obs[rows, :-COLOURS] = before.obs[rows, COLOURS:]
            self._draw(rows, memory.final_obs)
            if diverged is not None:  # the engine has set them back, so their last good picture is that of before
                memory.final_obs[diverged] = before.obs[diverged]

        self._states.before_reset = keep_last_picture
        try:
            step = self._states.recv()
            memory.reward[...] = step.reward.numpy()
            for _ in range(self._repeat - 1):
                # All rows end at once, by the clock, unless one has diverged; then the others move on less.
                if step.episode_ended.any():
                    break
                assert self._action is not None
                step = self._states.step(self._action)
                memory.reward += step.reward.numpy()
            return step
        finally:
            self._states.before_reset = None

    def _draw(self, rows: Sequence[int] | np.ndarray, observations: np.ndarray) -> None:
        """The newest frame of some rows into observations [N, 3 * frame_stack, H, W]."""
        self._drawing.draw(rows, [observations[row, -COLOURS:] for row in rows])

    def render(self, row: int = 0, height: int = 480, width: int = 480) -> np.ndarray:
        """A picture of one row at reference quality, uint8 [height, width, 3]."""
        return self._states.render(row, height, width)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, the stacked frames among it; not between `send` and `recv`."""
        frames = None if self._written is None else torch.from_numpy(self._written.obs.copy())
        lengths = torch.from_numpy(self._lengths.copy())
        return {**self._states.state_dict(), "pixels": dict(self._settings), "frames": frames, "actions": lengths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was called. Raises ValueError if the environments are not the same."""
        if state.get("pixels") != self._settings:
            raise ValueError(f"the saved environments have pixels {state.get('pixels')}, these have {self._settings}")
        self._states.load_state_dict(state)
        self._written = None
        if state["frames"] is not None:
            self._written = self._memory.next()
            self._written.obs[...] = state["frames"].numpy()
        self._lengths[...] = state["actions"].numpy()
        self.diverged_episodes = self._states.diverged_episodes

    def close(self) -> None:
        """Free the contexts and the simulations. Returned tensors stay readable."""
        self._drawing.close()
        self._states.close()
