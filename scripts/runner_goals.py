"""Measure the runner against its goals and print the Markdown of docs/results/runner.md, all with one command.

    python scripts/runner_goals.py --out results/bench

Runs of `neoteny bench` with 1, 64 and 256 rows, then the table of goals; about a quarter of an hour on two idle
cores. `--only-table` prints the table of goals again from what an earlier call has written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs.bench import bench_command, rows
from runs.contestants import CONTESTANTS

MUJOCO = ("mujoco/HalfCheetah-v5", "mujoco/Ant-v5", "mujoco/Humanoid-v5")
CONTROL = ("dmc/cheetah-run", "dmc/walker-walk", "dmc/humanoid-run")
SIMULATED = (*MUJOCO, *CONTROL, "atari/Pong")
# Without Gymnasium Async, whose 256 processes take minutes to start and do a third of the work of 8.
AT_256 = ("sync", "dm_control", "ale", "envpool", "limit")
# One command each, after which its processes and their memory are gone: 256 rows of a few environments take gigabytes.
PARTS = {
    "1": (1, (*SIMULATED, "gym/CartPole-v1"), ()),
    "64": (64, (*SIMULATED, "gym/CartPole-v1"), ()),
    "256": (256, MUJOCO, AT_256),
    "256-others": (256, ("dmc/cheetah-run", "atari/Pong"), AT_256),
}


@dataclass(frozen=True)
class Goal:
    """Our steps a second divided by a contestant's shall be at least so much, in each environment."""

    num_envs: int
    contestant: str
    least: Mapping[str, float]


def _all(envs: tuple[str, ...], least: float) -> dict[str, float]:
    return dict.fromkeys(envs, least)


GOALS = (  # specs/environment-runner.md, section 6
    Goal(64, "limit", {"atari/Pong": 0.65}),
    Goal(64, "ale", {"atari/Pong": 0.97}),
    Goal(64, "envpool", {"atari/Pong": 1.0}),
    Goal(64, "async", {"atari/Pong": 2.0}),
    Goal(256, "limit", _all(MUJOCO, 0.90)),
    Goal(256, "envpool", {**_all(MUJOCO, 1.0), "mujoco/HalfCheetah-v5": 1.3}),
    Goal(256, "sync", _all(MUJOCO, 1.4)),  # per CPU second
    Goal(64, "limit", _all(MUJOCO, 0.85)),
    Goal(64, "async", _all(MUJOCO, 5.0)),
    Goal(64, "limit", {**_all(CONTROL, 0.80), "dmc/cheetah-run": 0.75}),
    Goal(64, "envpool", _all(CONTROL, 1.0)),
    Goal(64, "dm_control", {**_all(CONTROL, 1.5), "dmc/cheetah-run": 3.0}),
    Goal(256, "limit", {"dmc/cheetah-run": 0.80}),
    Goal(256, "envpool", {"dmc/cheetah-run": 1.0}),
    Goal(1, "gymnasium", _all((*MUJOCO, "atari/Pong", "gym/CartPole-v1"), 1.0)),
    Goal(1, "dm_control", _all(CONTROL, 1.0)),
)


def goals_table(results: list[dict[str, Any]]) -> str:
    """A line for each goal of a measured number of rows: what was measured, in bold where the goal is missed.

    results: those of `bench.json`, of several files one after the other.
    """
    measured_rows = {result["num_envs"] for result in results}
    found = {(result["env"], result["num_envs"], result["contestant"]): result for result in results}
    lines = ["| rows | ours against | goal | by the clock | per CPU second |", "|---:|---|---|---|---|"]
    for goal in (goal for goal in GOALS if goal.num_envs in measured_rows):
        cells = [str(goal.num_envs), CONTESTANTS[goal.contestant].title, _wanted(goal)]
        for ratio in ("ratio", "cpu_ratio"):
            measured = {env: found.get((env, goal.num_envs, goal.contestant)) for env in goal.least}
            reached = [
                _cell(env, result[ratio] if result else None, goal.least[env]) for env, result in measured.items()
            ]
            cells.append(", ".join(reached))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _name(env: str) -> str:
    return env.partition("/")[2].removesuffix("-v5").removesuffix("-v1")


def _wanted(goal: Goal) -> str:
    usual = list(goal.least.values())[-1]
    others = [f"{least:g} ({_name(env)})" for env, least in goal.least.items() if least != usual]
    return ", ".join([f"{usual:g}", *others])


def _cell(env: str, ratio: float | None, least: float) -> str:
    if ratio is None:
        return f"{_name(env)} -"
    text = f"{_name(env)} {ratio:.2f}"
    return text if round(ratio, 2) >= least else f"**{text}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of bench.json and bench.png")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS), help="the numbers are of rows")
    parser.add_argument("--only-table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for part in options.parts:
        num_envs, envs, against = PARTS[part]
        folder = options.out / part
        if not options.only_table:
            command = ["--env", *envs, "--num-envs", str(num_envs), "--rounds", str(options.rounds)]
            command += ["--seconds", f"{options.seconds:g}", "--out", str(folder)]
            command += ["--against", *against] if against else []
            if os.getloadavg()[0] > 0.5:
                print(f"load is {os.getloadavg()[0]:.1f}: other work will be in the figures", file=sys.stderr)
            print(f"## {rows(num_envs)}\n\n```\nneoteny bench {' '.join(command)}\n```\n", flush=True)
            bench_command(command)
            print(flush=True)
        results += json.loads((folder / "bench.json").read_text())["results"]
    print(f"## Against the goals\n\n{goals_table(results)}")


if __name__ == "__main__":
    main()
