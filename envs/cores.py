"""How many cores this process may use: what the scheduler allows it, and what a container's quota pays for."""

from __future__ import annotations

import os
from pathlib import Path


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores of this process's affinity, or fewer under a CPU quota of control groups (version 2 or 1); at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time that the container may spend; None without a limit."""
    try:
        if (cgroup / "cpu.max").exists():
            spend, period = (cgroup / "cpu.max").read_text().split()
            return None if spend == "max" else int(spend) / int(period)
        spend_us = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
        return spend_us / period_us if spend_us > 0 else None
    except (OSError, ValueError):  # no control groups here, or not in a form we know
        return None
