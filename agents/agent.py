"""The contract of an agent, and the few things that every agent does in the same way."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar, cast, get_args, get_origin, get_type_hints, runtime_checkable

import torch
from torch import Tensor

from agents.fading import FadingReplay
from agents.plastic import AgentOptimizer, Optimizer, Plasticity
from agents.population import of_seed
from agents.replay import Replay
from envs.runner import ActionSpec, ContinuousActionSpec, DiscreteActionSpec, ObservationSpec, Step
from plasticity.population import Axes, RandomStream, copy_state_

Metrics = dict[str, Tensor]
Streams = Mapping[str, RandomStream]
Function = TypeVar("Function", bound=Callable[..., Any])
Pending = TypeVar("Pending", bound=tuple[Tensor, ...])

# One stream for each purpose an agent draws random numbers for; `runs` spawns them from the seed.
PURPOSES = ("initialisation", "exploration", "sampling", "update", "evaluation")


class Agent(Protocol):
    """What the loop needs of an agent.

    Every module of an agent offers `Config` and `Agent(observation_spec, action_spec, config, *, num_envs, device,
    streams, compiled=False, plasticity=None)`, which raises ValueError if the agent cannot act in such an environment.

    Several seeds in one agent. Streams of S seeds make a population (`agents.population`): whatever goes in and comes
    out has S in front, and every seed is, to rounding, what it would be alone. Shapes below show it as *S, empty for
    one seed. To be liftable an agent

    * counts axes from the end, in losses (one ends in `.mean(-1)` over its batch, and is [*S]) and in networks, which
      it writes as for one seed, as `agents.networks.Liftable`, and makes by `new_network`;
    * draws from its streams alone, in shapes without *S, and keeps what it remembers in tensors with *S in front; a 0-d
      tensor is common to all seeds, as are its counters, so nothing that a seed's numbers decide may choose what is
      computed next;
    * hands all of it to `parts_state` and `load_parts_state`: what is saved is one seed's, and knows no population.

    An agent that is not calls `require_one_seed` first; its seeds are then trained in processes.
    """

    plasticity: Plasticity  # `plasticity.at_boundary` is to be told where the task changes
    steps: int  # environment steps observed by each seed, summed over its environments
    updates: int  # gradient steps taken

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """obs [*S, N, *obs_shape] -> action [*S, N, A] in the environment's units, or [*S, N] int64.

        With `explore`, the agent remembers obs and action: the next `observe` completes the transition.
        """
        ...

    def observe(self, step: Step) -> None:
        """Take in what the last exploring `act` led to; fields are [*S, N, ...]."""
        ...

    def update(self) -> Metrics:
        """Take the gradient steps that are due. Returns tensors [*S] of the last one; empty if none was due."""
        ...

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        """Everything that decides the future of one seed; `seed` counts from 0 through a population."""
        ...

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        """Restore exactly. All seeds of a population must be given states of the same step."""
        ...


@runtime_checkable
class Valuing(Protocol):
    """An agent whose critics can be asked; its `config` has a `discount`."""

    def value(self, obs: Tensor) -> Tensor:
        """The discounted return that the trained critics, not their targets, expect of what `act` does without
        exploration at obs [*S, N, *obs_shape], in the rewards of the environment: [*S, N]. Twin critics: their mean."""
        ...


def updates_due(steps: int, num_envs: int, warmup_steps: int, update_every: int) -> int:
    """How many multiples of `update_every` the last round of `num_envs` steps reached, once the warm-up is over."""
    if steps <= warmup_steps:
        return 0
    return steps // update_every - max(steps - num_envs, warmup_steps) // update_every


def take_pending(pending: Pending | None) -> Pending:
    """What the last exploring `act` left. Raises RuntimeError if there was none since the last `observe`."""
    if pending is None:
        raise RuntimeError("observe() needs an act(obs, explore=True) before it")
    return pending


def compiled_if(compiled: bool, function: Function) -> Function:
    """The function itself, or compiled by `torch.compile` at its first call."""
    return cast(Function, torch.compile(function)) if compiled else function


def gradient_step(optimizer: Optimizer, loss: Tensor, max_norm: float = math.inf) -> None:
    """One step of the optimiser's parameters down `loss` [*S]; nothing else that the loss went through gets a gradient.

    A gradient longer than `max_norm`, over all parameters of a seed together, is scaled down to it.
    """
    joint_step([optimizer], loss, max_norm)


def joint_step(optimizers: Sequence[Optimizer], loss: Tensor, max_norm: float = math.inf) -> None:
    """One step of several optimisers' parameters down one `loss` [*S], by one backward pass.

    max_norm: as in `gradient_step`, of all their parameters together.
    """
    gradients = _gradients(optimizers, loss)
    if max_norm < math.inf:
        norms = [torch.linalg.vector_norm(g.reshape(*loss.shape, -1), dim=-1) for own in gradients for g in own]
        norm = torch.linalg.vector_norm(torch.stack(norms, -1), dim=-1)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        gradients = [[g * scale.reshape(*loss.shape, *[1] * (g.ndim - loss.ndim)) for g in own] for own in gradients]
    for optimizer, own in zip(optimizers, gradients, strict=True):
        optimizer.step(own)


def _gradients(optimizers: Sequence[Optimizer], loss: Tensor) -> list[list[Tensor]]:
    """Of the loss and what the optimisers' interventions add to it, with respect to the parameters of each."""
    for optimizer in optimizers:
        penalty = optimizer.penalty(loss.shape) if isinstance(optimizer, AgentOptimizer) else None
        if penalty is not None:
            loss = loss + penalty
    parameters = [parameter for optimizer in optimizers for parameter in optimizer.parameters]
    gradients = iter(torch.autograd.grad(loss.sum() if loss.ndim else loss, parameters))
    found = [list(itertools.islice(gradients, len(optimizer.parameters))) for optimizer in optimizers]
    for optimizer, own in zip(optimizers, found, strict=True):
        if optimizer.on_gradients is not None:
            optimizer.on_gradients(own)
    return found


