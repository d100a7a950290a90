"""Which ids exist, which backend runs them, and what is said about the others."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import pkgutil
import subprocess
import sys

import pytest
import torch

import envs
import envs.tasks
from envs import mujoco_warp, registry
from envs.tasks.classic_control.task import ClassicTask
from envs.tasks.dm_control.base import ControlTask
from envs.tasks.gymnasium_v5.task import GymnasiumTask


@pytest.mark.parametrize(
    ("env_id", "backend"),
    [
        ("mujoco/HalfCheetah-v5", "mujoco.batch"),
        ("dmc/walker-walk", "mujoco.batch"),
        ("dmc/fish-swim", "mujoco.batch"),
        ("dmc/quadruped-escape", "gymnasium"),
        ("mujoco/Reacher-v5", "mujoco.batch"),
        ("atari/Pong", "ale"),
        ("gym/CartPole-v1", "classic_control"),
        ("gym/CartPole-v0", "gymnasium"),  # the newest versions are native
        ("gym/HalfCheetah-v5", "gymnasium"),  # plain Gymnasium on request
        ("gym/counter_env:neoteny/Counter-v0", "gymnasium"),
    ],
)
def test_every_form_of_id_finds_its_backend(env_id, backend):
    registry.check_id(env_id)
    runner = envs.make(env_id, num_envs=2, seed=1, device="cpu")
    assert runner.spec.backend == backend
    assert runner.spec.env_id == env_id
    assert runner.num_envs == 2
    assert runner.device == torch.device("cpu")
    obs = runner.reset()
    assert obs.shape == (2, *runner.observation_spec.shape)
    assert obs.device == torch.device("cpu")
    runner.close()


@pytest.mark.parametrize(
    ("env_id", "nearest"),
    [
        ("atari/Pongg", "atari/Pong"),
        ("Pong", "atari/Pong"),
        ("atari/ms_pacman", "atari/MsPacman"),
        ("gym/Cartpole-v1", "gym/CartPole-v1"),
        ("CartPole-v1", "gym/CartPole-v1"),
        ("mujoco/halfcheetah-v5", "mujoco/HalfCheetah-v5"),
        ("mujoco/HalfCheetah-v9", "mujoco/HalfCheetah-v5"),
        ("dmc/walker_walk", "dmc/walker-walk"),
        ("dm_control/cheetah-run", "dmc/cheetah-run"),
    ],
)
def test_a_mistyped_id_names_the_nearest_first(env_id, nearest):
    with pytest.raises(envs.EnvironmentNotFound) as caught:
        envs.make(env_id)
    message = str(caught.value)
    assert message.startswith(f"unknown environment '{env_id}'. Did you mean '{nearest}'"), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "env_id", ["", "/", "qqqqqqqqqqqqqqqq", "gym/:X-v0", "gym/no.such.module:X-v0", "atari/Combat"]
)
def test_what_is_not_there_is_unknown(env_id):
    with pytest.raises(envs.EnvironmentNotFound, match="unknown environment"):
        envs.make(env_id)


def test_a_module_without_the_environment_is_named():
    with pytest.raises(envs.EnvironmentNotFound, match="'counter_env' registers no environment 'Nothing-v0'"):
        envs.make("gym/counter_env:Nothing-v0")


def test_unlike_anything_points_to_the_list():
    with pytest.raises(envs.EnvironmentNotFound, match="`neoteny list envs` shows all"):
        registry.check_id("qqqqqqqqqqqqqqqq")


@pytest.mark.parametrize("num_envs", [0, -1])
def test_fewer_than_one_environment_is_refused(num_envs):
    with pytest.raises(ValueError, match=f"num_envs must be at least 1, got {num_envs}"):
        envs.make("gym/CartPole-v1", num_envs)


@pytest.mark.parametrize("env_id", ["gym/CartPole-v1", "atari/Pong", "dmc/fish-swim", "mujoco/HalfCheetah-v5"])
def test_an_unknown_setting_is_refused_alike_by_every_backend(env_id):
    with pytest.raises(ValueError, match=f"{env_id} has no setting 'no_such_setting'; it .*row_seeds"):
        envs.make(env_id, no_such_setting=1)


def test_mujoco_warp_must_be_asked_for_by_its_name_and_be_installed(monkeypatch):
    with pytest.raises(ValueError, match="backend must be 'mujoco-warp' or left away, got 'warp'"):
        envs.make("mujoco/Hopper-v5", backend="warp")
    with pytest.raises(envs.EnvironmentNotFound, match="Did you mean"):
        envs.make("mujoco/Hoper-v5", backend="mujoco-warp")
    with pytest.raises(ValueError, match="runs the native MuJoCo and dm_control tasks, not atari/Pong"):
        envs.make("atari/Pong", backend="mujoco-warp")
    monkeypatch.setitem(sys.modules, "warp", None)
    with pytest.raises(
        envs.EnvironmentNotFound, match=r"needs mujoco-warp and warp-lang .* pip install 'neoteny\[gpu\]'"
    ):
        envs.make("mujoco/Hopper-v5", backend="mujoco-warp")


def test_known_ids_are_sorted_unique_and_accepted():
    ids = envs.known_ids()
    assert ids == sorted(set(ids))
    for env_id in ids:
        registry.check_id(env_id)
    assert {"mujoco/HalfCheetah-v5", "dmc/walker-walk", "dmc/dog-run", "atari/Pong", "gym/CartPole-v1"} <= set(ids)


def test_listing_loads_no_simulator():
    code = """
import json, sys, time
import envs
start = time.perf_counter()
count = len(envs.known_ids())
heavy = [name for name in ("cv2", "dm_control", "matplotlib", "mujoco", "pygame") if name in sys.modules]
print(json.dumps([count, heavy, time.perf_counter() - start]))
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    count, heavy, seconds = json.loads(output)
    assert count > 150
    assert heavy == []
    assert seconds < 2.0  # 0.1 on a quiet machine


def test_what_mujoco_warp_does_not_have_is_one_sentence(monkeypatch):
    """Whether its packages are installed or not; the command line shows a ValueError as it is."""

    def lacking(*_):
        raise NotImplementedError("it has no such contacts")

    monkeypatch.setattr(mujoco_warp, "import_warp", lambda: None)
    monkeypatch.setattr(mujoco_warp, "WarpSimulations", lacking)
    with pytest.raises(ValueError, match="mujoco/Hopper-v5 cannot run on MuJoCo Warp: it has no such contacts"):
        mujoco_warp.make("mujoco/Hopper-v5", 1, 0, torch.device("cpu"), 1)


def test_every_task_defines_what_its_kind_leaves_open():
    """The bodies that raise NotImplementedError are contracts; no task is left with one that is called."""
    for module in pkgutil.walk_packages(envs.tasks.__path__, "envs.tasks."):
        importlib.import_module(module.name)

    def kinds(cls: type) -> list[type]:
        return [kind for below in cls.__subclasses__() for kind in kinds(below)] or [cls]

    contracts = {GymnasiumTask: 11, ClassicTask: 5, ControlTask: 24}
    for contract, count in contracts.items():
        tasks = [task for task in kinds(contract) if task.__module__.startswith("envs.tasks.")]
        assert len(tasks) >= count
        for task, moment in itertools.product(tasks, ("start", "advance", "observe", "outcome")):
            own = getattr(task, moment, None)
            assert own is None or "raise NotImplementedError" not in inspect.getsource(own), (task, moment)
