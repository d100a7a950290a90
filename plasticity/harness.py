"""All seeds of one method on one problem, trained together as a stacked population.

    for each task: for each step: predict, measure, learn;  then interventions that may know of the boundary

`Trial` holds everything that decides the future and can be saved and continued between any two steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plasticity.adam import Adam
from plasticity.denormals import denormals_as_zero
from plasticity.intervention import Batch, Intervention, Learner, by_stage
from plasticity.measures.diagnostics import Diagnostics
from plasticity.networks.architectures import ARCHITECTURES, draw_
from plasticity.networks.mlp_gradients import MLPGradients, Passed, mlp_gradients
from plasticity.networks.stacked import stack
from plasticity.networks.structure import Structure, activations, find_structure
from plasticity.optimisers.adamp import AdamP
from plasticity.optimisers.proposing import ProposingOptimizer, scaled_step
from plasticity.optimisers.sgdp import SGDP
from plasticity.problems.losses import majority_share, member_losses, member_scores
from plasticity.problems.published import Problem
from plasticity.problems.streams import generator, open_stream

_GATHERED = 512  # samples of each member that are gathered from the images at a time
_PROBED = 512  # samples on which the costly diagnostics are measured


@dataclass(frozen=True)
class TaskResult:
    """What a finished task left: metrics [K] by name. steps: optimiser steps of each member so far."""

    task: int
    steps: int
    metrics: Mapping[str, Tensor]


class Trial:
    """One composition of interventions on one problem, one member a seed.

    interventions: objects of this trial alone; none for the plain learner. folder: where data sets lie. compiled: the
    network goes through `torch.compile`, which pays in long runs. diagnostics: what else is measured, on its own
    schedule, with the interventions' own metrics, and at the end of each `costly_every`-th task and the last, on
    samples of that task. Raises ValueError for what does not fit together.
    """

    def __init__(
        self,
        problem: Problem,
        interventions: Sequence[Intervention],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        compiled: bool = False,
        diagnostics: Diagnostics | None = None,
        costly_every: int = 1,
    ):
        self.problem, self.seeds, self.device = problem, tuple(seeds), torch.device(device)
        self.interventions = list(interventions)
        self._after = by_stage(self.interventions)
        self.stream = open_stream(problem, self.seeds, self.device, folder)
        self._template = self._built()
        networks = [self._fresh(generator(self.device, seed, "initialisation")) for seed in self.seeds]
        self.network = stack(networks)
        self.parameter_count = sum(p.numel() for p in networks[0].parameters())
        drawn = [generator(self.device, seed, "intervention") for seed in self.seeds]
        self.learner = Learner(
            self.network, find_structure(self.network), self._optimizer(), len(self.seeds), drawn, self._fresh
        )
        for intervention in self.interventions:
            intervention.begin(self.learner)
        self._parameters = list(self.network.parameters())
        self._watches = any(i.needs_activations for i in self.interventions)
        self._scales = any(i.scales_steps for i in self.interventions)
        self._penalises = any(i.penalises for i in self.interventions)
        by_hand = None if compiled else mlp_gradients(self.network)
        self._differentiation = by_hand or Autograd(self.network, self.learner.structure, self._watches, compiled)
        self.diagnostics = diagnostics
        self.measurements: list[tuple[int, Mapping[str, Tensor]]] = []  # of single steps, until someone takes them
        self._costly_every = costly_every
        if diagnostics is not None:
            diagnostics.begin(self.learner)
        self.index = self.step = 0
        self.task = self.stream.task(0)
        self._totals = torch.zeros(2, len(self.seeds), device=self.device)  # score and loss, summed over steps

    def _built(self) -> nn.Module:
        problem = self.problem
        network = ARCHITECTURES[problem.architecture](self.stream.shape, problem.hidden, problem.outputs)
        for intervention in self.interventions:
            network = intervention.build(network)
        return network.to(self.device)

    def _fresh(self, source: torch.Generator) -> nn.Module:
        return draw_(copy.deepcopy(self._template), self.problem.initialisation, source)

    def _optimizer(self) -> Any:
        named, problem = dict(self.network.named_parameters()), self.problem
        offered = [i.optimizer(self.network, named, problem.learning_rate, stacked=True) for i in self.interventions]
        parameters = list(named.values())
        own = [optimizer for optimizer in offered if optimizer is not None]
        if len(own) > 1:
            raise ValueError("two of the interventions are optimisers; a network has one")
        scales = any(i.scales_steps for i in self.interventions)
        if own:
            if scales and not isinstance(own[0], ProposingOptimizer):
                raise ValueError(
                    f"{type(own[0]).__name__} cannot have its steps scaled; use one of plasticity.optimisers"
                )
            return own[0]
        if scales:  # without projection they are Adam and SGD
            if problem.optimizer == "adam":
                return AdamP(parameters, problem.learning_rate, delta=0.0, stacked=True)
            return SGDP(parameters, problem.learning_rate, problem.momentum, delta=0.0, stacked=True)
        if problem.optimizer == "adam":
            return Adam(parameters, problem.learning_rate)
        return torch.optim.SGD(parameters, problem.learning_rate, problem.momentum)

    @property
    def done(self) -> bool:
        return self.index >= self.problem.tasks

    def advance(self, steps: int) -> TaskResult | None:
        """Take up to `steps` steps, no further than the end of the present task; its result if it ended."""
        stop = min(self.step + steps, self.problem.steps)
        gathered = max(1, _GATHERED // self.problem.batch_size)
        while self.step < stop:
            end = min(self.step + gathered, stop)
            inputs, targets = self.task.batches(self.step, end)
            outputs = torch.stack([self._learn(inputs[:, i], targets[:, i]) for i in range(end - self.step)], 1)
            seen = outputs.flatten(1, 2), targets.flatten(1, 2)
            self._totals += torch.stack([member_scores(*seen), member_losses(*seen)]) * (end - self.step)
            self.step = end
        return self._end_task() if self.step == self.problem.steps else None

    def _learn(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One step on inputs [K, B, ...] and targets [K, B, ...]. Returns the outputs before it, [K, B, out]."""
        learner, differentiation = self.learner, self._differentiation
        if isinstance(differentiation, MLPGradients) and not all(p.requires_grad for p in self._parameters):
            differentiation = self._differentiation = Autograd(self.network, learner.structure, self._watches)
        passed = differentiation.forward(inputs)
        batch = Batch(inputs, targets, passed.activations)
        diagnostics = self.diagnostics if self._is_measured else None
        gradients: Sequence[Tensor] = ()
        if diagnostics is not None:
            gradients = differentiation.gradients(passed, targets)
            loss_before = member_losses(passed.outputs.detach(), targets)
            diagnostics.before_step(learner)
        if isinstance(differentiation, MLPGradients) and self._descends_plainly:
            differentiation.descend(passed, targets, learner.optimizer.param_groups[0]["lr"])
        else:
            self._step(gradients or differentiation.gradients(passed, targets), batch)
        learner.steps += 1
        for intervention in self._after:
            intervention.after_step(learner, batch)
        if diagnostics is not None:
            found = diagnostics.cheap(learner, batch, gradients, member_losses, loss_before)
            for intervention in self.interventions:  # whose numbers may be counters that go on
                found |= {name: value.clone() for name, value in intervention.metrics(learner).items()}
            self.measurements.append((learner.steps, found))
        return passed.outputs.detach()

    @property
    def _is_measured(self) -> bool:
        return self.diagnostics is not None and self.diagnostics.due(self.learner.steps + 1)

    @property
    def _costly_is_due(self) -> bool:
        return (self.index + 1) % self._costly_every == 0 or self.index + 1 == self.problem.tasks

    @property
    def _descends_plainly(self) -> bool:
        """Plain gradient descent, and nothing that wants to see a gradient."""
        optimizer = self.learner.optimizer
        plain = type(optimizer) is torch.optim.SGD and self.problem.momentum == 0
        return plain and not self._penalises

    def _step(self, gradients: Sequence[Tensor], batch: Batch) -> None:
        learner = self.learner
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        if self._penalises:
            gradients = self._with_penalties(trained, gradients)
        if isinstance(learner.optimizer, Adam):
            learner.optimizer.step(gradients)
            return
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        if self._scales:
            scaled_step(learner, batch, self.interventions)
        else:
            with denormals_as_zero():
                learner.optimizer.step()

    def _with_penalties(self, trained: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> list[Tensor]:
        named = dict(self.network.named_parameters())
        asked = [i.penalty(self.learner, named) for i in self.interventions]
        penalties = [penalty.sum() for penalty in asked if penalty is not None]
        if not penalties:
            return list(gradients)
        added = torch.autograd.grad(torch.stack(penalties).sum(), trained, allow_unused=True)
        return [gradient if more is None else gradient + more for gradient, more in zip(gradients, added, strict=True)]

    @torch.no_grad()
    def _end_task(self) -> TaskResult:
        score, loss = self._totals / self.problem.steps
        metrics = {self.problem.online_metric: score, "online_loss": loss}
        self.network.eval()
        inputs, targets = self.task.examples()
        metrics["final_" + self.problem.online_metric.removeprefix("online_")] = self.score(inputs, targets)
        if self.problem.loss == "cross_entropy":
            metrics["chance_accuracy"] = majority_share(targets, self.problem.outputs)
        if self.problem.held_out:
            metrics["test_accuracy"] = self.score(*self.task.test())
        self.network.train()
        if self.diagnostics is not None and self._costly_is_due:
            sample = inputs[:, :_PROBED], targets[:, :_PROBED]
            with torch.enable_grad():
                metrics |= self.diagnostics.costly(self.learner, *sample, member_losses)
        result = TaskResult(self.index, self.learner.steps, metrics)
        self.index, self.step = self.index + 1, 0
        self._totals.zero_()
        if not self.done:
            self.task = self.stream.task(self.index)
            if self.problem.zero_head:
                for name in self.learner.structure.heads:
                    self.learner.parameter(name).zero_()
            for intervention in self.interventions:
                if intervention.uses_boundaries:
                    intervention.at_boundary(self.learner)
        return result

    @torch.no_grad()
    def score(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Accuracy or squared error of each member on inputs [K, M, ...], targets [K, M, ...]: [K]."""
        parts = [self.network(part) for part in inputs.split(1000, 1)]
        return member_scores(torch.cat(parts, 1), targets)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, as tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "interventions": [intervention.state_dict() for intervention in self.interventions],
            "generators": [g.get_state() for g in self.learner.generators],
            "steps": self.learner.steps,
            "index": self.index,
            "step": self.step,
            "totals": self._totals.clone(),
            "diagnostics": {} if self.diagnostics is None else self.diagnostics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly. Raises ValueError if the state is of another trial."""
        if len(state["interventions"]) != len(self.interventions) or len(state["generators"]) != len(self.seeds):
            raise ValueError("the saved trial has other interventions or another number of seeds")
        self.network.load_state_dict(state["network"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        for intervention, saved in zip(self.interventions, state["interventions"], strict=True):
            intervention.load_state_dict(saved)
        for source, saved in zip(self.learner.generators, state["generators"], strict=True):
            source.set_state(saved)
        self.learner.steps, self.index, self.step = state["steps"], state["index"], state["step"]
        self._totals.copy_(state["totals"])
        if self.diagnostics is not None and state["diagnostics"]:
            self.diagnostics.load_state_dict(state["diagnostics"])
        if not self.done:
            self.task = self.stream.task(self.index)


class Autograd:
    """Forward and backward pass of any stacked network; the same interface as `MLPGradients`."""

    def __init__(self, network: nn.Module, structure: Structure, watches: bool, compiled: bool = False):
        self._network, self._structure, self._watches = network, structure, watches
        self._forward = torch.compile(network) if compiled else network

    def forward(self, x: Tensor) -> Passed:
        """x [K, B, ...] -> outputs [K, B, out], with their graph, and activations if they are watched."""
        if not self._watches:
            return Passed(self._forward(x), {})
        with activations(self._network, self._structure) as seen:
            return Passed(self._network(x), seen)

    def gradients(self, passed: Passed, targets: Tensor) -> Sequence[Tensor]:
        """Of the members' losses, one tensor a trained parameter, in their order."""
        trained = [parameter for parameter in self._network.parameters() if parameter.requires_grad]
        return torch.autograd.grad(member_losses(passed.outputs, targets).sum(), trained)
