"""Atari 2600 games on the Arcade Learning Environment's own vector environment (`ale_py.vector_env.AtariVectorEnv`).

`envs.atari_settings` has the settings and the published protocols. Frames are the maximum of an action's last two, grey
or in colour, resized by area; an observation is the stack of the newest four, zeros before the first.

Four facts about the simulator shape this file:

* In next-step mode an ended row waits for its next action to reset. A masked reset right after the end cancels that, so
  the last frame is in hand and no action is lost.
* Its own frame stack runs on when a life is lost, and has to be uploaded whole. So it is asked for single frames, and
  `envs.frame_stack` stacks them on the device.
* Its state cannot be read. A saved row is its last seed and the actions since; loading plays them again. The actions of
  one episode would not do: in 19 games (Assault, BeamRider, ...) a reset leaves traces of the episode before.
* Seeding means loading the cartridge again, which leaves no trace but takes 70 ms, as long as 250 actions, because ALE
  recomputes a colour table, and all rows wait. So a row gets a new seed only at the first episode that begins
  `reseed_after` or more actions after its last one. With T busy threads that costs about 240 T / reseed_after of the
  time, 1 % for two threads and the default.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from envs.atari_console import Console
from envs.atari_settings import Settings, choose
from envs.frame_stack import FrameStack
from envs.host_step import MemoryRing, check_task_args, take_row_seeds, usable_threads
from envs.registry import EnvironmentNotFound
from envs.runner import DiscreteActionSpec, ObservationSpec, RunnerSpec, Step

if TYPE_CHECKING:
    from ale_py.vector_env import AtariVectorEnv

_PREFIX = "atari/"


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

    `protocol="machado"`, "classic" or "atari-100k" chooses published settings (`atari_settings.PROTOCOLS`); single
    settings change it further. Takes about 0.07 s a row, and the first reset as long on one core: the cartridge is
    loaded twice. Raises ValueError for a setting or protocol that does not exist or a value out of range,
    EnvironmentNotFound if the cartridge cannot be read.
    """
    seeds, settings = read_task_args(env_id, num_envs, seed, task_args)
    return AtariRunner(env_id, seeds, torch.device(device), threads, settings)


def read_task_args(env_id: str, num_envs: int, seed: int, task_args: dict[str, Any]) -> tuple[list[int], Settings]:
    """The seed of each row, and the settings. Raises ValueError as `make` does."""
    check_task_args(env_id, task_args, [field.name for field in fields(Settings)] + ["row_seeds"])
    seeds, changes = take_row_seeds(task_args, seed, num_envs)
    return seeds, choose(**changes)


def build_emulators(env_id: str, num_envs: int, threads: int, settings: Settings, **mode: Any) -> AtariVectorEnv:
    """ALE's vector environment, which hands out single frames as `channels_first` takes them."""
    from ale_py import roms
    from ale_py.vector_env import AtariVectorEnv

    game = _roms()[env_id]
    try:
        found = roms.get_rom_path(game) is not None
    except OSError as error:
        raise EnvironmentNotFound(f"'{env_id}' is known, but its cartridge cannot be read: {error}") from error
    if not found:
        raise EnvironmentNotFound(f"'{env_id}' is known, but ale-py {version('ale-py')} has no cartridge '{game}'")
    return AtariVectorEnv(
        game,
        num_envs,
        num_threads=min(usable_threads(threads), num_envs),
        max_num_frames_per_episode=settings.max_frames,
        repeat_action_probability=settings.sticky_actions,
        full_action_space=settings.full_action_set,
        frameskip=settings.frame_skip,
        stack_num=1,
        grayscale=settings.grayscale,
        img_height=settings.image_size,
        img_width=settings.image_size,
        noop_max=settings.noop_max + 1,  # ALE draws from 0 .. its own noop_max - 1
        use_fire_reset=settings.fire_on_reset,
        reward_clipping=False,
        **mode,
    )


def channels_first(frame: np.ndarray) -> np.ndarray:
    """ALE's frames, [N, 1, H, W] or in colour [N, 1, H, W, 3], as [N, C, H, W]."""
    if frame.ndim == 4:
        return frame
    import cv2

    rows, _, height, width, channels = frame.shape
    planes = np.empty((channels, rows * height, width), np.uint8)
    cv2.split(frame.reshape(rows * height, width, channels), list(planes))  # 7 x faster than a copy of the moved axis
    return planes.reshape(channels, rows, height, width).swapaxes(0, 1)


def frame_spec(settings: Settings) -> ObservationSpec:
    """One frame of one row."""
    return ObservationSpec((settings.channels, settings.image_size, settings.image_size), torch.uint8)


