"""One Atari emulator that shows what ALE's vector environment does not: the picture on the console's screen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Console:
    """Follows one row of an `envs.atari.AtariRunner` by playing its recorded actions again, with the same seed.

    The loop over frames is that of ALE's `PreprocessedEnv` (v0.12): an action lasts `frame_skip` frames or until the
    game is over or `max_frames` have passed, and no-op and FIRE frames at the start do not count.
    """

    def __init__(self, rom: str, actions: Sequence, sticky_actions: float, frame_skip: int, max_frames: int) -> None:
        import ale_py
        from ale_py import roms

        self._ale = ale_py.ALEInterface()
        self._ale.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale.setFloat("repeat_action_probability", sticky_actions)
        self._fire = ale_py.Action.FIRE
        self._noop = ale_py.Action.NOOP
        self._rom = str(roms.get_rom_path(rom))
        self._actions = list(actions)
        self._frame_skip = frame_skip
        self._max_frames = max_frames
        self._record_number = -1
        self._played = 0
        self._episodes = 0
        self._frames = 0
        self._over = True

    def screen(
        self, record_number: int, seed: int, start_frames: Sequence[int], actions: np.ndarray, fire_on_reset: bool
    ) -> np.ndarray:
        """The picture, uint8 RGB [height, width, 3], after `actions`; only those not yet seen are played.

        record_number tells one record of a row from the next, which starts anew with `seed`.
        start_frames: for each episode begun since the seed, its frames before the first action.
        """
        if record_number != self._record_number:
            self._record_number = record_number
            self._ale.setInt("random_seed", seed)
            self._ale.loadROM(self._rom)
            self._played, self._episodes, self._over = 0, 0, True
        while self._over or self._played < len(actions):
            if self._over:
                self._begin(start_frames[self._episodes], fire_on_reset)
            else:
                self._play(int(actions[self._played]))
        return self._ale.getScreenRGB()

    def _begin(self, start_frames: int, fire_on_reset: bool) -> None:
        self._ale.reset_game()
        fire = fire_on_reset and self._fire in self._actions
        for frame in range(start_frames):
            self._ale.act(self._fire if fire and frame == 0 else self._noop)
        self._episodes += 1
        self._frames = 0
        self._over = False

    def _play(self, action: int) -> None:
        for _ in range(self._frame_skip):
            self._ale.act(self._actions[action])
            self._frames += 1
            self._over = self._ale.game_over() or self._frames >= self._max_frames
            if self._over:
                break
        self._played += 1
