"""What keeps the networks of an agent able to learn: interventions at each network, a schedule for its learning rates.

An agent makes its networks and their optimisers through one `Plasticity`, and has nothing else to do with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from agents.networks import initialise_, new_network
from agents.population import Axes, RandomStream, of_seed
from plasticity.adam import Adam
from plasticity.intervention import Batch, Intervention, Learner, by_stage
from plasticity.networks.structure import find_structure
from plasticity.schedules import Constant, Schedule

Network = TypeVar("Network", bound=nn.Module)
_NO_BATCH = Batch(torch.empty(0), torch.empty(0), {})


class PlasticAdam(Adam):
    """Adam on the parameters of one network, with interventions in the loss and after each step."""

    def __init__(self, learner: Learner, interventions: Sequence[Intervention], learning_rate: float, **settings: Any):
        super().__init__(list(learner.network.parameters()), learning_rate, **settings)
        learner.optimizer = self
        self.learner, self.interventions = learner, by_stage(interventions)
        for intervention in self.interventions:
            intervention.begin(learner)
        self._penalising = [i for i in self.interventions if i.penalises]

    def penalty(self) -> Tensor | None:
        """What is added to the loss of each seed, [K] (K = 1: one seed); None: nothing."""
        if not self._penalising:
            return None
        alone = self.learner.members is None
        named = {n: p.unsqueeze(0) if alone else p for n, p in self.learner.network.named_parameters()}
        found = [i.penalty(self.learner, named) for i in self._penalising]
        penalties = [penalty for penalty in found if penalty is not None]
        return torch.stack(penalties).sum(0) if penalties else None

    def step(self, gradients: Sequence[Tensor]) -> None:
        super().step(gradients)
        self.learner.steps += 1
        for intervention in self.interventions:
            intervention.after_step(self.learner, _NO_BATCH)

    def seed_state(self, seed: int, lead: Axes) -> dict[str, Any]:
        """Of one seed: moments, steps taken, interventions."""
        kept = [of_seed(intervention.state_dict(), seed, lead) for intervention in self.interventions]
        return {"adam": of_seed(self.state_dict(), seed, lead), "steps": self.learner.steps, "interventions": kept}

    def load_seed_state(self, state: Mapping[str, Any], seed: int, lead: Axes) -> None:
        """Undo `seed_state`. Raises ValueError if it is of other interventions."""
        own: dict[str, Any] = {"adam": self.state_dict(), "interventions": [i.state_dict() for i in self.interventions]}
        if set(state) != {"adam", "steps", "interventions"} or len(state["interventions"]) != len(self.interventions):
            raise ValueError("the saved optimiser is of an agent with other interventions")
        self.load_state_dict(_with_seed(own["adam"], state["adam"], seed, lead))
        self.learner.steps = state["steps"]
        for intervention, mine, saved in zip(
            self.interventions, own["interventions"], state["interventions"], strict=True
        ):
            intervention.load_state_dict(_with_seed(mine, saved, seed, lead))


def _with_seed(whole: Any, part: Any, seed: int, lead: Axes) -> Any:
    """The nested state `whole` of all seeds, with that of one seed replaced by `part`."""
    if not lead:
        return part
    if isinstance(part, Mapping):
        return {name: _with_seed(whole[name], value, seed, lead) for name, value in part.items()}
    if isinstance(part, list | tuple):
        if len(part) != len(whole):
            raise ValueError("the saved state is of other interventions")
        return [_with_seed(mine, value, seed, lead) for mine, value in zip(whole, part, strict=True)]
    if isinstance(part, Tensor) and whole.ndim:
        changed = whole.detach().clone()
        changed[seed] = part
        return changed
    return part


class Plasticity:
    """Makes the networks and optimisers of one agent.

    interventions: makes new ones, called once for each network. schedule: of all learning rates, in environment steps.
    Without either, networks and optimisers are those of an agent that knows nothing of this.
    """

    def __init__(
        self, interventions: Callable[[], Sequence[Intervention]] = list, schedule: Schedule | None = None
    ) -> None:
        self._interventions, self._schedule = interventions, schedule or Constant()
        self._made: dict[nn.Module, tuple[list[Intervention], Callable[[], nn.Module], RandomStream]] = {}
        self._rates: list[tuple[Adam, float]] = []

    def network(self, make: Callable[[], Network], stream: RandomStream) -> Network:
        """As `agents.networks.new_network`, with what the interventions build in. Raises ValueError if they cannot."""
        interventions = list(self._interventions())

        def build() -> nn.Module:
            network: nn.Module = make()
            for intervention in interventions:
                network = intervention.build(network)
            return network

        network = new_network(build, stream)
        self._made[network] = interventions, build, stream
        return cast(Network, network)

    def optimizer(self, network: nn.Module, learning_rate: float, **settings: Any) -> Adam:
        """Of a network that `network` made, with its interventions. settings: those of `plasticity.adam.Adam`."""
        interventions, build, stream = self._made[network]
        if not interventions:
            return self.scheduled(Adam(list(network.parameters()), learning_rate, **settings))

        def fresh(generator: torch.Generator) -> nn.Module:
            with stream.device:
                drawn = build()
            initialise_(drawn, generator)
            return drawn

        for intervention in interventions:
            _check(intervention)
        with stream.device:
            structure = find_structure(build())
        members = stream.lead[0] if stream.lead else None
        learner = Learner(network, structure, None, members, [], fresh)
        return self.scheduled(PlasticAdam(learner, interventions, learning_rate, **settings))

    def scheduled(self, optimizer: Adam) -> Adam:
        """The optimiser, whose learning rate follows the schedule from now on."""
        self._rates.append((optimizer, optimizer.learning_rate))
        return optimizer

    def at(self, step: int) -> None:
        """Set the learning rates for the updates at this environment step."""
        if not isinstance(self._schedule, Constant):
            factor = self._schedule.factor(step, step)
            for optimizer, rate in self._rates:
                optimizer.learning_rate = rate * factor


def _check(intervention: Intervention) -> None:
    """Raises ValueError for what an agent does not offer."""
    for needs, what in (
        (intervention.needs_activations, "sees the activations"),
        (intervention.uses_boundaries, "is told when the task changes"),
        (intervention.scales_steps, "scales steps"),
        (type(intervention).optimizer is not Intervention.optimizer, "is an optimiser"),
    ):
        if needs:
            name = type(intervention).__name__
            raise ValueError(
                f"{name} {what}, which agents do not offer; nap, layernorm, rmsnorm and l2-init go with them"
            )
