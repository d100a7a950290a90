"""How an Atari game is played and shown: single settings, and the published protocols that fix them together."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What changes the game. Defaults are protocol "v5"."""

    protocol: str = "v5"  # the name in PROTOCOLS from which the other values come, unless given one by one
    sticky_actions: float = 0.25  # probability, per frame, that the console sees the previous action again
    full_action_set: bool = False  # all 18 joystick actions instead of those the game uses
    frame_skip: int = 4  # emulator frames per action; an observation is the maximum of the last two
    noop_max: int = 0  # an episode starts with 0 .. noop_max frames without input, uniformly drawn
    fire_on_reset: bool = False  # press FIRE once at the start (instead of one such frame), if the game has that action
    life_loss_terminates: bool = False  # report a lost life as `terminated` and start a new stack; the game goes on
    clip_rewards: bool = True  # the sign of the reward in `Step.reward`; `episode_return` stays raw
    max_frames: int = 108_000  # emulator frames until truncation, 60 a second
    grayscale: bool = True  # False: three colour channels (red, green, blue) a frame instead of one
    image_size: int = 84  # height and width of the observation in pixels
    frame_stack: int = 4  # frames in an observation
    reseed_after: int = 50_000  # actions between two seeds of a row: also about how many a resume plays again

    def __post_init__(self) -> None:
        probability = self.sticky_actions
        if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 <= probability < 1:
            raise ValueError(f"sticky_actions must be a number in [0, 1), got {probability!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("noop_max", "reseed_after") else 1
            if field.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be True or False, got {value!r}")
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{field.name} must be an integer of at least {least}, got {value!r}")

    @property
    def horizon(self) -> int:
        """Actions until truncation."""
        return -(-self.max_frames // self.frame_skip)

    @property
    def channels(self) -> int:
        """Channels of one frame."""
        return 1 if self.grayscale else 3


# A protocol fixes every field that it does not list to the default above.
#
# "v5": the conventions of ALE's v5 ids (https://ale.farama.org), with frames and rewards as all of the others.
#
# "machado": Machado et al. 2018 (doi:10.1613/jair.5699) recommend sticky actions of 0.25, all 18 actions, and no use of
#   lives; reported are the returns of training episodes. They leave the cap open (Toromanoff et al. 2019,
#   arXiv:1908.04683); 108 000 frames, 30 minutes, are ALE's and Dopamine's (atari_lib.py).
#
# "classic": DQN of Mnih et al. 2015 (doi:10.1038/nature14236, Methods): deterministic, minimal action set, up to 30
#   no-ops, a lost life ends the episode while training, rewards clipped to their sign, and at most five minutes, 18 000
#   frames. Their code draws 1 .. 30 no-ops, ALE's environment starts at 0. With max_frames=108_000, 30 minutes, it is
#   the "no-op starts" of Double DQN to Rainbow (Hessel et al. 2018, arXiv:1710.02298, table 3; DQN Zoo).
#
# "atari-100k": 100 000 actions, 400 000 frames, of training (Kaiser et al. 2020, arXiv:1903.00374), in the settings of
#   SPR (Schwarzer et al. 2021, arXiv:2007.05929; github.com/mila-iqia/spr, src/rlpyt_atari_env.py): as "classic" with
#   27 000 actions, 108 000 frames, an episode. The number of training steps is the caller's. Scores are means over 100
#   episodes of the last policy.
#
# Evaluate agents trained with "classic" and "atari-100k" with life_loss_terminates=False, as all of these papers do.
_NO_OP_STARTS: dict[str, Any] = {"sticky_actions": 0.0, "noop_max": 30, "life_loss_terminates": True}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "v5": {},
    "machado": {"sticky_actions": 0.25, "full_action_set": True, "life_loss_terminates": False, "max_frames": 108_000},
    "classic": {**_NO_OP_STARTS, "max_frames": 18_000},
    "atari-100k": {**_NO_OP_STARTS, "max_frames": 108_000},
}


def choose(protocol: str = "v5", **changes: Any) -> Settings:
    """The settings of a protocol, with single ones changed.

    Raises ValueError for an unknown protocol, naming the nearest one, or a value out of range.
    """
    if protocol not in PROTOCOLS:
        near = difflib.get_close_matches(str(protocol).lower(), PROTOCOLS, 1, cutoff=0.0)[0]
        raise ValueError(f"unknown Atari protocol '{protocol}'; did you mean '{near}'?")
    return Settings(protocol=protocol, **{**PROTOCOLS[protocol], **changes})
