"""Fixed data of an offline agent: transitions in one packed tensor, and batches of them as networks see them.

A row of `rows` is one transition, so a batch is one gather:

    observation [O] | action [A] | reward | next observation [O] | terminal (0 or 1)

Rows are raw: observations, actions and rewards as the environment gave them, episode after episode, in order. What is
done to them (states normalised, actions brought to [-1, 1], rewards mapped) happens to each batch; so data that lie in
a mapped file are never written, and data of several seeds lie in memory once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.agent import ActionScale
from agents.replay import Batch
from plasticity.population import Axes, RandomStream

_AT_A_TIME = 65_536  # rows of a pass over the data, so that mapped files are not read into memory whole
STD_EPSILON = 1e-3  # added to the standard deviations of observations


@dataclass(frozen=True)
class Transitions:
    """N transitions of E episodes.

    rows [N, 2 O + A + 2] float32, see the module. truncated [N] bool: a time limit cut the episode off behind this row.
    starts [E + 1] int64: episode e has the rows starts[e] to starts[e + 1] - 1. whole [E] bool: False for an episode
    that was still going on where the data end, which counts for no return. mapped: the rows lie in a file, and stay
    there whatever the agent's device.
    """

    rows: Tensor
    observations: int
    actions: int
    truncated: Tensor
    starts: Tensor
    whole: Tensor
    mapped: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def obs(self) -> Tensor:
        """[N, O], a view."""
        return self.rows[:, : self.observations]

    @property
    def action(self) -> Tensor:
        """[N, A], a view."""
        return self.rows[:, self.observations : self.observations + self.actions]

    @property
    def reward(self) -> Tensor:
        """[N], a view."""
        return self.rows[:, self.observations + self.actions]

    @property
    def next_obs(self) -> Tensor:
        """[N, O], a view."""
        return self.rows[:, -self.observations - 1 : -1]

    @property
    def terminal(self) -> Tensor:
        """[N] bool."""
        return self.rows[:, -1] != 0

    @property
    def lengths(self) -> Tensor:
        """[E] int64, transitions of each episode."""
        return self.starts.diff()

    def returns(self, discount: float = 1.0) -> Tensor:
        """Σ γ^t r_t of every episode, whole or not, [E] float64."""
        episode = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        age = torch.arange(len(self)) - self.starts[:-1][episode]
        weighted = self.reward.double() * discount ** age.double()
        return torch.zeros(len(self.lengths), dtype=torch.float64).index_add_(0, episode, weighted)

    def rows_of_best(self, fraction: float, discount: float = 1.0) -> Tensor:
        """Rows [M] of the top fraction of whole episodes by return; at least one. Raises ValueError without any."""
        whole = self.whole.nonzero().flatten()
        if not len(whole):
            raise ValueError("the data have no whole episode, so none can be chosen by its return")
        order = self.returns(discount)[whole].argsort(descending=True, stable=True)
        best = whole[order[: max(1, int(fraction * len(whole)))]].sort().values
        return torch.cat([torch.arange(*self.starts[e : e + 2].tolist()) for e in best.tolist()])

    @functools.cached_property
    def followed(self) -> Tensor:
        """[N] bool: the next row is the next step of the same episode, so that its action is the one taken next."""
        found = torch.ones(len(self), dtype=torch.bool)
        found[self.starts[1:] - 1] = False
        return found

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and population standard deviation of each observed value, over `obs` alone, [O] float32 each."""
        total = torch.zeros(self.observations, dtype=torch.float64)
        for part in self.obs.split(_AT_A_TIME):
            total += part.sum(0, dtype=torch.float64)
        mean = total / len(self)
        squares = torch.zeros_like(total)
        for part in self.obs.split(_AT_A_TIME):
            squares += (part.double() - mean).square().sum(0)
        return mean.float(), (squares / len(self)).sqrt().float()


class FixedReplay:
    """Samples uniformly with replacement from transitions that lie on `device`, or in a mapped file on the host.

    mean, std [*S, 1, O]: of the normalisation, as the agent keeps them. rewards become scale · r + shift. usable: rows
    to sample from, all by default.
    """

    def __init__(
        self,
        transitions: Transitions,
        device: torch.device,
        stream: RandomStream,
        scale: ActionScale,
        discount: float,
        reward_map: tuple[float, float] = (1.0, 0.0),
        usable: Tensor | None = None,
    ):
        self.transitions, self.device, self.stream, self.lead = transitions, device, stream, stream.lead
        self.discount, self.reward_map = discount, reward_map
        self.rows = transitions.rows if transitions.mapped else transitions.rows.to(device)
        self.usable = None if usable is None else usable.to(device)
        self._scale = scale
        self.normalise_by(*(torch.full((transitions.observations,), value, device=device) for value in (0.0, 1.0)))

    def __len__(self) -> int:
        """Rows to sample from."""
        return len(self.rows) if self.usable is None else len(self.usable)

    def normalise_by(self, mean: Tensor, std: Tensor) -> None:
        """From now on observations are (s - mean) / std. Both [O], of all seeds."""
        nothing, one = torch.zeros(1, device=self.device), torch.ones(1, device=self.device)
        self._centre = torch.cat([mean, self._scale.centre, nothing, mean, nothing])
        self._spread = torch.cat([std, self._scale.half_range, one, std, one])

    def sample(self, batch_size: int) -> Batch:
        """B transitions of each seed, fields [*S, B, ...]."""
        return self.gather(self.draw(batch_size))

    def draw(self, batch_size: int) -> Tensor:
        """Rows [*S, B] int64."""
        index = self.stream.integers(len(self), batch_size)
        return index if self.usable is None else self.usable[index]

    def gather(self, index: Tensor) -> Batch:
        """The transitions of rows [*S, B] int64."""
        rows = self._taken(index)
        o, a = self.transitions.observations, self.transitions.actions
        obs, action, reward, next_obs, terminal = rows.split([o, a, 1, o, 1], -1)
        return Batch(
            obs=obs,
            action=action,
            reward=mapped(reward.squeeze(-1), self.reward_map),
            next_obs=next_obs,
            terminated=terminal.squeeze(-1) != 0,
            discount=torch.full(index.shape, self.discount, device=self.device),
        )

    def next_actions(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows [*S, B]: the action taken next [*S, B, A], and whether there is one [*S, B] bool; else it is 0."""
        o, a = self.transitions.observations, self.transitions.actions
        there = self._followed[index]
        action = self._taken((index + 1).clamp(max=len(self.rows) - 1))[..., o : o + a]
        return action * there.unsqueeze(-1), there

    @functools.cached_property
    def _followed(self) -> Tensor:
        return self.transitions.followed.to(self.device)

    def _taken(self, index: Tensor) -> Tensor:
        at = index.flatten().to(self.rows.device)
        rows = self.rows.index_select(0, at).to(self.device).view(*index.shape, -1)
        return rows.sub_(self._centre).div_(self._spread)


def mapped(reward: Tensor, reward_map: tuple[float, float]) -> Tensor:
    """scale · r + shift; the reward itself where that changes nothing."""
    return reward if reward_map == (1.0, 0.0) else reward * reward_map[0] + reward_map[1]


def of_all_seeds(vector: Tensor, lead: Axes) -> Tensor:
    """A copy [*S, 1, O] of what all seeds have in common, [O]."""
    return vector.expand(*lead, 1, -1).clone()
