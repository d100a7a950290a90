"""The replay ring: transitions of N environments on one device, every observation (or frame) stored once.

Each environment owns a ring of T slots. A slot holds an observation and what followed it:

    slot p       obs_p, action_p, reward_p, terminated_p                     a transition
    slot p + 1   the successor of obs_p; the next transition starts here

Where an episode ends at p, slot p + 1 keeps its true last observation and is no transition (a boundary slot), and the
next episode starts at p + 2. So the successor of any transition is always one slot further, whether or not the episode
went on, and `add` needs no branch and no host synchronisation: it writes p, writes the observation of p + 1, and moves
the head by 1 + ended. The cost is one slot an episode.

A second ring lists the slots that are transitions, one entry for each `add`. Those that may be drawn are its newest
`count` entries, so a draw is a number below `count`. It costs four bytes a slot.

Stacked frames are rebuilt when sampling: slot p stores only the newest frame; older ones are read from the slots before
it and are zero before the first frame of the episode.

In a population (`agents.population`) the environments of the second seed follow those of the first, each seed samples
from its own with its own stream, and what comes in and goes out has one axis more in front, *S.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.runner import ActionSpec, ContinuousActionSpec, ObservationSpec, Step
from plasticity.population import RandomStream

# So many equally likely numbers that their remainders are equally likely too, but for one in 10^12.
MANY = 1 << 62

# Steps of age that fading tells apart: finer than the batches of any agent can notice.
FADING_STEPS = 65_536


@dataclass(frozen=True, slots=True)
class Batch:
    """B sampled transitions, n steps long; of each seed, if it is a population's.

    obs, next_obs [*S, B, *obs_shape]; action [*S, B, A] float32 or [*S, B] int64; reward [*S, B]: sum over k < m of
    discount^k r_k; terminated [*S, B] bool: the episode terminated within those m steps; discount [*S, B]: discount^m,
    the factor of the bootstrap value at next_obs, *not* yet multiplied by (1 - terminated). m = n unless the episode or
    the newest transition comes first.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor
    discount: Tensor


