"""The tasks of a run: which one is learnt, where it changed, and how well each seed does all of them.

A run in one environment is a sequence of one task without a name, which never changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from envs import Runner
from envs.sequence import SequenceRunner, sequence_of
from runs import scores, transfer
from runs.config import RunConfig
from runs.record import Row

TASK = "sequence/task"  # a row wherever a task begins: its number, with its name as the row's task


@dataclass
class Returns:
    """How one seed does each task: `matrix` [visits + 1, T] as in `runs.transfer`, and the curve of the present visit.

    areas: of each visit, the mean over its steps of the return on its task; None where it was measured once only.
    """

    matrix: list[list[float]] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    areas: list[float | None] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {"matrix": self.matrix, "curve": [list(point) for point in self.curve], "areas": self.areas}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Returns:
        """Undo `state_dict`."""
        return cls(list(state["matrix"]), [(step, value) for step, value in state["curve"]], list(state["areas"]))


class Tasks:
    """The sequence of a group of seeds, which change their tasks together.

    names: of all tasks. current: which one is learnt. visits: those that were learnt so far, and the present one once
    it counts (see `count_visit`). changed: the environments have gone on to the next task, but what is due at the end
    of the old one (an evaluation, what happens to networks and replay) has not been done yet.
    """

    def __init__(self, config: RunConfig, runner: Runner):
        sequence = sequence_of(runner)
        self.names: list[str | None] = [None] if sequence is None else list(sequence.task_names)
        self.in_sequence = sequence is not None
        self.evaluates_all, self.steps = config.eval_tasks == "all", config.steps
        self.reference = config.reference
        self.batch_size = getattr(config.agent_config, "batch_size", 1)
        self._ids = [] if sequence is None else [task.env_id for task in sequence.tasks]
        self._seen = 1  # switches that were noticed
        self.current, self._following = 0 if sequence is None else sequence.task_of[0], 0
        self.visits: list[int] = []
        self.changed = False
        self.cleared_at: int | None = None  # environment steps at which the replay was last cleared

    @property
    def name(self) -> str | None:
        """Of the task that is learnt."""
        return self.names[self.current]

    def look(self, runner: Runner) -> bool:
        """Notice whether the environments went on to another task in the last step. runner: of any seed."""
        sequence = sequence_of(runner)
        if sequence is None or len(sequence.switches) == self._seen:
            return False
        self._seen = len(sequence.switches)
        self._following = sequence.task_of[sequence.switches[-1].index]
        self.changed = True
        return True

    def go_on(self) -> None:
        """Everything due at the end of the old task is done."""
        self.current, self.changed = self._following, False

    def waits_for_a_batch(self, steps: int) -> bool:
        """Whether the replay was cleared so lately that it does not hold a batch yet."""
        return self.cleared_at is not None and steps - self.cleared_at < self.batch_size

    def to_evaluate(self, step: int) -> list[int]:
        """The tasks of an evaluation: all at the start, where a task ends and at the end of the run."""
        return list(range(len(self.names))) if self.evaluates_all or self._counts(step) else [self.current]

    def _counts(self, step: int) -> bool:
        return step == 0 or self.changed or step >= self.steps

    def count_visit(self, step: int) -> bool:
        """Whether the evaluation at this step, of all tasks, is one after a visit (or the first); then count it."""
        if not self.in_sequence or not self._counts(step):
            return False
        if step:
            self.visits.append(self.current)
        return True

    def rows(self, step: int, seed: int, returns: Returns, found: Mapping[int, float], counts: bool) -> Iterator[Row]:
        """What an evaluation says of transfer and forgetting. found: by task, its mean return; `returns` takes it in.

        counts: what `count_visit` said.
        """
        if not self.in_sequence:
            return
        returns.curve.append((step, found[self.current]))
        if not counts:
            return
        returns.matrix.append([found[task] for task in range(len(self.names))])
        after = len(self.visits)
        for task, value in found.items():
            yield Row(step, f"return/task_{task}_after_{after}", value, seed)
        if not after:
            yield Row(step, TASK, self.current, seed, self.name)
            return
        returns.areas.append(transfer.mean_over_steps(returns.curve))
        returns.curve = [(step, found[self._following])]
        for name, value in self._measures(returns).items():
            yield Row(step, f"cl/{name}", value, seed)
        if self.changed and step < self.steps:
            yield Row(step, TASK, self._following, seed, self.names[self._following])

    def _measures(self, returns: Returns) -> dict[str, float]:
        """Of returns; and of scores, whose names end in "score", if every task has a reference pair."""
        found = dict(transfer.measures(returns.matrix, self.visits))
        areas = [area for area in returns.areas if area is not None]
        whole = bool(self.reference) and len(areas) == len(self.visits)
        scratch = [self.reference[self._ids[task]] for task in self.visits] if whole else []
        if whole:
            found["transfer"] = transfer.transfer(areas, scratch)
        try:
            columns = [
                scores.normalise(self._ids[t], column) for t, column in enumerate(zip(*returns.matrix, strict=True))
            ]
        except ValueError:
            return found
        normalised = [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        found |= {_of_scores(name): value for name, value in transfer.measures(normalised, self.visits).items()}
        if whole:
            own, theirs = (self._scored(values) for values in (areas, scratch))
            scaled = transfer.scaled_transfer(own, theirs)
            found |= {} if scaled is None else {_of_scores("transfer"): scaled}
        return found

    def _scored(self, areas: Sequence[float]) -> list[float]:
        return [float(scores.normalise(self._ids[task], a)) for task, a in zip(self.visits, areas, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """What all seeds have in common."""
        values = {name: getattr(self, name) for name in _STATE}
        return {**values, "visits": list(self.visits)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.visits = list(state["visits"])


_STATE = ("current", "_following", "_seen", "changed", "cleared_at")


def _of_scores(name: str) -> str:
    return f"{name.removesuffix('_return')}_score"


def new_environments(runner: Runner, task: int, num_envs: int, seed: int) -> Runner | None:
    """Environments for the evaluation of one task of a sequence, None if `runner` goes through none."""
    sequence: SequenceRunner | None = sequence_of(runner)
    return None if sequence is None else sequence.alone(task, num_envs, seed, without=CUT_SHORT)


CUT_SHORT = ("staggered_starts",)  # settings with which first episodes are not whole