def stack_spec(settings: Settings) -> ObservationSpec:
    """The observation of one row."""
    depth, size = settings.frame_stack, settings.image_size
    return ObservationSpec((depth * settings.channels, size, size), torch.uint8, stacked_frames=depth)


def runner_spec(env_id: str, backend: str, settings: Settings) -> RunnerSpec:
    """What a run's record says about these environments."""
    return RunnerSpec(
        env_id=env_id,
        backend=backend,
        horizon=settings.horizon,
        action_repeat=settings.frame_skip,
        settings=asdict(settings),
        versions={name: version(name) for name in ("ale-py", "gymnasium")},
    )


def read_actions(env_id: str, action: Tensor, rows: int, count: int, device: torch.device) -> np.ndarray:
    """The actions as an array. Raises ValueError unless they are int64 [rows] in 0 .. count - 1, on CPU or `device`."""
    if not isinstance(action, Tensor) or action.dtype != torch.int64 or action.shape != (rows,):
        given = f"{action.dtype} {list(action.shape)}" if isinstance(action, Tensor) else type(action).__name__
        raise ValueError(f"{env_id}: actions must be an int64 tensor [{rows}], got {given}")
    if action.device.type not in ("cpu", device.type):
        raise ValueError(f"{env_id}: actions must be on cpu or {device}, got {action.device}")
    actions = (action if device.type == "cpu" else action.cpu()).numpy()
    # An index out of range would stop ALE's worker for good, and recv would wait for ever. Unsigned, -1 is the largest.
    if actions.view(np.uint64).max() >= count:
        raise ValueError(f"{env_id}: actions must be in 0 .. {count - 1}, got {actions.tolist()}")
    return actions


