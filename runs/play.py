"""Let the newest checkpoint of a run play: `neoteny evaluate` and `neoteny watch`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import envs
from agents.agent import Agent
from envs import Runner
from envs.graphics import OpenGLMissing
from runs import checkpoint, compute
from runs.checkpoint import Damaged
from runs.config import RunConfig
from runs.errors import UsageError
from runs.evaluation import evaluate, evaluation_environments
from runs.fixed_data import score_rows
from runs.randomness import spawn_streams
from runs.record import Row
from runs.settings import made_by
from runs.statistics import summarise_rows
from runs.tasks import Tasks
from runs.training import MISFITS, build_agent, one_line
from runs.video import show_in_tensorboard, write_mp4


def open_run(folder: Path) -> tuple[RunConfig, Path]:
    """A run's config and its newest checkpoint in which every agent is whole; damaged ones are named on stderr.

    Raises UsageError if it is not a run of `neoteny train` or has no such checkpoint.
    """
    try:
        config, damaged = RunConfig.load(folder), []
        for candidate in [checkpoint.newest(folder), *checkpoint.list_checkpoints(folder)[-2::-1]]:
            try:
                for seed in playable_seeds(config, candidate):
                    checkpoint.read_seed(candidate, seed)
            except Damaged as error:
                damaged.append(error)
                continue
            for error in damaged:
                print(f"neoteny: {error}; {candidate.name} is used instead", file=sys.stderr)
            return config, candidate
    except ValueError as error:
        raise UsageError(str(error)) from error
    raise UsageError(f"no checkpoint of '{folder}' is whole: {damaged[0]}")


def playable_seeds(config: RunConfig, saved: Path) -> list[int]:
    """The seeds of a run but those whose numbers were no longer finite before the first checkpoint."""
    without_state = checkpoint.read_manifest(saved).get("seeds_without_state", [])
    return [seed for seed in config.seeds if seed not in without_state]


def open_environments(config: RunConfig, num_envs: int, seed: int, device: torch.device) -> Runner:
    """Environments of a run's kind. Raises UsageError if they are not installed here or cannot be drawn."""
    try:
        return envs.make(config.env, num_envs, seed, device, **config.env_settings)
    except (ValueError, OpenGLMissing) as error:
        raise UsageError(str(error)) from error


def load_agent(
    config: RunConfig, saved: Path, seed: int, runner: Runner, device: torch.device, with_rings: bool = False
) -> Agent:
    """One seed's agent as it was saved, its replay empty unless `with_rings`. Raises UsageError if it does not fit."""
    try:
        agent = build_agent(config, runner, device, spawn_streams(seed, device))
        agent.load_state_dict(checkpoint.read_seed(saved, seed, with_rings)["agent"])
    except Damaged as error:
        raise UsageError(str(error)) from error
    except MISFITS as error:
        maker = made_by(config.environment)
        raise UsageError(f"{saved} does not fit this installation: {one_line(error)}; {maker}") from error
    return agent


def evaluate_run(folder: Path, episodes: int, seed: int, device_name: str) -> dict[str, Any]:
    """{"run", "step", "metrics": {"eval/return": …, "eval/length": …}}: mean over episodes, summarised over seeds.

    Of a sequence, the mean over its tasks, and "eval/return/TASK" of each. Of a run on fixed data, scores by
    each of its reference pairs.
    """
    if episodes < 1:
        raise UsageError(f"--episodes must be at least 1, got {episodes}")
    config, saved = open_run(folder)
    device = _device(device_name)
    compute.set_up(device, config.threads)
    found: list[Row] = []
    seeds = playable_seeds(config, saved)
    for lost in sorted(set(config.seeds) - set(seeds)):
        print(f"neoteny: seed {lost} was lost before it had a checkpoint, and is left out", file=sys.stderr)
    for run_seed in seeds:
        runner = open_environments(config, 1, seed, device)
        try:
            agent = load_agent(config, saved, run_seed, runner, device)
            for task, name in enumerate(Tasks(config, runner).names):
                scores = evaluate(agent, [evaluation_environments(config, runner, task, episodes, seed)])
                assert scores is not None  # only a stop gives None
                if scores.errors:
                    raise UsageError(f"seed {run_seed} of '{folder}' cannot play: {scores.errors[0]}")
                found.append(Row(0, "eval/return", float(scores.returns.mean()), run_seed, name))
                found += score_rows(config, 0, run_seed, float(scores.returns.mean()))
                found.append(Row(0, "eval/length", float(scores.lengths.float().mean()), run_seed, name))
        finally:
            runner.close()
    metrics = summarise_rows(found)
    return {"run": str(folder), "step": int(saved.name.removeprefix("step_")), "metrics": metrics}


def film_run(
    folder: Path, seed: int | None, episode_seed: int, out: Path | None, max_steps: int, size: int, fps: int
) -> tuple[Path, int, float]:
    """Film one episode. Returns the video's path, its steps and its return so far."""
    for name, value in (("max-steps", max_steps), ("size", size), ("fps", fps)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    config, saved = open_run(folder)
    seeds = playable_seeds(config, saved)
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise UsageError(f"{saved} has no seed {seed}; it has {', '.join(map(str, seeds))}")
    device = _device("cpu")
    compute.set_up(device, config.threads)
    path = out or folder / "videos" / f"{saved.name}_seed_{seed}.mp4"
    runner = open_environments(config, 1, episode_seed, device)
    try:
        agent = load_agent(config, saved, seed, runner, device)
        played = Episode(agent, runner, max_steps, size)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, played.frames(), fps)
        show_in_tensorboard(folder, seed, int(saved.name.removeprefix("step_")), path)
    except OpenGLMissing as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error.strerror or error}; choose another file with --out") from error
    finally:
        runner.close()
    return path, played.steps, played.return_


class Episode:
    """One episode without exploration, picture by picture."""

    def __init__(self, agent: Agent, runner: Runner, max_steps: int, size: int):
        self.agent, self.runner, self.max_steps, self.size = agent, runner, max_steps, size
        self.steps, self.return_ = 0, 0.0

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 [H, W, 3], one before each action; the reset of the next episode is not shown."""
        obs, ended = self.runner.reset(), False
        while not ended and self.steps < self.max_steps:
            yield self.runner.render(0, self.size, self.size)
            step = self.runner.step(self.agent.act(obs, explore=False))
            self.steps += 1
            ended = bool(step.episode_ended[0])
            # Raw rewards are only known as the episode's sum; until it ends the (maybe clipped) rewards stand in.
            self.return_ = float(step.episode_return[0]) if ended else self.return_ + float(step.reward[0])
            obs = step.obs


def _device(name: str) -> torch.device:
    try:
        return compute.resolve_device(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
