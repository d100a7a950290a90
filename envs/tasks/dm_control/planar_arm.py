"""The arm of the domains manipulator and stacker: in a plane, with a hand of two fingers, first in the model."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from envs.tasks.dm_control.base import ControlTask, length
from envs.tasks.task import Array, flat

JOINTS = 8  # of which the model has thumb and thumbtip before finger and fingertip, the reference behind them
CLOSE = 0.01  # metres


def random_arm(task: ControlTask, xp: ModuleType, random: Any) -> Array:
    """qpos [..., 8] of the arm, with the finger as far open as the thumb."""
    limited = task.model.jnt_limited[:JOINTS, None].astype(bool)
    low, high = _swapped(np, np.where(limited, task.model.jnt_range[:JOINTS], (-np.pi, np.pi)).T)
    drawn = _swapped(xp, random.uniform(low, high, JOINTS))
    return xp.concatenate((drawn[..., :6], drawn[..., 4:5], drawn[..., 7:]), -1)


def observe_arm(task: ControlTask, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
    """Sines and cosines of the joints, their velocities, and logarithms of the five touch sensors."""
    angles = _swapped(xp, physics.qpos[:, :JOINTS])
    touch = physics.sensordata[:, task.sensors["palm_touch"].start : task.sensors["thumbtip_touch"].stop]
    turned = xp.stack((xp.sin(angles), xp.cos(angles)), 2)
    return flat(turned), _swapped(xp, physics.qvel[:, :JOINTS]), xp.log1p(touch)


def pose(task: ControlTask, physics: SimpleNamespace, body: str) -> tuple[Array, Array]:
    """x and z, and the components w and y of the quaternion, [N, 2] each."""
    return physics.xpos[:, task.bodies[body], ::2], physics.xquat[:, task.bodies[body], ::2]


def distance(task: ControlTask, xp: ModuleType, physics: SimpleNamespace, site: str, other: str) -> Array:
    """Between two sites, [N]."""
    return length(xp, physics.site_xpos[:, task.sites[site]] - physics.site_xpos[:, task.sites[other]])


def _swapped(xp: ModuleType, joints: Array) -> Array:
    """[..., 8] with thumb and thumbtip behind finger and fingertip, or before them again."""
    return xp.concatenate((joints[..., :4], joints[..., 6:], joints[..., 4:6]), -1)
