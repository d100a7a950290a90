"""What can change about a robot and its world from one task to the next: factors on fields of a MuJoCo model."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np

from envs.mujoco_simulation import Model, engine

FACTORS = {
    "friction": "sliding friction of every geometry; a contact takes the larger of its two",
    "gravity": "gravity",
    "mass": "mass and rotational inertia of every body",
    "actuator_strength": "force or torque that every actuator transmits for a control (its gear)",
    "joint_damping": "viscous damping of every degree of freedom",
}


def check_factors(factors: Mapping[str, float]) -> None:
    """Raises ValueError for an unknown name, or a number that is negative, not finite, or 0 for `mass`."""
    for name, factor in factors.items():
        if name not in FACTORS:
            raise ValueError(f"a model has no factor '{name}'; it has {', '.join(FACTORS)}")
        if not math.isfinite(factor) or factor < 0 or (name == "mass" and factor == 0):
            raise ValueError(f"the factor of {name} must be positive and finite, got {factor}")


def changed_model(model: Model, factors: Mapping[str, float]) -> Model:
    """A copy of an MjModel with each field in `factors` multiplied. Raises ValueError as `check_factors`."""
    check_factors(factors)
    changed = copy.copy(model)
    changed.geom_friction[:, 0] *= factors.get("friction", 1.0)
    changed.opt.gravity[:] *= factors.get("gravity", 1.0)
    changed.actuator_gear[:] *= factors.get("actuator_strength", 1.0)
    changed.dof_damping[:] *= factors.get("joint_damping", 1.0)
    if factors.get("mass", 1.0) != 1.0:
        changed.body_mass[:] *= factors["mass"]
        changed.body_inertia[:] *= factors["mass"]
    if {"mass", "actuator_strength"} & factors.keys():
        engine().mj_setConst(changed, engine().MjData(changed))  # inverse weights and the like follow from the masses
    return changed


def changed_fields(model: Model, factors: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The fields in which `changed_model` may differ from `model`, by the name that `Simulations.expand` takes."""
    changed = changed_model(model, factors)
    names = {
        "friction": ("geom_friction",),
        "actuator_strength": ("actuator_gear", "actuator_acc0"),
        "joint_damping": ("dof_damping",),
        "mass": (
            "body_mass",
            "body_inertia",
            "body_subtreemass",
            "body_invweight0",
            "dof_invweight0",
            "dof_M0",
            "actuator_acc0",
        ),
    }
    found = {field: np.array(getattr(changed, field)) for factor in factors for field in names.get(factor, ())}
    if "gravity" in factors:
        found["opt.gravity"] = np.array(changed.opt.gravity)
    return found
