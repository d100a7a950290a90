"""CHAIN: churn reduction (Tang & Berseth 2024, arXiv:2409.04792).

    loss + λ E_{x ~ B'} (f_θ(x) - f_θ'(x))²,   θ' the parameters `lag` updates ago, B' a batch other than the loss's own

B' is the batch of the step before; in a stream of independent batches that is an independent one. The mean runs over
samples and outputs, as in the released code.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from plasticity.intervention import Batch, Intervention, Learner
from plasticity.optimisers.proposing import at_least


@dataclass
class Churn(Intervention):
    """Holds outputs on other inputs where they were before the last updates."""

    strength: float = 100.0
    """λ; 100 is the published value for DQN, whose outputs are action values"""
    lag: int = 1
    """updates between θ' and θ"""

    needs_inputs = True

    def __post_init__(self) -> None:
        at_least("strength of churn", self.strength, 0)
        at_least("lag of churn", self.lag, 1)

    def begin(self, learner: Learner) -> None:
        if any("BatchNorm" in type(module).__name__ for module in learner.network.modules()):
            raise ValueError(
                "churn runs the network a second time, which the running statistics of BatchNorm do not bear"
            )
        self.network = copy.deepcopy(learner.network)
        for module in self.network.modules():  # what watches the network is not to see this second run
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.past = [self._values(learner)]  # of the last `lag` + 1 steps, oldest first
        self.inputs: Tensor | None = None

    def penalty(self, learner: Learner, parameters: Mapping[str, Tensor]) -> Tensor | None:
        if self.inputs is None or len(self.past) <= self.lag:
            return None
        if learner.members is None:
            parameters = {name: p.squeeze(0) for name, p in parameters.items()}
        inputs = self.inputs if learner.members is not None else self.inputs.squeeze(0)
        now = functional_call(self.network, dict(parameters), (inputs,))
        with torch.no_grad():
            before = functional_call(self.network, self.past[0], (inputs,))
        churn = (now - before).square()
        return self.strength * (churn.flatten(1).mean(1) if learner.members is not None else churn.mean().unsqueeze(0))

    @torch.no_grad()
    def after_step(self, learner: Learner, batch: Batch) -> None:
        self.inputs = batch.inputs
        self.past = [*self.past, self._values(learner)][-(self.lag + 1) :]

    @staticmethod
    def _values(learner: Learner) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in learner.network.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"past": self.past, "inputs": self.inputs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past, self.inputs = [dict(past) for past in state["past"]], state["inputs"]
