"""What pyproject.toml promises about dependencies."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_mujoco_and_dm_control_are_pinned_as_a_pair():
    """dm-control 1.0.50 cannot load a task under mujoco 4.0, and pip would choose 4.0."""
    wanted = {Requirement(line).name: str(Requirement(line).specifier) for line in PROJECT["dependencies"]}
    assert wanted["mujoco"] == "==3.17.0"
    assert wanted["dm-control"] == "==1.0.50"


def test_constraints_fit_what_is_declared():
    exact = pinned()
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        assert exact[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_extras_are_those_of_the_design():
    assert set(PROJECT["optional-dependencies"]) == {"avalanche", "box2d", "offline", "gpu", "dev", "bench", "sweep"}
    assert PROJECT["license"] == "Apache-2.0"
