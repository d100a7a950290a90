"""Every other Gymnasium environment: plain environments stepped one after another in this process.

Not a Gymnasium vector environment: at one environment, where this backend is used most, its bookkeeping costs more than
a step of CartPole.

A row is seeded once, at its first episode; later episodes continue the environment's own generator, as `env.reset()`
does. An exact resume restores the generator as it was when the episode began, and takes the episode's actions again.
That covers what draws from `np_random` alone and keeps nothing else from one episode to the next; a checksum tells.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import zlib
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec, load_env_creator, register, registry
from torch import Tensor

from envs.dm_control_env import SUITE, DmControlEnv
from envs.graphics import load_compiler_first
from envs.gymnasium_spaces import actions, observations
from envs.host_step import MemoryRing, StepMemory, check_task_args, raise_not_finite, resized, take_row_seeds
from envs.registry import EnvironmentNotFound
from envs.runner import RunnerSpec, Step

# Of what is registered: Atari has its own backend, phys2d and tabular need JAX, Blackjack observes a tuple.
_LEFT_OUT = ("ale_py", "gymnasium.envs.phys2d", "gymnasium.envs.tabular", "gymnasium.envs.toy_text.blackjack")
_DMC_UNBOUNDED = ("lqr",)

register("GridWorld-v0", entry_point="envs.grid_world:GridWorld", max_episode_steps=200)


@functools.cache
def _dm_control_ids() -> frozenset[str]:
    return frozenset(f"dmc/{domain}-{task}" for domain, tasks in SUITE.items() for task in tasks)


def known_ids() -> list[str]:
    """`gym/ID` in its newest version, `mujoco/NAME-v5`, `dmc/DOMAIN-TASK`: what can be built with the packages here."""
    known = {name for name in _dm_control_ids() if not name.startswith(tuple(f"dmc/{d}-" for d in _DMC_UNBOUNDED))}
    newest: dict[tuple[str | None, str], EnvSpec] = {}
    for spec in registry.values():
        module = _module(spec)
        # What `gymnasium.envs` itself registers only says that an environment has moved elsewhere.
        if module == "gymnasium.envs" or module.startswith(_LEFT_OUT):
            continue
        if module.startswith("gymnasium.envs.box2d") and find_spec("Box2D") is None:
            continue
        key = (spec.namespace, spec.name)
        if key not in newest or (spec.version or 0) > (newest[key].version or 0):
            newest[key] = spec
    for spec in newest.values():
        room = "mujoco" if _module(spec).startswith("gymnasium.envs.mujoco") else "gym"
        known.add(f"{room}/{spec.id}")
    return sorted(known)


def _module(spec: EnvSpec) -> str:
    entry = spec.entry_point
    return entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", "")


def accepts(env_id: str) -> bool:
    """Whether `make` knows this id: also older versions, and those whose package is missing.

    `gym/module:ID` names an environment that importing `module` registers.
    """
    room, _, name = env_id.partition("/")
    if room == "gym" and ":" in name:
        return _is_importable(name.partition(":")[0])
    return env_id in _dm_control_ids() or (room == "gym" and name in registry) or env_id in known_ids()


def _is_importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package is missing, or the name is none
        return False


def make(
    env_id: str, num_envs: int, seed: int, device: torch.device | str, threads: int = 0, **task_args: Any
) -> GymnasiumRunner:
    """Build N environments. `threads` has no meaning here.

    task_args: `row_seeds`, `max_episode_steps`, and whatever keyword the environment's own constructor takes.
    Raises EnvironmentNotFound if the environment's package is not installed, ValueError for an unknown setting or for
    spaces other than Box and Discrete.
    """
    seeds, settings = take_row_seeds(task_args, seed, num_envs)
    build = _build_dm_control if env_id.startswith("dmc/") else _build_registered
    envs = [build(env_id, row_seed, settings) for row_seed in seeds]
    return GymnasiumRunner(env_id, envs, seeds, torch.device(device), settings)


def _build_dm_control(env_id: str, seed: int, settings: dict[str, Any]) -> gymnasium.Env:
    check_task_args(env_id, settings, ("row_seeds", "max_episode_steps"))
    domain, _, task = env_id.removeprefix("dmc/").partition("-")
    env = DmControlEnv(domain, task, seed)
    limit = settings.get("max_episode_steps")
    return env if limit is None else gymnasium.wrappers.TimeLimit(env, limit)


def _build_registered(env_id: str, _seed: int, settings: dict[str, Any]) -> gymnasium.Env:
    module, _, name = env_id.partition("/")[2].rpartition(":")
    try:
        if module:
            import_module(module)
        spec = gymnasium.spec(name)
        creator = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
        accepted = _keywords(creator)
        if accepted is not None:
            check_task_args(env_id, settings, {"row_seeds", "max_episode_steps", *accepted})
        modes = getattr(creator, "metadata", {}).get("render_modes", ())
        picture = {"render_mode": "rgb_array"} if "rgb_array" in modes else {}
        return gymnasium.make(name, disable_env_checker=True, **picture, **settings)
    except gymnasium.error.UnregisteredEnv as error:
        raise EnvironmentNotFound(f"'{module}' registers no environment '{name}'") from error
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        missing = getattr(error, "name", None)
        advice = f"pip install {missing}" if missing else str(error)
        raise EnvironmentNotFound(f"'{env_id}' is known, but a package it needs is not installed: {advice}") from error


def _keywords(creator: Any) -> set[str] | None:
    """The keywords that make an environment; None if it takes any, for something other than its base classes."""
    constructors = [base.__init__ for base in creator.__mro__[:-1]] if inspect.isclass(creator) else [creator]
    accepted: set[str] = set()
    for constructor in constructors:
        parameters = inspect.signature(constructor).parameters.values()
        accepted |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            return accepted - {"self", "render_mode", "args"}
    return None


class GymnasiumRunner:
    """N plain Gymnasium environments of one kind. The contract is `envs.runner.Runner`."""

    def __init__(
        self,
        env_id: str,
        envs: list[gymnasium.Env],
        row_seeds: list[int],
        device: torch.device,
        settings: dict[str, Any],
    ) -> None:
        self.num_envs = len(envs)
        self.device = device
        self._envs = envs
        self._rows = [_Row(env, seed) for env, seed in zip(envs, row_seeds, strict=True)]
        self.observation_space = envs[0].observation_space  # its bounds, which the spec does not have
        self.observation_spec, self._encode = observations(env_id, self.observation_space)
        self.action_spec, self._decode = actions(env_id, envs[0].action_space, self.num_envs, device)
        self.spec = RunnerSpec(
            env_id=env_id,
            backend="gymnasium",
            horizon=_horizon(envs[0]),
            action_repeat=1,
            settings=settings,
            versions=_versions(envs[0]),
        )
        self._memory = MemoryRing(self.observation_spec, self.num_envs, device)
        self._written: StepMemory | None = None
        self._sent: list[Any] | None = None
        self.diverged_episodes = 0

    def reset(self) -> Tensor:
        """Start a new episode in every row: its first one with the row's seed, a later one without. Returns obs."""
        self._finish_sent()
        memory = self._memory.next()
        for index, row in enumerate(self._rows):
            memory.obs[index] = self._encode(row.start_episode())
        self._written = memory
        self._check_finite(memory, 0.0)
        return memory.upload_obs()

    def step(self, action: Tensor) -> Step:
        """Take one action in every row. action: [N] int64, or [N, A] float32 in the units of `action_spec`."""
        self.send(action)
        return self.recv()

    def send(self, action: Tensor) -> None:
        """Keep a copy of the actions; the environments move in `recv`. Raises ValueError for a wrong shape or type."""
        if self._written is None or self._sent is not None:
            raise RuntimeError("send needs a reset before it, and a recv between two of them")
        self._sent = self._decode(action)

    def recv(self) -> Step:
        """Step every row with the actions sent last; start the next episode where one ended."""
        if self._sent is None:
            raise RuntimeError("recv needs a send before it")
        sent, self._sent = self._sent, None
        memory = self._written = self._memory.next()
        memory.nothing_ended()
        reward_sum, ended = 0.0, []
        for index, (row, action) in enumerate(zip(self._rows, sent, strict=True)):
            obs, reward, terminated, truncated = row.step(action)
            memory.obs[index] = self._encode(obs)
            memory.reward[index] = reward
            reward_sum += reward
            if terminated or truncated:
                ended.append(index)
                memory.terminated[index], memory.truncated[index] = terminated, truncated
                memory.episode_return[index], memory.episode_length[index] = row.return_, len(row.actions)
                memory.episode_ended[index] = True
        self._check_finite(memory, reward_sum)
        if ended:
            memory.final_obs[...] = memory.obs
            for index in ended:
                memory.obs[index] = self._encode(self._rows[index].start_episode())
            self._check_finite(memory, 0.0)
        return memory.publish(bool(ended))

    def _check_finite(self, memory: StepMemory, reward_sum: float) -> None:
        obs = memory.flat_obs
        # A sum of squares is not finite if any element is not; the slower search also clears those merely too large.
        if not math.isfinite(reward_sum) or (obs.dtype != np.uint8 and not math.isfinite(np.vdot(obs, obs))):
            raise_not_finite(self.spec.env_id, memory.obs, memory.reward)

    def render(self, row: int = 0, height: int = 480, width: int = 480) -> np.ndarray:
        """The environment's own picture, uint8 [height, width, 3], resized if its size is fixed.

        Raises RuntimeError if the environment draws none, DependencyNotInstalled if the package that draws is missing.
        """
        env = self._envs[row]
        if isinstance(env.unwrapped, DmControlEnv):
            env.unwrapped.render_size = (height, width)
        load_compiler_first()
        picture = env.render()
        if not isinstance(picture, np.ndarray):
            raise RuntimeError(f"{self.spec.env_id} draws no picture")
        return resized(picture, height, width)

    def state_dict(self) -> dict[str, Any]:
        """Per row its seed, its generator when the episode began, and the episode's actions."""
        if self._sent is not None:
            raise RuntimeError("state_dict needs a recv after the last send")
        return {
            "env_id": self.spec.env_id,
            "settings": dict(self.spec.settings),
            "row_seeds": [row.seed for row in self._rows],
            # JSON, because the 128-bit integers and the arrays of generator states are no tensors.
            "generators": [json.dumps(row.generator_at_start, default=np.ndarray.tolist) for row in self._rows],
            "actions": [torch.tensor(np.array(row.actions)) for row in self._rows],
            "obs_checksum": None if self._written is None else zlib.crc32(self._written.obs.tobytes()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start each row's episode as it was started, and take its actions again; what follows is bit-equal.

        Raises ValueError if the state is of other environments, or if they do not come to the same observation again
        because they draw from something other than `np_random` or have changed.
        """
        for name, value in (("env_id", self.spec.env_id), ("settings", self.spec.settings)):
            if state[name] != value:
                raise ValueError(f"the saved environments have {name} {state[name]}, these have {value}")
        if len(state["row_seeds"]) != self.num_envs:
            raise ValueError(f"the saved state has {len(state['row_seeds'])} rows, not {self.num_envs}")
        self._sent = self._written = None
        saved = zip(self._rows, state["row_seeds"], state["generators"], state["actions"], strict=True)
        if state["obs_checksum"] is None:
            self._rows = [_Row(row.env, seed) for row, seed, _, _ in saved]
            return
        memory = self._written = self._memory.next()
        for index, (row, seed, generator, taken) in enumerate(saved):
            memory.obs[index] = self._encode(row.replay(seed, json.loads(generator), taken.numpy()))
        if zlib.crc32(memory.obs.tobytes()) != state["obs_checksum"]:
            raise ValueError(
                f"{self.spec.env_id} comes to another observation than the saved one: it draws from something other "
                "than np_random, keeps something from one episode to the next, or has changed"
            )

    def _finish_sent(self) -> None:
        if self._sent is not None:
            self.recv()

    def close(self) -> None:
        for env in self._envs:
            env.close()


class _Row:
    """One environment and what its current episode has been: actions taken, undiscounted return."""

    def __init__(self, env: gymnasium.Env, seed: int) -> None:
        self.env = env
        self.seed = seed
        self.actions: list[Any] = []
        self.return_ = 0.0
        self.generator_at_start: dict[str, Any] | None = None  # None: the episode was started with the seed
        self._base = env.unwrapped
        self._started = False

    def start_episode(self) -> Any:
        """The first observation of the next episode."""
        self.actions.clear()
        self.return_ = 0.0
        if self._started:
            self.generator_at_start = _generator_state(self._base)
            return self.env.reset()[0]
        self._started = True
        self.generator_at_start = None
        return self.env.reset(seed=self.seed)[0]

    def step(self, action: Any) -> tuple[Any, float, bool, bool]:
        obs, reward, terminated, truncated, _ = self.env.step(action)
        reward = float(reward)
        self.actions.append(action)
        self.return_ += reward
        return obs, reward, bool(terminated), bool(truncated)

    def replay(self, seed: int, generator: dict[str, Any] | None, actions: np.ndarray) -> Any:
        """The observation to which the saved episode leads."""
        self.seed = seed
        self._started = False
        obs = self.start_episode()
        if generator is not None:
            _set_generator_state(self._base, generator)
            obs = self.start_episode()
        for action in actions.tolist() if actions.ndim == 1 else actions:
            obs, *_ = self.step(action)
        return obs


def _generator_state(base: gymnasium.Env) -> dict[str, Any]:
    # RandomState keeps a spare normal draw beside its bit generator, so the bit generator alone is not enough.
    if isinstance(base, DmControlEnv):
        return dict(base.random.get_state(legacy=False))
    return dict(base.np_random.bit_generator.state)


def _set_generator_state(base: gymnasium.Env, state: dict[str, Any]) -> None:
    if isinstance(base, DmControlEnv):
        base.random.set_state(state)
    else:
        base.np_random.bit_generator.state = state


def _horizon(env: gymnasium.Env) -> int | None:
    own = env.unwrapped.horizon if isinstance(env.unwrapped, DmControlEnv) else None
    limits = [own, env.get_wrapper_attr("_max_episode_steps") if env.has_wrapper_attr("_max_episode_steps") else None]
    return min((limit for limit in limits if limit is not None), default=None)


# Reads the metadata of every installed package, and each evaluation makes its environments anew.
_distributions = functools.cache(packages_distributions)


def _versions(env: gymnasium.Env) -> dict[str, str]:
    """Versions of gymnasium and of the package in which the environment's class is, if that is another one."""
    packages = {"gymnasium"}
    module = type(env.unwrapped).__module__
    if isinstance(env.unwrapped, DmControlEnv):
        packages |= {"dm-control", "mujoco"}
    elif module.startswith("gymnasium.envs.mujoco"):
        packages.add("mujoco")
    elif module.startswith("gymnasium.envs.box2d"):
        packages.add("box2d")
    else:
        packages.update(_distributions().get(module.partition(".")[0], ()))
    return {name: version(name) for name in sorted(packages)}
