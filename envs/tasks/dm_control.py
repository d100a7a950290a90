"""DeepMind Control Suite tasks (Tassa et al. 2018, arXiv:1801.00690; Tunyasuvunakool et al. 2020, arXiv:2006.12983).

Equal to dm_control, observations bit for bit, given the same seeds and actions (tests/envs/test_mujoco_dm_control.py).
Observations are the reference's entries, flattened in their order. Episodes are only truncated, never terminated.
Quirks kept: derived fields are up to date in position and velocity after a step, but forces and touch lag by one
simulator step; an episode begins with two forward passes without actuation, which leave the solver's warm start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from envs.mujoco_simulation import STAGE_ACCELERATION, STAGE_VELOCITY, Model, Simulations, engine, load_model
from envs.tasks.task import Array, copies, flat, package_file
from envs.tasks.tolerance import tolerance

ACTUATION_DISABLED = 1 << 11  # mjDSBL_ACTUATION
XX, XZ, ZZ = 0, 2, 8  # entries of a body's rotation matrix in `xmat`, row by row


@dataclass(frozen=True, kw_only=True)
class ControlTask:
    """What all tasks of the suite share."""

    file: ClassVar[str]
    package: ClassVar[str] = "dm-control"
    fields: ClassVar[tuple[str, ...]] = ("xmat",)
    constants: ClassVar[tuple[str, ...]] = ()
    expanded: ClassVar[tuple[str, ...]] = ()
    stage: ClassVar[int] = STAGE_VELOCITY
    contact_forces: ClassVar[bool] = False
    random_turns: ClassVar[bool] = True  # episodes begin with unlimited hinges at random, not only limited joints

    time_limit: float = 10.0  # seconds
    control_timestep: float | None = None  # seconds; None: one simulator step

    def __post_init__(self) -> None:
        if self.time_limit <= 0:
            raise ValueError(f"time_limit must be positive, got {self.time_limit}")

    @cached_property
    def model(self) -> Model:
        return load_model(package_file("dm_control", "suite", self.file))

    @property
    def camera(self) -> int:
        return 0

    @property
    def substeps(self) -> int:
        return self._steps[0]

    @property
    def horizon(self) -> int:
        return self._steps[1]

    @cached_property
    def _steps(self) -> tuple[int, int]:
        """Simulator steps per action, actions per episode."""
        timestep = self.model.opt.timestep
        substeps = 1 if self.control_timestep is None else round(self.control_timestep / timestep)
        return substeps, math.ceil(self.time_limit / (timestep * substeps))

    @cached_property
    def _random_joints(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Addresses in qpos, lower and upper bounds of the joints that an episode begins with at random, in order."""
        model = self.model
        limited = model.jnt_limited.astype(bool)
        chosen = limited | (self.random_turns & (model.jnt_type == engine().mjtJoint.mjJNT_HINGE))
        bounds = np.where(limited[:, None], model.jnt_range, (-np.pi, np.pi))[chosen]
        return model.jnt_qposadr[chosen], bounds[:, 0], bounds[:, 1]

    def _randomized_joints(self, random: Any, default: SimpleNamespace) -> Array:
        """qpos [..., nq] with the limited (and turning) joints drawn anew."""
        joints, low, high = self._random_joints
        drawn = random.uniform(low, high, len(joints))
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

    def begin(
        self, simulations: Simulations, physics: SimpleNamespace, rows: np.ndarray, generators: list[Any]
    ) -> None:
        disabled = simulations.expand("opt.disableflags")
        disabled[rows] |= ACTUATION_DISABLED
        simulations.reset(rows, STAGE_ACCELERATION)
        self.place(simulations, physics, rows, generators)
        simulations.forward(rows)
        disabled[rows] &= ~ACTUATION_DISABLED

    def place(
        self, simulations: Simulations, physics: SimpleNamespace, rows: np.ndarray, generators: list[Any]
    ) -> None:
        """Set the first state of an episode in `rows`, which stand in the model's default state."""
        default = SimpleNamespace(qpos=self.model.qpos0, **{name: getattr(self.model, name) for name in self.expanded})
        for row in rows:
            for name, values in self.start(np, generators[row], default).items():
                getattr(physics, name)[row] = values

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        return {"qpos": self._randomized_joints(random, default)}

    def progress(self, xp: ModuleType, physics: SimpleNamespace) -> None:
        return None

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        raise NotImplementedError

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Cheetah(ControlTask):
    """Run at 10 m/s. Observation 17, actions 6."""

    file: ClassVar[str] = "cheetah.xml"
    fields: ClassVar[tuple[str, ...]] = ("sensordata",)
    random_turns: ClassVar[bool] = False
    run_speed: float = 10.0  # metres per second

    def place(
        self, simulations: Simulations, physics: SimpleNamespace, rows: np.ndarray, generators: list[Any]
    ) -> None:
        super().place(simulations, physics, rows, generators)
        # The robot falls for 200 simulator steps. The first one integrates the drawn pose with the accelerations of the
        # default pose, because the reference finishes the step that its forward pass had begun there.
        disabled = simulations.expand("opt.disableflags")
        disabled[rows] &= ~ACTUATION_DISABLED
        simulations.apply("mj_step2", rows, save=True)
        simulations.step(199, rows=rows)
        physics.time[rows] = 0.0
        disabled[rows] |= ACTUATION_DISABLED

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos[:, 1:], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        speed = physics.sensordata[:, 0]
        return tolerance(xp, speed, self.run_speed, math.inf, self.run_speed, "linear", 0.0), None


