"""Environments that change: one task after another behind a single runner, for continual reinforcement learning.

A `Segment` is one task: an environment id, its settings, factors on its MuJoCo model (`envs.model_changes`), a shuffle
of its observation. The runner goes from one to the next after `switch_every` steps, and starts over after the last one.

How a switch looks from the agent's side:

* Between different environments every row is cut off: the step is `truncated`, `final_obs` is true, `obs` is the first
  observation of the new task. A cut-off episode is not counted: `episode_ended` stays False.
* Between segments that differ only in their model, no episode is cut: each row changes when its own episode ends.

Observations and actions have one shape for all tasks: vectors are padded with zeros behind, surplus action components
are ignored, and of discrete actions those beyond a task's own count act as its action 0 (Atari: no operation). Where
tasks bound continuous actions differently, the agent acts in [-1, 1] and each task maps that to its own box.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.actions import check_action, check_choice
from envs.model_changes import check_factors
from envs.registry import check_id, make
from envs.runner import ActionSpec, ContinuousActionSpec, DiscreteActionSpec, ObservationSpec, Runner, RunnerSpec, Step


@dataclass(frozen=True)
class Segment:
    """One task of a sequence. settings: keyword arguments of `envs.make`. model: factors, MuJoCo and DMC only.

    shuffle: seed of a fixed permutation and fixed signs of the observation vector's entries; None leaves them.
    """

    env_id: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, float] = field(default_factory=dict)
    shuffle: int | None = None

    def __post_init__(self) -> None:
        check_id(self.env_id)
        check_factors(self.model)

    def follows_without_a_cut(self, before: Segment) -> bool:
        """Whether episodes of `before` may run on when this segment begins: only the model differs."""
        return self.environment == before.environment and self.shuffle == before.shuffle

    @property
    def environment(self) -> str:
        """Equal for two segments that one runner can serve."""
        return json.dumps([self.env_id, self.settings], sort_keys=True, default=str)

    def __str__(self) -> str:
        factors = ", ".join(f"{name} x {factor:g}" for name, factor in self.model.items())
        shuffled = "" if self.shuffle is None else f"shuffle {self.shuffle}"
        changes = ", ".join(text for text in (factors, shuffled) if text)
        return f"{self.env_id} ({changes})" if changes else self.env_id


@dataclass(frozen=True)
class Switch:
    """A change of task, after `step` steps counted over all rows, to segment `index` of the sequence.

    waits_for_episodes: a row changes when its own episode ends, not at once.
    """

    step: int
    index: int
    waits_for_episodes: bool = False


def sequence_of(runner: Runner) -> SequenceRunner | None:
    """The sequence of tasks that a runner goes through, in the background or not; None for a single task."""
    inner = getattr(runner, "runner", runner)
    return inner if isinstance(inner, SequenceRunner) else None


def steps_of_task(runner: Runner) -> int | None:
    """Steps, over all rows, from one change of task to the next; None for one task, or tasks of so many episodes."""
    sequence = sequence_of(runner)
    every = None if sequence is None else sequence.switch_every
    return None if every is None else -(-every // runner.num_envs) * runner.num_envs


def make_sequence(
    segments: Sequence[Segment | str],
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    threads: int = 0,
    *,
    switch_every: int | None = None,
    switch_episodes: int | None = None,
) -> SequenceRunner:
    """A runner that goes through `segments` in turn, again and again.

    switch_every: steps (over all rows) of a segment; switch_episodes: or ended episodes (over all rows). Give one.
    Atari games whose action sets differ get the full set of 18, so that an action means the same in all of them.
    Raises ValueError for an empty sequence, for environments that cannot share an agent (images with vectors, discrete
    with continuous actions), for factors on an environment without a MuJoCo model, and as `envs.make`.
    """
    chosen = [Segment(segment) if isinstance(segment, str) else segment for segment in segments]
    if not chosen:
        raise ValueError("a sequence needs at least one segment")
    if (switch_every is None) == (switch_episodes is None):
        raise ValueError("a sequence needs switch_every (steps) or switch_episodes, and only one of them")
    length = switch_episodes if switch_every is None else switch_every
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"a segment must last a whole number of steps or episodes, at least 1, got {length}")
    return SequenceRunner(_with_equal_buttons(chosen), num_envs, seed, device, threads, switch_every, switch_episodes)


def _distinct(names: list[str]) -> list[str]:
    """The names; tasks that differ in their settings alone get a number: "dmc/walker-walk", "dmc/walker-walk #2"."""
    before = [names[:at].count(name) for at, name in enumerate(names)]
    return [f"{name} #{count + 1}" if count else name for name, count in zip(names, before, strict=True)]


def _with_equal_buttons(segments: list[Segment]) -> list[Segment]:
    """The segments, Atari games with the full action set unless all games have the same number of actions."""
    games = [segment for segment in segments if segment.env_id.startswith("atari/")]
    if len(games) < len(segments) or len({segment.env_id for segment in games}) == 1:
        return segments
    full = {"full_action_set": True}
    return [dataclasses.replace(segment, settings={**full, **segment.settings}) for segment in segments]


class SequenceRunner:
    """Fulfils `envs.runner.Runner`.

    task: int64 [N] on the device, the segment to which each row's present episode belongs.
    switches: where the sequence went from one segment to the next, oldest first.
    tasks: the segments without repetitions; task_names: one for each; task_of: of each segment, its index in `tasks`.
    """

    def __init__(
        self,
        segments: list[Segment],
        num_envs: int,
        seed: int,
        device: torch.device | str,
        threads: int,
        switch_every: int | None,
        switch_episodes: int | None,
        specs: tuple[ObservationSpec, ActionSpec] | None = None,
    ):
        """specs: how the agent sees and acts, by default what all segments have in common."""
        self.num_envs, self.device = num_envs, torch.device(device)
        self.segments = segments
        self.tasks = [segment for at, segment in enumerate(segments) if segment not in segments[:at]]
        self.task_of = [self.tasks.index(segment) for segment in segments]
        self._task_of = torch.tensor(self.task_of, device=self.device)
        self.task_names = _distinct([str(task) for task in self.tasks])
        self.switch_every, self.switch_episodes = switch_every, switch_episodes
        self._seed, self._threads = seed, threads
        self._runners: dict[str, Runner] = {}
        for segment in segments:
            self._prepare(segment)
        runners = [self._runners[segment.environment] for segment in segments]
        self.observation_spec, self.action_spec = specs or (
            _common_observations(segments, [runner.observation_spec for runner in runners]),
            _common_actions(segments, [runner.action_spec for runner in runners]),
        )
        self._runner = runners[0]
        horizons = [runner.spec.horizon for runner in runners]
        self.spec = RunnerSpec(
            env_id=" -> ".join(str(segment) for segment in segments),
            backend=" -> ".join(dict.fromkeys(runner.spec.backend for runner in runners)),
            horizon=None if None in horizons else max(h for h in horizons if h is not None),
            action_repeat=runners[0].spec.action_repeat,
            settings={
                "switch_every": switch_every,
                "switch_episodes": switch_episodes,
                "segments": [dataclasses.asdict(segment) for segment in segments],
                "tasks": [dict(runner.spec.settings) for runner in runners],
            },
            versions={name: version for runner in runners for name, version in runner.spec.versions.items()},
        )
        self._steps = self._episodes = self._left_at = 0
        self._index = 0
        self.switches = [Switch(0, 0)]
        self.task = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._boxes = _boxes(self._runners, self.action_spec, self.device)
        self._change_model(segments[0])
        self._set_shuffle()

    def _prepare(self, segment: Segment) -> None:
        """Build the segment's environments unless an earlier segment did. Their seeds follow from their place."""
        key = segment.environment
        if key not in self._runners:
            drawn = np.random.SeedSequence((self._seed, len(self._runners))).generate_state(1)[0]
            own_seed = self._seed if not self._runners else int(drawn >> 1)
            self._runners[key] = make(
                segment.env_id, self.num_envs, own_seed, self.device, self._threads, **segment.settings
            )
        if segment.model and not hasattr(self._runners[key], "change_model"):
            raise ValueError(f"{segment.env_id} has no MuJoCo model of which to change {', '.join(segment.model)}")

    def alone(self, task: int, num_envs: int, seed: int, without: Collection[str] = ()) -> SequenceRunner:
        """New environments of `tasks[task]` only, which look to the agent as they do in this sequence.

        without: settings of its segment that are left out.
        """
        segment = self.tasks[task]
        kept = {name: value for name, value in segment.settings.items() if name not in without}
        specs = self.observation_spec, self.action_spec
        only = [dataclasses.replace(segment, settings=kept)]
        return SequenceRunner(only, num_envs, seed, self.device, self._threads, None, None, specs)

    @property
    def task_rows(self) -> Tensor:
        """The index in `tasks` of each row's present episode, int64 [N] on the device."""
        return self._task_of.index_select(0, self.task)

    @property
    def segment(self) -> Segment:
        """The one that the next episode belongs to."""
        return self.segments[self._index % len(self.segments)]

    @property
    def diverged_episodes(self) -> int:
        return sum(runner.diverged_episodes for runner in self._runners.values())

    def reset(self) -> Tensor:
        """Start a new episode of the present task in every row."""
        self.task = torch.full_like(self.task, self._index % len(self.segments))
        return self._presented(self._runner.reset())

    def step(self, action: Tensor) -> Step:
        """Take one action in every row. action: [N, A] of the widest task, or [N] int64."""
        self.send(action)
        return self.recv()

    def send(self, action: Tensor) -> None:
        """Raises ValueError for actions of another kind, or of which the present task's runner says so."""
        check_action(action, self.action_spec, self.num_envs, self.device)
        if isinstance(self.action_spec, DiscreteActionSpec) and action.is_cpu:
            check_choice(action, self.action_spec)  # a task with fewer actions would take any number for its action 0
        self._runner.send(self._own_action(action))

    def recv(self) -> Step:
        step = self._runner.recv()
        self._steps += self.num_envs
        if self.switch_episodes is not None:
            self._episodes += int(step.episode_ended.sum())
            due = self._episodes - self._left_at >= self.switch_episodes
        else:
            due = self.switch_every is not None and self._steps - self._left_at >= self.switch_every
        if self.switches[-1].waits_for_episodes:
            self.task = torch.where(step.episode_ended, self._index % len(self.segments), self.task)
        return self._switch(step) if due else self._presented_step(step)

    def _switch(self, step: Step) -> Step:
        old, step = self.segment, self._presented_step(step)
        self._left_at = self._steps if self.switch_every is not None else self._episodes
        self._index += 1
        waits = self.segment.follows_without_a_cut(old)
        self.switches.append(Switch(self._steps, self._index % len(self.segments), waits))
        self._runner = self._runners[self.segment.environment]
        self._change_model(self.segment)
        self._set_shuffle()
        if waits:
            return step
        final_obs = step.final_obs.clone()
        return dataclasses.replace(
            step, obs=self.reset(), final_obs=final_obs, truncated=step.truncated | ~step.terminated
        )

    def _change_model(self, segment: Segment) -> None:
        """Every factor that any segment of this environment names; those that this one does not are 1."""
        same = [other for other in self.segments if other.environment == segment.environment]
        names = {name for other in same for name in other.model}
        if names:
            self._runner.change_model({name: segment.model.get(name, 1.0) for name in sorted(names)})  # type: ignore[attr-defined]

    def _set_shuffle(self) -> None:
        self._order = self._signs = None
        if self.segment.shuffle is not None:
            if len(self._runner.observation_spec.shape) != 1:
                raise ValueError(f"{self.segment.env_id} shows images; only vectors can be shuffled")
            size = self._runner.observation_spec.shape[0]
            generator = np.random.default_rng(self.segment.shuffle)
            self._order = torch.from_numpy(generator.permutation(size)).to(self.device)
            signs = generator.choice(np.array([-1.0, 1.0], np.float32), size)
            self._signs = torch.from_numpy(signs).to(self.device, self._runner.observation_spec.dtype)

    def _own_action(self, action: Tensor) -> Tensor:
        spec = self._runner.action_spec
        if isinstance(spec, DiscreteActionSpec):
            assert isinstance(self.action_spec, DiscreteActionSpec)
            return action if spec.count == self.action_spec.count else torch.where(action < spec.count, action, 0)
        own = action if action.shape[-1] == spec.size else action[:, : spec.size]
        if self._boxes is None:
            return own
        centre, half_range = self._boxes[self.segment.environment]
        return torch.addcmul(centre, half_range, own)

    def _presented(self, obs: Tensor) -> Tensor:
        """The observation as the agent sees it: shuffled, padded."""
        if self._order is not None and self._signs is not None:
            obs = obs[:, self._order] * self._signs
        missing = self.observation_spec.shape[0] - obs.shape[1]
        return torch.nn.functional.pad(obs, (0, missing)) if missing else obs

    def _presented_step(self, step: Step) -> Step:
        obs = self._presented(step.obs)
        if obs is step.obs:
            return step
        final_obs = obs if step.final_obs is step.obs else self._presented(step.final_obs)
        return dataclasses.replace(step, obs=obs, final_obs=final_obs)

    def render(self, row: int = 0, height: int = 480, width: int = 480) -> np.ndarray:
        return self._runner.render(row, height, width)

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence is, and the state of every environment in it."""
        return {
            "segments": [f"{segment.environment} {segment}" for segment in self.segments],
            "steps": self._steps,
            "episodes": self._episodes,
            "left_at": self._left_at,
            "index": self._index,
            "switches": [[s.step, s.index, s.waits_for_episodes] for s in self.switches],
            "task": self.task.clone(),
            "runners": [runner.state_dict() for runner in self._runners.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly. Raises ValueError if the state is of another sequence."""
        if state["segments"] != self.state_dict()["segments"]:
            raise ValueError(f"the saved sequence is not {self.spec.env_id}")
        for runner, saved in zip(self._runners.values(), state["runners"], strict=True):
            runner.load_state_dict(saved)
        self._steps, self._episodes = state["steps"], state["episodes"]
        self._left_at, self._index = state["left_at"], state["index"]
        self.switches = [Switch(*switch) for switch in state["switches"]]
        self.task = state["task"].to(self.device)
        self._runner = self._runners[self.segment.environment]
        self._set_shuffle()

    def close(self) -> None:
        for runner in self._runners.values():
            runner.close()


