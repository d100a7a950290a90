"""Many simulations of one model on a GPU through MuJoCo Warp, as tensors that share its memory.

Float32, and not the C engine's numbers: see docs/runner.md. Runs on the CPU too, for tests, at a twentieth of the C
engine's speed. Methods without a result queue kernels and return; nothing waits for the device unless it says so.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.mujoco_simulation import Model, engine
from envs.registry import EnvironmentNotFound

_ABSENT = {"dof_M0"}  # model fields that the compiler alone reads, which MuJoCo Warp leaves out
# What an overflow bit of MuJoCo Warp means to its user, by the name of the bit: the capacity to raise.
CAPACITIES = {
    "NEFC": "njmax",
    "NJMAX_NNZ": "njmax",
    "BROADPHASE": "nconmax",
    "NARROWPHASE": "nconmax",
    "CCD": "nconmax",
}


def import_warp() -> tuple[Any, Any]:
    """The packages `warp` and `mujoco_warp`. Raises EnvironmentNotFound if they are not installed."""
    try:
        import warp

        warp.config.quiet = True  # it would print to the standard output, where a command's result may go
        import mujoco_warp
    except ImportError as error:
        raise EnvironmentNotFound(
            f"backend 'mujoco-warp' needs mujoco-warp and warp-lang ({error}): pip install 'neoteny[gpu]'"
        ) from error
    warp.init()
    return warp, mujoco_warp


def default_nconmax(model: Model) -> int:
    """Contacts of one environment for which there is room, on average over all environments."""
    return int(min(128, max(32, model.ngeom)))


def default_njmax(model: Model) -> int:
    """Rows of constraints of one environment for which there is room: all limits, and 40 contacts at a time.

    Under random actions no task of the suite or of Gymnasium has more than 35.
    """
    condim = int(model.geom_condim.max(initial=1))
    elliptic = model.opt.cone == engine().mjtCone.mjCONE_ELLIPTIC
    rows_per_contact = condim if elliptic or condim == 1 else 2 * (condim - 1)
    limits = int(model.jnt_limited.sum() + model.tendon_limited.sum())
    friction = int((model.dof_frictionloss > 0).sum() + (model.tendon_frictionloss > 0).sum())
    needed = limits + friction + 6 * model.neq + 40 * rows_per_contact
    return -(-needed // 16) * 16


class WarpSimulations:
    """N simulations of `model`; `data` and `model` fields as tensors by `bind` and `expand`.

    deterministic: the same numbers at every run on one device, at some cost in speed.
    Raises NotImplementedError, in one sentence, for a model with parts that MuJoCo Warp does not have.
    """

    def __init__(
        self, model: Model, num_envs: int, device: torch.device, nconmax: int, njmax: int, deterministic: bool
    ):
        self._warp, self._mjw = import_warp()
        self.num_envs, self.device, self.model = num_envs, device, model
        self._warp_device = self._warp.device_from_torch(device)
        with self._warp.ScopedDevice(self._warp_device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of geometries without friction, which in these models touch nothing
            self._model = self._mjw.put_model(supported(model))
            self._data = self._mjw.make_data(model, nworld=num_envs, nconmax=nconmax, njmax=njmax)
        self._warp.synchronize_device(self._warp_device)  # torch does not know the stream in which this was made
        options = self._model.opt
        options.warn_overflow, options.deterministic = 0, deterministic
        passive = options.disableflags | int(self._mjw.DisableBit.ACTUATION)
        self._without_actuation = dataclasses.replace(
            self._model, opt=dataclasses.replace(options, disableflags=passive)
        )
        # MuJoCo Warp places geometries of the world once, when it makes its data. Under this model it places them all.
        everywhere = self._warp.full_like(self._model.body_weldid, -1)
        self._all_moving = dataclasses.replace(self._model, body_weldid=everywhere)
        self.expanded: dict[str, Tensor] = {}
        self._numbers = torch.arange(self._data.naconmax, device=device)
        self.ncon = torch.zeros(num_envs, dtype=torch.int32, device=device)
        self._contact_rows = self._tensor(self._data.contact.worldid).view(-1)
        self._contact_count = self._tensor(self._data.nacon)
        self._overflow = self._tensor(self._data.overflow)

    def _tensor(self, array: Any) -> Tensor:
        return self._warp.to_torch(array)

    @property
    def solver(self) -> str:
        """Of the constraints: "newton" or "cg"."""
        return engine().mjtSolver(self._model.opt.solver).name.removeprefix("mjSOL_").lower()

    def bind(self, name: str) -> Tensor:
        """The live tensor [N, ...] of an MjData field, in the C engine's shape. `ncon` is that of `count_contacts`."""
        if name == "ncon":
            return self.ncon
        values = self._tensor(getattr(self._data, name))
        shape = np.asarray(getattr(engine().MjData(self.model), name)).shape
        return values.view(self.num_envs, *shape)

    def expand(self, name: str) -> Tensor:
        """Give a model field its own value in every simulation: the live tensor [N, ...]. Its memory is new."""
        if name not in self.expanded:
            option = name.startswith("opt.")
            own = name.removeprefix("opt.")
            spec = self._mjw.Option if option else self._mjw.Model
            if own not in spec.__annotations__ or spec.__annotations__[own].shape[:1] != ("*",):
                raise NotImplementedError(f"MuJoCo Warp has no per-environment '{name}'; use the C engine")
            values = np.asarray(getattr(self.model.opt if option else self.model, own), np.float32)
            tensor = torch.from_numpy(values).to(self.device).repeat(self.num_envs, *[1] * values.ndim)
            holders = [m.opt if option else m for m in (self._model, self._without_actuation, self._all_moving)]
            array = self._warp.from_torch(tensor, dtype=getattr(holders[0], own).dtype)
            for holder in holders:
                setattr(holder, own, array)
            self.expanded[name] = tensor
        return self.expanded[name]

    # --- kernels; to be called on the right device and stream, see `envs.recorded`

    def place_fixed(self) -> None:
        """Place also what does not move in an episode, after its place in the model was written."""
        self._mjw.kinematics(self._all_moving, self._data)

    def step(self, substeps: int) -> None:
        for _ in range(substeps):
            self._mjw.step(self._model, self._data)

    def finish_step(self, substeps: int) -> None:
        """The second half of a step whose first half `forward_passive` was, with actuation, and further steps."""
        self._mjw.step2(self._model, self._data)
        self.step(substeps - 1)

    def contact_forces(self) -> None:
        """Compute `cfrc_ext` of the last step."""
        self._mjw.rne_postconstraint(self._model, self._data)

    def update_velocities(self) -> None:
        """Bring positions, velocities and the sensors of both up to date with the state; forces stay those of before.

        For sensors on bodies, joints, geometries and sites, which are all that the tasks read.
        """
        model, data, mjw = self._model, self._data, self._mjw
        mjw.fwd_kinematics(model, data)
        mjw.sensor_pos(model, data)
        mjw.com_vel(model, data)
        mjw.sensor_vel(model, data)

    def update_positions(self) -> None:
        self._mjw.fwd_kinematics(self._model, self._data)

    def update_contacts(self) -> None:
        """Bring positions and contacts up to date."""
        self._mjw.fwd_kinematics(self._model, self._data)
        self._mjw.collision(self._model, self._data)

    def forward(self) -> None:
        self._mjw.forward(self._model, self._data)

    def forward_passive(self) -> None:
        """Without actuation."""
        self._mjw.forward(self._without_actuation, self._data)

    # --- tensor operations

    def count_contacts(self) -> None:
        """Set `ncon`, int32 [N], from the list of contacts of all simulations."""
        count_rows(self._contact_rows, self._numbers < self._contact_count, self.ncon)

    def keep_warm_start(self) -> None:
        """The solver begins the next step with the accelerations of the last forward pass."""
        self.bind("qacc_warmstart").copy_(self.bind("qacc"))

    def overflown(self) -> Tensor:
        """bool [len(CAPACITIES)], whether some simulation ever lacked room, on the device."""
        bits = [int(self._mjw.OverflowType[name]) for name in CAPACITIES]
        return torch.stack([(self._overflow & bit).ne(0).any() for bit in bits])

    def capacity(self, name: str) -> int:
        """Contacts an environment on average (`nconmax`), or constraints of one environment (`njmax`)."""
        return self._data.njmax if name == "njmax" else self._data.naconmax // self.num_envs


def supported(model: Model) -> Model:
    """The model, with Newton's method in place of projected Gauss-Seidel, which MuJoCo Warp does not have."""
    solvers = engine().mjtSolver
    if model.opt.solver != solvers.mjSOL_PGS:
        return model
    changed = copy.copy(model)
    changed.opt.solver = solvers.mjSOL_NEWTON
    return changed


def count_rows(rows: Tensor, counted: Tensor, out: Tensor) -> None:
    """Write into `out` int32 [N] how often each row occurs in `rows` [K], where `counted` bool [K] is true."""
    out.zero_().index_add_(0, rows.long().clamp(0, len(out) - 1), counted.int())


def model_fields(names: Collection[str]) -> list[str]:
    """Those of some MjModel fields that MuJoCo Warp reads."""
    return [name for name in names if name not in _ABSENT]


def constants(model: Model, names: Collection[str], device: torch.device) -> SimpleNamespace:
    """MjModel fields as float32 tensors, without the axis N."""
    found = {name: np.array(getattr(model, name), np.float32) for name in names}
    return SimpleNamespace(**{name: torch.from_numpy(values).to(device) for name, values in found.items()})
