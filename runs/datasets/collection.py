"""Data from trained agents: rollouts of whole episodes, what a replay ring holds, and which snapshots are what.

The kinds are D4RL's (specs/a2pr-and-offline-rl.md, sections 10.3 and 10.4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.agent import ActionScale
from agents.offline.transitions import Transitions
from envs import Runner, Step
from runs.datasets.dataset import chosen_episodes, fill, in_memory, packed

BAND, WANTED, HIGHEST, LOWEST = (0.25, 0.50), 1 / 3, 0.60, 0.10  # of a medium policy, between random and expert
# Reward of a step for being upright, in Gymnasium's tasks that have one.
ALIVE = {"Hopper": 1.0, "Walker2d": 1.0, "Ant": 1.0, "Humanoid": 5.0}


@dataclass
class _Episode:
    """One that began at step `start` in environment `row`; `stop` is the step behind its end, None before."""

    start: int
    row: int
    stop: int | None = None


@torch.no_grad()
def roll_out(runner: Runner, act: Callable[[Tensor], Tensor], wanted: int) -> Transitions:
    """At least so many transitions of whole episodes, in the order in which the episodes began.

    Episodes that began earlier count first, however long they are, so that short ones are not preferred. act: obs
    [N, O] -> action [N, A] in the environment's units.
    """
    obs, steps = runner.reset(), 0
    columns: list[tuple[Tensor, ...]] = []
    begun = [_Episode(0, row) for row in range(runner.num_envs)]
    going, counted, total = list(begun), 0, 0
    while total < wanted:
        action = act(obs)
        step: Step = runner.step(action)
        kept = obs, action, step.reward, step.final_obs, step.terminated, step.truncated & ~step.terminated
        columns.append(tuple(tensor.to("cpu", copy=True) for tensor in kept))
        obs, steps = step.obs, steps + 1
        for row in step.episode_ended.nonzero().flatten().tolist():
            going[row].stop = steps
            going[row] = _Episode(steps, row)
            begun.append(going[row])
        while total < wanted and (stop := begun[counted].stop) is not None:
            total += stop - begun[counted].start
            counted += 1
    return _of_columns([torch.stack(column) for column in zip(*columns, strict=True)], begun[:counted])


def _of_columns(columns: Sequence[Tensor], episodes: Sequence[_Episode]) -> Transitions:
    """columns: obs, action, reward, next obs, terminal, truncated, each [T, N, ...]."""
    spans = [(slice(e.start, e.stop), e.row) for e in episodes]
    obs, action, reward, following, terminal, cut = (
        np.concatenate([column[span].numpy() for span in spans]) for column in columns
    )
    rows = in_memory(len(obs), 2 * obs.shape[1] + action.shape[1] + 2)
    fill(rows, obs, action, reward, following, terminal)
    starts = np.cumsum([0, *((e.stop or 0) - e.start for e in episodes)])
    return packed(rows, obs.shape[1], action.shape[1], cut, starts, np.ones(len(episodes), bool))


def ring_transitions(tensors: Mapping[str, Tensor], head: int, scale: ActionScale, steps: int) -> Transitions:
    """The first `steps` transitions of one environment's replay ring, and the rest of the episode that they end in.

    tensors: [1, T, ...] by the names of `agents.replay`, of a ring that was never full; head: of the ring. Without its
    last episode where that was going on. Raises ValueError if the ring holds no whole episode.
    """
    is_transition = tensors["is_transition"][0]
    at = is_transition.nonzero().flatten()
    terminal = tensors["terminated"][0][at]
    ended = ~is_transition[at + 1] & (at + 1 < head)  # what lies at the head waits for its action
    ends = ended.nonzero().flatten() + 1
    if not len(ends):
        raise ValueError("the replay holds no whole episode")
    behind = ends[ends >= min(steps, int(ends[-1]))][0]
    at, terminal, ended = at[:behind], terminal[:behind], ended[:behind]
    obs, following = tensors["frame"][0][at], tensors["frame"][0][at + 1]
    action = scale.to_environment(tensors["action"][0][at])
    rows = in_memory(len(at), 2 * obs.shape[1] + action.shape[1] + 2)
    values = obs, action, tensors["reward"][0][at], following, terminal
    fill(rows, *(value.numpy() for value in values))
    starts = np.concatenate([[0], (ended.nonzero().flatten() + 1).numpy()])
    truncated = (ended & ~terminal).numpy()
    return packed(rows, obs.shape[1], action.shape[1], truncated, starts, np.ones(len(starts) - 1, bool))


def expert_step(evaluations: Sequence[tuple[int, float]]) -> int:
    """The snapshot in the middle of the three consecutive evaluations with the best mean. (step, return), in order.

    Raises ValueError for fewer than three.
    """
    if len(evaluations) < 3:
        raise ValueError(f"an expert is chosen by three evaluations in a row, the run has {len(evaluations)}")
    means = [np.mean([value for _, value in evaluations[i : i + 3]]) for i in range(len(evaluations) - 2)]
    return evaluations[int(np.argmax(means)) + 1][0]


def medium_step(evaluations: Sequence[tuple[int, float]], low: float, high: float) -> tuple[int, float]:
    """The first snapshot a quarter to half of the way from random to expert, and where it is on that way.

    If training jumped over that, the nearest one below 0.6. evaluations: (step, return), in order; low, high: returns
    of random and expert. Raises ValueError if there is none.
    """
    if not high > low:
        raise ValueError(f"the expert's return of {high:.4g} is not above the random one of {low:.4g}: train longer")
    placed = [(step, (value - low) / (high - low)) for step, value in evaluations if step > 0]
    for step, place in placed:
        if BAND[0] <= place <= BAND[1]:
            return step, place
    near = [(abs(place - WANTED), step, place) for step, place in placed if LOWEST <= place <= HIGHEST]
    if not near:
        raise ValueError("no snapshot is between random and expert: evaluate more often (--train-eval-every)")
    _, step, place = min(near)
    return step, place


def alive_share(env: str, data: Transitions) -> float | None:
    """The part of the mean return that is for being upright; None where a task has no such reward."""
    bonus = ALIVE.get(env.partition("/")[2].partition("-")[0])
    mean = float(data.returns().mean())
    if bonus is None or mean <= 0:
        return None
    return bonus * float(data.lengths.double().mean()) / mean


def cut_to(data: Transitions, wanted: int) -> Transitions:
    """The first episodes that together have at least so many transitions."""
    count = int((data.starts[1:] < wanted).sum()) + 1
    return chosen_episodes(data, range(min(count, len(data.lengths))))
