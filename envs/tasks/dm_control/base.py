"""What all tasks of the DeepMind Control Suite share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from envs.mujoco_simulation import (
    STAGE_ACCELERATION,
    STAGE_POSITION,
    STAGE_VELOCITY,
    Data,
    Model,
    Simulations,
    engine,
    load_model,
)
from envs.tasks.settings import Duration, settle
from envs.tasks.task import Array, copies, package_file

ACTUATION_DISABLED = 1 << 11  # mjDSBL_ACTUATION
XX, XZ, ZX, ZY, ZZ = 0, 2, 6, 7, 8  # entries of a rotation matrix of `xmat`, row by row
MAX_ATTEMPTS = 10_000  # to begin an episode without contacts


@dataclass(frozen=True, kw_only=True)
class ControlTask:
    """A task of the suite: its model, and pure functions of the simulation.

    An episode begins in the model's default state, a forward pass taken without actuation. Then, in this order:

    1. `start` draws the first state. Rows that it marks as `unfinished` take a forward pass, and `finish` completes
       them.
    2. contact_free: while a forward pass finds contacts, `restart` draws again.
    3. lifted: qpos[2] is the least multiple of 1 cm at which no contact is found, in the default state otherwise. It
       is reached by a forward pass of the default state and one of the pose; `after_lift` draws what is left.
    4. settling_steps: so many simulator steps with actuation, after which the time is 0 again.
    5. A forward pass without actuation gives the first observation.
    """

    file: ClassVar[str]
    package: ClassVar[str] = "dm-control"
    fields: ClassVar[tuple[str, ...]] = ("xmat",)
    constants: ClassVar[tuple[str, ...]] = ()
    expanded: ClassVar[tuple[str, ...]] = ()
    stage: ClassVar[int] = STAGE_VELOCITY
    contact_forces: ClassVar[bool] = False
    passive_start: ClassVar[bool] = True
    finishes: ClassVar[bool] = False
    random_turns: ClassVar[bool] = True  # episodes begin with unlimited hinges at random, not only limited joints
    contact_free: ClassVar[bool] = False
    lifted: ClassVar[bool] = False
    settling_steps: ClassVar[int] = 0

    time_limit: Duration = 10.0
    control_timestep: float | None = None  # seconds; None: one simulator step

    def __post_init__(self) -> None:
        settle(self)

    @cached_property
    def model(self) -> Model:
        return load_model(package_file("dm_control", "suite", self.file), self.edit)

    def edit(self, spec: Any) -> None:
        """Change the model (a mujoco.MjSpec) as the reference does before it compiles it."""

    @property
    def camera(self) -> int:
        return 0

    @property
    def substeps(self) -> int:
        return self._steps[0]

    @property
    def horizon(self) -> int | None:
        return self._steps[1]

    @cached_property
    def _steps(self) -> tuple[int, int | None]:
        """Simulator steps per action, actions per episode."""
        timestep = self.model.opt.timestep
        control_timestep = timestep if self.control_timestep is None else self.control_timestep
        substeps = round(control_timestep / timestep)
        if substeps < 1 or abs(control_timestep / timestep - substeps) > 1e-8:
            raise ValueError(f"control_timestep must be a multiple of {timestep}, got {control_timestep}")
        if math.isinf(self.time_limit):
            return substeps, None
        return substeps, math.ceil(self.time_limit / (timestep * substeps))

    @cached_property
    def bodies(self) -> dict[str, int]:
        """Ids by name."""
        return {self.model.body(i).name: i for i in range(self.model.nbody)}

    @cached_property
    def geoms(self) -> dict[str, int]:
        """Ids by name."""
        return {self.model.geom(i).name: i for i in range(self.model.ngeom)}

    @cached_property
    def sites(self) -> dict[str, int]:
        """Ids by name."""
        return {self.model.site(i).name: i for i in range(self.model.nsite)}

    @cached_property
    def sensors(self) -> dict[str, slice]:
        """Columns of `sensordata` by name."""
        adr, dim, name = self.model.sensor_adr, self.model.sensor_dim, self.model.sensor
        return {name(i).name: slice(int(adr[i]), int(adr[i] + dim[i])) for i in range(self.model.nsensor)}

    def default_pose(self) -> Data:
        """The default state with its positions computed."""
        data = engine().MjData(self.model)
        engine().mj_fwdPosition(self.model, data)
        return data

    @cached_property
    def _random_joints(self) -> tuple[slice, np.ndarray, np.ndarray]:
        """Place in qpos, lower and upper bounds of the joints that an episode begins with at random, in order.

        They are neighbours in all models that draw them so; a slice needs no copy of indices to a device.
        """
        model = self.model
        limited = model.jnt_limited.astype(bool)
        chosen = limited | (self.random_turns & (model.jnt_type == engine().mjtJoint.mjJNT_HINGE))
        bounds = np.where(limited[:, None], model.jnt_range, (-np.pi, np.pi))[chosen]
        first, last = model.jnt_qposadr[chosen][[0, -1]]
        assert last - first + 1 == len(bounds), "the joints are not neighbours"
        return slice(int(first), int(last) + 1), bounds[:, 0], bounds[:, 1]

    def randomized_joints(self, random: Any, default: SimpleNamespace) -> Array:
        """qpos [..., nq] with the limited (and turning) joints drawn anew."""
        joints, low, high = self._random_joints
        drawn = random.uniform(low, high, len(low))
        qpos = copies(default.qpos, drawn.shape[:-1])
        qpos[..., joints] = drawn
        return qpos

    def generator(self, seed: int) -> np.random.RandomState:
        return np.random.RandomState(seed)

    def generator_state(self, generator: np.random.RandomState) -> dict[str, Any]:
        state = generator.get_state(legacy=False)
        key = torch.from_numpy(state["state"]["key"].astype(np.int64))
        return {**state, "state": {"key": key, "pos": int(state["state"]["pos"])}}

    def set_generator_state(self, generator: np.random.RandomState, state: dict[str, Any]) -> None:
        key = state["state"]["key"].numpy().astype(np.uint32)
        generator.set_state({**state, "state": {"key": key, "pos": state["state"]["pos"]}})

    def build(self, physics: SimpleNamespace, generators: list[Any]) -> None:
        for row, generator in enumerate(generators):
            _write(physics, row, self.construction(np, generator, self._default))

    def begin(
        self, simulations: Simulations, physics: SimpleNamespace, rows: np.ndarray, generators: list[Any]
    ) -> None:
        disabled = simulations.expand("opt.disableflags")
        disabled[rows] |= ACTUATION_DISABLED
        simulations.reset(rows, STAGE_ACCELERATION)
        default = self._default
        self._draw(simulations, physics, rows, lambda row: self.start(np, generators[row], default))
        if self.contact_free:
            self._draw_until_free(simulations, physics, rows, generators)
        if self.lifted:
            self._lift(simulations, physics, rows, generators)
        if self.settling_steps:
            disabled[rows] &= ~ACTUATION_DISABLED
            self._settle(simulations, physics, rows)
            disabled[rows] |= ACTUATION_DISABLED
        simulations.forward(rows)
        disabled[rows] &= ~ACTUATION_DISABLED

    @cached_property
    def _default(self) -> SimpleNamespace:
        return SimpleNamespace(qpos=self.model.qpos0, **{name: getattr(self.model, name) for name in self.expanded})

    def _draw(
        self,
        simulations: Simulations,
        physics: SimpleNamespace,
        rows: np.ndarray,
        drawn: Callable[[int], dict[str, Array]],
    ) -> None:
        unfinished = np.zeros(simulations.num_envs, bool)
        for row in rows:
            fields = drawn(row)
            unfinished[row] = fields.pop("unfinished", False)
            _write(physics, row, fields)
        if unfinished.any():
            left = np.flatnonzero(unfinished).astype(np.int32)
            simulations.forward(left)
            for name, values in self.finish(np, physics).items():
                getattr(physics, name)[left] = values[left]

    def _draw_until_free(
        self, simulations: Simulations, physics: SimpleNamespace, rows: np.ndarray, generators: list[Any]
    ) -> None:
        """Each attempt's forward pass leaves its warm start to the next."""

        def drawn(row: int) -> dict[str, Array]:
            current = SimpleNamespace(qpos=physics.qpos[row], qvel=physics.qvel[row])
            return self.restart(np, generators[row], self._default, current)

        for _ in range(MAX_ATTEMPTS):
            simulations.forward(rows)
            rows = rows[physics.ncon[rows] > 0]
            if rows.size == 0:
                return
            self._draw(simulations, physics, rows, drawn)
        raise RuntimeError(f"row {rows[0]}: no pose without contacts in {MAX_ATTEMPTS} draws")

    def _lift(
        self, simulations: Simulations, physics: SimpleNamespace, rows: np.ndarray, generators: list[Any]
    ) -> None:
        height, touching = 0.0, rows
        for _ in range(MAX_ATTEMPTS):
            physics.qpos[touching, 2] = height
            simulations.forward(touching, STAGE_POSITION)
            touching = touching[physics.ncon[touching] > 0]
            if touching.size == 0:
                break
            height += 0.01
        else:
            raise RuntimeError(f"row {touching[0]}: touches the ground at a height of {height:.0f} m")
        pose = physics.qpos[rows]
        simulations.reset(rows, STAGE_ACCELERATION)
        physics.qpos[rows] = pose
        simulations.forward(rows)
        for row in rows:
            current = SimpleNamespace(qpos=physics.qpos[row], qvel=physics.qvel[row])
            _write(physics, row, self.after_lift(np, generators[row], current))

    def _settle(self, simulations: Simulations, physics: SimpleNamespace, rows: np.ndarray) -> None:
        # The first step integrates the drawn pose with the accelerations of the default pose, because the reference
        # finishes the step that its forward pass had begun there.
        simulations.apply("mj_step2", rows, save=True)
        simulations.step(self.settling_steps - 1, rows=rows)
        physics.time[rows] = 0.0

    def construction(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return {}

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        """See `Task.start`. The entry `unfinished` [...] bool marks what `finish` completes; it may be left out."""
        return {"qpos": self.randomized_joints(random, default)}

    def finish(self, xp: ModuleType, physics: SimpleNamespace) -> dict[str, Array]:
        """Fields [N, ...] of unfinished rows, from derived fields of what `start` or `restart` drew."""
        raise NotImplementedError

    def restart(
        self, xp: ModuleType, random: Any, default: SimpleNamespace, current: SimpleNamespace
    ) -> dict[str, Array]:
        """What is drawn again after a pose with contacts, as by `start`. current: `qpos`, `qvel` of that pose."""
        return self.start(xp, random, default)

    def after_lift(self, xp: ModuleType, random: Any, current: SimpleNamespace) -> dict[str, Array]:
        """What is drawn once the pose is free of contacts. current: `qpos`, `qvel` of that pose."""
        return {}

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> None:
        return None

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        raise NotImplementedError

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        raise NotImplementedError


def _write(physics: SimpleNamespace, row: int, fields: dict[str, Array]) -> None:
    for name, values in fields.items():
        getattr(physics, name)[row] = values


def length(xp: ModuleType, x: Array) -> Array:
    """Euclidean norm over the last axis, [..., k] -> [...]."""
    return xp.sqrt(xp.linalg.vecdot(x, x))


def unit(xp: ModuleType, x: Array) -> Array:
    """x [..., k] scaled to length 1 over the last axis."""
    return x / length(xp, x)[..., None]


def local(vectors: Array, xmat: Array) -> Array:
    """Vectors [N, k, 3] of the world in the frame with rotation matrix `xmat` [N, 9].

    One product for the k of them, of which the last bit may differ from k products.
    """
    return vectors @ xmat.reshape(-1, 3, 3)


def local_vector(vector: Array, xmat: Array) -> Array:
    """A vector [N, 3] of the world in the frame with rotation matrix `xmat` [N, 9]."""
    return local(vector[:, None], xmat)[:, 0]


def ruled_out(condition: Array) -> bool:
    """Whether a condition on draws is known not to hold: of one row on the host, but not of rows on a device.

    Where it is ruled out, the reference draws nothing, and so must we.
    """
    return isinstance(condition, (np.bool_, np.ndarray)) and condition.ndim == 0 and not condition
