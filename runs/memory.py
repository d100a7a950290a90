"""Whether the replays of a run fit into memory, found before anything of the run is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.fading import FadingReplay
from envs import Runner
from runs.config import RunConfig
from runs.randomness import spawn_streams
from runs.training import build_agent

_SMALL, _TWICE = 64, 128  # transitions, for each environment, of the two replays that are measured
_EXPLORATION = 8  # of which so many are exploration, so that a fading replay has whole tiles
_LEFT = 0.9  # of what is available, for the replays: networks and batches need some too


@dataclasses.dataclass(frozen=True)
class ReplayBytes:
    """What the replay of one seed takes: `fixed` bytes, and `each` for every transition that it can hold.

    filled_at_once: it is full from the first update on, as a fading replay of Symphony is.
    """

    fixed: float
    each: float
    filled_at_once: bool

    def of(self, transitions: int) -> float:
        """Bytes of a replay of so many transitions."""
        return self.fixed + self.each * transitions


def require_replay_memory(config: RunConfig, runner: Runner) -> None:
    """Raises ValueError if the replays of all seeds are larger than the memory that is free on their device.

    On a CPU a ring takes memory only where it is written, so a short run is not refused for what it never fills.
    """
    capacity = getattr(config.agent_config, "replay_capacity", None)
    free = available_memory(torch.device(config.device))
    if capacity is None or free is None:
        return
    one = measure_replay(config, runner)
    used = capacity
    if config.device == "cpu" and not (one.filled_at_once and config.steps >= config.agent_config.warmup_steps):
        used = min(capacity, config.steps)
    seeds = len(config.seeds)
    needed = seeds * one.of(used)
    if needed <= free:
        return
    unit = config.agent_config.warmup_steps if one.filled_at_once else config.num_envs
    fitting = _fitting((_LEFT * free / seeds - one.fixed) / one.each, unit)
    advice = f"--replay-capacity {fitting} would fit" if fitting else "even a small one does not fit, use fewer --seeds"
    whose = "the replay needs" if seeds == 1 else f"the replays of {seeds} seeds need"
    memory = "memory" if config.device == "cpu" else "GPU memory"
    raise ValueError(
        f"{whose} {_in_words(needed)} of {memory} ({used} transitions of {_in_words(one.each)}), and {_in_words(free)} "
        f"are free; {advice}"
    )


def measure_replay(config: RunConfig, runner: Runner) -> ReplayBytes:
    """From two small replays of the agent, so that whatever an agent keeps of a transition is counted."""
    sizes = [count * config.num_envs for count in (_SMALL, _TWICE)]
    replays = [_replay_of(config, runner, size) for size in sizes]
    first, second = (_tensor_bytes(replay) for replay in replays)
    each = (second - first) / (sizes[1] - sizes[0])
    return ReplayBytes(first - each * sizes[0], each, isinstance(replays[0], FadingReplay))


def _replay_of(config: RunConfig, runner: Runner, capacity: int) -> Any:
    small = {"replay_capacity": capacity, "warmup_steps": _EXPLORATION * config.num_envs}
    agent_config = dataclasses.replace(config.agent_config, **small)
    cpu = torch.device("cpu")
    plain = dataclasses.replace(config, agent_config=agent_config, interventions="none")  # which keep no transitions
    agent: Any = build_agent(plain, runner, cpu, spawn_streams(0, cpu))
    return agent.replay


def _tensor_bytes(part: Any) -> int:
    """Of all tensors of an object, and of the objects of ours, lists and mappings in it."""
    if isinstance(part, Tensor):
        return part.nbytes
    if isinstance(part, Mapping):
        return sum(map(_tensor_bytes, part.values()))
    if isinstance(part, list | tuple):
        return sum(map(_tensor_bytes, part))
    return _tensor_bytes(vars(part)) if type(part).__module__.startswith("agents.") else 0


def _fitting(transitions: float, unit: int) -> int:
    """At most so many: a multiple of `unit`, with two digits that count where the unit lets it."""
    rounding = 10 ** max(0, math.floor(math.log10(max(transitions, 1))) - 1)
    return int(transitions // rounding * rounding // unit * unit) if transitions >= unit else 0


def _in_words(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def available_memory(
    device: torch.device, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that are free: of the GPU, or of the machine and its container, whichever has less; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [free for free in (_of_machine(proc), _of_container(cgroup)) if free is not None]
    return min(known, default=None)


def _of_machine(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):  # not Linux, or a very old one
        return None


def _of_container(cgroup: Path) -> int | None:
    """What its control group (version 2 or 1) leaves; files that are cached and can go are not counted as used."""
    old = cgroup / "memory"
    for limit, usage, stat, cached in (
        (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat", "inactive_file"),
        (old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat", "total_inactive_file"),
    ):
        try:
            allowed, used = int(limit.read_text()), int(usage.read_text())
            values = dict(line.split(maxsplit=1) for line in stat.read_text().splitlines())
            return max(0, allowed - used + int(values.get(cached, 0)))
        except (OSError, ValueError):  # no such control group, or "max": no limit
            continue
    return None