@dataclass(frozen=True, kw_only=True)
class Walker(ControlTask):
    """Stand, and move at `move_speed` unless that is 0. Observation 24, actions 6."""

    file: ClassVar[str] = "walker.xml"
    fields: ClassVar[tuple[str, ...]] = ("xmat", "xpos", "sensordata")
    time_limit: float = 25.0
    control_timestep: float | None = 0.025
    stand_height: float = 1.2  # metres
    move_speed: float = 0.0  # metres per second

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        orientations = physics.xmat[:, 1:, XX : XZ + 1 : 2]
        return flat(orientations), physics.xpos[:, 1, 2:], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        height = physics.xpos[:, 1, 2]
        standing = tolerance(xp, height, self.stand_height, math.inf, self.stand_height / 2)
        upright = (1.0 + physics.xmat[:, 1, ZZ]) / 2.0
        stand_reward = (3.0 * standing + upright) / 4.0
        if self.move_speed == 0.0:
            return stand_reward, None
        speed = physics.sensordata[:, 0]
        moving = tolerance(xp, speed, self.move_speed, math.inf, self.move_speed / 2, "linear", 0.5)
        return stand_reward * (5.0 * moving + 1.0) / 6.0, None


@dataclass(frozen=True, kw_only=True)
class Cartpole(ControlTask):
    """Swing a pole up, or keep it up. Observation 5, action 1."""

    file: ClassVar[str] = "cartpole.xml"
    swing_up: bool = True  # begin hanging down at rest, else near upright
    sparse: bool = False  # reward 1 only within 0.25 m and a cosine of 0.995

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        if self.swing_up:
            qpos = 0.01 * random.standard_normal(2)
            qpos[..., 1] += np.pi
        else:
            qpos = random.uniform((-0.1, -0.034), (0.1, 0.034), 2)
        return {"qpos": qpos, "qvel": 0.01 * random.standard_normal(2)}

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        pole = physics.xmat[:, 2]
        return physics.qpos[:, :1], pole[:, ZZ:], pole[:, XZ : XZ + 1], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        position, cosine = physics.qpos[:, 0], physics.xmat[:, 2, ZZ]
        if self.sparse:
            return tolerance(xp, position, -0.25, 0.25) * tolerance(xp, cosine, 0.995, 1.0), None
        upright = (cosine + 1.0) / 2.0
        centred = (1.0 + tolerance(xp, position, margin=2.0)) / 2.0
        calm = (4.0 + tolerance(xp, physics.ctrl[:, 0], margin=1.0, shape="quadratic", value_at_margin=0.0)) / 5.0
        slow = (1.0 + tolerance(xp, physics.qvel[:, 1], margin=5.0)) / 2.0
        return upright * calm * slow * centred, None


@dataclass(frozen=True, kw_only=True)
class Pendulum(ControlTask):
    """Swing a weakly actuated pole up; reward 1 within 8 degrees of upright. Observation 3, action 1."""

    file: ClassVar[str] = "pendulum.xml"
    time_limit: float = 20.0
    cosine: float = math.cos(math.radians(8.0))

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        pole = physics.xmat[:, 1]
        return pole[:, ZZ:], pole[:, XZ : XZ + 1], physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        return tolerance(xp, physics.xmat[:, 1, ZZ], self.cosine, 1.0), None