def _common_observations(segments: list[Segment], specs: list[ObservationSpec]) -> ObservationSpec:
    """The one shape that holds all: the longest vector, or the image that all have."""
    if all(spec == specs[0] for spec in specs):
        return specs[0]
    for segment, spec in zip(segments, specs, strict=True):
        if len(spec.shape) != 1 or len(specs[0].shape) != 1 or spec.dtype != specs[0].dtype:
            raise ValueError(
                f"{segments[0].env_id} and {segment.env_id} cannot share an agent: observations of shape "
                f"{list(specs[0].shape)} and {list(spec.shape)}"
            )
    return ObservationSpec((max(spec.shape[0] for spec in specs),), specs[0].dtype)


def _common_actions(segments: list[Segment], specs: list[ActionSpec]) -> ActionSpec:
    """The most discrete actions, or a box of the most components: that of all tasks, or [-1, 1] where theirs differ."""
    first = specs[0]
    for segment, spec in zip(segments, specs, strict=True):
        if type(spec) is not type(first):
            raise ValueError(
                f"{segments[0].env_id} and {segment.env_id} cannot share an agent: discrete and continuous"
            )
    if isinstance(first, DiscreteActionSpec):
        return DiscreteActionSpec(max(spec.count for spec in specs if isinstance(spec, DiscreteActionSpec)))
    boxes = [spec for spec in specs if isinstance(spec, ContinuousActionSpec)]
    widest = max(boxes, key=lambda box: box.size)
    if all(_same_bounds(box, widest) for box in boxes):
        return widest
    return ContinuousActionSpec(-np.ones(widest.size, np.float32), np.ones(widest.size, np.float32))


def _same_bounds(box: ContinuousActionSpec, widest: ContinuousActionSpec) -> bool:
    return bool((box.low == widest.low[: box.size]).all() and (box.high == widest.high[: box.size]).all())


def _boxes(
    runners: Mapping[str, Runner], spec: ActionSpec, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Centre and half range [A] of each environment's actions, where the agent acts in [-1, 1] instead of these."""
    own = {key: runner.action_spec for key, runner in runners.items()}
    boxes = {key: box for key, box in own.items() if isinstance(box, ContinuousActionSpec)}
    if not isinstance(spec, ContinuousActionSpec) or all(_same_bounds(box, spec) for box in boxes.values()):
        return None
    bounds = {key: (torch.from_numpy(box.low), torch.from_numpy(box.high)) for key, box in boxes.items()}
    return {key: (((low + high) / 2).to(device), ((high - low) / 2).to(device)) for key, (low, high) in bounds.items()}
