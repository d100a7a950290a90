"""Kill runs with SIGKILL at random moments, resume them, and compare what comes out with runs that nothing disturbed.

Half of the kills come at any moment of a life, half of them while a checkpoint is being written. A run is killed
several times before it may end. It has survived if its final `state_hash` and every row of its table, but for clocks,
are those of the undisturbed run. Each life is a fork of this process, which imports all and computes nothing.

    python scripts/kill_runs.py --kills 40
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runs.resume
import runs.train  # noqa: F401 - both are needed by every fork
from runs import checkpoint
from runs.cli import main as neoteny
from runs.record import TABLE, read_table
from runs.settings import CONFIG

COMMON = ["--hidden", "32", "32", "--batch-size", "16", "--warmup-steps", "100", "--eval-episodes", "1", "--quiet"]
SETTINGS: dict[str, list[str]] = {
    "td3, HalfCheetah": [
        *("td3", "--env", "mujoco/HalfCheetah-v5", *COMMON, "--steps", "800", "--eval-every", "400", "--seeds", "1"),
        *("--checkpoint-every", "20", "--replay-capacity", "500", "--no-tensorboard"),
    ],
    "sac, Pendulum, two seeds": [
        *("sac", "--env", "gym/Pendulum-v1", *COMMON, "--steps", "900", "--eval-every", "300", "--seeds", "2"),
        *("--checkpoint-every", "30", "--num-envs", "3"),
    ],
    "dqn, Pong, two environments": [
        *("dqn", "--env", "atari/Pong", "--warmup-steps", "200", "--batch-size", "4", "--steps", "600", "--quiet"),
        *("--eval-every", "600", "--eval-episodes", "1", "--seeds", "1", "--num-envs", "2", "--threads", "1"),
        *("--checkpoint-every", "40", "--replay-capacity", "400", "--epsilon-evaluation", "1.0", "--no-tensorboard"),
    ],
    "ddpg, cartpole-swingup, overlap": [
        *("ddpg", "--env", "dmc/cartpole-swingup", *COMMON, "--steps", "1200", "--eval-every", "600", "--seeds", "1"),
        *("--checkpoint-every", "40", "--num-envs", "4", "--overlap", "--no-tensorboard"),
    ],
}
KILLS_OF_A_RUN = 4


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: its folder, and how long its process took."""

    run: Path
    seconds: float


@dataclass(frozen=True)
class Kill:
    """One kill. writing: a checkpoint was half written at the moment."""

    setting: str
    wanted: str
    seconds: float
    writing: bool


class Life:
    """A fork of this process that runs `neoteny ARGUMENTS`; its output goes to `log`."""

    def __init__(self, arguments: list[str], log: Path):
        self.code: int | None = None
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                code = neoteny(arguments)
            finally:
                os._exit(code)

    def has_ended(self, patiently: bool = False) -> bool:
        """Whether it has; `patiently` waits until it has."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, 0 if patiently else os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def end_well(self) -> None:
        """Wait for the end. Raises SystemExit with what it said unless the exit code is 0."""
        self.has_ended(patiently=True)
        if self.code:
            raise SystemExit(f"a run that nobody killed ended with {self.code}: {self.log.read_text()}")


def train_whole(flags: list[str], out: Path) -> Whole:
    """Train without any disturbance."""
    began = time.monotonic()
    Life(["train", *flags, "--out", str(out), "--name", "whole"], out.with_suffix(".log")).end_well()
    return Whole(out / "whole", time.monotonic() - began)


def is_writing(run: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any((run / checkpoint.FOLDER).glob(".*.partial"))


def kill_once(life: Life, run: Path, wanted: str, whole: Whole, chance: random.Random) -> bool:
    """Kill a running process at a random moment. Returns whether it lived long enough to be killed."""
    if wanted == "any moment":
        time.sleep(chance.uniform(0, whole.seconds))
    else:
        time.sleep(chance.uniform(0, 0.5 * whole.seconds))
        while not is_writing(run) and not life.has_ended():
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))
    if life.has_ended():
        return False
    os.kill(life.pid, signal.SIGKILL)
    return life.has_ended(patiently=True)


def disturb(setting: str, run: Path, whole: Whole, count: int, chance: random.Random) -> list[Kill]:
    """Start a run, kill it up to `count` times, resume it each time, and let it end. Returns the kills."""
    kills: list[Kill] = []
    flags = ["train", *SETTINGS[setting], "--out", str(run.parent), "--name", run.name]
    while True:
        resumed = (run / CONFIG).exists()
        if not resumed and run.exists():
            shutil.rmtree(run)  # killed before it was a run
        began = time.monotonic()
        life = Life(["resume", str(run), "--quiet"] if resumed else flags, run.with_suffix(".log"))
        wanted = ("any moment", "while writing")[len(kills) % 2]
        if len(kills) == count or not kill_once(life, run, wanted, whole, chance):
            life.end_well()
            return kills
        kills.append(Kill(setting, wanted, time.monotonic() - began, is_writing(run)))
        print(kills[-1], file=sys.stderr, flush=True)


def differences(run: Path, whole: Path) -> list[str]:
    """In what two finished runs differ; clocks excepted."""
    states = [checkpoint.verify(checkpoint.newest(folder))["state_hash"] for folder in (run, whole)]
    tables = [
        Counter(
            (row.seed, row.step, row.name, row.name.startswith("speed/") or row.value) for row in read_table(folder)
        )
        for folder in (run, whole)
    ]
    found = ["state_hash"] if states[0] != states[1] else []
    return found + ([TABLE] if tables[0] != tables[1] else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="how many altogether")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help=f"some of {', '.join(SETTINGS)}")
    parser.add_argument("--json", type=Path, help="also write every kill here")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chance, began = random.Random(options.seed), time.monotonic()
    told: list[dict[str, Any]] = []
    survived = attempted = 0
    print("| run | kills | of them in a half-written checkpoint | survived |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, setting in enumerate(options.only):
            out = Path(folder, str(number))
            whole = train_whole(SETTINGS[setting], out)
            share = options.kills // len(options.only) + (number < options.kills % len(options.only))
            kills: list[Kill] = []
            good = 0
            while len(kills) < share:
                run = out / f"run{len(kills)}"
                own = disturb(setting, run, whole, min(KILLS_OF_A_RUN, share - len(kills)), chance)
                found = differences(run, whole.run)
                kills += own
                good += 0 if found else len(own)
                told += [vars(kill) | {"differences": found} for kill in own]
                shutil.rmtree(run)
            writing = sum(kill.writing for kill in kills)
            print(f"| {setting} | {len(kills)} | {writing} | {good} |", flush=True)
            survived, attempted = survived + good, attempted + len(kills)
    print(
        f"\n{survived} of {attempted} kills survived with identical state and table; {time.monotonic() - began:.0f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(told, indent=2) + "\n")
    return 0 if survived == attempted else 1


if __name__ == "__main__":
    sys.exit(main())
