"""What keeps the networks of an agent able to learn: interventions at each network, a schedule for its learning rates.

An agent makes its networks and their optimisers through one `Plasticity`, and has nothing else to do with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from agents.networks import initialise_, new_network
from agents.population import of_seed
from plasticity.adam import Adam
from plasticity.intervention import Intervention, Learner
from plasticity.networks.structure import find_structure
from plasticity.networks.tracing import leading_axes
from plasticity.optimisers.members import MemberOptimizer
from plasticity.plastic_optimizer import PlasticOptimizer, brings_optimizer, check_fits, other_optimizer
from plasticity.population import Axes, RandomStream
from plasticity.schedules import Constant, Schedule

Network = TypeVar("Network", bound=nn.Module)


class AgentOptimizer(PlasticOptimizer):
    """The same for agents, whose seeds are saved one by one.

    Members of the learner are the seeds; networks side by side in one (twin critics) are members of their own.
    """

    def seed_state(self, seed: int, lead: Axes) -> dict[str, Any]:
        """Of one seed: moments, steps taken, interventions and what they draw from."""
        kept = [of_seed(i.state_dict(), self._place(i, seed), lead) for i in self.interventions]
        generator = self.learner.generators[seed * self.learner.twins].get_state()
        own = of_seed(self.inner.state_dict(), self._place_in_optimizer(seed), lead)
        return {"optimizer": own, "steps": self.learner.steps, "interventions": kept, "generator": generator}

    def load_seed_state(self, state: Mapping[str, Any], seed: int, lead: Axes) -> None:
        """Undo `seed_state`. Raises ValueError if it is of other interventions."""
        parts = {"optimizer", "steps", "interventions", "generator"}
        if set(state) != parts or len(state["interventions"]) != len(self.interventions):
            raise ValueError("the saved optimiser is of an agent with other interventions")
        place = self._place_in_optimizer(seed)
        self.inner.load_state_dict(_with_part(self.inner.state_dict(), state["optimizer"], place, lead))
        self.learner.steps = state["steps"]
        self.learner.generators[seed * self.learner.twins].set_state(state["generator"])
        for intervention, saved in zip(self.interventions, state["interventions"], strict=True):
            place = self._place(intervention, seed)
            intervention.load_state_dict(_with_part(intervention.state_dict(), saved, place, lead))

    def _place(self, intervention: Intervention, seed: int) -> int | slice:
        """Where a seed is along the first axis of an intervention's tensors."""
        return self._members_of(seed) if intervention.sees_members else seed

    def _place_in_optimizer(self, seed: int) -> int | slice:
        return self._members_of(seed) if isinstance(self.inner, MemberOptimizer) else seed

    def _members_of(self, seed: int) -> slice:
        twins = self.learner.twins
        return slice(seed * twins, (seed + 1) * twins)


def _with_part(whole: Any, part: Any, place: int | slice, lead: Axes) -> Any:
    """The nested state `whole` of all seeds, with that of one of them, at `place`, replaced by `part`."""
    if not lead:
        return part
    if isinstance(part, Mapping):
        return {name: _with_part((whole or {}).get(name), value, place, lead) for name, value in part.items()}
    if isinstance(part, list | tuple):
        whole = [None] * len(part) if whole is None else whole
        if len(part) != len(whole):
            raise ValueError("the saved state is of other interventions")
        return [_with_part(mine, value, place, lead) for mine, value in zip(whole, part, strict=True)]
    if not isinstance(part, Tensor) or not (part.ndim or isinstance(whole, Tensor) and whole.ndim):
        return part
    if isinstance(whole, Tensor):
        changed = whole.detach().clone()
    else:  # what comes up only in the course of training
        changed = part.new_zeros(lead[0] * len(part), *part.shape[1:])
    changed[place] = part
    return changed


Optimizer = Adam | AgentOptimizer
Schedulable = TypeVar("Schedulable", Adam, AgentOptimizer)


