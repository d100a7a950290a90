"""The `mujoco.warp` backend: native Gymnasium v5 and dm_control tasks on a GPU, through MuJoCo Warp.

The tasks are those of `envs.mujoco_batch`, over torch instead of NumPy, on tensors that share the simulator's memory. A
step is a few launches of recorded graphs; the host neither waits for the device nor learns what happened there, except
when it looks (`check`): every `CHECKED_EVERY` steps, at numbers that are as old, and when a state is saved.

Float32 and another solver make this a class of results of its own: trajectories leave those of the C engine within
seconds of simulated time. Rows draw their episodes from `envs.row_random`, not from the references' generators.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from envs.actions import check_action
from envs.device_episodes import LIFTS, NO_ROW, STATE_FIELDS, Episodes
from envs.drawing import Drawing, View
from envs.model_changes import changed_fields
from envs.mujoco_batch import NEVER, PIXEL_SETTINGS, known_ids, make_task
from envs.mujoco_simulation import STAGE_VELOCITY, Simulations
from envs.recorded import RecordedKernels, RecordedTensors
from envs.row_random import RowRandom, row_keys
from envs.runner import ContinuousActionSpec, ObservationSpec, RunnerSpec, Step, row_seeds
from envs.tasks.task import Task
from envs.warp_simulation import (
    CAPACITIES,
    WarpSimulations,
    constants,
    default_nconmax,
    default_njmax,
    import_warp,
    model_fields,
)

CHECKED_EVERY = 256  # steps
MEANINGS = {"njmax": "constraints of one environment", "nconmax": "contacts of an environment on average"}
ATTEMPTS = 160  # draws of a pose without contacts; the hardest task accepts one in eight, so 1e-9 of rows keep one


class CapacityExceeded(RuntimeError):
    """Contacts or constraints were left out for lack of room; the message says which capacity to raise."""


def make(env_id: str, num_envs: int, seed: int, device: torch.device, threads: int, **task_args: Any) -> MujocoWarp:
    """Build N environments of one id. See `envs.make`; `threads` has no meaning here.

    task_args: `row_seeds` (one integer a row, instead of those derived from `seed`), `nconmax` (contacts of an
    environment for which there is room, on average over all), `njmax` (rows of constraints of any one environment),
    `deterministic` (True; False is faster and no longer exact on a GPU), and the fields of the task's class.
    Raises ValueError for an id without a native task or a setting that the task does not have, EnvironmentNotFound if
    the packages are not installed.
    """
    if env_id not in known_ids():
        raise ValueError(f"backend 'mujoco-warp' runs the native MuJoCo and dm_control tasks, not {env_id}")
    if task_args.pop("obs", "state") != "state" or task_args.keys() & set(PIXEL_SETTINGS):
        raise ValueError("backend 'mujoco-warp' has no pixel observations; leave `backend` away for those")
    if task_args.pop("dtype", torch.float32) != torch.float32:
        raise ValueError("backend 'mujoco-warp' computes in torch.float32; leave `dtype` away")
    import_warp()
    seeds = task_args.pop("row_seeds", None)
    seeds = row_seeds(seed, num_envs) if seeds is None else [int(s) for s in seeds]
    if len(seeds) != num_envs:
        raise ValueError(f"row_seeds needs {num_envs} integers, got {len(seeds)}")
    own = {name: task_args.pop(name) for name in ("nconmax", "njmax", "deterministic") if name in task_args}
    return MujocoWarp(env_id, make_task(env_id, **task_args), seeds, torch.device(device), **own)


class MujocoWarp:
    """N environments of one task; fulfils `envs.runner.Runner`."""

    def __init__(
        self,
        env_id: str,
        task: Task,
        seeds: list[int],
        device: torch.device,
        nconmax: int | None = None,
        njmax: int | None = None,
        deterministic: bool = True,
    ):
        if device.type == "cuda" and device.index is None:  # Warp wants to know which
            device = torch.device("cuda", torch.cuda.current_device())
        model, self.num_envs, self.device = task.model, len(seeds), device
        nconmax = default_nconmax(model) if nconmax is None else _capacity("nconmax", nconmax)
        njmax = default_njmax(model) if njmax is None else _capacity("njmax", njmax)
        self._task = task
        try:
            self._simulations = WarpSimulations(model, self.num_envs, device, nconmax, njmax, deterministic)
            for name in task.expanded:
                self._simulations.expand(name)
        except NotImplementedError as error:
            raise ValueError(f"{env_id} cannot run on MuJoCo Warp: {error}") from error
        names = ("qpos", "qvel", "ctrl", "time", *task.fields)
        self._physics = SimpleNamespace(**{name: self._simulations.bind(name) for name in names})
        vars(self._physics).update(vars(constants(model, task.constants, device)), **self._simulations.expanded)
        low, high = model.actuator_ctrlrange.astype(np.float32).T
        self.action_spec = ContinuousActionSpec(low, high)
        self._action = torch.zeros(self.num_envs, low.size, device=device)
        self._limits = torch.from_numpy(low).to(device), torch.from_numpy(high).to(device)
        self._random = RowRandom(row_keys(seeds, device))
        self._horizon = NEVER if task.horizon is None else task.horizon
        state = {name: self._simulations.bind(name) for name in STATE_FIELDS if name != "act" or model.na}
        defaults = constants(model, task.expanded, device)
        defaults.qpos = constants(model, ("qpos0",), device).qpos0
        self._episodes = Episodes(
            *(task, self._physics, {**state, **self._simulations.expanded}),
            *(self._limits, defaults, self._random, self._horizon),
        )
        self._episodes.construct()
        self._slots = tuple(self._episodes.make_step() for _ in range(2))
        self._slot = 0
        self._arrange()
        self._time = 0
        self._started = np.zeros(self.num_envs, np.int64)  # as the host knows it: but for episodes that diverged
        self._report: _Report | None = None
        self._known_diverged = 0
        self._prepared = self._sent = self._ready = self._closed = False
        self._easel: tuple[Simulations, Drawing] | None = None
        self.observation_spec = ObservationSpec((self._episodes.obs.shape[1],))
        capacities = {"nconmax": nconmax, "njmax": njmax}
        solver = self._simulations.solver
        numerics = {"dtype": "float32", "solver": solver, "deterministic": deterministic}
        settings = {**dataclasses.asdict(cast(Any, task)), **numerics, **capacities}
        packages = ("mujoco", "mujoco-warp", "warp-lang", task.package)
        self.spec = RunnerSpec(
            env_id, "mujoco.warp", task.horizon, 1, settings, {name: version(name) for name in packages}
        )

    # --- what is launched

    def _arrange(self) -> None:
        """Make the sequences of a step and of the preparation of starts; they are recorded when they run again."""
        episodes = self._episodes
        self._take = self._tensors(lambda: episodes.take(self._action))
        self._simulate = self._kernels(self._physics_of_a_step)
        self._conclude = tuple(self._tensors(lambda step=step: episodes.conclude(step)) for step in self._slots)
        self._begin_all = self._tensors(episodes.begin_all)
        self._preparation = list(self._stages_of_a_start())

    def _tensors(self, *operations: Callable[[], None]) -> RecordedTensors:
        return RecordedTensors(_in_turn(operations), self.device)

    def _kernels(self, *operations: Callable[[], None]) -> RecordedKernels:
        if self._moves_fixed:
            operations = (self._simulations.place_fixed, *operations)
        return RecordedKernels(_in_turn(operations), self.device)

    @property
    def _moves_fixed(self) -> bool:
        """Whether an episode has its own places of bodies or geometries that may not move in it, such as targets."""
        return not {"geom_pos", "body_pos", "body_quat"}.isdisjoint(self._task.expanded)

    def _physics_of_a_step(self) -> None:
        self._simulations.step(self._task.substeps)
        if self._task.contact_forces:
            self._simulations.contact_forces()
        if self._task.stage == STAGE_VELOCITY:
            self._simulations.update_velocities()

    def _stages_of_a_start(self) -> Iterator[Callable[[], None]]:
        """The next start of every row, in the order of `dm_control.ControlTask`, with two differences.

        Without `settling_steps` nothing that is read depends on the forward pass of the default state, so it is left
        out; nor is there one if the task reads no derived field. (Both would only change where the solver begins.)
        """
        task, episodes, simulations = self._task, self._episodes, self._simulations
        forward = self._kernels(simulations.forward_passive if task.passive_start else simulations.forward)
        look, place = self._kernels(simulations.update_contacts), self._kernels(simulations.update_positions)
        yield self._tensors(episodes.set_aside)
        if task.settling_steps:
            yield from (forward, self._tensors(simulations.keep_warm_start))
        yield self._tensors(episodes.draw)
        finish = (place, self._tensors(episodes.finish)) if task.finishes else ()
        yield from finish
        if task.contact_free:
            again = self._tensors(simulations.count_contacts, episodes.draw_again)
            yield from (look, again, *finish) * ATTEMPTS
        if task.lifted:
            yield self._tensors(episodes.begin_lift)
            yield from (look, self._tensors(simulations.count_contacts, episodes.judge_lift)) * LIFTS
            yield self._tensors(episodes.after_lift)
        if task.settling_steps:
            yield self._kernels(lambda: simulations.finish_step(task.settling_steps))
            yield self._tensors(episodes.restart_clock)
        if task.fields:
            yield from (forward, self._tensors(simulations.keep_warm_start))
        yield self._tensors(episodes.collect)

    def _prepare(self) -> None:
        for stage in self._preparation:
            stage()

    # --- the runner

    def reset(self) -> Tensor:
        """Start a new episode in every row. Returns obs [N, O]."""
        self._check_open()
        if not self._prepared:
            if self.device.type == "cpu":
                message = "MuJoCo Warp on the CPU is for tests only: the C engine is about 20 times as fast"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            self._prepare()
            self._prepared = True
        self._begin_all()
        self._prepare()
        self._started[...] = self._time
        self._sent, self._ready = False, True
        self._slot = 1 - self._slot
        obs = self._slots[self._slot].obs
        obs.copy_(self._episodes.obs)
        return obs

    def step(self, action: Tensor) -> Step:
        """Take one action in every row; see `envs.runner.Runner.step`.

        What is wrong with values is found when `check` looks: an action that is not a number or out of bounds, an
        observation or reward that is not finite, and contacts that there was no room for. A row whose simulation
        diverges is truncated with reward 0 and its last good observation, counted in `diverged_episodes`, and begun
        anew; until the next look a second time with the same first state.
        """
        self.send(action)
        return self.recv()

    def send(self, action: Tensor) -> None:
        """Hand over actions [N, A] and queue the step. Raises ValueError for another shape, type or device."""
        if self._sent or not self._ready:
            raise RuntimeError("send: call recv first" if self._sent else "send: call reset first")
        check_action(action, self.action_spec, self.num_envs, self.device)
        self._sent = True
        self._action.copy_(action.detach())
        self._slot = 1 - self._slot
        self._take()
        self._simulate()
        self._conclude[self._slot]()
        self._time += 1
        due = self._time - self._started >= self._horizon
        if self._episodes.may_terminate or due.any():
            self._prepare()
        self._started[due] = self._time

    def recv(self) -> Step:
        """The outcome of the actions sent; on a GPU it may still be on its way."""
        if not self._sent:
            raise RuntimeError("recv: call send first")
        self._sent = False
        if self._time % CHECKED_EVERY == 0:
            if self._report is not None:
                self._judge(self._report)
            self._report = _Report(self._simulations, self._episodes)
        return self._slots[self._slot]

    def check(self) -> None:
        """Wait for the device, and raise what went wrong since the environments were made, see `step`."""
        self._judge(_Report(self._simulations, self._episodes))

    def _judge(self, report: _Report) -> None:
        found, where = report.read(), self.spec.env_id
        if (diverged := found["diverged"] - self._known_diverged) > 0:
            self._known_diverged += diverged
            message = f"{where}: {diverged} simulations met NaN or huge numbers; the episodes are truncated"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
            if not self._episodes.may_terminate:
                self._prepare()  # their next starts are used up
        if (row := found["first_wrong_action"]) != NO_ROW:
            low, high = self.action_spec.low, self.action_spec.high
            bounds = ", ".join(f"[{a:g}, {b:g}]" for a, b in sorted(set(zip(low.tolist(), high.tolist(), strict=True))))
            raise ValueError(f"{where}: row {row} was given an action that is NaN or outside of {bounds}")
        if (row := found["first_not_finite"]) != NO_ROW:
            raise FloatingPointError(f"{where}: an observation or the reward of row {row} was NaN or infinite")
        for bit, capacity in CAPACITIES.items():
            if found[bit]:
                room = self._simulations.capacity(capacity)
                raise CapacityExceeded(
                    f"{where}: {MEANINGS[capacity]}: {capacity}={room} was not enough and some were left out; make the "
                    f"environments with a larger {capacity}, for example {capacity}={2 * room}"
                )

    @property
    def diverged_episodes(self) -> int:
        """Waits for the device."""
        return int(self._episodes.diverged)

    def change_model(self, factors: Mapping[str, float], rows: Sequence[int] | None = None, now: bool = False) -> None:
        """Multiply parts of the original model in `rows` (None: all), from their next episodes on, or `now`.

        See `envs.mujoco_batch.MujocoBatch.change_model`. The first change of a field gives it memory of its own, so
        that all graphs are recorded anew.
        """
        self._check_open()
        rows = range(self.num_envs) if rows is None else rows
        if outside := [row for row in rows if not 0 <= row < self.num_envs]:
            raise ValueError(f"row {outside[0]} does not exist; there are {self.num_envs}")
        fields = changed_fields(self._task.model, factors)
        chosen = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        self._expand(model_fields(fields))
        for name in model_fields(fields):
            values = torch.from_numpy(fields[name].astype(np.float32)).to(self.device)
            self._episodes.starts[name][chosen] = values
            if now:
                self._episodes.state[name][chosen] = values
        if self._prepared:
            self._prepare()

    def _expand(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._episodes.state]
        for name in new:
            self._episodes.add(name, self._simulations.expand(name))
        if new:
            self._arrange()

    def render(self, row: int = 0, height: int = 480, width: int = 480) -> np.ndarray:
        """A picture of one row, uint8 [height, width, 3], drawn by the C engine from a copy of the row's state."""
        self._check_open()
        view = View(self._task.camera, height, width)
        if self._easel is None or self._easel[1].view != view:
            self._close_easel()
            simulation = Simulations(self._task.model, 1, 1, persistent=False)
            self._easel = simulation, Drawing(simulation, view, 1, up_to_date=True)
        simulation, drawing = self._easel
        for name in self._episodes.state.keys() - {"qacc_warmstart"}:
            values = self._episodes.state[name]
            bound = simulation.bind(name) if name in STATE_FIELDS else simulation.expand(name)
            bound[0] = values[row].cpu().numpy().reshape(bound[0].shape)
        picture = np.empty((height, width, 3), np.uint8)
        drawing.draw([0], [picture.transpose(2, 0, 1)])
        return picture

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, as tensors and plain values; not between `send` and `recv`.

        Waits for the device and raises as `check`.
        """
        self._check_open()
        if self._sent:
            raise RuntimeError("state_dict: call recv first")
        self.check()
        return {
            "env_id": self.spec.env_id,
            "backend": self.spec.backend,
            "num_envs": self.num_envs,
            "tensors": {name: values.cpu().clone() for name, values in self._episodes.kept().items()},
            "episode_length": torch.from_numpy(self._time - self._started),
            "prepared": self._prepared,
            "ready": self._ready,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was called. Raises ValueError if the environments are not the same."""
        self._check_open()
        saved = f"{state.get('num_envs')} x {state['env_id']} of {state.get('backend', 'another backend')}"
        here = f"{self.num_envs} x {self.spec.env_id} of {self.spec.backend}"
        if saved != here:
            raise ValueError(f"state of {saved} given to {here}")
        tensors = state["tensors"]
        self._expand([name.removeprefix("state.") for name in tensors if name.startswith("state.")])
        self._episodes.forget_changes()
        for name, values in self._episodes.kept().items():
            if name in tensors:
                values.copy_(tensors[name])
        self._time = 0
        self._started[...] = -state["episode_length"].numpy()
        self._known_diverged, self._report = int(tensors["diverged"]), None
        self._sent, self._prepared, self._ready = False, state["prepared"], state["ready"]

    def close(self) -> None:
        """Free the simulations and the drawing context. Returned tensors stay readable. Raises as `check`."""
        if self._closed:
            return
        self._closed, self._ready = True, False
        self._close_easel()
        self.check()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the runner of {self.spec.env_id} is closed")

    def _close_easel(self) -> None:
        if self._easel is not None:
            simulation, drawing = self._easel
            drawing.close()
            simulation.close()
            self._easel = None


class _Report:
    """A copy of what went wrong so far, on its way to the host."""

    def __init__(self, simulations: WarpSimulations, episodes: Episodes):
        values = {
            "diverged": episodes.diverged,
            "first_wrong_action": episodes.first_wrong_action,
            "first_not_finite": episodes.first_not_finite,
        }
        packed = torch.cat([torch.stack([v.long() for v in values.values()]), simulations.overflown().long()])
        self._names = (*values, *CAPACITIES)
        self._values = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=packed.is_cuda)
        self._values.copy_(packed, non_blocking=True)
        self._copied = torch.cuda.Event() if packed.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(packed.device))

    def read(self) -> dict[str, int]:
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


def _in_turn(operations: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for operation in operations:
            operation()

    return run


def _capacity(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value
