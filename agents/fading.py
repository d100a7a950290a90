"""The Fading Replay Buffer of Symphony (Ishuov et al. 2025, arXiv:2512.10477, section III; specs/symphony.md).

    rank     i = 0 (oldest) ... N - 1 (newest)
    weight   w_i = tanh((π i / N)^e),  p_i = w_i / Σ w                        table II, with the code's index from 0
    fill     r̄ = mean |r| of the exploration; r <- r / r̄; the exploration T times over, N = T N_exp          eq. 4
    rescue   a terminal transition about to be overwritten becomes the newest but one; the next oldest goes instead

The buffer is full from its filling on, so the probabilities never change and a draw is a binary search: O(log N). It is
a ring: nothing moves, ranks turn. Rescued transitions break the order of time, so each row is a whole transition with
its own successor, unlike in `agents.replay.Replay`, which fades too where an agent asks for it, but rescues nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agents.replay import Batch, Rings, copy_rings_, fade, zeros
from envs.runner import ActionSpec, ContinuousActionSpec, ObservationSpec, Step
from plasticity.population import RandomStream


class FadingReplay:
    """`tiles` times `exploration_steps` rows for each seed of `stream`, sampled by age.

    terminal_lives: how often a terminal transition is rescued. half_precision: keeps observations and actions as
    float16 (Symphony ED), rewards stay exact. weight: of a row, by its rank over N. Raises ValueError if environments
    do not share out the exploration.
    """

    def __init__(
        self,
        exploration_steps: int,
        tiles: int,
        num_envs: int,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        device: torch.device,
        stream: RandomStream,
        *,
        terminal_lives: float = math.inf,
        half_precision: bool = False,
        weight: Callable[[Tensor], Tensor] = fade,
    ):
        if exploration_steps < 1 or tiles < 1 or exploration_steps % num_envs:
            raise ValueError(
                f"a fading replay needs exploration steps that are a multiple of the {num_envs} environments, and at "
                f"least one tile, got {exploration_steps} and {tiles}"
            )
        self.exploration_steps, self.tiles, self.num_envs = exploration_steps, tiles, num_envs
        self.slots = exploration_steps * tiles
        self.stream, self.lead, self.device = stream, stream.lead, device
        self.seeds, self.terminal_lives = math.prod(self.lead), terminal_lives
        rows = self.seeds * self.slots
        wide = torch.float16 if half_precision else observation_spec.dtype
        self.obs = zeros((rows, *observation_spec.shape), wide, device)
        self.next_obs = zeros((rows, *observation_spec.shape), wide, device)
        if isinstance(action_spec, ContinuousActionSpec):
            self.action = zeros((rows, action_spec.size), torch.float16 if half_precision else torch.float32, device)
        else:
            self.action = zeros((rows,), torch.int64, device)
        self.reward = zeros((rows,), torch.float32, device)
        self.terminated = zeros((rows,), torch.bool, device)
        self.rescues = zeros((rows,), torch.int32, device)
        self.head = torch.zeros(self.seeds, dtype=torch.int64, device=device)  # rows ever written or rescued
        self.explored = 0  # transitions of each seed since the first one, or since `clear`
        self.reward_scale = torch.ones(self.seeds, device=device)
        self._first = torch.arange(self.seeds, device=device) * self.slots
        weights = weight(torch.arange(self.slots, dtype=torch.float64) / self.slots)
        cumulative = weights.cumsum(0)
        self.probability = weights / cumulative[-1]  # float64 [N], of each rank
        self._cumulative = (cumulative / cumulative[-1]).to(device)

    def add(self, obs: Tensor, action: Tensor, step: Step) -> None:
        """Store what `action` [*S, N, ...] taken at `obs` [*S, N, *obs_shape] led to, environment by environment."""
        fields = (obs, action, step.reward, step.final_obs, step.terminated)
        rows = [tensor.unflatten(0, (1, -1)) if not self.lead else tensor for tensor in fields]
        for env in range(self.num_envs):
            self._append(*(tensor[:, env] for tensor in rows))
        self.explored += self.num_envs

    def _append(self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, terminated: Tensor) -> None:
        """One transition of each seed, [S, ...]. A ring that is not full yet has no terminal transition at its head."""
        oldest = self._first + self.head % self.slots
        rescued = self.terminated[oldest] & (self.rescues[oldest] < self.terminal_lives)
        self.rescues[oldest] += rescued
        self.head += rescued
        at = self._first + self.head % self.slots
        self.obs[at] = obs.to(self.obs.dtype)
        self.action[at] = action.to(self.action.dtype)
        self.reward[at] = reward / self.reward_scale
        self.next_obs[at] = next_obs.to(self.next_obs.dtype)
        self.terminated[at] = terminated
        self.rescues[at] = 0
        self.head += 1

    def normalise_and_fill(self) -> None:
        """When `exploration_steps` rows are in: freeze the scale of rewards and tile the exploration."""
        reward = self.reward.view(self.seeds, self.tiles, -1)
        mean = reward[:, 0].abs().mean(-1)
        self.reward_scale.copy_(torch.where(mean > 0, mean, torch.ones_like(mean)))
        reward[:, 0] /= self.reward_scale[:, None]
        for ring in (self.obs, self.action, self.reward, self.next_obs, self.terminated):
            tiled = ring.unflatten(0, (self.seeds, self.tiles, -1))
            tiled[:, 1:] = tiled[:, :1]
        # Every slot has changed, and the oldest row is in slot 0.
        self.head += 2 * self.slots - self.exploration_steps

    def clear(self) -> None:
        """Forget everything, between two steps: exploration begins again, and fills the buffer when it is over."""
        self.explored = 0
        self.terminated.fill_(False)  # nothing old is rescued
        self.reward_scale.fill_(1)
        # Every slot has changed, and the next row goes into slot 0.
        self.head.copy_((self.head // self.slots + 2) * self.slots)

    @property
    def is_empty(self) -> bool:
        """Whether it waits for the exploration that fills it."""
        return self.explored < self.exploration_steps

    def sample(self, batch_size: int, discount: float) -> Batch:
        """B transitions, independent and with replacement, by age."""
        return self.gather(self.draw(batch_size), discount)

    def draw(self, batch_size: int) -> Tensor:
        """Ranks of B rows, independent and with replacement, int64 [*S, B]; 0 is the oldest."""
        return torch.searchsorted(self._cumulative, self.stream.uniform(batch_size, dtype=torch.float64), right=True)

    def gather(self, rank: Tensor, discount: float) -> Batch:
        """The transitions of these ranks [*S, B]."""
        rank = rank if self.lead else rank[None]
        at = (self._first[:, None] + (self.head[:, None] + rank) % self.slots).flatten()
        obs, action, reward, next_obs, terminated = (
            ring.index_select(0, at).unflatten(0, (*self.lead, rank.shape[1]))
            for ring in (self.obs, self.action, self.reward, self.next_obs, self.terminated)
        )
        if obs.dtype == torch.float16:
            obs, action, next_obs = obs.float(), action.float(), next_obs.float()
        return Batch(obs, action, reward, next_obs, terminated, torch.full_like(reward, discount))

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        """The ring of one seed as it lies in memory, its scale of rewards and its generator's state."""
        return {
            "rings": Rings(self._rings(seed), self.head[seed : seed + 1].clone()),
            "explored": self.explored,
            "reward_scale": self.reward_scale[seed].clone(),
            "generator": self.stream.generators[seed].get_state(),
        }

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        """Restore one seed exactly. Raises ValueError if the saved ring has another shape."""
        saved = state["rings"]
        rings = self._rings(seed)
        copy_rings_(rings, saved)
        rings["terminated"][:, saved.filled :] = False
        self.head[seed] = saved.head[0]
        self.explored = state["explored"]
        self.reward_scale[seed] = state["reward_scale"]
        self.stream.generators[seed].set_state(state["generator"])

    def _rings(self, seed: int) -> dict[str, Tensor]:
        """Views [1, N, ...] of one seed's ring."""
        own = slice(seed * self.slots, (seed + 1) * self.slots)
        names = ("obs", "action", "reward", "next_obs", "terminated", "rescues")
        return {name: getattr(self, name)[own].unsqueeze(0) for name in names}
