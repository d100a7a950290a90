"""Atari 2600 games on the Arcade Learning Environment's own vector environment (`ale_py.vector_env.AtariVectorEnv`).

Defaults follow the ALE v5 convention (Machado et al. 2018, "Revisiting the Arcade Learning Environment",
arXiv:1709.06009): sticky actions 0.25, minimal action set, 4 frames an action, no no-ops, whole games, 108 000 frames.
Frames are grey, 84 x 84, the maximum of the last two, stacked by four with zeros before the first.

Three facts about the simulator shape this file:

* In next-step mode an ended row waits for its next action to reset. A masked reset right after the end cancels that, so
  the last frame is in hand and no action is lost.
* Its state cannot be read. A saved row is its last seed and the actions since; loading plays them again. The actions of
  one episode would not do: in 19 games (Assault, BeamRider, ...) a reset leaves traces of the episode before.
* Seeding means loading the cartridge again, which leaves no trace but takes 70 ms, as long as 250 actions, because ALE
  recomputes a colour table. So a row gets a new seed only at the first episode that begins `reseed_after` or more
  actions after its last one.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.atari_console import Console
from envs.host_step import MemoryRing, check_task_args, take_row_seeds, usable_threads
from envs.runner import DiscreteActionSpec, ObservationSpec, RunnerSpec, Step

_STACK = 4
_SIDE = 84
_PREFIX = "atari/"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What changes the game; the accepted `task_args`."""

    sticky_actions: float = 0.25  # probability, per frame, that the console sees the previous action again
    full_action_set: bool = False  # all 18 joystick actions instead of those the game uses
    frame_skip: int = 4  # emulator frames per action
    noop_max: int = 0  # an episode starts with 0 .. noop_max - 1 frames without input
    fire_on_reset: bool = False  # press FIRE once at the start, where the game has that action
    life_loss_terminates: bool = False  # report a lost life as `terminated`; the game goes on
    clip_rewards: bool = True  # the sign of the reward in `Step.reward`; `episode_return` stays raw
    max_frames: int = 108_000  # emulator frames until truncation, 30 minutes of play
    reseed_after: int = 10_000  # actions between two seeds of a row: also about how many a resume plays again

    def __post_init__(self) -> None:
        if not 0 <= self.sticky_actions < 1:
            raise ValueError(f"sticky_actions must be in [0, 1), got {self.sticky_actions}")
        for name, least in (("frame_skip", 1), ("max_frames", 1), ("noop_max", 0), ("reseed_after", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    @property
    def horizon(self) -> int:
        """Actions until truncation."""
        return -(-self.max_frames // self.frame_skip)


@functools.cache
def _roms() -> dict[str, str]:
    """Cartridge file of each game id. ALE's registration leaves out the games that have no single-player mode."""
    import ale_py  # noqa: F401  (registers the ALE/ ids)
    from gymnasium.envs.registration import registry

    specs = [spec for spec in registry.values() if spec.namespace == "ALE" and spec.version == 5]
    return {_PREFIX + spec.name: spec.kwargs["game"] for spec in specs}


def known_ids() -> list[str]:
    """Every single-player game of ALE as `atari/Name`, with the names of Gymnasium's `ALE/` ids."""
    return sorted(_roms())


def make(
    env_id: str, num_envs: int, seed: int, device: torch.device | str, threads: int = 0, **task_args: Any
) -> AtariRunner:
    """Build N copies of one game; `task_args` are the fields of `Settings` and `row_seeds`.

    Takes about 0.07 s a row, and the first reset as long on one core: the cartridge is loaded twice.
    Raises ValueError for a setting that does not exist or is out of range.
    """
    check_task_args(env_id, task_args, [field.name for field in fields(Settings)] + ["row_seeds"])
    seeds, settings = take_row_seeds(task_args, seed, num_envs)
    return AtariRunner(env_id, seeds, torch.device(device), threads, Settings(**settings))


class AtariRunner:
    """N copies of one Atari game. The contract is `envs.runner.Runner`."""

    def __init__(
        self, env_id: str, row_seeds: list[int], device: torch.device, threads: int, settings: Settings
    ) -> None:
        from ale_py.vector_env import AtariVectorEnv

        self.num_envs = len(row_seeds)
        self.device = device
        self._settings = settings
        self._env = AtariVectorEnv(
            _roms()[env_id],
            self.num_envs,
            num_threads=min(usable_threads(threads), self.num_envs),
            max_num_frames_per_episode=settings.max_frames,
            repeat_action_probability=settings.sticky_actions,
            full_action_space=settings.full_action_set,
            frameskip=settings.frame_skip,
            stack_num=_STACK,
            img_height=_SIDE,
            img_width=_SIDE,
            noop_max=settings.noop_max,
            use_fire_reset=settings.fire_on_reset,
            reward_clipping=False,
        )
        self.observation_spec = ObservationSpec((_STACK, _SIDE, _SIDE), torch.uint8, stacked_frames=_STACK)
        self.action_spec = DiscreteActionSpec(len(self._env.ale.get_action_set()))
        self.spec = RunnerSpec(
            env_id=env_id,
            backend="ale",
            horizon=settings.horizon,
            action_repeat=settings.frame_skip,
            settings=asdict(settings),
            versions={name: version(name) for name in ("ale-py", "gymnasium")},
        )
        self._memory = MemoryRing(self.observation_spec, self.num_envs, device)
        self._row_seeds = list(row_seeds)
        self._episode = np.full(self.num_envs, -1, np.int64)
        self._length = np.zeros(self.num_envs, np.int64)
        self._return = np.zeros(self.num_envs, np.float64)
        self._lives = np.zeros(self.num_envs, np.int64)
        self._record = _Record(self.num_envs, settings)
        self._consoles: dict[int, Console] = {}
        self._obs: np.ndarray | None = None
        self._in_flight = False
        self.diverged_episodes = 0

    def reset(self) -> Tensor:
        """Start a new episode, with a new seed, in every row. Returns obs [N, 4, 84, 84] uint8."""
        self._finish_sent()
        obs = self._start_episodes(np.ones(self.num_envs, bool), force_seed=True)
        return self._memory.next().publish_arrays(obs, obs).obs

    def step(self, action: Tensor) -> Step:
        """Take one action in every row. action: [N] int64 in 0 .. count - 1; raises ValueError for another."""
        self.send(action)
        return self.recv()

    def send(self, action: Tensor) -> None:
        """Hand the actions to ALE's threads and return at once."""
        if self._obs is None or self._in_flight:
            raise RuntimeError("send needs a reset before it, and a recv between two of them")
        actions = action.detach().cpu().numpy()
        if actions.shape != (self.num_envs,) or actions.dtype != np.int64:
            raise ValueError(f"actions must be int64 [{self.num_envs}], got {actions.dtype} {list(actions.shape)}")
        # An index out of range would stop ALE's worker for good, and recv would wait for ever.
        if actions.min() < 0 or actions.max() >= self.action_spec.count:
            raise ValueError(f"actions must be in 0 .. {self.action_spec.count - 1}, got {actions.tolist()}")
        self._record.append(actions)
        self._env.send(actions)
        self._in_flight = True

    def recv(self) -> Step:
        """Wait for the actions sent last; start the next episode where one ended."""
        if not self._in_flight:
            raise RuntimeError("recv needs a send before it")
        final_obs, reward, terminated, truncated, info = self._env.recv()
        self._in_flight = False
        ended = terminated | truncated
        self._length += 1
        self._return += reward
        memory = self._memory.next()
        memory.reward[:] = np.sign(reward) if self._settings.clip_rewards else reward
        memory.terminated[:] = terminated
        if self._settings.life_loss_terminates:
            memory.terminated |= info["lives"] < self._lives
        memory.truncated[:] = truncated
        memory.episode_ended[:] = ended
        memory.episode_return[:] = self._return * ended
        memory.episode_length[:] = self._length * ended
        if ended.any():
            obs = self._start_episodes(ended)
        else:
            obs = self._obs = final_obs
            self._lives = info["lives"]
        return memory.publish_arrays(obs, final_obs)

    def _start_episodes(self, rows: np.ndarray, force_seed: bool = False) -> np.ndarray:
        """Reset the marked rows; obs [N, 4, 84, 84] of all rows."""
        self._episode[rows] += 1
        self._length[rows] = 0
        self._return[rows] = 0.0
        seeds = np.full(self.num_envs, -1, np.int64)
        for row in np.flatnonzero(rows):
            if force_seed or self._record.count[row] >= self._settings.reseed_after:
                seeds[row] = _episode_seed(self._row_seeds[row], int(self._episode[row]))
                self._record.begin(int(row), int(seeds[row]))
        return self._reset_rows(rows, seeds)

    def _reset_rows(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Reset the marked rows, seeding those whose seed is not -1; obs of all rows."""
        obs, info = self._env.reset(seed=seeds[rows], options={"reset_mask": rows})
        for row in np.flatnonzero(rows):
            self._record.start_frames[row].append(int(info["episode_frame_number"][row]))
        self._obs = obs
        self._lives = info["lives"]
        return obs

    def render(self, row: int = 0, height: int = 480, width: int = 480) -> np.ndarray:
        """The console's picture of one row, uint8 RGB, usually 210 x 160; `height` and `width` are ignored.

        ALE's vector environment gives none, so a second emulator plays the row's actions since its last seed: the first
        call of a row takes up to some seconds, the next ones one action each.
        """
        if self._obs is None or self._in_flight:
            raise RuntimeError("render needs a reset before it, and a recv after the last send")
        if row not in self._consoles:
            rom = _roms()[self.spec.env_id]
            frames = (self._settings.frame_skip, self._settings.max_frames)
            self._consoles[row] = Console(rom, self._env.ale.get_action_set(), self._settings.sticky_actions, *frames)
        record = self._record
        return self._consoles[row].screen(
            record.begun[row],
            int(record.seed[row]),
            record.start_frames[row],
            record.actions_of(row),
            self._settings.fire_on_reset,
        )

    def state_dict(self) -> dict[str, Any]:
        """Per row its seed, counters, and the actions since it was seeded last. RuntimeError between send and recv."""
        if self._in_flight:
            raise RuntimeError("state_dict needs a recv after the last send")
        record = self._record
        actions = [record.actions_of(row) for row in range(self.num_envs)]
        return {
            "env_id": self.spec.env_id,
            "settings": asdict(self._settings),
            "row_seeds": list(self._row_seeds),
            "episode": torch.tensor(self._episode),
            "length": torch.tensor(self._length),
            "return": torch.tensor(self._return),
            "seed": torch.tensor(record.seed),
            "count": torch.tensor(record.count),
            "actions": torch.tensor(np.concatenate(actions)),
            "obs_checksum": None if self._obs is None else zlib.crc32(self._obs.tobytes()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Play the saved actions again, about 3 000 a second and core; what follows is bit-equal to the saved run.

        Raises ValueError if the state is of other environments or the simulator no longer leads to the same frames.
        """
        mine = {"env_id": self.spec.env_id, "settings": asdict(self._settings)}
        for name, value in mine.items():
            if state[name] != value:
                raise ValueError(f"the saved environments have {name} {state[name]}, these have {value}")
        if len(state["row_seeds"]) != self.num_envs:
            raise ValueError(f"the saved state has {len(state['row_seeds'])} rows, not {self.num_envs}")
        self._finish_sent()
        self._row_seeds = list(state["row_seeds"])
        self._episode[:] = state["episode"].numpy()
        self._length[:] = state["length"].numpy()
        self._return[:] = state["return"].numpy()
        self._record.load(state["seed"].numpy(), state["count"].numpy(), state["actions"].numpy())
        self._obs = None
        if state["obs_checksum"] is not None and zlib.crc32(self._replay().tobytes()) != state["obs_checksum"]:
            raise ValueError("the saved actions lead to other frames here: ale-py differs from the saved run's")

    def _replay(self) -> np.ndarray:
        """Bring every row to where its recorded actions lead; obs of all rows.

        The rows can only step together, so a row with fewer actions waits, playing action 0 in a game that its seeding
        discards, and all rows arrive at the same tick.
        """
        record, rows = self._record, np.arange(self.num_envs)
        ticks = int(record.count.max())
        first_tick = ticks - record.count
        due = np.ones(self.num_envs, bool)
        obs = np.empty(0)
        for tick in range(ticks + 1):
            seeded = first_tick == tick
            due |= seeded
            if due.any():
                for row in np.flatnonzero(seeded):
                    record.start_frames[row].clear()
                obs = self._reset_rows(due, np.where(seeded, record.seed, -1))
            if tick == ticks:
                break
            played = np.where(tick >= first_tick, record.actions[rows, np.maximum(tick - first_tick, 0)], 0)
            obs, _, terminated, truncated, info = self._env.step(played.astype(np.int64))
            due = terminated | truncated
            self._obs = obs
            self._lives = info["lives"]
        return obs

    def _finish_sent(self) -> None:
        if self._in_flight:
            self.recv()

    def close(self) -> None:
        """Stop ALE's threads; a second call does nothing."""
        if not self._env.closed:
            self._finish_sent()
            self._env.close()
            del self._env.ale  # close() leaves them running, the destructor joins them


class _Record:
    """What each row has done since it was seeded last.

    seed [N] int64; count [N] int64; actions [N, capacity] uint8; start_frames: of each
    episode since, the frames it had before its first action; begun: how often a row was seeded, to tell records apart.
    """

    def __init__(self, num_envs: int, settings: Settings) -> None:
        self.seed = np.zeros(num_envs, np.int64)
        self.count = np.zeros(num_envs, np.int64)
        # An episode that begins just below `reseed_after` still runs to its horizon.
        self.actions = np.zeros((num_envs, settings.reseed_after + settings.horizon), np.uint8)
        self.start_frames: list[list[int]] = [[] for _ in range(num_envs)]
        self.begun = [0] * num_envs
        self._rows = np.arange(num_envs)

    def begin(self, row: int, seed: int) -> None:
        self.seed[row] = seed
        self.count[row] = 0
        self.start_frames[row].clear()
        self.begun[row] += 1

    def append(self, actions: np.ndarray) -> None:
        self.actions[self._rows, self.count] = actions
        self.count += 1

    def actions_of(self, row: int) -> np.ndarray:
        return self.actions[row, : self.count[row]]

    def load(self, seed: np.ndarray, count: np.ndarray, actions: np.ndarray) -> None:
        for row, played in enumerate(np.split(actions, np.cumsum(count)[:-1])):
            self.begin(row, int(seed[row]))
            self.actions[row, : len(played)] = played
        self.count[:] = count


def _episode_seed(row_seed: int, episode: int) -> int:
    return int(np.random.SeedSequence((row_seed, episode)).generate_state(1, np.uint32)[0] >> 1)
