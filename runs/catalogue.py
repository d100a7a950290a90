"""Which agents there are, and which published settings each knows by name."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

import agents
from agents import simba
from envs import ObservationSpec
from runs.errors import nearest
from runs.offline_presets import OFFLINE_PRESETS

AGENTS: dict[str, ModuleType] = {name: importlib.import_module(f"agents.{name}") for name in agents.NAMES}
# Those that learn from fixed data.
OFFLINE: dict[str, ModuleType] = {
    name: importlib.import_module(f"agents.offline.{name}") for name in agents.OFFLINE_NAMES
}

# The switches and numbers of Symphony's successor that its paper and its code have in common.
_SAYA = {
    "weighting": "bell",
    "batch_average": True,
    "soft_target": True,
    "trained_slope": True,
    "encoder_features": 24,
    "gradient_dropout": True,
    "annealed_epsilon": True,
    "shared_noise": True,
    "target_rate": 0.001,
    "second_moment_rate": 0.999,
    "updates_per_step": 1,
    "fall_window": 100,
    "terminal_lives": 1,
}

# Atari in 100 000 decisions (specs/beer-and-online-rl.md, section 10).
_ATARI_100K: dict[str, Any] = {
    "n_step": 10,
    "learning_rate": 1e-4,
    "adam_epsilon": 1.5e-4,
    "replay_capacity": 100_000,
    "warmup_steps": 1_600,
    "update_every": 1,
    "target_update_every": 2_000,
    "epsilon_decay_steps": 2_000,
}
# Ours: everything sooner, for hours on two cores instead of days.
_SMALL_ATARI: dict[str, Any] = {
    "replay_capacity": 100_000,
    "warmup_steps": 5_000,
    "epsilon_decay_steps": 50_000,
    "target_update_every": 1_000,
}
# Ours.
_CARTPOLE: dict[str, Any] = {
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-8,
    "batch_size": 64,
    "replay_capacity": 20_000,
    "warmup_steps": 500,
    "update_every": 1,
    "target_update_every": 50,
    "epsilon_decay_steps": 2_000,
    "epsilon_evaluation": 0.0,
    "n_step": 10,
    "hidden": (128, 128),
}
_PPO_ATARI: dict[str, Any] = {
    "learning_rate": 2.5e-4,
    "rollout_steps": 128,
    "epochs": 4,
    "minibatches": 4,
    "clip": 0.1,
    "entropy_weight": 0.01,
    "normalise_rewards": False,
    "deterministic_evaluation": False,
}
# What NaP's paper builds on: Rainbow of DQN Zoo (specs/nap-and-plasticity.md, section 1.8).
_NAP_RAINBOW: dict[str, Any] = {"noise_scale": 0.1, "adam_epsilon": 0.005 / 32}
# SAC with SimBa's networks, for tasks of 1000 steps that do not terminate, as those of the control suite; where tasks
# do, its authors take the smaller of two critics (`--critics 2`).
_SIMBA: dict[str, Any] = {
    "architecture": "simba",
    "hidden": (128,),
    "critic_hidden": (512, 512),
    "critics": 1,
    "normalise_observations": True,
    "learning_rate": 1e-4,
    "weight_decay": 1e-2,
    "initial_temperature": 0.01,
    "target_entropy_per_action": -0.5,
    "log_std_min": -10.0,
    "discount": simba.discount(1_000),
}

# What differs from the agent's defaults. "small" fits two cores and minutes.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "beer": {
        "dmc": {"warmup_steps": 1_000, "n_step": 3, "exploration_noise": 0.3},
        # Lyle et al. 2022, as far as remembered (specs/beer-and-online-rl.md, section 5).
        "infer": {"representation": "infer", "representation_weight": 0.1},
        "small": {"warmup_steps": 1_000, "replay_capacity": 100_000},
    },
    # Critics of 2048 units take seconds for hundreds of steps on two cores.
    "crossq": {"small": {"warmup_steps": 1_000, "replay_capacity": 100_000, "critic_hidden": (256, 256)}},
    "ddpg": {
        "dmc": {"warmup_steps": 1_000, "n_step": 3, "exploration_noise": 0.3},
        "small": {"warmup_steps": 1_000, "replay_capacity": 100_000},
    },
    # CleanRL's; the rates of all fall to 0 over the run (--lr-schedule linear).
    "ppo": {
        "atari": _PPO_ATARI,
        "nap-atari": _PPO_ATARI,
        "nap-atari-sequence": _PPO_ATARI,
        "nap-dmc": {},
        "nap-dmc-sequence": {},
        # Small vector tasks with buttons; four environments (--num-envs 4).
        "classic": {
            "learning_rate": 2.5e-4,
            "rollout_steps": 128,
            "epochs": 4,
            "minibatches": 4,
            "entropy_weight": 0.01,
            "normalise_observations": False,
            "normalise_rewards": False,
        },
        "mujoco": {},
    },
    "qrdqn": {
        "atari": {},
        "atari100k": _ATARI_100K,
        "cartpole": {**_CARTPOLE, "quantiles": 20},
        "small": {**_SMALL_ATARI, "learning_rate": 1e-4, "n_step": 3},
    },
    "rainbow": {
        "atari": {},
        "nap-atari": _NAP_RAINBOW,
        # The peak that is reported for the sequence, ten times Rainbow's rate; it may be a slip, so compare with that.
        "nap-atari-sequence": {**_NAP_RAINBOW, "learning_rate": 6.25e-4},
        # Data-efficient Rainbow (van Hasselt et al. 2019) as Dopamine has it.
        "atari100k": {**_ATARI_100K, "importance_steps": 100_000},
        # Bellemare et al. 2017, in DQN Zoo's settings.
        "c51": {
            "double": False,
            "dueling": False,
            "n_step": 1,
            "replay": "uniform",
            "noisy": False,
            "learning_rate": 2.5e-4,
            "adam_epsilon": 0.01 / 32,
            "warmup_steps": 50_000,
            "target_update_every": 10_000,
            "epsilon_decay_steps": 1_000_000,
        },
        "cartpole": {**_CARTPOLE, "atoms": 21, "v_min": 0.0, "v_max": 100.0, "importance_steps": 20_000},
        "small": {**_SMALL_ATARI, "learning_rate": 1e-4, "importance_steps": 100_000},
    },
    "sac": {
        "nap-dmc": {},
        "nap-dmc-sequence": {},
        "small": {"warmup_steps": 1_000, "replay_capacity": 100_000},
        "simba": _SIMBA,
        "simba-small": {
            **_SIMBA,
            "warmup_steps": 1_000,
            "replay_capacity": 100_000,
            "hidden": (64,),
            "critic_hidden": (128, 128),
        },
    },
    "symphony": {
        # specs/symphony.md, section 11: the four of the paper; "s3" are the defaults.
        "s3": {},
        "se": {"noise_std": 1 / math.pi},
        "s2": {"warmup_steps": 20_480, "learning_rate": 5e-5, "gradient_dropout": True},
        "ed": {
            "warmup_steps": 7_680,
            "replay_capacity": 384_000,
            "hidden": (384, 384),
            "nodes": 96,
            "batch_size": 288,
            "updates_per_step": 2,
            "half_precision_replay": True,
        },
        # Section 15, "Saya": the paper of August 2026, and its code, which is smaller. 24 is the code's.
        "saya": {
            **_SAYA,
            "warmup_steps": 20_000,
            "replay_capacity": 1_000_000,
            "hidden": (768, 768),
            "bottleneck": 384,
            "nodes": 128,
            "batch_size": 384,
        },
        "saya-code": {
            **_SAYA,
            "warmup_steps": 10_000,
            "replay_capacity": 500_000,
            "hidden": (384, 384),
            "bottleneck": 192,
            "nodes": 64,
            "batch_size": 192,
        },
        # Section 17: a replay about as long as the run, or old exploration fills most of the batches. For 8 000 steps.
        "small": {
            "warmup_steps": 1_000,
            "replay_capacity": 8_000,
            "hidden": (128, 128),
            "nodes": 32,
            "batch_size": 96,
            "learning_rate": 3e-4,
        },
    },
    "td3": {
        # Ours, for the DeepMind Control suite: the short random phase of the paper's section 6.1, the three-step
        # returns of DrQ-v2 and MR.Q, the exploration of D4PG. docs/results/first-run.md compares.
        "dmc": {"warmup_steps": 1_000, "n_step": 3, "exploration_noise": 0.3},
        "small": {"warmup_steps": 1_000, "replay_capacity": 100_000},
    },
    "td7": {
        "small": {
            "warmup_steps": 1_000,
            "replay_capacity": 100_000,
            "embedding": 64,
            "hidden": (64, 64),
        }
    },
    "dqn": {
        # The defaults: CleanRL's Atari settings.
        "atari": {},
        "nap-atari": {},
        "nap-atari-sequence": {},
        # Ours, after the Atari-100k settings: everything sooner, for hours on two cores instead of days.
        "small": {
            "learning_rate": 1e-4,
            "replay_capacity": 100_000,
            "warmup_steps": 5_000,
            "epsilon_decay_steps": 50_000,
            "target_update_every": 1_000,
            "n_step": 3,
        },
        # rl-baselines3-zoo, CartPole-v1 (its ε falls over 16 % of 50 000 steps; SB3 clips gradients and uses Huber),
        # but for the learning rate: the zoo's 2.3e-3 reaches 500 and falls back, again and again.
        "cartpole": {
            "learning_rate": 5e-4,
            "batch_size": 64,
            "replay_capacity": 100_000,
            "warmup_steps": 1_000,
            "update_every": 256,
            "updates_per_round": 128,
            "target_update_every": 10,
            "epsilon_decay_steps": 8_000,
            "epsilon_end": 0.04,
            "epsilon_evaluation": 0.0,
            "huber": True,
            "max_gradient_norm": 10.0,
        },
        # rl-baselines3-zoo, LunarLander: ε over 12 % of 100 000 steps.
        "lunarlander": {
            "learning_rate": 6.3e-4,
            "batch_size": 128,
            "replay_capacity": 50_000,
            "warmup_steps": 0,
            "update_every": 4,
            "updates_per_round": 4,
            "target_update_every": 250,
            "epsilon_decay_steps": 12_000,
            "epsilon_end": 0.1,
            "epsilon_evaluation": 0.0,
            "huber": True,
            "max_gradient_norm": 10.0,
        },
    },
}

PRESETS |= OFFLINE_PRESETS


# What a preset sets of the run, whatever the agent: options of `neoteny train`. NaP leaves the decay of learning rates
# to the schedule. For one task it is linear to 0, a survey's simple choice (specs/nap-and-plasticity.md, section 1.7).
# For tasks in turn it is that of the sequence of games (section 1.9): a cosine from the peak to 1e-6 within each, after
# 1 000 gradient steps of warm-up, which Atari's agents take in 4 000 steps.
_SEQUENCE: dict[str, Any] = {"with_": "nap", "lr_schedule": "cosine-restart", "lr_end": 1e-6 / 6.25e-4}
PRESET_RUNS: dict[str, dict[str, Any]] = {
    "nap-atari": {"with_": "nap", "lr_schedule": "linear"},
    "nap-atari-sequence": {**_SEQUENCE, "lr_warmup": 4_000},
    "nap-dmc": {"with_": "nap", "lr_schedule": "linear"},
    "nap-dmc-sequence": {**_SEQUENCE, "lr_warmup": 1_000},
}


def find_agent(name: str) -> ModuleType:
    """The module of an agent: its `Config` and its `Agent`. Raises ValueError with the nearest names."""
    known = AGENTS | OFFLINE
    if name not in known:
        raise ValueError(f"unknown agent '{name}'.{nearest(name, known)}")
    return known[name]


def default_preset(agent: str, env_ids: Sequence[str], observation_spec: ObservationSpec) -> str | None:
    """The preset of a run that names none; None for the agent's plain defaults. env_ids: of all its tasks.

    Settings for Atari do not fit small vector tasks, and 25 000 random steps do not fit the control suite.
    """
    if agent in ("dqn", "qrdqn", "rainbow"):
        return "atari" if observation_spec.dtype == torch.uint8 else "cartpole"
    if agent == "ppo" and observation_spec.dtype == torch.uint8:
        return "atari"
    return "dmc" if all(env_id.startswith("dmc/") for env_id in env_ids) and "dmc" in PRESETS[agent] else None


def preset_config(agent: str, preset: str | None) -> Any:
    """The agent's `Config` with a preset's values. Raises ValueError with the nearest names."""
    config = find_agent(agent).Config()
    if preset is None:
        return config
    if preset not in PRESETS[agent]:
        raise ValueError(f"'{agent}' has no preset '{preset}'.{nearest(preset, PRESETS[agent])}")
    return dataclasses.replace(config, **PRESETS[agent][preset])


def run_preset(preset: str | None) -> dict[str, Any]:
    """Options of `neoteny train` that a preset sets beside the agent's hyper-parameters."""
    return PRESET_RUNS.get(preset or "", {})


def config_to_json(config: Any) -> dict[str, Any]:
    """A Config as plain values; infinity, which JSON does not have, as null."""
    values = dataclasses.asdict(config)
    return {name: None if value == math.inf else value for name, value in values.items()}


def config_from_json(agent: str, values: dict[str, Any]) -> Any:
    """Undo `config_to_json`. Raises ValueError if a name is not a hyper-parameter of the agent."""
    module = find_agent(agent)
    known = {field.name for field in dataclasses.fields(module.Config)}
    for name in values:
        if name not in known:
            raise ValueError(f"'{name}' is no hyper-parameter of '{agent}'.{nearest(name, known)}")
    plain = {name: math.inf if value is None else value for name, value in values.items()}
    return module.Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()})
