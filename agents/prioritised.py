"""Prioritised experience replay, the proportional variant (Schaul et al. 2016, arXiv:1511.05952).

    priority    p_i = (|δ_i| + ε)^α;  of a new transition the largest that there ever was     section 3.3, algorithm 1
    draw        P(i) = p_i / Σ p, by a sum tree, one number from each of B equal parts of Σ p    appendix B.2.1
    importance  w_i = (N P(i))^-β / max_j w_j, the maximum over the batch                        section 3.4

The replay is the ring that all agents share; this decides which of its rows a batch is of. Rows that are no
transitions, or whose frames are being overwritten, have priority 0 and are never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agents.replay import Replay, zeros
from envs.runner import ActionSpec, ObservationSpec, Step
from plasticity.population import RandomStream

# Children of a node. Four levels then hold a million leaves, and every level costs the same few operations.
BRANCHES = 32

_BELOW_ONE = 1 - 2**-53  # the largest float64 below 1


class SumTree:
    """S trees of `leaves` non-negative float64 numbers each, with the sums of all branches. Rows are int64 [S, K].

    A change recomputes the sums of the branches above it from their parts, so that no rounding adds up over time.
    """

    def __init__(self, trees: int, leaves: int, device: torch.device):
        sizes = [leaves]
        while sizes[-1] > BRANCHES:
            sizes.append(math.ceil(sizes[-1] / BRANCHES))
        # From the root down; each level in groups of siblings: [S, groups, BRANCHES].
        groups = [math.ceil(size / BRANCHES) for size in reversed(sizes)]
        self.levels = [zeros((trees * g * BRANCHES,), torch.float64, device).view(trees, g, BRANCHES) for g in groups]
        trees_before = torch.arange(trees, device=device)[:, None]
        self._first_group = [trees_before * g for g in groups]  # [S, 1] of each level
        self._last = [size - 1 for size in reversed(sizes)]  # row of each level

    @property
    def total(self) -> Tensor:
        """The sum of all leaves, [S]."""
        return self.levels[0].sum((-2, -1))

    def set(self, rows: Tensor, values: Tensor) -> None:
        """Change leaves to values [S, K]. Of a row that comes twice, one of its values counts."""
        for level, first in zip(reversed(self.levels), reversed(self._first_group), strict=True):
            level.view(-1).index_copy_(0, (rows + first * BRANCHES).flatten(), values.flatten())
            rows = rows // BRANCHES
            values = level.flatten(0, 1).index_select(0, (rows + first).flatten()).sum(-1).view(rows.shape)

    def find(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The rows in which lie these shares of the total, in [0, 1), and their values. All [S, K].

        A row with value 0 is not found, unless all are 0; where numbers are not finite, any row is.
        """
        rows = torch.zeros_like(shares, dtype=torch.int64)
        values = shares
        for level, first, last in zip(self.levels, self._first_group, self._last, strict=True):
            siblings = level.flatten(0, 1).index_select(0, (rows + first).flatten()).view(*rows.shape, BRANCHES)
            sums = siblings.cumsum(-1)
            # A share below 1 is below the last sum after rounding as well, so it falls on a child that is not 0.
            sought = shares[..., None] * sums[..., -1:]
            child = torch.searchsorted(sums, sought, right=True).clamp_(max=BRANCHES - 1)
            values = siblings.gather(-1, child)
            shares = ((sought - sums.gather(-1, child) + values) / values).clamp_(0, _BELOW_ONE).squeeze(-1)
            rows = torch.add(child.squeeze(-1), rows, alpha=BRANCHES).clamp_(max=last)
        return rows, values.squeeze(-1)