class Plasticity:
    """Makes the networks and optimisers of one agent.

    interventions: makes new ones, called once for each network. schedule: of all learning rates, in environment steps.
    task_steps: after how many of them the task changes, for schedules that then begin again.
    Without either, networks and optimisers are those of an agent that knows nothing of this.
    """

    def __init__(
        self,
        interventions: Callable[[], Sequence[Intervention]] = list,
        schedule: Schedule | None = None,
        task_steps: int | None = None,
    ) -> None:
        self._task_steps = task_steps
        self._interventions, self._schedule = interventions, schedule or Constant()
        self._made: dict[nn.Module, tuple[list[Intervention], Callable[[], nn.Module], RandomStream]] = {}
        self._rates: list[tuple[Optimizer, float]] = []

    def network(self, make: Callable[[], Network], stream: RandomStream) -> Network:
        """As `agents.networks.new_network`, with what the interventions build in. Raises ValueError if they cannot.

        stream: of the first weights and, later on, of what interventions draw.
        """
        interventions = list(self._interventions())
        for intervention in interventions:
            check_fits(intervention, "agents")

        def build() -> nn.Module:
            network: nn.Module = make()
            for intervention in interventions:
                network = intervention.build(network)
            return network

        network = new_network(build, stream)
        self._made[network] = interventions, build, stream
        return cast(Network, network)

    def optimizer(
        self, network: nn.Module, learning_rate: float, target: nn.Module | None = None, **settings: Any
    ) -> Optimizer:
        """Of a network that `network` made, with its interventions. Raises ValueError if one cannot act there.

        target: its target network; where an intervention draws weights anew, the target gets them too. settings: those
        of `plasticity.adam.Adam`, unless an intervention brings another optimiser, at the same learning rate.
        """
        interventions, build, stream = self._made[network]
        if not interventions:
            return self.scheduled(Adam(list(network.parameters()), learning_rate, **settings))

        def fresh(generator: torch.Generator) -> nn.Module:
            with stream.device:
                drawn = build()
            initialise_(drawn, generator)
            return drawn

        with stream.device:
            plan = build()  # of one seed
        structure = find_structure(plan)
        leading = leading_axes(network, stream.lead[0] if stream.lead else None)
        counts = {n: math.prod(p.shape[: leading[n]]) for n, p in network.named_parameters()}
        _check_members(interventions, counts)
        members, seeds = max(counts.values()), len(stream.generators)
        twins = members // seeds
        generators = [generator for generator in stream.generators for _ in range(twins)]
        shared = members if stream.lead or twins > 1 else None
        learner = Learner(network, structure, None, shared, generators, fresh, twins=twins, leading=leading)
        if target is not None:
            learner.copies.append({n: learner.by_member(n, p.detach()) for n, p in target.named_parameters()})
        inner = other_optimizer(plan, learner, interventions, learning_rate)
        if inner is None:
            inner = learner.optimizer = Adam(list(network.parameters()), learning_rate, **settings)
        return self.scheduled(AgentOptimizer(learner, inner, interventions))

    def scheduled(self, optimizer: Schedulable) -> Schedulable:
        """The optimiser, whose learning rate follows the schedule from now on."""
        self._rates.append((optimizer, optimizer.learning_rate))
        return optimizer

    def at(self, step: int) -> None:
        """Set the learning rates for the updates at this environment step."""
        if not isinstance(self._schedule, Constant):
            factor = self._schedule.factor(step, step % self._task_steps if self._task_steps else step)
            for optimizer, rate in self._rates:
                optimizer.learning_rate = rate * factor

    @property
    def is_constant(self) -> bool:
        """Whether all updates are alike: no interventions, and learning rates that stay as they are."""
        return isinstance(self._schedule, Constant) and not any(made for made, *_ in self._made.values())

    @property
    def uses_boundaries(self) -> bool:
        """Whether an intervention acts where the task changes."""
        return any(intervention.uses_boundaries for made, *_ in self._made.values() for intervention in made)

    def at_boundary(self) -> None:
        """The task has changed, between the last update and the next."""
        for optimizer, _ in self._rates:
            if isinstance(optimizer, AgentOptimizer):
                optimizer.at_boundary()


def _check_members(interventions: Sequence[Intervention], counts: Mapping[str, int]) -> None:
    """Raises ValueError if parameters, with `counts` of members, are not all of as many as the interventions need."""
    one, other = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    acting = next((i for i in interventions if i.sees_members or brings_optimizer(i)), None)
    if acting is not None and counts[one] != counts[other]:
        raise ValueError(
            f"{type(acting).__name__} acts on each of the networks that '{other}' has side by side, "
            f"but they share '{one}'; leave out the intervention that put it in"
        )
