"""What agents have in common that value every action by one network: acting, replay, target network, what is saved.

DQN, Rainbow and QR-DQN are this with a network, a target and a loss of their own.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from agents.agent import (
    Metrics,
    Streams,
    joint_step,
    lerp_,
    load_parts_state,
    parts_state,
    require_discrete,
    take_pending,
    updates_due,
)
from agents.plastic import Plasticity
from agents.population import common_lead
from agents.prioritised import PrioritisedReplay
from agents.replay import Batch, Replay
from envs.runner import ActionSpec, DiscreteActionSpec, ObservationSpec, Step
from plasticity.population import RandomStream


def make_replay(
    config: Any,
    num_envs: int,
    observation_spec: ObservationSpec,
    action_spec: ActionSpec,
    device: torch.device,
    stream: RandomStream,
) -> Replay:
    """The ring that `config.replay` names: uniform, fading or prioritised."""
    common = config.replay_capacity, num_envs, observation_spec, action_spec, device, stream
    if config.replay == "prioritised":
        return PrioritisedReplay(*common, config.priority_exponent)
    return Replay(*common, fading=config.replay == "fading")


class ValueBased(ABC):
    """Owns the networks, the optimiser and the replay ring, and acts ε-greedily.

    An agent gives `name`, `_network`, `_values` and `_loss`. Its config has the hyper-parameters read here, which mean
    in all agents what they mean in `agents.dqn.Config`.
    """

    name: str

    def __init__(
        self,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        config: Any,
        *,
        num_envs: int,
        device: torch.device,
        streams: Streams,
        compiled: bool = False,
        plasticity: Plasticity | None = None,
    ):
        spec: DiscreteActionSpec = require_discrete(self.name, action_spec)
        self.config, self.num_envs, self.device, self.lead = config, num_envs, device, common_lead(streams)
        self.plasticity = make = plasticity or Plasticity()
        self.actions = spec.count
        self.exploration, self.evaluation = streams["exploration"], streams["evaluation"]
        self.net = make.network(lambda: self._network(observation_spec), streams["initialisation"])
        self.target_net = copy.deepcopy(self.net)
        self.target_parameters: list[Tensor] = list(self.target_net.parameters())
        self.optimizer = make.optimizer(
            self.net, config.learning_rate, target=self.target_net, epsilon=config.adam_epsilon
        )
        self.optimizers: list[Any] = [self.optimizer]
        self.replay = make_replay(config, num_envs, observation_spec, spec, device, streams["sampling"])
        self.steps = self.updates = 0
        self.pending: tuple[Tensor, Tensor] | None = None  # obs and action that wait for their outcome

    @abstractmethod
    def _network(self, observation_spec: ObservationSpec) -> Any:
        """The network of one seed."""

    @abstractmethod
    def _values(self, obs: Tensor, stream: RandomStream | None) -> Tensor:
        """Q(s, ·) by which to act, [*S, N, number of actions]. stream: of exploring noise, None when evaluated."""

    @abstractmethod
    def _loss(self, batch: Batch, weight: Tensor | None) -> tuple[Tensor, Metrics, Tensor]:
        """Loss [*S], metrics [*S] and the errors that decide priorities [*S, B]. weight: of importance, [*S, B]."""

    @property
    def epsilon(self) -> float:
        """Chance of a random action at the present step."""
        done = min(1.0, self.steps / self.config.epsilon_decay_steps)
        return self.config.epsilon_start + done * (self.config.epsilon_end - self.config.epsilon_start)

    @property
    def importance_exponent(self) -> float:
        """β at the present step."""
        done = min(1.0, self.steps / self.config.importance_steps)
        return self.config.importance_start + done * (1 - self.config.importance_start)

    @torch.no_grad()
    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """As `agents.agent.Agent`."""
        stream, count = self.exploration if explore else self.evaluation, obs.shape[len(self.lead)]
        random = stream.integers(self.actions, count)
        if explore and self.steps < self.config.warmup_steps and self.epsilon == 1:
            action = random
        else:
            epsilon = self.epsilon if explore else self.config.epsilon_evaluation
            greedy = self._values(obs, stream if explore else None).argmax(-1)
            action = torch.where(stream.uniform(count) < epsilon, random, greedy)
        if explore:
            self.pending = obs, action
        return action

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        """As `agents.agent.Valuing`."""
        return self._values(obs, None).amax(-1)

    def observe(self, step: Step) -> None:
        """As `agents.agent.Agent`."""
        obs, action = take_pending(self.pending)
        self.replay.add(obs, action, step)
        self.pending = None
        self.steps += self.num_envs

    def update(self) -> Metrics:
        """As `agents.agent.Agent`."""
        config, metrics = self.config, {}
        self.plasticity.at(self.steps)
        rounds = updates_due(self.steps, self.num_envs, config.warmup_steps, config.update_every)
        for _ in range(rounds * config.updates_per_round):
            metrics = self._update_once()
        if updates_due(self.steps, self.num_envs, config.warmup_steps, config.target_update_every):
            lerp_(self.target_parameters, self.optimizer.parameters, 1.0)
        return metrics

    @property
    def update_variant(self) -> str | None:
        """Of the next update, see `agents.graphs`: all are alike, unless priorities count more and more."""
        return None if isinstance(self.replay, PrioritisedReplay) else "every"

    def _update_once(self) -> Metrics:
        config, replay = self.config, self.replay
        batch = replay.sample(config.batch_size, config.discount, config.n_step)
        prioritised = isinstance(replay, PrioritisedReplay)
        weight = replay.importance_weights(self.importance_exponent) if prioritised else None
        loss, metrics, errors = self._loss(batch, weight)
        joint_step(self.optimizers, loss, config.max_gradient_norm)
        if prioritised:
            replay.set_priorities(errors)
        self.updates += 1
        return metrics

    def _parts(self) -> dict[str, Any]:
        return {
            "net": self.net,
            "target_net": self.target_net,
            "optimizer": self.optimizer,
            "replay": self.replay,
            "exploration": self.exploration,
            "evaluation": self.evaluation,
        }

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        """As `agents.agent.Agent`."""
        parts = parts_state(self._parts(), seed, self.lead)
        return {"parts": parts, "steps": self.steps, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        """As `agents.agent.Agent`."""
        load_parts_state(self._parts(), state["parts"], seed, self.lead)
        self.steps, self.updates, self.pending = state["steps"], state["updates"], None


def weighted_mean(per_row: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over the batch of what each row adds to a loss, times its weight of importance: [*S, B] -> [*S]."""
    return (per_row if weight is None else weight * per_row).mean(-1)


def of_action(output: Tensor, action: Tensor, count: int) -> Tensor:
    """The `count` outputs that belong to one action in each row: [*S, B, A count], [*S, B] -> [*S, B, count]."""
    index = action[..., None, None].expand(*action.shape, 1, count)
    return output.unflatten(-1, (-1, count)).gather(-2, index).squeeze(-2)