class PrioritisedReplay(Replay):
    """The ring of `agents.replay`, sampled in proportion to priorities.

    exponent: α, 0 is uniform. After `sample`, `importance_weights` and `set_priorities` are of the rows just drawn.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        device: torch.device,
        stream: RandomStream,
        exponent: float,
        smallest: float = 1e-6,
    ):
        super().__init__(capacity, num_envs, observation_spec, action_spec, device, stream)
        self.exponent, self.smallest = exponent, smallest
        seeds = math.prod(self.lead)
        self.tree = SumTree(seeds, num_envs * self.slots, device)
        self.largest = torch.ones(seeds, dtype=torch.float64, device=device)  # priority that there ever was
        self.drawn = torch.zeros(seeds, 1, dtype=torch.int64, device=device)  # rows of the last batch, [S, B]
        self._priority = torch.zeros(seeds, 1, dtype=torch.float64, device=device)  # of these
        self._ahead = torch.arange(self.stack if self.stack > 1 else 0, device=device)
        self._first_of_seed = (torch.arange(num_envs, device=device) * self.slots).expand(seeds, -1)

    def add(self, obs: Tensor, action: Tensor, step: Step) -> None:
        written = self.head % self.slots
        super().add(obs, action, step)
        # What is no transition now, and what loses its first frames next.
        gone = torch.cat([written[:, None] + 1, self.head[:, None] + self._ahead], 1)
        slots = torch.cat([written[:, None], gone % self.slots], 1)
        rows = slots.view(*self._first_of_seed.shape, -1) + self._first_of_seed[..., None]
        values = torch.zeros_like(rows, dtype=torch.float64)
        values[..., 0] = self.largest[:, None]
        self.tree.set(rows.flatten(1), values.flatten(1))

    def clear(self) -> None:
        """As of the ring; new transitions get the priority of the very first ones."""
        super().clear()
        for level in self.tree.levels:
            level.zero_()
        self.largest.fill_(1)

    def _draw(self, batch_size: int) -> Tensor:
        """B rows by priority; for each seed, one after the other: int64 [S B]."""
        shares = self.stream.uniform(batch_size, dtype=torch.float64).view(-1, batch_size)
        parts = torch.arange(batch_size, dtype=torch.float64, device=self.device)
        self.drawn, self._priority = self.tree.find(((shares + parts) / batch_size).clamp_(max=_BELOW_ONE))
        return (self.drawn + self._first_env * self.slots).flatten()

    def importance_weights(self, exponent: float | Tensor) -> Tensor:
        """w of the last batch, [*S, B], at most 1. exponent: β, a number or []."""
        weights = (self._priority.amin(-1, keepdim=True) / self._priority) ** exponent
        return weights.float().view(*self.lead, -1)

    @torch.no_grad()
    def set_priorities(self, errors: Tensor) -> None:
        """Those of the last batch, from its errors δ, [*S, B]."""
        priorities = (errors.detach().double().abs() + self.smallest).pow(self.exponent).view(self.drawn.shape)
        self.largest = torch.maximum(self.largest, priorities.amax(-1))
        self.tree.set(self.drawn, priorities)

    def forget_largest(self) -> None:
        """From now on the largest priority is that of the transitions that are there."""
        self.largest = self.tree.levels[-1].amax((-2, -1))

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        """As of the ring, with its priorities."""
        priorities = [level[seed].clone() for level in self.tree.levels]
        return super().state_dict(seed) | {"priorities": priorities, "largest": self.largest[seed].clone()}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        """Restore one seed exactly. Raises ValueError if the saved ring is of another shape, or has no priorities."""
        saved: Sequence[Tensor] = state.get("priorities", ())
        if [level.shape for level in saved] != [level.shape[1:] for level in self.tree.levels]:
            raise ValueError("the saved replay has no priorities that fit; it was of another size, or not prioritised")
        super().load_state_dict(state, seed)
        for own, level in zip(self.tree.levels, saved, strict=True):
            if state["rings"].filled:
                own[seed].copy_(level)
            else:  # an agent that only acts is read without what its replay held
                own[seed].zero_()
        self.largest[seed] = state["largest"]