@dataclass(frozen=True)
class Rings:
    """What a replay holds, where it lies: a checkpoint copies only the slots written since the one before.

    tensors: by name [N, T, ...], no copies. head [N] int64: slots ever used, for each environment; the slot at the head
    holds the observation that waits for its action. Between two heads, the slots from the older to the newer, both
    included, have changed, and no others.
    """

    tensors: dict[str, Tensor]
    head: Tensor

    @property
    def filled(self) -> int:
        """Slots that hold anything; all behind them are zero."""
        slots = next(iter(self.tensors.values())).shape[1]
        return min(int(self.head.max()) + 1, slots)

    def pieces(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(first slot, tensors [N, some slots, ...]) until all filled slots are through; here, all at once."""
        yield 0, {name: ring[:, : self.filled] for name, ring in self.tensors.items()}

    def __getstate__(self) -> dict[str, Any]:
        (_, filled), *_ = self.pieces()
        return {"tensors": {name: ring.clone() for name, ring in filled.items()}, "head": self.head}


def copy_rings_(own: dict[str, Tensor], saved: Any) -> None:
    """Copy what saved rings hold, piece by piece, into one's own [N, T, ...]. Raises ValueError for other shapes."""
    for first, piece in saved.pieces():
        for name, ring in own.items():
            slots = slice(first, first + piece[name].shape[1])
            if slots.stop > ring.shape[1] or ring[:, slots].shape != piece[name].shape:
                raise ValueError(
                    f"saved replay '{name}' has shape {list(piece[name].shape)} from slot {first} on, "
                    f"this ring {list(ring.shape)}"
                )
            ring[:, slots] = piece[name].to(ring.device)


# Plain tensors by name: may be read back where `torch.load` executes no code.
torch.serialization.add_safe_globals([Rings])


def fade(rank: Tensor) -> Tensor:
    """Symphony's weight of a row, tanh((π x)^e) at relative rank x, 0 the oldest (arXiv:2512.10477, table II).

    The oldest row has weight 0; about the newest two thirds have the same.
    """
    return torch.tanh((math.pi * rank) ** math.e)


def bell(rank: Tensor) -> Tensor:
    """Symphony's later weight of a row at relative rank x, exp(-(|x - φ/2| φ)^(2e)), largest at φ/2 = 0.809.

    φ: the golden ratio (timurgepard/Symphony-S2 @97e0466, August 2026; specs/symphony.md, section 15 a).
    """
    golden = (math.sqrt(5) + 1) / 2
    return torch.exp(-(((rank - golden / 2).abs() * golden) ** (2 * math.e)))


def fading_quantiles() -> Tensor:
    """Relative ranks below which lie 0, 1 / FADING_STEPS, 2 / FADING_STEPS ... 1 of the weight that `fade` gives."""
    ranks = torch.linspace(0, 1, 4 * FADING_STEPS, dtype=torch.float64)
    below = torch.cumulative_trapezoid(fade(ranks), ranks)
    shares = torch.linspace(0, 1, FADING_STEPS + 1, dtype=torch.float64) * below[-1]
    return ranks[1:][torch.searchsorted(below, shares).clamp_(max=len(below) - 1)]


class Replay:
    """A ring of `capacity` slots shared out over `num_envs` environments, sampled over its transitions.

    Both numbers are of one seed; there are as many seeds as `stream` has. fading: whether old transitions are sampled
    less often, by `fade` of their ranks, instead of uniformly.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        device: torch.device,
        stream: RandomStream,
        fading: bool = False,
    ):
        self.stack = observation_spec.stacked_frames
        self.slots = capacity // num_envs
        if self.slots < self.stack + 2:
            raise ValueError(
                f"replay capacity must be at least {(self.stack + 2) * num_envs} for {num_envs} environments, "
                f"got {capacity}"
            )
        self.num_envs = num_envs
        self.device = device
        self.stream, self.lead = stream, stream.lead
        envs = num_envs * math.prod(self.lead)  # of all seeds
        slots = envs * self.slots
        if slots >= 1 << 31:
            raise ValueError(f"a replay has less than {1 << 31} slots, of all seeds together, got {slots}")
        self._channels = observation_spec.shape[0] // self.stack  # of one frame
        frame_shape = (self._channels, *observation_spec.shape[1:])
        # Slot t of environment n is row n * self.slots + t of every ring.
        self.frame = zeros((slots, *frame_shape), observation_spec.dtype, device)
        if isinstance(action_spec, ContinuousActionSpec):
            self.action = zeros((slots, action_spec.size), torch.float32, device)
        else:
            self.action = zeros((slots,), torch.int64, device)
        self.reward = zeros((slots,), torch.float32, device)
        self.terminated = zeros((slots,), torch.bool, device)
        self.is_transition = zeros((slots,), torch.bool, device)
        self.head = torch.zeros(envs, dtype=torch.int64, device=device)  # slots ever used, for each environment
        self.start = torch.zeros_like(self.head)  # the head at the last `clear`
        self._was_cleared = False  # so that transitions may be left that were not counted
        self.count = torch.zeros_like(self.head)  # transitions that may be drawn, for each environment
        # Rows of transitions in the order of `add`, [T, S N]; the newest are at `_place`, on the device at `_newest`.
        self._by_age = zeros((self.slots, envs), torch.int32, device)
        self._place = 0
        self._newest = torch.zeros(1, dtype=torch.int64, device=device)
        self._first = torch.arange(envs, device=device) * self.slots
        self._first_env = torch.arange(math.prod(self.lead), device=device)[:, None] * num_envs  # of each seed
        self._true_then_false = torch.arange(2 * envs, device=device) < envs
        # A transition is written at the head, its successor one slot further. The stack - 1 slots behind that have lost
        # frames before them: one that `add` reaches now, or two if the episode has ended, may not be drawn any more.
        self._written_and_left = torch.tensor([0, 1, self.stack, self.stack + 1], device=device)[:, None]
        self._frame_age = torch.arange(self.stack - 1, -1, -1, device=device)
        self._fading = 1 - fading_quantiles().to(device) if fading else None  # below 1, so ages are below `count`

    def add(self, obs: Tensor, action: Tensor, step: Step) -> None:
        """Store what `action` [*S, N, ...] taken at `obs` [*S, N, *obs_shape] led to."""
        rows = self._first + (self.head + self._written_and_left) % self.slots
        at, successor = rows[0], rows[1]
        flat = [action, step.reward, step.terminated, step.truncated, obs, step.final_obs]
        action, reward, terminated, truncated, obs, final_obs = (self._rows(tensor) for tensor in flat)
        ended = terminated | truncated
        left = self.is_transition.take(rows[2:])
        left[1].logical_and_(ended)
        if self._was_cleared:
            left &= self.head + self._written_and_left[2:] - self.slots >= self.start
        self.frame.index_copy_(0, at, self._newest_frame(obs))
        self.frame.index_copy_(0, successor, self._newest_frame(final_obs))
        self.action.index_copy_(0, at, action)
        self.reward.index_copy_(0, at, reward)
        self.terminated.index_copy_(0, at, terminated)
        # The successor is a boundary, or it waits for its action.
        self.is_transition.index_copy_(0, rows[:2].flatten(), self._true_then_false)
        self._place = (self._place + 1) % self.slots
        self._by_age[self._place] = at
        self._newest.fill_(self._place)
        self.count.add_(1).sub_(left.sum(0))
        self.head += 1
        self.head += ended

    def clear(self) -> None:
        """Forget all transitions, between two steps. The ring itself is left as it is, and written over in time."""
        self.start.copy_(self.head)
        self.count.zero_()
        self._was_cleared = True

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to sample in some seed."""
        return not bool((self.count > 0).view(-1, self.num_envs).any(-1).all())

    def sample(self, batch_size: int, discount: float, n_step: int = 1) -> Batch:
        """B transitions, with replacement, from all that are stored; for each seed from its own.

        Undefined before the first `add`, and between `clear` and the next one. Raises ValueError if n_step is below 1.
        """
        if n_step < 1:
            raise ValueError(f"n_step must be at least 1, got {n_step}")
        batch = self.gather(self._draw(batch_size), discount, n_step)
        if not self.lead:
            return batch
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return Batch(**{name: tensor.unflatten(0, (*self.lead, batch_size)) for name, tensor in fields.items()})

    def gather(self, row: Tensor, discount: float, n_step: int = 1) -> Batch:
        """The transitions that start in these rows, int64 [B]. Multi-step returns: Sutton & Barto 2018, eq. 7.1."""
        last, reward = row, self.reward.index_select(0, row)
        power = torch.full_like(reward, discount)
        for _ in range(n_step - 1):
            following = self._successor(last)
            going = self.is_transition.index_select(0, following)
            last = torch.where(going, following, last)
            reward = torch.where(going, reward + power * self.reward.index_select(0, last), reward)
            power = torch.where(going, power * discount, power)
        return Batch(
            obs=self._observation(row),
            action=self.action.index_select(0, row),
            reward=reward,
            next_obs=self._observation(self._successor(last)),
            terminated=self.terminated.index_select(0, last),
            discount=power,
        )

    def _draw(self, batch_size: int) -> Tensor:
        """B rows; for each seed, one after the other: int64 [S B].

        With small networks an update waits for every operation here, so a ring that is alone takes a shorter way.
        """
        env, age = self._draw_evenly(batch_size) if self._fading is None else self._draw_by_age(batch_size)
        entry = self._newest - age  # negative ones count from the end, which is where the ring goes on
        if len(self.head) > 1:
            entry = entry * len(self.head) + env + self._first_env
        return self._by_age.take(entry).flatten().long()

    def _draw_evenly(self, batch_size: int) -> tuple[Tensor | int, Tensor]:
        """Environments and ages in them, 0 the newest, int64 [*S, B]; all transitions alike."""
        number = self.stream.integers(MANY, batch_size)
        count = self.count.view(*self.lead, self.num_envs)
        if self.num_envs == 1:
            return 0, number % count
        cumulative = count.cumsum(-1)
        number = number % cumulative[..., -1:]
        env = torch.searchsorted(cumulative, number, right=True)
        return env, number - (cumulative - count).gather(-1, env)

    def _draw_by_age(self, batch_size: int) -> tuple[Tensor | int, Tensor]:
        """The same, all environments alike, and in each the ages by their weights."""
        assert self._fading is not None
        # float64: float32 has too few distinct values for a million transitions.
        position = self.stream.uniform(batch_size, dtype=torch.float64) * self.num_envs
        env = position.long()
        share = (position - env) * FADING_STEPS
        step = share.long()
        below, above = (self._fading.index_select(0, at.flatten()).view(at.shape) for at in (step, step + 1))
        count = self.count.view(*self.lead, self.num_envs).gather(-1, env)
        return env, (torch.lerp(below, above, share - step) * count).long()

    def _successor(self, row: Tensor) -> Tensor:
        """One slot further in the same ring."""
        following = row + 1
        if len(self.head) == 1:
            return following % self.slots
        return torch.where(following % self.slots == 0, following - self.slots, following)

    def _rows(self, tensor: Tensor) -> Tensor:
        """[*S, N, ...] -> [S N, ...]."""
        return tensor.flatten(0, 1) if self.lead else tensor

    def _newest_frame(self, obs: Tensor) -> Tensor:
        return obs[:, -self._channels :]

    def _observation(self, at: Tensor) -> Tensor:
        """The observations in rows `at`, int64 [B]."""
        if self.stack == 1:
            return self.frame.index_select(0, at)
        slot = at % self.slots
        rows = (at - slot)[:, None] + (slot[:, None] - self._frame_age) % self.slots  # oldest first
        flat = rows.flatten()  # an index by a matrix takes eight times as long
        frames = self.frame.index_select(0, flat).unflatten(0, rows.shape)
        # A frame belongs to the episode of `at` if no boundary lies from it up to, not including, `at`.
        unbroken = self.is_transition.index_select(0, flat).view(rows.shape)
        unbroken[:, -1] = True
        same_episode = unbroken.flip(1).cumprod(1).flip(1)
        frames *= same_episode.view(*same_episode.shape, *[1] * (frames.ndim - 2)).to(frames.dtype)
        return frames.flatten(1, 2)

    def state_dict(self, seed: int = 0) -> dict[str, Any]:
        """The rings of one seed as they lie in memory, with their heads, and its generator's state."""
        rings = Rings(self._rings(seed), self._own(self.head, seed).clone())
        start = self._own(self.start, seed).clone()
        return {"rings": rings, "start": start, "generator": self.stream.generators[seed].get_state()}

    def load_state_dict(self, state: dict[str, Any], seed: int = 0) -> None:
        """Restore one seed exactly. Raises ValueError if the saved ring has another shape."""
        rings, saved = self._rings(seed), state["rings"]
        copy_rings_(rings, saved)
        rings["is_transition"][:, saved.filled :] = False
        self._own(self.head, seed).copy_(saved.head)
        self._own(self.start, seed).copy_(state["start"])
        self._was_cleared |= bool(state["start"].any())
        for env in range(seed * self.num_envs, (seed + 1) * self.num_envs):
            self._recount(env)
        self.stream.generators[seed].set_state(state["generator"])

    def _recount(self, env: int) -> None:
        """Which transitions of one environment, of all seeds, may be drawn, from what its ring holds."""
        since_clear = max(0, int(self.head[env] - self.start[env]))
        age = torch.arange(min(since_clear, self.slots - self.stack), device=self.device)
        row = env * self.slots + (self.head[env] - 1 - age) % self.slots
        row = row[self.is_transition[row]]
        self.count[env] = len(row)
        self._by_age[(self._place - age[: len(row)]) % self.slots, env] = row.int()

    def _own(self, of_all: Tensor, seed: int) -> Tensor:
        """The environments of one seed, of a tensor [S N, ...]."""
        return of_all[seed * self.num_envs : (seed + 1) * self.num_envs]

    def _rings(self, seed: int) -> dict[str, Tensor]:
        """Views [N, T, ...] of one seed's rings."""
        rings = {
            "frame": self.frame,
            "action": self.action,
            "reward": self.reward,
            "terminated": self.terminated,
            "is_transition": self.is_transition,
        }
        return {name: self._own(ring.unflatten(0, (-1, self.slots)), seed) for name, ring in rings.items()}


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take host memory only where they are written: a ring costs what it holds, not what it could."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