@dataclass(frozen=True, kw_only=True)
class Reacher(ControlTask):
    """Touch a target with a two-link arm; its place is drawn anew each episode. Observation 6, actions 2."""

    file: ClassVar[str] = "reacher.xml"
    fields: ClassVar[tuple[str, ...]] = ("geom_xpos",)
    expanded: ClassVar[tuple[str, ...]] = ("geom_pos",)
    time_limit: float = 20.0
    target_size: float = 0.05  # radius in metres

    @cached_property
    def model(self) -> Model:
        model = load_model(package_file("dm_control", "suite", self.file))
        model.geom("target").size[0] = self.target_size
        return model

    @cached_property
    def _geoms(self) -> tuple[int, int, float]:
        """Ids of the target and the finger, and the sum of their radii."""
        target, finger = self.model.geom("target"), self.model.geom("finger")
        return target.id, finger.id, float(target.size[0] + finger.size[0])

    def start(self, xp: ModuleType, random: Any, default: SimpleNamespace) -> dict[str, Array]:
        qpos = self._randomized_joints(random, default)
        angle, radius = random.uniform(0.0, 2.0 * np.pi, 1), random.uniform(0.05, 0.20, 1)
        geom_pos = copies(default.geom_pos, qpos.shape[:-1])
        geom_pos[..., self._geoms[0], 0:1] = radius * xp.sin(angle)
        geom_pos[..., self._geoms[0], 1:2] = radius * xp.cos(angle)
        return {"qpos": qpos, "geom_pos": geom_pos}

    def _to_target(self, physics: SimpleNamespace) -> Array:
        target, finger, _ = self._geoms
        return physics.geom_xpos[:, target, :2] - physics.geom_xpos[:, finger, :2]

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        return physics.qpos, self._to_target(physics), physics.qvel

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        offset = self._to_target(physics)
        return tolerance(xp, xp.sqrt(xp.linalg.vecdot(offset, offset)), 0.0, self._geoms[2]), None


@dataclass(frozen=True, kw_only=True)
class FingerSpin(ControlTask):
    """Keep a body on an unactuated hinge turning at 15 rad/s or more, by touch. Observation 9, actions 2."""

    file: ClassVar[str] = "finger.xml"
    fields: ClassVar[tuple[str, ...]] = ("sensordata", "ncon")
    time_limit: float = 20.0
    control_timestep: float | None = 0.02
    spin_velocity: float = 15.0  # radians per second
    hinge_damping: float = 0.03

    @cached_property
    def model(self) -> Model:
        model = load_model(package_file("dm_control", "suite", self.file))
        model.joint("hinge").damping[0] = self.hinge_damping
        model.site("target").rgba[3] = model.site("tip").rgba[3] = 0.0  # the turning tasks' marks
        return model

    @cached_property
    def _sensors(self) -> dict[str, int]:
        return {self.model.sensor(i).name: int(self.model.sensor_adr[i]) for i in range(self.model.nsensor)}

    def place(
        self, simulations: Simulations, physics: SimpleNamespace, rows: np.ndarray, generators: list[Any]
    ) -> None:
        """Poses with contacts are drawn again. Each attempt's forward pass leaves its warm start to the next."""
        for _ in range(1000):
            super().place(simulations, physics, rows, generators)
            simulations.forward(rows)
            rows = rows[physics.ncon[rows] > 0]
            if rows.size == 0:
                return
        raise RuntimeError(f"row {rows[0]}: no pose without contacts in 1000 draws")

    def observe(self, xp: ModuleType, physics: SimpleNamespace) -> tuple[Array, ...]:
        data, at = physics.sensordata, self._sensors
        tip = data[:, at["tip"] : at["tip"] + 3 : 2] - data[:, at["spinner"] : at["spinner"] + 3 : 2]
        joints = data[:, at["proximal"] : at["distal"] + 1]
        velocities = data[:, at["proximal_velocity"] : at["hinge_velocity"] + 1]
        return joints, tip, velocities, xp.log1p(data[:, at["touchtop"] : at["touchbottom"] + 1])

    def outcome(self, xp: ModuleType, physics: SimpleNamespace, moved: Array) -> tuple[Array, Array | None]:
        turning = physics.sensordata[:, self._sensors["hinge_velocity"]]
        return xp.where(turning <= -self.spin_velocity, 1.0, 0.0), None


TASKS: dict[str, tuple[type[ControlTask], dict[str, Any]]] = {
    "dmc/cheetah-run": (Cheetah, {}),
    "dmc/walker-stand": (Walker, {"move_speed": 0.0}),
    "dmc/walker-walk": (Walker, {"move_speed": 1.0}),
    "dmc/walker-run": (Walker, {"move_speed": 8.0}),
    "dmc/cartpole-balance": (Cartpole, {"swing_up": False}),
    "dmc/cartpole-balance_sparse": (Cartpole, {"swing_up": False, "sparse": True}),
    "dmc/cartpole-swingup": (Cartpole, {}),
    "dmc/cartpole-swingup_sparse": (Cartpole, {"sparse": True}),
    "dmc/pendulum-swingup": (Pendulum, {}),
    "dmc/reacher-easy": (Reacher, {"target_size": 0.05}),
    "dmc/reacher-hard": (Reacher, {"target_size": 0.015}),
    "dmc/finger-spin": (FingerSpin, {}),
}
