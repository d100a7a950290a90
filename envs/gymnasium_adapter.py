"""A runner as a `gymnasium.vector.VectorEnv`, for libraries that train on those.

Rows reset themselves in the step that ends their episode: Gymnasium's `AutoresetMode.SAME_STEP`. Its other modes would
need an ignored action, which a runner does not have. Everything handed out is a copy, so it may be kept.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.error import ClosedEnvironmentError
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from envs.registry import make
from envs.runner import DiscreteActionSpec, Runner


def as_gymnasium(runner: Runner, episode_statistics: bool = True) -> RunnerVectorEnv:
    """The runner as a Gymnasium vector environment, which then owns it: closing one closes the other.

    episode_statistics: put `infos["episode"]` as Gymnasium's RecordEpisodeStatistics does. Switch it off before putting
    that wrapper around the result, because it refuses infos that have them already.
    """
    return RunnerVectorEnv(runner, episode_statistics)


class RunnerVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N rows of a runner; NumPy in, NumPy out, on the host. Made by `as_gymnasium`.

    Infos are empty unless an episode ended. Then `final_obs` [N] holds the last observation of the rows that ended and
    None elsewhere, with the mask `_final_obs`; `episode` holds `r` (undiscounted return of raw rewards), `l` (actions)
    and `t` (seconds), each [N] and 0 where none ended, with the mask `_episode`; `final_info` holds `episode` again.
    What else Gymnasium's own environments report in their infos a runner does not know.
    """

    def __init__(self, runner: Runner, episode_statistics: bool) -> None:
        self.runner = runner
        self.num_envs = runner.num_envs
        self.single_observation_space = observation_space(runner)
        self.single_action_space = action_space(runner)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.render_mode = "rgb_array"
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["rgb_array"]}
        self._episode_statistics = episode_statistics
        self._began = np.zeros(self.num_envs)  # seconds

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new episode in every row. Returns observations [N, ...] and empty infos.

        seed: row i draws from now on as an environment with seed + i would, or with seed[i]. This builds the
        environments once more and takes as long as `envs.make`. Without a seed the generators continue; the first
        reset uses the seeds the runner was made with. Raises ValueError for options: they would be `reset_mask`, which
        rows that reset themselves do not need, or for the environments, which a runner does not reach.
        """
        self._check_open()
        if options:
            raise ValueError(f"a runner has no reset options, got {', '.join(map(repr, options))}")
        if seed is not None:
            seeds = each_row_seed(seed, self.num_envs)
            super().reset(seed=seeds[0])
            reseed(self.runner, seeds)
        obs = copy_to_host(self.runner.reset())
        self._began[:] = time.perf_counter()
        return obs, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one action in every row; the outcome, float64 rewards, and infos as the class describes them."""
        self._check_open()
        step = self.runner.step(action_tensor(actions, self.runner.device))
        terminated, truncated = copy_to_host(step.terminated), copy_to_host(step.truncated)
        infos: dict[str, Any] = {}
        done = terminated | truncated
        if done.any():
            last = copy_to_host(step.final_obs)
            final_obs = np.full(self.num_envs, None, dtype=object)
            for row in np.flatnonzero(done):
                final_obs[row] = last[row].copy()  # one row may be kept for long
            infos = {"final_obs": final_obs, "_final_obs": done, "final_info": {}, "_final_info": done.copy()}
            if self._episode_statistics:
                self._add_episodes(
                    infos, *map(copy_to_host, (step.episode_ended, step.episode_return, step.episode_length))
                )
        return copy_to_host(step.obs), copy_to_host(step.reward).astype(np.float64), terminated, truncated, infos

    def _add_episodes(self, infos: dict[str, Any], ended: np.ndarray, returns: np.ndarray, lengths: np.ndarray) -> None:
        now = time.perf_counter()
        seconds = np.where(ended, np.round(now - self._began, 6), 0.0)
        self._began[ended] = now
        if not ended.any():  # a lost life that is reported as an end
            return
        for target in (infos, infos["final_info"]):
            target["episode"] = {"r": returns.astype(np.float64), "l": lengths.copy(), "t": seconds.copy()}
            target["_episode"] = ended.copy()

    def render(self) -> tuple[np.ndarray, ...]:
        """A picture of each row, uint8 [height, width, 3]."""
        self._check_open()
        return tuple(self.runner.render(row) for row in range(self.num_envs))

    def close_extras(self, **_: Any) -> None:
        self.runner.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError(f"the environments of {self.runner.spec.env_id} are closed")