@torch.no_grad()
def lerp_(targets: list[Tensor], sources: list[Tensor], rate: float) -> None:
    """target <- (1 - rate) target + rate source, pair by pair (Polyak averaging)."""
    torch._foreach_lerp_(targets, sources, rate)


def parts_state(parts: Mapping[str, Any], seed: int, lead: Axes) -> dict[str, Any]:
    """The state of one seed: of networks, optimisers, tensors, replay and random streams, by name."""
    return {name: _part_state(part, seed, lead) for name, part in parts.items()}


def _part_state(part: Any, seed: int, lead: Axes) -> Any:
    if isinstance(part, Replay | FadingReplay):
        return part.state_dict(seed)
    if isinstance(part, AgentOptimizer):
        return part.seed_state(seed, lead)
    if isinstance(part, RandomStream):
        return part.generators[seed].get_state()
    return of_seed(part.detach() if isinstance(part, Tensor) else part.state_dict(), seed, lead)


def load_parts_state(parts: Mapping[str, Any], state: Mapping[str, Any], seed: int, lead: Axes) -> None:
    """Undo `parts_state`. Raises ValueError if a part is missing from `state`, or does not fit."""
    missing = [name for name in parts if name not in state]
    if missing:
        raise ValueError(f"the saved agent has no '{missing[0]}': it was saved by another kind of agent")
    for name, part in parts.items():
        if isinstance(part, Replay | FadingReplay):
            part.load_state_dict(state[name], seed)
        elif isinstance(part, AgentOptimizer):
            part.load_seed_state(state[name], seed, lead)
        elif isinstance(part, RandomStream):
            part.generators[seed].set_state(state[name])
        else:
            copy_state_(_part_state(part, seed, lead), state[name], name)


class Misfit(ValueError):
    """The agent cannot act in an environment of this kind; another one may."""


