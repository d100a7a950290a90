"""The tensor part of a GPU step, without a GPU and without Warp: on fake CUDA tensors, and by numbers on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from envs.device_episodes import STATE_FIELDS, Episodes
from envs.mujoco_batch import known_ids, make_task
from envs.mujoco_simulation import engine
from envs.row_random import RowRandom, row_keys
from envs.tasks.task import Task
from envs.warp_simulation import count_rows

ROWS = 5


class NoWordToTheHost(TorchDispatchMode):
    """Refuses what would wait for a CUDA device or copy to it from the host."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        result = function(*args, **(kwargs or {}))
        # A number becomes a CPU tensor without dimensions, which a kernel takes as an argument.
        for tensor in tensors_in((args, kwargs, result)):
            assert tensor.device.type == "cuda" or tensor.dim() == 0, f"{name} uses a tensor on the {tensor.device}"
        if name in ("index", "index_put", "index_put_"):
            assert all(index.dtype != torch.bool for index in tensors_in(args[1])), f"{name} with a mask"
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def episodes_of(task: Task, device: torch.device, dtype: torch.dtype, physics: dict[str, np.ndarray]) -> Episodes:
    """Around arrays [N, ...] in place of a simulator; where the task names fields without one they are zero."""
    model = task.model
    data = engine().MjData(model)
    names = {*STATE_FIELDS, *task.fields}
    arrays = {name: np.zeros((ROWS, *np.shape(getattr(data, name)))) for name in names} | physics
    arrays |= {name: np.stack([getattr(model, name)] * ROWS) for name in task.expanded}

    def tensor(values: Any) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=dtype, device=device)

    fields = {name: tensor(values) for name, values in arrays.items()}
    state = {name: fields[name] for name in (*sorted(STATE_FIELDS), *task.expanded)}
    constants = {name: tensor(getattr(model, name)) for name in task.constants}
    own = {name: tensor(getattr(model, name)) for name in task.expanded}
    defaults = SimpleNamespace(qpos=tensor(model.qpos0), **own)
    low, high = (tensor(bound) for bound in model.actuator_ctrlrange.T)
    random = RowRandom(row_keys(range(ROWS), device), dtype)
    horizon = task.horizon or 10**9
    return Episodes(task, SimpleNamespace(**fields, **constants), state, (low, high), defaults, random, horizon)


def a_preparation(episodes: Episodes) -> None:
    task = episodes.task
    episodes.set_aside()
    episodes.draw()
    if task.finishes:
        episodes.finish()
    if task.contact_free:
        episodes.draw_again()
    if task.lifted:
        episodes.begin_lift()
        episodes.judge_lift()
        episodes.after_lift()
    episodes.restart_clock()
    episodes.collect()


# One id of each class, and where a setting decides what is computed one of each.
TRACED = [
    *{type(make_task(env_id)): env_id for env_id in reversed(known_ids())}.values(),
    *("dmc/cartpole-swingup_sparse", "dmc/walker-run", "dmc/humanoid-run_pure_state", "dmc/manipulator-insert_peg"),
]


@pytest.mark.parametrize("env_id", TRACED)
def test_the_tensors_of_a_step_say_no_word_to_the_host(env_id):
    cuda = torch.device("cuda")
    with FakeTensorMode():
        episodes = episodes_of(make_task(env_id), cuda, torch.float32, {})
        step = episodes.make_step()
        action = torch.zeros(ROWS, episodes.task.model.nu, device=cuda)
        episodes.construct()
        a_preparation(episodes)  # the first draws bring their bounds to the device
        with NoWordToTheHost():
            a_preparation(episodes)
            contacts, real = torch.zeros(7, dtype=torch.int32, device=cuda), torch.ones(7, device=cuda) > 0
            count_rows(contacts, real, torch.zeros(ROWS, dtype=torch.int32, device=cuda))
            episodes.begin_all()
            episodes.take(action)
            episodes.conclude(step)
    kept = episodes.kept()
    assert {tensor.device.type for tensor in kept.values()} == {"cuda"}
    assert kept["obs"].shape == (ROWS, step.obs.shape[1])


# --- the same numbers as over NumPy


