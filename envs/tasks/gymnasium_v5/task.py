"""What all of Gymnasium's MuJoCo tasks share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from envs.mujoco_simulation import STAGE_NONE, Model, Simulations, engine, load_model
from envs.tasks.settings import Count, Range, settle
from envs.tasks.task import Array, package_file


@dataclass(frozen=True, kw_only=True)
class GymnasiumTask:
    """What the eleven tasks share."""

    package: ClassVar[str] = "gymnasium"
    fields: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[str, ...]] = ()
    expanded: ClassVar[tuple[str, ...]] = ()
    stage: ClassVar[int] = STAGE_NONE
    contact_forces: ClassVar[bool] = False
    passive_start: ClassVar[bool] = False
    finishes: ClassVar[bool] = False
    contact_free: ClassVar[bool] = False
    lifted: ClassVar[bool] = False
    settling_steps: ClassVar[int] = 0

    xml_file: str  # of the package's models, or a path that begins with / . or ~
    frame_skip: Count  # simulator steps per action
    max_episode_steps: Count = 1000

    def __post_init__(self) -> None:
        settle(self)
        if not self._path.is_file():
            raise ValueError(f"xml_file: there is no file {self._path}")

    @property
    def _path(self) -> Path:
        if self.xml_file.startswith(("/", ".", "~")):
            return Path(self.xml_file).expanduser()
        return Path(package_file("gymnasium", "envs", "mujoco", "assets", self.xml_file))

    @cached_property
    def model(self) -> Model:
        try:
            return load_model(str(self._path))
        except ValueError as error:
            raise ValueError(f"xml_file: MuJoCo cannot read {self._path}: {' '.join(str(error).split())}") from None

    @cached_property
    def _default(self) -> SimpleNamespace:
        return SimpleNamespace(qpos=self.model.qpos0)

    @property
    def camera(self) -> int:
        """The models of running robots bring a camera that follows them; the others stay in a free camera's view (-1).

        Gymnasium's own default is a free camera for all.
        """
        return engine().mj_name2id(self.model, engine().mjtObj.mjOBJ_CAMERA, "track")

    @property
    def substeps(self) -> int:
        return self.frame_skip

    @property
    def horizon(self) -> int:
        return self.max_episode_steps

    @cached_property
    def timestep(self) -> float:
        """Seconds per simulator step."""
        return self.model.opt.timestep

    @cached_property
    def dt(self) -> float:
        """Seconds per action."""
        return self.timestep * self.frame_skip

    def generator(self, seed: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))

    def generator_state(self, generator: np.random.Generator) -> dict[str, Any]:
        return dict(generator.bit_generator.state)

    def set_generator_state(self, generator: np.random.Generator, state: dict[str, Any]) -> None:
        generator.bit_generator.state = state

    def construction(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return {}

    def build(self, physics: SimpleNamespace, generators: list[Any]) -> None:
        pass

    def begin(
        self, simulations: Simulations, physics: SimpleNamespace, rows: np.ndarray, generators: list[Any]
    ) -> None:
        simulations.reset(rows)
        for row in rows.tolist():
            for name, values in self.start(np, generators[row], self._default).items():
                getattr(physics, name)[row] = values
        simulations.forward(rows)

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        raise NotImplementedError

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> Array | None:
        return None

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        raise NotImplementedError

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        raise NotImplementedError

    def _uniform_start(self, scale: float, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        """Positions and velocities uniform within `scale` of the default state."""
        nq = self.model.nq
        noise = random.uniform(-scale, scale, nq + self.model.nv)  # the reference draws the two parts one by one
        return {"qpos": default.qpos + noise[..., :nq], "qvel": noise[..., nq:]}

    def _normal_start(self, scale: float, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        """Positions uniform within `scale` of the default pose, velocities normal with that deviation."""
        qpos = default.qpos + random.uniform(-scale, scale, self.model.nq)
        return {"qpos": qpos, "qvel": scale * random.standard_normal(self.model.nv)}

    def _body(self, name_or_id: str | int) -> int:
        try:
            return self.model.body(name_or_id).id
        except (KeyError, IndexError):
            raise ValueError(f"{self._path} has no body {name_or_id!r}") from None


# What follows takes arrays [N, ...] as well as the numbers that stand for one row (`per_row`).


def squared(xp: ModuleType, x: Array) -> Array:
    """Sum of squares over the last axis: [N, k] -> [N]."""
    if not isinstance(x, np.ndarray):
        return xp.linalg.vecdot(x, x)
    if len(x) == 1:
        return float(x[0].dot(x[0]))
    return np.vecdot(x, x)  # a wrapper of `linalg` takes as long as the product


def norm(xp: ModuleType, x: Array) -> Array:
    """Euclidean norm over the last axis: [N, k] -> [N]."""
    square = squared(xp, x)
    return math.sqrt(square) if isinstance(square, float) else xp.sqrt(square)


def within(x: Array, bounds: Range) -> Array:
    """low < x < high, elementwise."""
    return (bounds[0] < x) & (x < bounds[1])


def clipped(x: Array, bounds: Range) -> Array:
    """x brought within bounds, elementwise."""
    return min(max(x, bounds[0]), bounds[1]) if isinstance(x, float) else x.clip(*bounds)


def negated(condition: Array) -> Array:
    """`not`, elementwise."""
    return condition ^ True
