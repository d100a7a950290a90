"""BEER's grid world, with exact values: the tables of docs/results/agents.md.

python scripts/beer_grid_world.py none beer infer --seeds 5 [--step-reward -1 --goal-reward 0]
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch

from envs.grid_world import GridWorld
from runs.grid_study import KINDS, WEIGHTS, Settings, study

COLUMNS = ("error", "greedy_is_optimal", "feature_rank", "srank", "effective_rank", "representation/active_fraction")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["none", "beer", "infer"], metavar="PENALTY", help=", ".join(KINDS))
    parser.add_argument("--weight", type=float, help="of the penalty, instead of the published one")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=20)
    parser.add_argument("--goal-reward", type=float, default=1.0)
    parser.add_argument("--step-reward", type=float, default=0.0)
    parser.add_argument("--encoding", choices=["one-hot", "coordinates"], default="one-hot")
    given = parser.parse_args()
    torch.set_num_threads(1)
    grid = GridWorld(given.size, given.goal_reward, given.step_reward, given.encoding)
    settings = dataclasses.replace(Settings(), updates=given.updates, measure_every=max(1, given.updates // 5))
    print(f"| penalty | updates | {' | '.join(name.rpartition('/')[2] for name in COLUMNS)} |")
    for kind in given.kinds:
        weight = WEIGHTS.get(kind, 0.0) if given.weight is None else given.weight
        began = time.process_time()
        for row in study(grid, kind, weight, range(given.seeds), settings):
            cells = [_cell(row[name]) if name in row else "-" for name in COLUMNS]
            print(f"| {kind} {weight:g} | {int(row['update'][0])} | {' | '.join(cells)} |", flush=True)
        print(f"{kind}: {time.process_time() - began:.0f} s of processor time")


def _cell(values: torch.Tensor) -> str:
    """Mean over seeds, smallest and largest."""
    return f"{values.mean():.4g} [{values.min():.4g}, {values.max():.4g}]"


if __name__ == "__main__":
    main()