class Draws:
    """`envs.tasks.task.Random` for all rows; two with one seed draw the same, as arrays or as tensors."""

    def __init__(self, xp: Any):
        self.generator, self.xp = np.random.default_rng(0), xp

    def _given(self, values: np.ndarray) -> Any:
        return values if self.xp is np else torch.from_numpy(values)

    def uniform(self, low: Any, high: Any, size: int) -> Any:
        return self._given(self.generator.uniform(low, high, (ROWS, size)))

    def standard_normal(self, size: int) -> Any:
        return self._given(self.generator.standard_normal((ROWS, size)))

    def randint(self, high: int, size: int) -> Any:
        return self._given(self.generator.integers(high, size=(ROWS, size)))


def moving_rows(task: Task) -> dict[str, np.ndarray]:
    """What a task reads, of rows that were moved at random for a while, with all forces up to date."""
    mujoco, model, random = engine(), task.model, np.random.default_rng(1)
    low, high = model.actuator_ctrlrange.T
    rows = []
    for _ in range(ROWS):
        data = mujoco.MjData(model)
        data.qvel[:] = random.normal(0.0, 0.3, model.nv)
        for _ in range(20):
            data.ctrl[:] = random.uniform(low, high)
            mujoco.mj_step(model, data)
        mujoco.mj_forward(model, data)
        mujoco.mj_rnePostConstraint(model, data)
        rows.append(data)
    names = ("qpos", "qvel", "ctrl", *task.fields)
    found = {name: np.stack([np.array(getattr(data, name)) for data in rows]) for name in names}
    found |= {name: np.stack([np.array(getattr(model, name))] * ROWS) for name in task.expanded}
    return found | {name: np.array(getattr(model, name)) for name in task.constants}


def both(arrays: dict[str, Any]) -> tuple[SimpleNamespace, SimpleNamespace]:
    return SimpleNamespace(**arrays), SimpleNamespace(**{name: torch.tensor(x) for name, x in arrays.items()})


def assert_close(array: Any, tensor: Any, name: str = "") -> None:
    assert isinstance(tensor, Tensor), name
    np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.fixture
def wide() -> Iterator[None]:
    """Two numbers to choose from become a tensor of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("env_id", known_ids())
def test_every_task_gives_over_torch_what_it_gives_over_numpy(env_id):
    task = make_task(env_id)
    array, tensor = both(moving_rows(task))
    for a, b in zip(task.observe(np, array), task.observe(torch, tensor), strict=True):
        assert_close(a, b, "observation")
    progress = task.progress(np, array)
    moved = None if progress is None else np.linspace(-0.1, 0.2, ROWS)
    if progress is not None:
        assert_close(progress, task.progress(torch, tensor), "progress")
    outcome = task.outcome(np, array, moved)
    over_torch = task.outcome(torch, tensor, None if moved is None else torch.from_numpy(moved))
    assert_close(outcome[0], over_torch[0], "reward")
    assert (outcome[1] is None) == (over_torch[1] is None)
    if outcome[1] is not None:
        np.testing.assert_array_equal(over_torch[1].numpy(), outcome[1])


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("env_id", known_ids())
def test_every_task_starts_over_torch_as_over_numpy(env_id):
    task = make_task(env_id)
    defaults = both({"qpos": task.model.qpos0, **{name: getattr(task.model, name) for name in task.expanded}})
    moving = both(moving_rows(task))
    staged: Any = task
    drawn = []
    for xp, default, physics in zip((np, torch), defaults, moving, strict=True):
        random, current = Draws(xp), SimpleNamespace(qpos=physics.qpos, qvel=physics.qvel)
        parts = [task.construction(xp, random, default), task.start(xp, random, default)]
        if task.finishes:
            parts.append(staged.finish(xp, physics))
        if task.contact_free:
            parts.append(staged.restart(xp, random, default, current))
        if task.lifted:
            parts.append(staged.after_lift(xp, random, current))
        drawn.append(parts)
    assert drawn[0][1]
    for over_numpy, over_torch in zip(*drawn, strict=True):
        assert set(over_numpy) == set(over_torch)
        for name, values in over_numpy.items():
            assert_close(values, over_torch[name], name)
