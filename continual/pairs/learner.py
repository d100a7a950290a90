"""The loop over the parts of a stream of pairs: growth when one arrives, its steps, what is measured when it ends.

One learner is several seeds, each with a model of its own, whose architectures may differ. It is driven as
`continual.learner.Learner` is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from continual.growth.growclip import GrowClip
from continual.growth.protocol import Arrival
from continual.growth.search import validation_loss
from continual.learner import Measurement
from continual.pairs.batch import PairBatch
from continual.pairs.evaluation import Scores, evaluate, on_arrival
from continual.pairs.stream import PairStream
from continual.strategy import Metrics

_TRANSFER = "acc/task_1_after_{}"  # of which backward transfer is the change


class _SearchStopped(Exception):
    """Candidates were being tried; the model is as it was."""


class PairLearner:
    """Models that grow, one for each seed, on a stream.

    steps: of each part. look_every: steps between two looks within a part, 0: none. Raises ValueError if numbers of
    steps are missing.
    """

    def __init__(self, stream: PairStream, steps: Sequence[int], clips: Sequence[GrowClip], look_every: int = 0):
        if len(steps) != stream.parts or min(steps) < 1:
            raise ValueError(f"{stream.parts} parts need as many numbers of steps, all at least 1, got {tuple(steps)}")
        self.stream, self.plan, self.clips, self.look_every = stream, tuple(steps), list(clips), look_every
        self.members = len(self.clips)
        self.index = self.step = self.steps = 0  # the part, the step in it, all steps
        self.measurements: list[Measurement] = []  # until someone takes them
        self.stop_wanted: Callable[[], bool] = lambda: False  # gives up trying candidates, which may take long
        self._arrived: list[Scores] = []  # what was measured on the members that the present part has reached
        self._searched = [0.0] * self.members  # FLOPs of trying candidates
        # On the host, wherever the models are: forward transfer of each part but the first, and R@1 on the first part
        # when it had been learnt, [K].
        self._forward: list[Tensor] = []
        self._first = torch.zeros(self.members, dtype=torch.float64)
        self._logged: list[Metrics] = []

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return sum(self.plan)

    @property
    def done(self) -> bool:
        return self.index >= self.stream.parts

    def advance(self, steps: int) -> None:
        """Take up to `steps` steps, no further than the end of the part; or let a part reach one more member.

        That is where a model grows, which may take as long as many steps; given up, it has not reached the member.
        """
        if len(self._arrived) < self.members:
            with contextlib.suppress(_SearchStopped):
                self._arrive(self.clips[len(self._arrived)])
            return
        for _ in range(min(steps, self.plan[self.index] - self.step)):
            self._learn()
        self._log()
        if self.step == self.plan[self.index]:
            self._end_part()

    def _arrive(self, clip: GrowClip) -> None:
        part, stream = self.index, self.stream
        arrival = Arrival(
            index=part,
            pairs=stream.seen(part),
            vocabulary=stream.vocabularies[part],
            steps=self.plan[part],
            proxy_batches=partial(self._proxy_batches, part),
            validation=partial(stream.validation, part),
        )
        told: Scores = {}
        clip.extend_vocabulary(arrival)
        if part > 0:
            told["retrieval/forward_transfer"] = on_arrival(clip.model, stream, part).to("cpu")
            told["loss/validation_before_growth"] = self._validation(clip)
        before = clip.flops
        clip.grow(arrival)
        self._searched[len(self._arrived)] += clip.flops - before
        if part > 0:
            told["loss/validation_after_growth"] = self._validation(clip)
        self._arrived.append(told)
        if len(self._arrived) == self.members:
            values = _stacked(self._arrived)
            if part > 0:
                self._forward.append(values["retrieval/forward_transfer"])
                self.measurements.append(Measurement(self.steps, values, part + 1))
            self.measurements.append(Measurement(self.steps, self._sizes()))

    def _proxy_batches(self, part: int, seed: int, steps: int) -> Iterator[PairBatch]:
        for batch in self.stream.proxy_batches(part, seed, steps):
            if self.stop_wanted():
                raise _SearchStopped
            yield batch

    def _learn(self) -> None:
        told = [clip.learn(self.stream.batch(clip.seed, self.index, self.step)) for clip in self.clips]
        self._logged.append(_stacked(told))
        self.step += 1
        self.steps += 1
        if self.look_every and self.step % self.look_every == 0 and self.step < self.plan[self.index]:
            losses = torch.stack([self._validation(clip) for clip in self.clips])
            self.measurements.append(Measurement(self.steps, {"loss/validation": losses}))

    def _log(self) -> None:
        """The means over these steps of what was told of them."""
        if self._logged:
            names = self._logged[0]
            means = {name: torch.stack([told[name] for told in self._logged]).mean(0) for name in names}
            self.measurements.append(Measurement(self.steps, means))
        self._logged.clear()

    def _end_part(self) -> None:
        part = self.index
        scores = _stacked([evaluate(clip.model, self.stream, part) for clip in self.clips])
        scores["loss/validation"] = torch.stack([self._validation(clip) for clip in self.clips])
        first = scores[_TRANSFER.format(part + 1)].to("cpu")
        if part == 0:
            self._first = first
        else:
            scores["retrieval/backward_transfer"] = first - self._first
            scores["retrieval/forward_transfer"] = torch.stack(self._forward).mean(0)
        self.measurements.append(Measurement(self.steps, scores | self._sizes()))
        self._arrived.clear()
        self.index, self.step = part + 1, 0

    def _validation(self, clip: GrowClip) -> Tensor:
        loss = validation_loss(clip.model, self.stream.validation(self.index))
        return torch.tensor(loss, dtype=torch.float64)

    def _sizes(self) -> Metrics:
        """Of every member; FLOPs of a step are of a whole batch, `growth/cumulative_flops` has the search in it."""
        found = [clip.size for clip in self.clips]
        batch = self.stream.config.batch

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64)

        return {
            "growth/parameters": column([size["parameters"] for size in found]),
            "growth/capacity": column([size["capacity"] for size in found]),
            "growth/flops": column([size["flops_per_pair"] * batch for size in found]),
            "growth/cumulative_flops": column([size["flops"] for size in found]),
            "growth/search_flops": column(self._searched),
        }

    @property
    def learnt_part(self) -> int:
        """The last part that all models have learnt."""
        return self.index - 1

    @property
    def history(self) -> dict[int, list[dict[str, Any]]]:
        """What happened at each arrival, by seed: plain values."""
        return {clip.seed: clip.history for clip in self.clips}

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, as tensors and plain values."""
        return {
            "clips": [clip.state_dict() for clip in self.clips],
            "position": [self.index, self.step, self.steps],
            "arrived": [dict(told) for told in self._arrived],
            "searched": list(self._searched),
            "forward": list(self._forward),
            "first": self._first,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly. Raises ValueError if the state is of other seeds."""
        if len(state["clips"]) != self.members:
            raise ValueError(f"the state is of {len(state['clips'])} seeds, here are {self.members}")
        for clip, saved in zip(self.clips, state["clips"], strict=True):
            clip.load_state_dict(saved)
        self.index, self.step, self.steps = state["position"]
        self._arrived = [dict(told) for told in state["arrived"]]
        self._searched, self._forward = list(state["searched"]), list(state["forward"])
        self._first = state["first"]


def _stacked(members: Sequence[Mapping[str, Tensor]]) -> Metrics:
    """Numbers of every member as one tensor [K] by name."""
    return {name: torch.stack([told[name] for told in members]) for name in members[0]}
