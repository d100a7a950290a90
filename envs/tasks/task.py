"""What a task is to the MuJoCo runner: numbers, and pure functions of batched simulation fields.

A task is a frozen dataclass. Its fields are the settings that change it; its methods look at `physics`, a namespace of
arrays [N, ...] named as in MjData (`qpos`, `qvel`, `ctrl` and those in `fields`), and at nothing else that changes.
They use an array module `xp`, numpy or torch, and only operations that both have, so that one class serves the CPU and
a GPU backend. N is the number of rows.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Protocol

import numpy as np

from envs.mujoco_simulation import Model, Simulations

Array = Any  # numpy.ndarray, or torch.Tensor on a GPU backend: whatever belongs to `xp`


class Random(Protocol):
    """Where a task draws the start of an episode from.

    On the CPU it is the reference environment's own generator (numpy.random.Generator or RandomState) and draws for
    one row, without an axis N; on a GPU backend it draws for all rows, [N, size].
    """

    def uniform(self, low: Any, high: Any, size: int) -> Array:
        """[..., size] from [low, high); bounds are numbers or [size]."""
        ...

    def standard_normal(self, size: int) -> Array:
        """[..., size]."""
        ...

    def randint(self, high: int, size: int) -> Array:
        """[..., size] integers from 0 to high - 1."""
        ...


class Task(Protocol):
    """Two families fulfil it: `gymnasium_v5.GymnasiumTask` and `dm_control.ControlTask`."""

    package: ClassVar[str]  # the distribution whose version decides the trajectories, beside mujoco
    fields: ClassVar[tuple[str, ...]]  # derived MjData fields that the methods read
    constants: ClassVar[tuple[str, ...]]  # MjModel fields that the methods read, without the axis N
    expanded: ClassVar[tuple[str, ...]]  # MjModel fields that `build` or `begin` sets for each row
    stage: ClassVar[int]  # how far derived fields are brought up to date after a step
    contact_forces: ClassVar[bool]  # whether cfrc_ext is computed after a step
    # How an episode begins, see `dm_control.ControlTask`, which has a method for each; `begin` is all of it on the CPU.
    passive_start: ClassVar[bool]  # without actuation
    finishes: ClassVar[bool]  # whether `start` leaves rows unfinished
    contact_free: ClassVar[bool]
    lifted: ClassVar[bool]
    settling_steps: ClassVar[int]

    @property
    def camera(self) -> int | str:
        """The model camera that `render` looks through; -1 is the free camera."""
        ...

    @property
    def model(self) -> Model: ...

    @property
    def substeps(self) -> int:
        """Simulator steps per action."""
        ...

    @property
    def horizon(self) -> int | None:
        """Actions until truncation; None where there is no limit."""
        ...

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> Array | None:
        """[N] coordinate whose change over a step is rewarded; None if the reward needs no memory."""
        ...

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        """The observation in pieces [N, k], in order."""
        ...

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        """Reward [N], and terminated [N] bool or None where the task never terminates.

        moved: [N] change of `progress` over the step; None if there is none. For one row both may be plain numbers.
        """
        ...

    def generator(self, seed: int) -> Any:
        """The random generator that the reference environment makes from `seed`."""
        ...

    def generator_state(self, generator: Any) -> dict[str, Any]:
        """Everything that decides the generator's future, as tensors and plain values."""
        ...

    def set_generator_state(self, generator: Any, state: dict[str, Any]) -> None: ...

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        """The first state of an episode: by name, every field (of the state, or in `expanded`) that is not at default.

        random: a `Random`. default: `qpos` [nq] and the fields in `expanded` as the model has them, without axis N.
        Arrays of the fields' shapes, behind the axes [...] of the draws. Draws in the order of the reference.
        """
        ...

    def construction(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        """Fields in `expanded` that are drawn once, when a row's environment is made."""
        ...

    def build(self, physics: SimpleNamespace, generators: list[Any]) -> None:
        """Set the fields in `expanded` that the reference draws once, when it makes an environment; all rows."""
        ...

    def begin(
        self, simulations: Simulations, physics: SimpleNamespace, rows: np.ndarray, generators: list[Any]
    ) -> None:
        """Start an episode in `rows` (int32, ascending), with the reference's draws from each row's generator.

        generators: those of all N rows.
        """
        ...


def per_row(x: Array, *index: int) -> Array:
    """x[:, *index]: [N], or the number itself where NumPy computes one row, which takes a tenth of an array's time."""
    return x.item(0, *index) if isinstance(x, np.ndarray) and len(x) == 1 else x[:, *index]


def flat(x: Array) -> Array:
    """[N, a, b] as [N, a * b]."""
    return x.reshape(x.shape[0], -1)


def copies(default: Array, rows: tuple[int, ...]) -> Array:
    """`default` [a, ...] once for each row: [*rows, a, ...], to be written to."""
    shape = (*rows, *default.shape)
    return np.broadcast_to(default, shape).copy() if isinstance(default, np.ndarray) else default.expand(shape).clone()


def package_file(package: str, *parts: str) -> str:
    """Path of a data file of an installed package, found without importing it. Raises RuntimeError if it is absent."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise RuntimeError(f"this environment needs: pip install {package.replace('_', '-')}")
    return str(Path(found.submodule_search_locations[0], *parts))
