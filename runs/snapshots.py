"""A run of an online agent as the source of datasets: its snapshots, what each can do, its replay."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import envs
from agents.agent import ActionScale
from agents.offline.transitions import Transitions
from envs.runner import ContinuousActionSpec, Runner
from runs import checkpoint
from runs.catalogue import config_to_json
from runs.config import RunConfig
from runs.datasets.collection import cut_to, expert_step, medium_step, ring_transitions, roll_out
from runs.datasets.dataset import joined
from runs.errors import UsageError
from runs.folders import describe_machine
from runs.play import load_agent
from runs.randomness import stream_seed
from runs.record import read_table

Policy = Callable[[Tensor], Tensor]  # obs [N, O] -> action [N, A] in the environment's units

_LICENCE = "generated here; no rights of others"
_REFERENCE_EPISODES = 100
_CPU = torch.device("cpu")
# Which use of a stream of random numbers draws what.
_USES = {"random": 0, "medium": 1, "expert": 2, "low": 3, "high": 4}


class RandomSource:
    """Uniform actions in an environment, for which nothing has to be trained. seed: of the rollouts."""

    def __init__(self, env: str, settings: Mapping[str, Any], seed: int, num_envs: int):
        self.env, self.settings, self.seed, self.num_envs = env, dict(settings), seed, num_envs

    @functools.cached_property
    def low(self) -> float:
        """Mean return of 100 episodes of random actions."""
        with contextlib.closing(self.runner("low", _REFERENCE_EPISODES)) as runner:
            return mean_return(runner, self.random_policy("low", runner))

    @property
    def pair(self) -> tuple[float, float] | None:
        """The lab's reference returns; there are none without an expert."""
        return None

    def collected(self, kind: str, wanted: int) -> Transitions:
        """At least so many transitions of whole episodes."""
        assert kind == "random", kind
        with contextlib.closing(self.runner(kind)) as runner:
            return roll_out(runner, self.random_policy(kind, runner), wanted)

    def described(self, kind: str) -> dict[str, Any]:
        """What a card says of where data of a kind come from."""
        told = {"environment": self.env, "environment_settings": self.settings, "actions": "uniform"}
        return {**told, "random_return": self.low, "made_by": describe_machine(), "licence": _LICENCE}

    def runner(self, use: str, count: int | None = None) -> Runner:
        """Environments for one use of them."""
        seed = stream_seed(self.seed, "evaluation_environment", _USES[use])
        return envs.make(self.env, count or self.num_envs, seed, _CPU, **self.settings)

    def draws_of(self, use: str) -> int:
        """The seed of what is drawn for actions."""
        return stream_seed(self.seed, "exploration", _USES[use])

    def random_policy(self, use: str, runner: Runner) -> Policy:
        """obs [N, O] -> uniform actions [N, A]."""
        spec, generator = runner.action_spec, torch.Generator().manual_seed(self.draws_of(use))
        assert isinstance(spec, ContinuousActionSpec)
        scale = ActionScale(spec, _CPU)
        return lambda obs: scale.to_environment(torch.rand(len(obs), spec.size, generator=generator) * 2 - 1)