class AtariRunner:
    """N copies of one Atari game. The contract is `envs.runner.Runner`."""

    def __init__(
        self, env_id: str, row_seeds: list[int], device: torch.device, threads: int, settings: Settings
    ) -> None:
        self.num_envs = len(row_seeds)
        self.device = device
        self._settings = settings
        self._env = build_emulators(env_id, self.num_envs, threads, settings)
        self.observation_spec = stack_spec(settings)
        self.action_spec = DiscreteActionSpec(len(self._env.ale.get_action_set()))
        self.spec = runner_spec(env_id, "ale", settings)
        self._memory = MemoryRing(frame_spec(settings), self.num_envs, device)
        self._stack = FrameStack(self.num_envs, settings.frame_stack, frame_spec(settings).shape, device)
        self._row_seeds = list(row_seeds)
        self._episode = np.full(self.num_envs, -1, np.int64)
        self._length = np.zeros(self.num_envs, np.int64)
        self._return = np.zeros(self.num_envs, np.float64)
        self._lives = np.zeros(self.num_envs, np.int32)
        self._record = _Record(self.num_envs, settings)
        self._consoles: dict[int, Console] = {}
        self._began = False
        self._in_flight = False
        self.diverged_episodes = 0

    def reset(self) -> Tensor:
        """Start a new episode, with a new seed, in every row. Returns obs [N, stack * C, H, W] uint8.

        C is 1 for grey frames, 3 for red, green, blue; the oldest frame comes first.
        """
        self._finish_sent()
        frame = self._start_episodes(np.ones(self.num_envs, bool), force_seed=True)
        return self._stack.start(self._memory.next().upload(frame, frame)[0])

    def step(self, action: Tensor) -> Step:
        """Take one action in every row. action: [N] int64 in 0 .. count - 1; raises ValueError for another."""
        self.send(action)
        return self.recv()

    def send(self, action: Tensor) -> None:
        """Hand the actions to ALE's threads and return at once."""
        self._check_open()
        if not self._began or self._in_flight:
            raise RuntimeError("send needs a reset before it, and a recv between two of them")
        actions = read_actions(self.spec.env_id, action, self.num_envs, self.action_spec.count, self.device)
        self._record.append(actions)
        self._env.send(actions)
        self._in_flight = True
        self._stack.make_room()  # while ALE's threads work

    def recv(self) -> Step:
        """Wait for the actions sent last; start the next episode where one ended.

        Where a lost life is reported as a termination, the row's next stack begins with this frame, and `episode_ended`
        is False.
        """
        if not self._in_flight:
            raise RuntimeError("recv needs a send before it")
        last, reward, terminated, truncated, info = self._env.recv()
        self._in_flight = False
        ended = terminated | truncated
        any_ended = any_over = bool(np.count_nonzero(ended))
        self._length += 1
        self._return += reward
        memory = self._memory.next()
        memory.reward[:] = np.sign(reward) if self._settings.clip_rewards else reward
        memory.terminated[:] = terminated
        memory.truncated[:] = truncated
        memory.episode_ended[:] = ended
        memory.episode_return[:] = self._return * ended if any_ended else 0.0
        memory.episode_length[:] = self._length * ended if any_ended else 0
        if self._settings.life_loss_terminates:
            memory.terminated |= info["lives"] < self._lives
            any_over = any_ended or bool(np.count_nonzero(memory.terminated))
        self._lives = info["lives"]
        last = channels_first(last)
        first = self._start_episodes(ended) if any_ended else last
        return self._stack.follow(*memory.upload(first, last), any_over)

    def _start_episodes(self, rows: np.ndarray, force_seed: bool = False) -> np.ndarray:
        """Reset the marked rows; the newest frames of all rows."""
        self._episode[rows] += 1
        self._length[rows] = 0
        self._return[rows] = 0.0
        seeds = np.full(self.num_envs, -1, np.int64)
        for row in np.flatnonzero(rows):
            if force_seed or self._record.count[row] >= self._settings.reseed_after:
                seeds[row] = _episode_seed(self._row_seeds[row], int(self._episode[row]))
                self._record.begin(int(row), int(seeds[row]))
        return channels_first(self._reset_rows(rows, seeds))

    def _reset_rows(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Reset the marked rows, seeding those whose seed is not -1; the newest frames of all rows, as ALE has them."""
        frame, info = self._env.reset(seed=seeds[rows], options={"reset_mask": rows})
        for row in np.flatnonzero(rows):
            self._record.start_frames[row].append(int(info["episode_frame_number"][row]))
        self._began = True
        self._lives = info["lives"]
        return frame

    def render(self, row: int = 0, height: int = 480, width: int = 480) -> np.ndarray:
        """The console's picture of one row, uint8 RGB, usually 210 x 160; `height` and `width` are ignored.

        ALE's vector environment gives none, so a second emulator plays the row's actions since its last seed: the first
        call of a row takes up to some seconds, the next ones one action each.
        """
        self._check_open()
        if not self._began or self._in_flight:
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
        """Per row its seed, counters, stack, and the actions since it was seeded last.

        Raises RuntimeError between send and recv.
        """
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
            "lives": torch.tensor(self._lives),
            "seed": torch.tensor(record.seed),
            "count": torch.tensor(record.count),
            "actions": torch.tensor(np.concatenate(actions)),
            "obs": self._stack.now.cpu().clone() if self._began else None,
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
        self._record.load(state["seed"].numpy(), state["count"].numpy(), state["actions"].numpy())
        self._length[:] = 0
        self._return[:] = 0.0
        self._began = state["obs"] is not None
        if self._began:
            newest = torch.from_numpy(self._replay())
            reached = {"length": self._length, "return": self._return, "lives": self._lives}
            same = [torch.equal(torch.from_numpy(value), state[name]) for name, value in reached.items()]
            if not all(same) or not torch.equal(newest, state["obs"][:, -self._settings.channels :]):
                raise ValueError("the saved actions lead elsewhere here: ale-py differs from the saved run's")
            self._stack.restore(state["obs"])

    def _replay(self) -> np.ndarray:
        """Bring every row to where its recorded actions lead; the newest frames of all rows.

        The rows can only step together, so a row with fewer actions waits, playing action 0 in a game that its seeding
        discards, and all rows arrive at the same tick.
        """
        record, rows = self._record, np.arange(self.num_envs)
        ticks = int(record.count.max())
        first_tick = ticks - record.count
        due = np.ones(self.num_envs, bool)
        frame = np.empty(0)
        for tick in range(ticks + 1):
            seeded = first_tick == tick
            due |= seeded
            if due.any():
                for row in np.flatnonzero(seeded):
                    record.start_frames[row].clear()
                self._length[due] = 0
                self._return[due] = 0.0
                frame = self._reset_rows(due, np.where(seeded, record.seed, -1))
            if tick == ticks:
                break
            played = np.where(tick >= first_tick, record.actions[rows, np.maximum(tick - first_tick, 0)], 0)
            frame, reward, terminated, truncated, info = self._env.step(played.astype(np.int64))
            self._length += 1
            self._return += reward
            due = terminated | truncated
            self._lives = info["lives"]
        return channels_first(frame)

    def _check_open(self) -> None:
        if self._env.closed:
            raise RuntimeError(f"the runner of {self.spec.env_id} is closed")

    def _finish_sent(self) -> None:
        self._check_open()
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
