"""The `mujoco.batch` backend: native Gymnasium v5 and dm_control tasks on MuJoCo's C++ thread pool.

A step costs one call into the pool and a few wide NumPy operations in float64; results go into preallocated buffers
that torch tensors share, so nothing is allocated or dispatched in torch on the CPU. Rows are the reference
environments: row i draws what `gymnasium.make(...)` or `suite.load(...)` with row i's seed would draw.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from envs.actions import check_action, check_bounds
from envs.cores import available_cores
from envs.drawing import Drawing, View
from envs.model_changes import changed_fields
from envs.mujoco_simulation import STAGE_NONE, SimulationDiverged, Simulations
from envs.runner import ContinuousActionSpec, ObservationSpec, RunnerSpec, Step, row_seeds
from envs.tasks import dm_control, gymnasium_v5
from envs.tasks.task import Task

_BOUNDS_CHECKED_EVERY = 256  # steps; looking costs as much as a tenth of a cheap step of one row
NEVER = 1 << 60  # the horizon, in steps, of a task without time limit


def known_ids() -> list[str]:
    """The environments with a native task, as `mujoco/NAME-v5` and `dmc/DOMAIN-TASK`."""
    return [*gymnasium_v5.TASKS, *dm_control.TASKS]


_RUNNER_SETTINGS = ["obs", "row_seeds", "dtype", "staggered_starts"]  # of `make`, beside those of the task
# What `envs.pixels` has beside the settings of the task.
PIXEL_SETTINGS = ("image_size", "frame_stack", "camera", "render_profile", "action_repeat")


def make(env_id: str, num_envs: int, seed: int, device: torch.device, threads: int, **task_args: Any) -> MujocoBatch:
    """Build N environments of one id. See `envs.make`.

    task_args: `row_seeds` (one integer a row, instead of those derived from `seed`), `dtype` (torch.float32, or
    torch.float64 for exact comparisons; of observations, rewards and returns), `staggered_starts` (True: the clock of
    row i's first episode begins i / N of the way, so that rows do not all end at once), and the fields of the task's
    class.
    `obs` is "state" here; "pixels" is `envs.pixels.make`. Raises ValueError for a setting that the task does not have.
    """
    obs = task_args.pop("obs", "state")
    if obs != "state":
        raise ValueError(f"obs must be 'state' or 'pixels', got {obs!r}")
    for name in sorted(task_args.keys() & set(PIXEL_SETTINGS)):
        raise ValueError(f"{env_id} has the setting '{name}' only with obs='pixels'")
    seeds = task_args.pop("row_seeds", None)
    dtype = task_args.pop("dtype", torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    seeds = row_seeds(seed, num_envs) if seeds is None else [int(s) for s in seeds]
    if len(seeds) != num_envs:
        raise ValueError(f"row_seeds needs {num_envs} integers, got {len(seeds)}")
    staggered = task_args.pop("staggered_starts", False)
    if not isinstance(staggered, bool):
        raise ValueError(f"staggered_starts must be True or False, got {staggered!r}")
    task = make_task(env_id, **task_args)
    if staggered and task.horizon is None:
        raise ValueError(f"{env_id} without a time limit has no staggered_starts")
    return MujocoBatch(env_id, task, seeds, torch.device(device), threads, dtype, staggered=staggered)


def make_task(env_id: str, **settings: Any) -> Task:
    """The task of an id with some of its fields replaced.

    Raises ValueError for a field it does not have or a value it cannot take.
    """
    kind, preset = _task_kind(env_id)
    names = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise ValueError(f"{env_id} has no setting '{unknown[0]}'; it has {', '.join(_RUNNER_SETTINGS + names)}")
    return kind(**{**preset, **settings})


def task_settings(env_id: str) -> list[str]:
    """The fields of an id's task."""
    return [field.name for field in dataclasses.fields(_task_kind(env_id)[0])]


def _task_kind(env_id: str) -> tuple[Any, dict[str, Any]]:
    """The class of an id's task, and the fields that make it this one."""
    return (gymnasium_v5.TASKS[env_id], {}) if env_id in gymnasium_v5.TASKS else dm_control.TASKS[env_id]


class MujocoBatch:
    """N environments of one task; fulfils `envs.runner.Runner`."""

    def __init__(
        self,
        env_id: str,
        task: Task,
        seeds: list[int],
        device: torch.device,
        threads: int,
        dtype: torch.dtype,
        persistent: bool = False,
        staggered: bool = False,
    ):
        model = task.model
        self.num_envs = num_envs = len(seeds)
        self.device = device
        self._on_host = device.type == "cpu"
        self._task, self._substeps = task, task.substeps
        threads = min(threads or available_cores(), num_envs)
        # Derived fields belong to one simulation only if it keeps its own MjData.
        self._simulations = Simulations(model, num_envs, threads, persistent or bool(task.fields))
        physics = {name: self._simulations.bind(name) for name in ("time", "qpos", "qvel", "ctrl", *task.fields)}
        physics |= {name: np.array(getattr(model, name)) for name in task.constants}
        self._expanded = {name: self._simulations.expand(name) for name in task.expanded}
        self._physics = SimpleNamespace(**physics, **self._expanded)
        self._ctrl = self._physics.ctrl
        self._pending: dict[int, dict[str, np.ndarray]] = {}  # model fields of a row from its next episode on
        self._generators = [task.generator(seed) for seed in seeds]
        task.build(self._physics, self._generators)
        self._progress: np.ndarray | None = None
        self._returns = np.zeros(num_envs)
        self._time = 0  # steps since this object was made or loaded
        self._started = np.zeros(num_envs, np.int64)  # `_time` at the start of each row's episode
        self._horizon = NEVER if task.horizon is None else task.horizon
        self._ends = np.full(num_envs, self._horizon)  # `_time` at which each row's clock runs out
        self._next_truncation = self._horizon
        # How much sooner it does in the first episodes.
        self._head_starts = np.arange(num_envs) * self._horizon // num_envs if staggered else None
        self._sent = False
        self._ready = False
        self.diverged_episodes = 0
        self._picture: Drawing | None = None
        # Called while the simulations still stand where episodes ended, with the rows and those that diverged.
        self.before_reset: Callable[[np.ndarray, np.ndarray | None], None] | None = None
        pieces = task.observe(np, self._physics)
        sizes = [piece.shape[1] for piece in pieces]
        self._observed = _columns_of(self._simulations.state, pieces)
        self._slots = tuple(_Slot(num_envs, sizes, device, dtype) for _ in range(2))
        self._slot = 0
        low, high = model.actuator_ctrlrange.astype(np.float32).T
        self.action_spec = ContinuousActionSpec(low, high)
        self._action_shape = (num_envs, low.size)
        self.observation_spec = ObservationSpec((sum(sizes),), dtype)
        settings = {**dataclasses.asdict(cast(Any, task)), "dtype": str(dtype).removeprefix("torch.")}
        settings |= {"staggered_starts": True} if staggered else {}
        versions = {name: version(name) for name in ("mujoco", task.package)}
        self.spec = RunnerSpec(env_id, "mujoco.batch", task.horizon, 1, settings, versions)

    def reset(self) -> Tensor:
        """Start a new episode in every row. Returns obs [N, O]."""
        self._check_open()
        self._sent = False
        self._begin(np.arange(self.num_envs, dtype=np.int32))
        if self._head_starts is not None:
            self._ends -= self._head_starts
            self._next_truncation = int(self._ends.min())
        slot = self._claim_slot()
        slot.reward[...] = 0.0
        self._observe(slot, self._task.progress(np, self._physics))
        self._ready = True
        return slot.publish(slot.plain).obs

    def step(self, action: Tensor) -> Step:
        """Take one action in every row; see `envs.runner.Runner.step`. float64 actions are used unrounded.

        Raises ValueError for actions of another shape, type or device, and, looking at every 256th step, out of bounds:
        actions that a policy forgot to scale are so again and again. A row whose simulation diverges is truncated with
        reward 0 and its last good observation, counted in `diverged_episodes` and begun anew.
        """
        if self._sent or not self._ready:
            raise RuntimeError("step: call recv first" if self._sent else "step: call reset first")
        self._set_action(action)
        return self._simulate()

    def send(self, action: Tensor) -> None:
        """Hand over actions [N, A]; `recv` simulates. Raises ValueError as `step`."""
        if self._sent or not self._ready:
            raise RuntimeError("send: call recv first" if self._sent else "send: call reset first")
        self._set_action(action)
        self._sent = True

    def recv(self) -> Step:
        """The outcome of the actions sent."""
        if not self._sent:
            raise RuntimeError("recv: call send first")
        self._sent = False
        return self._simulate()

    def _set_action(self, action: Tensor) -> None:
        try:
            # On the host `force` would cost a fifth more.
            values = action.numpy(force=True) if action.requires_grad or not self._on_host else action.numpy()
            fits = action.is_cpu == self._on_host and values.shape == self._action_shape and values.dtype.kind == "f"
        except (AttributeError, TypeError, NotImplementedError):  # no tensor, or one that NumPy does not take
            fits, values = False, self._ctrl
        if not fits:
            check_action(action, self.action_spec, self.num_envs, self.device)
            values = action.detach().double().numpy(force=True)
        if self._time % _BOUNDS_CHECKED_EVERY == 0:
            check_bounds(values, self.action_spec)
        self._ctrl[...] = values

    def _simulate(self) -> Step:
        task, physics, simulations = self._task, self._physics, self._simulations
        diverged = None
        try:
            simulations.step(self._substeps, task.stage)
        except SimulationDiverged as error:
            diverged = self._note_divergence(error)
        if task.contact_forces:
            simulations.apply("mj_rnePostConstraint")
            simulations.forward(stage=STAGE_NONE)
        progress = task.progress(np, physics)
        moved = None if progress is None else progress - self._progress
        reward, terminated = task.outcome(np, physics, moved)
        if diverged is not None:
            reward = np.array(reward, ndmin=1)
            reward[diverged] = 0.0
        slot = self._claim_slot()
        if self.num_envs == 1:  # numbers cost less than arrays of one number: 4 % of a HalfCheetah step
            number = reward if isinstance(reward, float) else reward.item()
            slot.reward[0] = number
            self._returns[0] += number
            any_terminated = bool(terminated)
        else:
            slot.reward[...] = reward
            self._returns += reward
            any_terminated = terminated is not None and np.count_nonzero(terminated) > 0
        self._observe(slot, progress)
        if diverged is not None:
            slot.obs[diverged] = self._slots[1 - self._slot].obs[diverged]
        self._time += 1
        if any_terminated or self._time >= self._next_truncation or diverged is not None:
            return self._end_episodes(slot, terminated, diverged)
        return slot.plain if slot.copied is None else slot.publish(slot.plain)

    def _note_divergence(self, error: SimulationDiverged) -> np.ndarray:
        rows = np.unique(error.rows)
        self.diverged_episodes += rows.size
        warnings.warn(f"{self.spec.env_id}: {error}; the episode is truncated", RuntimeWarning, stacklevel=4)
        return rows

    def _end_episodes(self, slot: _Slot, terminated: np.ndarray | None, diverged: np.ndarray | None) -> Step:
        lengths = self._time - self._started
        np.greater_equal(self._time, self._ends, out=slot.truncated)
        slot.terminated[...] = False if terminated is None else terminated
        if diverged is not None:
            slot.terminated[diverged], slot.truncated[diverged] = False, True
        np.logical_or(slot.terminated, slot.truncated, out=slot.episode_ended)
        np.multiply(self._returns, slot.episode_ended, out=slot.episode_return, casting="same_kind")
        np.multiply(lengths, slot.episode_ended, out=slot.episode_length)
        slot.final_obs[...] = slot.obs
        rows = slot.episode_ended.nonzero()[0].astype(np.int32)
        if self.before_reset is not None:
            self.before_reset(rows, diverged)
        self._begin(rows)
        self._observe(slot, self._task.progress(np, self._physics))
        return slot.publish(slot.ended)

    def change_model(self, factors: Mapping[str, float], rows: Sequence[int] | None = None, now: bool = False) -> None:
        """Multiply parts of the original model in `rows` (None: all), from their next episodes on, or `now`.

        factors: see `envs.model_changes.FACTORS`; those not named keep what an earlier call set. What follows is equal
        to a simulation of one row with that model. Raises ValueError for an unknown factor, value or row.
        """
        self._check_open()
        rows = range(self.num_envs) if rows is None else rows
        if outside := [row for row in rows if not 0 <= row < self.num_envs]:
            raise ValueError(f"row {outside[0]} does not exist; there are {self.num_envs}")
        fields = changed_fields(self._task.model, factors)
        for name in fields:
            if name not in self._expanded:
                self._expanded[name] = self._simulations.expand(name)
        for row in rows:
            self._pending.setdefault(row, {}).update(fields)
            if now:
                self._apply_pending(row)

    def _apply_pending(self, row: int) -> None:
        for name, values in self._pending.pop(row).items():
            self._expanded[name][row] = values

    def _begin(self, rows: np.ndarray) -> None:
        for row in self._pending.keys() & set(rows.tolist()) if self._pending else ():
            self._apply_pending(row)
        self._task.begin(self._simulations, self._physics, rows, self._generators)
        for row in rows.tolist():  # an index array takes ten times as long for one row
            self._returns[row] = 0.0
            self._started[row] = self._time
            self._ends[row] = self._time + self._horizon
        self._next_truncation = int(self._ends[self._ends.argmin()])  # min() takes five times as long for one row

    def _claim_slot(self) -> _Slot:
        """The buffers of two steps ago, which may be written again."""
        self._slot = 1 - self._slot
        slot = self._slots[self._slot]
        if slot.copied is not None:  # until the GPU has read the last contents
            slot.copied.synchronize()
        return slot

    def _observe(self, slot: _Slot, progress: np.ndarray | None) -> None:
        """Write the observation, remember what the next reward is measured from, refuse NaN and infinity."""
        if progress is not None:
            self._progress = progress.copy()
        if self._observed is not None:
            slot.obs[...] = self._observed
        else:  # `concatenate` casts and writes all pieces in one call
            np.concatenate(self._task.observe(np, self._physics), axis=1, out=slot.obs, casting="same_kind")
        # A sum of squares is finite only if every entry is, at a fifth of the cost of isfinite().all(). It may also
        # overflow, so the entries decide.
        if not math.isfinite(slot.checked.dot(slot.checked)):
            for name, values in (("observation", slot.obs), ("reward", slot.reward[:, None])):
                for row, column in np.argwhere(~np.isfinite(values)):
                    raise FloatingPointError(f"row {row}: {name} [{column}] is {values[row, column]}")

    def render(self, row: int = 0, height: int = 480, width: int = 480) -> np.ndarray:
        """A picture of one row, uint8 [height, width, 3]. Raises OpenGLMissing if no context can be made."""
        self._check_open()
        view = View(self._task.camera, height, width)
        if self._picture is None or self._picture.view != view:
            self._close_picture()
            self._picture = self.drawing(view, 1, up_to_date=True)
        picture = np.empty((height, width, 3), np.uint8)
        self._picture.draw([row], [picture.transpose(2, 0, 1)])
        return picture

    def drawing(self, view: View, threads: int, up_to_date: bool) -> Drawing:
        """What draws these simulations; see `Drawing`. The caller closes it before this runner."""
        return Drawing(self._simulations, view, threads, up_to_date)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, as tensors and plain values; not between `send` and `recv`."""
        self._check_open()
        if self._sent:
            raise RuntimeError("state_dict: call recv first")
        return {
            "env_id": self.spec.env_id,
            "simulation": torch.from_numpy(self._simulations.state.copy()),
            "model": {name: torch.from_numpy(values.copy()) for name, values in self._expanded.items()},
            "pending_model": {
                row: {name: torch.from_numpy(values.copy()) for name, values in fields.items()}
                for row, fields in self._pending.items()
            },
            "progress": None if self._progress is None else torch.from_numpy(self._progress.copy()),
            "episode_return": torch.from_numpy(self._returns.copy()),
            "episode_length": torch.from_numpy(self._time - self._started),
            "steps_left": torch.from_numpy(self._ends - self._time),
            "generators": [self._task.generator_state(generator) for generator in self._generators],
            "obs": torch.from_numpy(self._slots[self._slot].obs.copy()),
            "diverged_episodes": self.diverged_episodes,
            "ready": self._ready,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was called. Raises ValueError if the environments are not the same."""
        self._check_open()
        saved = (state["env_id"], len(state["generators"]))
        if saved != (self.spec.env_id, self.num_envs):
            raise ValueError(f"state of {saved[1]} x {saved[0]} given to {self.num_envs} x {self.spec.env_id}")
        # Clears what persistent simulations remember beside their state.
        self._simulations.reset()
        self._simulations.state[...] = state["simulation"].numpy()
        for name, saved_values in state["model"].items():
            if name not in self._expanded:
                self._expanded[name] = self._simulations.expand(name)
            self._expanded[name][...] = saved_values.numpy()
        self._pending = {
            row: {name: values.numpy() for name, values in fields.items()}
            for row, fields in state["pending_model"].items()
        }
        # The derived field that it came from lags the state, so it cannot be computed again.
        self._progress = None if state["progress"] is None else state["progress"].numpy().copy()
        self._returns[...] = state["episode_return"].numpy()
        self._time = 0
        self._started[...] = -state["episode_length"].numpy()
        self._ends[...] = state["steps_left"].numpy()
        self._next_truncation = int(self._ends.min())
        for generator, saved_generator in zip(self._generators, state["generators"], strict=True):
            self._task.set_generator_state(generator, saved_generator)
        self._slots[self._slot].obs[...] = state["obs"].numpy()
        self.diverged_episodes = state["diverged_episodes"]
        self._sent = False
        self._ready = state["ready"]

    def close(self) -> None:
        """Free the simulations and the drawing context. Returned tensors stay readable."""
        self._ready = False
        self._close_picture()
        self._simulations.close()

    def _check_open(self) -> None:
        if self._simulations.closed:
            raise RuntimeError(f"the runner of {self.spec.env_id} is closed")

    def _close_picture(self) -> None:
        if self._picture is not None:
            self._picture.close()
            self._picture = None


def _columns_of(state: np.ndarray, pieces: tuple[np.ndarray, ...]) -> np.ndarray | None:
    """The live view of `state` that is all pieces side by side; None if they do not lie there so."""
    start = column = (pieces[0].ctypes.data - state.ctypes.data) // state.itemsize
    for piece in pieces:
        if piece.strides != state.strides or piece.ctypes.data != state.ctypes.data + column * state.itemsize:
            return None
        column += piece.shape[1]
    return state[:, start:column]


class _Slot:
    """One of the two sets of output buffers: NumPy arrays to write, and Steps of tensors to hand out.

    On the CPU they share memory. For a GPU the arrays are pinned and `publish` copies them without waiting.
    """

    def __init__(self, num_envs: int, sizes: list[int], device: torch.device, dtype: torch.dtype):
        def buffer(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, pin_memory=device.type == "cuda")

        rows, size = (num_envs,), sum(sizes)
        numbers = buffer((num_envs * (size + 1),), dtype)
        host = {
            "obs": numbers[: num_envs * size].view(num_envs, size),
            "reward": numbers[num_envs * size :],
            "terminated": buffer(rows, torch.bool),
            "truncated": buffer(rows, torch.bool),
            "final_obs": buffer((num_envs, size), dtype),
            "episode_return": buffer(rows, dtype),
            "episode_length": buffer(rows, torch.int64),
            "episode_ended": buffer(rows, torch.bool),
        }
        self.checked = numbers.numpy()  # observations and rewards in one array, for one test of all
        self.obs, self.final_obs = host["obs"].numpy(), host["final_obs"].numpy()
        self.reward = host["reward"].numpy()
        self.terminated, self.truncated = host["terminated"].numpy(), host["truncated"].numpy()
        self.episode_return, self.episode_length = host["episode_return"].numpy(), host["episode_length"].numpy()
        self.episode_ended = host["episode_ended"].numpy()
        on_device = host if device.type == "cpu" else {k: v.to(device) for k, v in host.items()}
        nothing = {k: torch.zeros_like(v) for k, v in on_device.items()}
        self.ended = Step(**on_device)
        # Where no episode ended, which is nearly always, only two buffers change: the rest stays zero, and the last
        # observation of the step is the next one.
        self.plain = Step(
            **{**nothing, "obs": on_device["obs"], "reward": on_device["reward"], "final_obs": on_device["obs"]}
        )
        self.copied = torch.cuda.Event() if device.type == "cuda" else None
        self._plain_copies = [(on_device[name], host[name]) for name in ("obs", "reward")]
        self._ended_copies = [(on_device[name], host[name]) for name in host]

    def publish(self, step: Step) -> Step:
        if self.copied is not None:
            for target, source in self._plain_copies if step is self.plain else self._ended_copies:
                target.copy_(source, non_blocking=True)
            self.copied.record(torch.cuda.current_stream(step.obs.device))
        return step