class ActionScale:
    """Between the agent's actions in [-1, 1] and the environment's box [low, high]."""

    def __init__(self, spec: ContinuousActionSpec, device: torch.device):
        low, high = torch.from_numpy(spec.low), torch.from_numpy(spec.high)
        self.centre = ((high + low) / 2).to(device)
        self.half_range = ((high - low) / 2).to(device)

    def to_environment(self, action: Tensor) -> Tensor:
        """[..., A] in [-1, 1] -> [..., A] in [low, high]."""
        return torch.addcmul(self.centre, self.half_range, action)


def require_continuous(agent_name: str, spec: ActionSpec) -> ContinuousActionSpec:
    """Raises Misfit if the environment's actions are discrete."""
    if not isinstance(spec, ContinuousActionSpec):
        raise Misfit(f"'{agent_name}' needs continuous actions, this environment has {spec.count} discrete ones")
    return spec


def require_discrete(agent_name: str, spec: ActionSpec) -> DiscreteActionSpec:
    """Raises Misfit if the environment's actions are continuous."""
    if not isinstance(spec, DiscreteActionSpec):
        raise Misfit(f"'{agent_name}' needs discrete actions, this environment has {spec.size} continuous ones")
    return spec


def require_flat(agent_name: str, spec: ObservationSpec) -> int:
    """The number of observed values. Raises Misfit if the environment shows images."""
    if len(spec.shape) != 1:
        raise Misfit(f"'{agent_name}' needs a vector of observations, this environment shows {list(spec.shape)}")
    return spec.shape[0]


_AT_LEAST_ONE = {
    *(
        "batch_size",
        "replay_capacity",
        "policy_delay",
        "n_step",
        "update_every",
        "updates_per_round",
        "updates_per_step",
    ),
    *("target_update_every", "epsilon_decay_steps", "nodes", "episode_limit", "feature_heads"),
    *("rollout_steps", "epochs", "minibatches", "importance_steps", "critics"),
    *("embedding", "checkpoint_episodes", "sampled_actions", "backup_actions"),
}
_POSITIVE = {
    *("learning_rate", "vae_learning_rate", "actor_learning_rate", "critic_learning_rate"),
    "adam_epsilon",
    "initial_temperature",
    "max_gradient_norm",
    "noise_std",
    "clip",
    "smallest_priority",
}
_FRACTION = {
    *("discount", "target_rate", "epsilon_start", "epsilon_end", "epsilon_evaluation"),
    *("gae_lambda", "advantage_rate", "first_moment_rate", "second_moment_rate"),
    *("priority_exponent", "importance_start", "checkpoint_reset"),
    *("batch_norm_momentum", "offline_share", "anneal_end", "expectile"),
}
_NOT_NEGATIVE = {
    *("warmup_steps", "exploration_noise", "target_noise", "target_noise_clip", "fall_window", "terminal_lives"),
    *("value_weight", "entropy_weight", "representation_weight", "weight_decay", "bottleneck", "encoder_features"),
    *("alpha", "mask", "vae_weight", "cloning_weight", "critic_penalty", "inverse_temperature", "conservatism"),
    "renormalise_after",
    "checkpoint_after",
}
_LAYERS = ("hidden", "critic_hidden", "vae_hidden")


def check_config(config: Any) -> None:
    """Raises ValueError naming the first hyper-parameter outside its range; a name means the same in every agent."""
    kinds = get_type_hints(type(config))
    for name, value in dataclasses.asdict(config).items():
        if get_origin(kinds[name]) is Literal and value not in get_args(kinds[name]):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kinds[name]))}, got {value}")
        if name in _AT_LEAST_ONE and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if name in _POSITIVE and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
        if name in _FRACTION and not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if name in _NOT_NEGATIVE and not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
        if name == "hidden" and not value or name in _LAYERS and min(value, default=1) < 1:
            raise ValueError(f"{name} must list at least one layer size of at least 1, got {value}")