class Source(RandomSource):
    """One seed of a run of `neoteny train`, for `collect`.

    Raises UsageError for a run whose checkpoints were not all kept, or that is not of one environment.
    """

    def __init__(self, folder: Path, seed: int, num_envs: int, deterministic: bool):
        try:
            self.config = RunConfig.load(folder)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not isinstance(self.config.env, str) or self.config.num_envs != 1:
            raise UsageError(f"'{folder}' must be of one environment (--num-envs 1) to be collected from")
        super().__init__(self.config.env, self.config.env_settings, seed, num_envs)
        self.folder, self.deterministic, self.run_seed = folder, deterministic, self.config.seeds[0]
        self.snapshots = {int(path.name.removeprefix("step_")): path for path in checkpoint.list_checkpoints(folder)}
        rows = [row for row in read_table(folder) if row.name == "eval/return" and row.seed == self.run_seed]
        found = [(row.step, float(row.value)) for row in rows if row.value is not None]
        self.evaluations = [(step, value) for step, value in found if step in self.snapshots]
        if len(self.evaluations) < 3:
            raise UsageError(
                f"'{folder}' has {len(self.evaluations)} snapshots with evaluations; train with --checkpoint-every and "
                "--keep-every as --eval-every"
            )

    @functools.cached_property
    def expert(self) -> int:
        """Step of the snapshot that is the expert."""
        return expert_step(self.evaluations)

    @functools.cached_property
    def medium(self) -> tuple[int, float]:
        """Step of the medium snapshot, and where it is between random and expert."""
        return medium_step(self.evaluations, self.low, self.high)

    @functools.cached_property
    def high(self) -> float:
        """Mean return of 100 episodes of the expert without noise."""
        with contextlib.closing(self.runner("high", _REFERENCE_EPISODES)) as runner:
            return mean_return(runner, self._policy("high", self.expert, runner, deterministic=True))

    @property
    def pair(self) -> tuple[float, float] | None:
        """Of random actions and of the expert; none of an expert that is no better."""
        return (self.low, self.high) if self.high > self.low else None

    def collected(self, kind: str, wanted: int) -> Transitions:
        """Any kind that is no mixture; of rollouts at least so many transitions."""
        if kind == "random":
            return super().collected(kind, wanted)
        if kind in ("medium-replay", "full-replay"):
            return self.replay(kind)
        if kind == "medium-expert":
            return joined([cut_to(self.collected(part, wanted), wanted) for part in ("medium", "expert")])
        step = self.medium[0] if kind == "medium" else self.expert
        with contextlib.closing(self.runner(kind)) as runner:
            return roll_out(runner, self._policy(kind, step, runner, self.deterministic), wanted)

    def replay(self, kind: str) -> Transitions:
        """What training had seen: until the medium snapshot for medium-replay, all of it for full-replay."""
        steps = self.medium[0] if kind == "medium-replay" else self.config.steps
        newest = checkpoint.list_checkpoints(self.folder)[-1]
        parts = checkpoint.read_seed(newest, self.run_seed)["agent"]["parts"]
        if "replay" not in parts:
            raise UsageError(f"'{self.config.agent}' keeps no replay that could be written down")
        rings = parts["replay"]["rings"]
        pieces = [piece for _, piece in rings.pieces()]
        tensors = {name: torch.cat([piece[name] for piece in pieces], 1) for name in pieces[0]}
        if int(tensors["is_transition"].sum()) < self.config.steps:
            raise UsageError(
                f"the replay of '{self.folder}' has forgotten its beginning: --replay-capacity was too small"
            )
        with contextlib.closing(self.runner("low")) as runner:
            assert isinstance(runner.action_spec, ContinuousActionSpec)
            return ring_transitions(tensors, int(rings.head), ActionScale(runner.action_spec, _CPU), steps)

    def described(self, kind: str) -> dict[str, Any]:
        """What a card says of where data of a kind come from."""
        agent = json.dumps(config_to_json(self.config.agent_config), sort_keys=True)
        snapshots: dict[str, Any] = {"expert": self.expert}
        if "medium" in kind:
            snapshots["medium"], snapshots["medium_between_random_and_expert"] = self.medium
        return {
            **super().described(kind),
            "expert_return": self.high,
            "agent": self.config.agent,
            "agent_config_sha256": hashlib.sha256(agent.encode()).hexdigest(),
            "training_steps": self.config.steps,
            "training_seed": self.run_seed,
            "snapshots": snapshots,
            "evaluations": [list(point) for point in self.evaluations],
            "actions": "without noise" if self.deterministic else self._noise(),
            "trained_by": self.config.environment,
        }

    def _noise(self) -> str:
        sigma = getattr(self.config.agent_config, "exploration_noise", None)
        return (
            "sampled from the policy" if sigma is None else f"with normal noise of {sigma:g} of half the action range"
        )

    def _policy(self, use: str, step: int, runner: Runner, deterministic: bool) -> Policy:
        """That of a snapshot."""
        config = dataclasses.replace(self.config, device="cpu")
        agent: Any = load_agent(config, self.snapshots[step], self.run_seed, runner, _CPU)
        agent.exploration.manual_seed([self.draws_of(use)])
        return lambda obs: agent.act(obs, explore=not deterministic)


def mean_return(runner: Runner, act: Policy) -> float:
    """Of the first episode of each environment."""
    obs, returns = runner.reset(), torch.zeros(runner.num_envs)
    running = torch.ones(runner.num_envs, dtype=torch.bool)
    while bool(running.any()):
        step = runner.step(act(obs))
        returns = torch.where(running & step.episode_ended, step.episode_return, returns)
        running &= ~step.episode_ended
        obs = step.obs
    return float(returns.mean())
