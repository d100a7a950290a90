"""What growing one dimension or another brings: from one trained model, each alone to the same number of parameters.

The paper compares growth in different dimensions to guide the design of cross-modal models; how it does so is not
known. Here the models learn the first part, then every dimension is grown without changing what they compute, and all
learn the second part from the same batches (specs/growclip-and-growth.md, A.6).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from continual.growth import operators
from continual.growth.dual_encoder import DualEncoder
from continual.growth.genome import Genome
from continual.growth.growclip import GrowClip
from continual.growth.protocol import Move
from continual.growth.search import validation_loss
from continual.growth.space import HOLD, same_size
from continual.growth.training import Training
from continual.learner import Measurement
from continual.pairs.evaluation import Scores, evaluate
from continual.pairs.learner import PairLearner
from continual.pairs.stream import PairStream


class DimensionStudy(PairLearner):
    """The first part, then an arm for no growth and for each dimension; `index` counts these.

    Raises ValueError if the stream has no second part, or the models differ.
    """

    def __init__(self, stream: PairStream, steps: Sequence[int], clips: Sequence[GrowClip], look_every: int = 0):
        super().__init__(stream, steps, clips, look_every)
        if stream.parts < 2:
            raise ValueError(f"a study of dimensions needs two parts, and '{stream.pairs.name}' has {stream.parts}")
        first = clips[0].genome
        self.moves: list[Move[Genome]] = [Move(HOLD, first), *same_size(first)]
        self.plan = (steps[0], *[steps[1]] * len(self.moves))
        self.trainings: list[Training] = []  # of the present arm, one for each member

    @property
    def done(self) -> bool:
        return self.index >= len(self.plan)

    @property
    def learnt_part(self) -> int:
        """The first one; the second is learnt by models of their own."""
        return 0

    def advance(self, steps: int) -> None:
        """Take up to `steps` steps, no further than the end of the first part or of an arm."""
        if self.index == 0:
            super().advance(steps)
            return
        if self.step == 0:
            self.trainings = [self._begun(clip, self.moves[self.index - 1]) for clip in self.clips]
        for _ in range(min(steps, self.plan[self.index] - self.step)):
            for clip, training in zip(self.clips, self.trainings, strict=True):
                training.learn(self.stream.batch(clip.seed, 1, self.step))
            self.step += 1
            self.steps += 1
        if self.step == self.plan[self.index]:
            self._end_arm(self.moves[self.index - 1])

    def _begun(self, clip: GrowClip, move: Move[Genome]) -> Training:
        """A model of one arm, which still computes what the first part has taught."""
        known = self.stream.vocabularies[1]
        model: DualEncoder = operators.grow_vocabulary(clip.model, known)[0]
        grown = Move(move.name, dataclasses.replace(move.genome, vocabulary=known))
        if move.name != HOLD:
            model, _ = model.grow(grown, self._random(clip.seed), clip.config.operators)
        return Training(model, clip.config, self.plan[self.index])

    def _end_arm(self, move: Move[Genome]) -> None:
        told = [self._measured(training) for training in self.trainings]
        values = {f"dims/{move.name}/{name}": torch.stack([own[name] for own in told]) for name in told[0]}
        self.measurements.append(Measurement(self.steps, values))
        self.index, self.step = self.index + 1, 0
        self.trainings = []

    def _measured(self, training: Training) -> Scores:
        model, genome = training.model, training.model.genome
        found = evaluate(model, self.stream, 1)
        kept = {name.rpartition("/")[2]: value for name, value in found.items() if name in _KEPT}
        if "zero_shot/accuracy" in found:
            kept["zero_shot"] = found["zero_shot/accuracy"]
        sizes = {
            "validation_loss": validation_loss(model, self.stream.validation(1)),
            "parameters": genome.parameters,
            "flops": genome.flops * self.stream.config.batch,
        }
        return kept | {name: torch.tensor(value, dtype=torch.float64) for name, value in sizes.items()}

    def _random(self, seed: int) -> torch.Generator:
        """Draws what is new in a model, on the device."""
        numbers = np.random.SeedSequence((seed, 1)).generate_state(1, np.uint64)
        return torch.Generator(self.stream.device).manual_seed(int(numbers[0] >> np.uint64(1)))

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, as tensors and plain values."""
        return super().state_dict() | {"arm": [training.state_dict() for training in self.trainings]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly. Raises ValueError if the state is of other seeds."""
        super().load_state_dict(state)
        self.trainings = []
        if state["arm"]:
            self.trainings = [self._begun(clip, self.moves[self.index - 1]) for clip in self.clips]
            for training, saved in zip(self.trainings, state["arm"], strict=True):
                training.load_state_dict(saved)


_KEPT = ("retrieval/text_to_image_r1", "retrieval/image_to_text_r1")
