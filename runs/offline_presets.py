"""Published settings of the offline agents, by data set; what differs from the agents' defaults.

Those of A2PR with a star are in the final README of its authors' code, the others only in the notes of its history
(specs/a2pr-and-offline-rl.md, section 4). They are for D4RL's files: on small sets made here some of them do harm.
"""

from __future__ import annotations

from typing import Any

_SMALL = {"hidden": (128, 128), "critic_hidden": (128, 128), "batch_size": 128}
_TINY = {"hidden": (64, 64), "critic_hidden": (64, 64), "batch_size": 128}
_RETURN_RANGE = {"actor": "deterministic", "reward_scaling": "return_range"}


def _a2pr(width: int) -> dict[str, Any]:
    return {
        "hidden": (width,) * 3,
        "critic_hidden": (width,) * 4,
        "vae_hidden": (128, 128) if width == 128 else (64, 64),
        "batch_size": 128,
    }


OFFLINE_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "a2pr": {
        "default": {},  # the one setting of an independent reproduction on 15 tasks
        "halfcheetah-medium": {"alpha": 40.0},  # *
        "hopper-medium": {"mask": 0.4, "discount": 0.995},  # *
        "walker2d-medium": {"vae_weight": 1.5},  # *
        "halfcheetah-medium-replay": {"alpha": 40.0, "mask": 0.8, "vae_weight": 1.5, "discount": 0.995},
        "halfcheetah-medium-expert": {"alpha": 40.0, "mask": 15.0},
        "hopper-random": {"mask": 1.5, "vae_weight": 1.5, "discount": 0.995},
        "hopper-medium-replay": {"mask": 0.5, "vae_weight": 1.5},
        "hopper-medium-expert": {"mask": 4.0},
        "walker2d-medium-replay": {"mask": 1.2, "vae_weight": 1.5, "discount": 0.995},
        "walker2d-medium-expert": {"mask": 0.8},
        # Of PRDC, whose code A2PR's began from; not verified for A2PR.
        "antmaze": {"alpha": 7.5, "reward_scale": 10_000.0, "reward_shift": -1.0},
        "small": _a2pr(128),
        "tiny": _a2pr(64),
    },
    "bc": {
        "10-percent": {"fraction": 0.1},
        "small": {"hidden": (128, 128), "batch_size": 128},
        "tiny": {"hidden": (64, 64), "batch_size": 128},
    },
    "td3_bc": {
        "antmaze": {"reward_shift": -1.0},
        "a2pr-depths": {"hidden": (256,) * 3, "critic_hidden": (256,) * 4},
        "small": _SMALL,
        "tiny": _TINY,
    },
    "iql": {
        "antmaze": {"expectile": 0.9, "inverse_temperature": 10.0, "reward_shift": -1.0},
        "hopper-medium": {**_RETURN_RANGE, "target_rate": 0.001},
        "hopper-medium-replay": _RETURN_RANGE,
        "hopper-medium-expert": {"expectile": 0.5, "inverse_temperature": 6.0},
        "small": {"hidden": (128, 128), "batch_size": 128},
        "tiny": {"hidden": (64, 64), "batch_size": 128},
    },
    "cql": {
        "antmaze": {
            "actor_learning_rate": 1e-4,
            "critic_hidden": (256,) * 5,
            "lagrange": True,
            "conservatism": 5.0,
            "clip_below": 200.0,
            "backup_actions": 10,
            "reward_scale": 10.0,
            "reward_shift": -5.0,
            "normalise": False,
        },
        # A short run at the published rate of 3e-5 leaves the policy where it began.
        "small": {**_SMALL, "actor_learning_rate": 1e-4},
        "tiny": {**_TINY, "actor_learning_rate": 3e-4},
    },
    "rebrac": {
        "hopper-medium": {"cloning_weight": 0.01, "critic_penalty": 0.01},
        # The two weights are as remembered from the paper; the rest is CORL's.
        "antmaze-umaze": {
            "cloning_weight": 0.003,
            "critic_penalty": 0.002,
            "discount": 0.999,
            "critic_learning_rate": 5e-5,
            "reward_scale": 100.0,
        },
        "small": {**_SMALL, "batch_size": 256},
        "tiny": _TINY,
    },
}
