"""How many threads a runtime on the CPU is given."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def default_threads() -> int:
    """$OMP_NUM_THREADS where it is set, as PyTorch does; else the physical cores that this process may use.

    Two threads of one core share its arithmetic units, and more threads than a container's quota wait for each other.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return max(1, min(physical_cores(), _quota()))


def physical_cores(cpus: Path = CPUS) -> int:
    """Cores that this process may run on; its CPUs where the system does not say which share a core."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        return len({_core(cpus / f"cpu{cpu}" / "topology") for cpu in allowed})
    except OSError:
        return len(allowed)


@cache
def _core(topology: Path) -> tuple[str, str]:
    """What tells a CPU's core from all others: CPUs of one core give the same."""
    return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()


def _quota() -> int:
    """CPUs' worth of time that a container may use, rounded up; large where there is no limit."""
    try:
        quota, period = QUOTA.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # not Linux, an older kernel, or "max"
        return 1 << 16