def observation_space(runner: Runner) -> Box:
    """The space of one row's observation, with the bounds of the environment's own space where the runner has them."""
    spec = runner.observation_spec
    if spec.dtype == torch.uint8:
        return Box(0, 255, spec.shape, np.uint8)
    dtype = np.dtype(str(spec.dtype).removeprefix("torch."))
    own = getattr(runner, "observation_space", None)
    if isinstance(own, Discrete):  # the runner hands it out one-hot
        return Box(0.0, 1.0, spec.shape, dtype.type)
    if isinstance(own, Box):
        with np.errstate(over="ignore"):  # float64's largest number as a bound becomes infinity
            low, high = (bound.reshape(spec.shape).astype(dtype) for bound in (own.low, own.high))
        return Box(low, high, dtype=dtype.type)
    return Box(-np.inf, np.inf, spec.shape, dtype.type)


def action_space(runner: Runner) -> Box | Discrete:
    """The space of one row's action."""
    spec = runner.action_spec
    if isinstance(spec, DiscreteActionSpec):
        return Discrete(spec.count)
    return Box(spec.low, spec.high, dtype=np.float32)


def action_tensor(actions: Any, device: torch.device) -> Tensor:
    """A copy of the actions as a runner on `device` takes them: whole numbers as int64, others as they are."""
    values = np.asarray(actions)
    return torch.tensor(values.astype(np.int64) if values.dtype.kind in "iu" else values, device=device)


def copy_to_host(values: Tensor) -> np.ndarray:
    """A NumPy copy: the runner writes its own memory again two steps later."""
    return np.array(values.numpy(force=True))


def each_row_seed(seed: int | Sequence[int], num_envs: int) -> list[int]:
    """Gymnasium's rule: row i gets seed + i, or the i-th of a sequence. ValueError unless there is one for each row."""
    if isinstance(seed, Sequence | np.ndarray):
        seeds = [operator.index(value) for value in seed]
    else:
        seeds = [operator.index(seed) + row for row in range(num_envs)]
    if len(seeds) != num_envs or min(seeds) < 0:
        raise ValueError(f"seed must be a non-negative integer or {num_envs} of them, got {seed}")
    return seeds


def reseed(runner: Runner, seeds: Sequence[int]) -> None:
    """Bring the runner to where one made with these seeds, one a row, begins; its next call must be `reset`.

    The state of new environments goes into the old ones, so that whoever holds the runner keeps it; what was changed in
    those, as by `MujocoBatch.change_model`, stays.
    Raises RuntimeError if `envs.make` does not make environments like these.
    """
    settings = dict(runner.spec.settings)
    if isinstance(settings.get("dtype"), str):
        settings["dtype"] = getattr(torch, settings["dtype"])
    try:
        fresh = make(runner.spec.env_id, runner.num_envs, device=runner.device, row_seeds=list(seeds), **settings)
    except ValueError as error:
        raise RuntimeError(
            f"cannot seed {runner.spec.env_id} anew, give the seeds to envs.make instead: {error}"
        ) from error
    try:
        if fresh.spec != runner.spec:
            raise RuntimeError(f"cannot seed {runner.spec.env_id} anew: envs.make builds it otherwise, as {fresh.spec}")
        own, state = runner.state_dict(), fresh.state_dict()
        kept = {name: own[name] for name in ("pending_model", "diverged_episodes") if name in own}
        if "model" in own:  # of which new environments have only the fields that tasks draw
            kept["model"] = {**own["model"], **state["model"]}
        runner.load_state_dict({**state, **kept})
    finally:
        fresh.close()
