"""Normalised scores: a return placed between two published ones, so that environments can be averaged.

score = (return - low) / (high - low): 0 is as good as `low`, 1 as good as `high`. A score means nothing without its
pair, so each pair says where it is from. What has no published pair is refused.

Atari: random and human scores of Wang et al. 2016, "Dueling network architectures", table 2 (no-op starts), as used
by DQN Zoo (`atari_data.py`) and in later papers (Hessel et al. 2018, Badia et al. 2020). The human scores of Mnih et
al. 2015 are older and differ (Alien 6875 instead of 7127.7). Only these 57 games have a human score; ALE has more.

D4RL: random and expert returns of Fu et al. 2020 (arXiv:2004.07219), from `d4rl/infos.py`; published tables multiply
by 100. The MuJoCo pairs were measured on the -v2 environments and are used for -v4 and -v5 as well, as is customary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from runs.errors import nearest


@dataclass(frozen=True)
class ReferencePair:
    """Returns that count as 0 and as 1, what they are returns of, and who published them."""

    low: float
    high: float
    low_name: str
    high_name: str
    source: str


def reference_pair(name: str) -> ReferencePair:
    """The pair of an environment id (`atari/Pong`, `dmc/walker-walk`, `mujoco/Hopper-v5`) or a data set.

    Data sets by D4RL's names (`hopper-medium-v2`), Minari's (`D4RL/pen/human-v2`, `mujoco/hopper/medium-v0`) and those
    of `neoteny collect` (`lab/hopper/medium-small-v0`).
    Raises ValueError for anything else.
    """
    suite, _, rest = name.partition("/")
    if suite == "atari":
        if rest in ATARI:
            return ReferencePair(*ATARI[rest], "random", "human", "Wang et al. 2016, table 2, no-op starts")
        hint = nearest(rest, ATARI)
        raise ValueError(f"'{name}' has no human score: it is none of the 57 games of Wang et al. 2016.{hint}")
    if suite == "dmc":
        return ReferencePair(0.0, 1000.0, "zero", "maximum", "rewards of 0..1 in 1000 steps, Tassa et al. 2018")
    key = _d4rl_key(name)
    if key is None:
        raise ValueError(f"'{name}' has no reference pair: there are pairs for atari/, dmc/ and D4RL's environments")
    return ReferencePair(*D4RL[key], "random", "expert", "D4RL, Fu et al. 2020")


def normalise(name: str, returns: ArrayLike) -> np.ndarray:
    """Returns of an environment or data set, any shape, as scores. Raises ValueError if it has no reference pair."""
    pair = reference_pair(name)
    return (np.asarray(returns, dtype=np.float64) - pair.low) / (pair.high - pair.low)


def _d4rl_key(name: str) -> str | None:
    """'mujoco/HalfCheetah-v5', 'halfcheetah-medium-replay-v2', 'D4RL/antmaze/umaze-v1' -> the key in D4RL."""
    name = name.lower().removeprefix("mujoco/").removeprefix("d4rl/").removeprefix("lab/")
    words = name.replace("/", "-").split("-")
    if words[0] == "pointmaze":  # Minari's name of the same mazes
        words[0] = "maze2d"
    if words[0] == "maze2d":
        words = [word for word in words if word not in ("eval", "sparse")]
        return next((key for end in (3, 2) if (key := "-".join(words[:end])) in D4RL), None)
    return words[0] if words[0] in D4RL else None


# Game: (random, human).
ATARI: dict[str, tuple[float, float]] = {
    "Alien": (227.8, 7127.7),
    "Amidar": (5.8, 1719.5),
    "Assault": (222.4, 742.0),
    "Asterix": (210.0, 8503.3),
    "Asteroids": (719.1, 47388.7),
    "Atlantis": (12850.0, 29028.1),
    "BankHeist": (14.2, 753.1),
    "BattleZone": (2360.0, 37187.5),
    "BeamRider": (363.9, 16926.5),
    "Berzerk": (123.7, 2630.4),
    "Bowling": (23.1, 160.7),
    "Boxing": (0.1, 12.1),
    "Breakout": (1.7, 30.5),
    "Centipede": (2090.9, 12017.0),
    "ChopperCommand": (811.0, 7387.8),
    "CrazyClimber": (10780.5, 35829.4),
    "Defender": (2874.5, 18688.9),
    "DemonAttack": (152.1, 1971.0),
    "DoubleDunk": (-18.6, -16.4),
    "Enduro": (0.0, 860.5),
    "FishingDerby": (-91.7, -38.7),
    "Freeway": (0.0, 29.6),
    "Frostbite": (65.2, 4334.7),
    "Gopher": (257.6, 2412.5),
    "Gravitar": (173.0, 3351.4),
    "Hero": (1027.0, 30826.4),
    "IceHockey": (-11.2, 0.9),
    "Jamesbond": (29.0, 302.8),
    "Kangaroo": (52.0, 3035.0),
    "Krull": (1598.0, 2665.5),
    "KungFuMaster": (258.5, 22736.3),
    "MontezumaRevenge": (0.0, 4753.3),
    "MsPacman": (307.3, 6951.6),
    "NameThisGame": (2292.3, 8049.0),
    "Phoenix": (761.4, 7242.6),
    "Pitfall": (-229.4, 6463.7),
    "Pong": (-20.7, 14.6),
    "PrivateEye": (24.9, 69571.3),
    "Qbert": (163.9, 13455.0),
    "Riverraid": (1338.5, 17118.0),
    "RoadRunner": (11.5, 7845.0),
    "Robotank": (2.2, 11.9),
    "Seaquest": (68.4, 42054.7),
    "Skiing": (-17098.1, -4336.9),
    "Solaris": (1236.3, 12326.7),
    "SpaceInvaders": (148.0, 1668.7),
    "StarGunner": (664.0, 10250.0),
    "Surround": (-10.0, 6.5),
    "Tennis": (-23.8, -8.3),
    "TimePilot": (3568.0, 5229.2),
    "Tutankham": (11.4, 167.6),
    "UpNDown": (533.4, 11693.2),
    "Venture": (0.0, 1187.5),
    "VideoPinball": (16256.9, 17667.9),
    "WizardOfWor": (563.5, 4756.5),
    "YarsRevenge": (3092.9, 54576.9),
    "Zaxxon": (32.5, 9173.3),
}
# Environment: (random, expert); one pair for all data sets of an environment.
D4RL: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
    "maze2d-open": (0.01, 20.66),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-open-dense": (11.17817, 27.166538620695782),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
}
