"""Runs on a disk that fills up, then on one that cannot be written: `python -m tests.runs.small_disk FOLDER`.

Mounts a tmpfs on FOLDER, so it needs a mount namespace of its own (`unshare --mount`). Prints what happened as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

from runs.cli import main
from runs.files import read_json
from tests.runs.same_run import final_hash

TRAIN = ["train", "td3", "--env", "gym/Pendulum-v1", "--steps", "160", "--hidden", "64", "64", "--warmup-steps", "10"]
TRAIN += ["--batch-size", "4", "--eval-episodes", "1", "--seeds", "1", "--quiet", "--no-tensorboard"]
TRAIN += ["--eval-every", "80", "--checkpoint-every", "20"]


def neoteny(*arguments: str) -> tuple[int, str]:
    """Exit code and what was said on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(list(arguments))
    return code, said.getvalue()


def mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True)


def on_a_small_disk(disk: Path, elsewhere: Path) -> dict[str, object]:
    """What happens on it, by name."""
    run, told = str(disk / "run"), {}
    mount("-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk))
    told["full"] = neoteny(*TRAIN, "--out", str(disk), "--name", "run")
    told["state when full"] = read_json(disk / "run" / "status.json")["state"]
    told["resumed while full"] = neoteny("resume", run, "--quiet")
    told["left behind"] = [path.name for path in (disk / "run" / "checkpoints").glob(".*")]
    mount("-o", "remount,size=20m", str(disk))
    told["resumed"] = neoteny("resume", run, "--quiet")
    told["undisturbed"] = neoteny(*TRAIN, "--out", str(elsewhere), "--name", "whole")
    told["hashes"] = [final_hash(disk / "run"), final_hash(elsewhere / "whole")]
    (disk / "run" / "status.json").unlink()  # as after a kill
    mount("-o", "remount,ro", str(disk))
    told["resume, read-only"] = neoteny("resume", run)
    told["train, read-only"] = neoteny(*TRAIN, "--out", str(disk), "--name", "other")
    told["report, read-only"] = neoteny("report", run)
    told["report elsewhere"] = neoteny("report", run, "--out", str(elsewhere))
    told["watch, read-only"] = neoteny("watch", run, "--max-steps", "2", "--size", "64")
    told["evaluate, read-only"] = neoteny("evaluate", run, "--episodes", "1")
    return told


if __name__ == "__main__":
    disk, elsewhere = Path(sys.argv[1], "disk"), Path(sys.argv[1], "elsewhere")
    disk.mkdir()
    elsewhere.mkdir()
    print(json.dumps(on_a_small_disk(disk, elsewhere)))
