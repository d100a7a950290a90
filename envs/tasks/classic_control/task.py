"""What Gymnasium's classic control tasks share."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from envs.runner import ActionSpec
from envs.tasks.classic_control import one_row
from envs.tasks.settings import Count, settle

Number = Any  # a float with `one_row`, an array [N] with `many_rows`
State = tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
class ClassicTask:
    """A task: numbers, and pure functions of its state, which is a few numbers for each row.

    `xp` is `one_row` or `many_rows`, and says whether numbers or arrays [N] come in. Fields are the settings of the
    reference's constructor, under the same names and with the same defaults.
    """

    action_spec: ClassVar[ActionSpec]
    observation_size: ClassVar[int]

    max_episode_steps: Count

    def __post_init__(self) -> None:
        settle(self)

    def start(self, random: np.random.Generator) -> tuple[float, ...]:
        """The first state of one row's episode, with the reference's draws."""
        raise NotImplementedError

    def advance(self, xp: ModuleType, state: State, action: Number) -> tuple[State, Number, Number | None]:
        """The next state, the reward, and whether the task is over; None where it never is.

        action: the number of a discrete action, or the only component of a continuous one, within bounds
        and rounded to float32.
        """
        raise NotImplementedError

    def observe(self, xp: ModuleType, state: State) -> tuple[Number, ...]:
        """The observation, one entry after the other."""
        raise NotImplementedError

    def first_observation(self, state: tuple[float, ...]) -> tuple[float, ...]:
        """The observation of one row's first state."""
        return self.observe(one_row, state)

    def show(self, env: Any, state: np.ndarray, action: float | None) -> None:
        """Put a state [k], and the action that led to it, into the reference's environment, which will draw it."""
        env.state = state
