"""How many threads a runtime on the CPU is given."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

from regionspot.cgroups import ROOT, groups, read

NO_LIMIT = 1 << 16
_CPUS = "sys/devices/system/cpu"
_SIBLINGS = ("core_cpus_list", "thread_siblings_list")  # the second is the name before Linux 5.3


def default_threads() -> int:
    """$OMP_NUM_THREADS where it is set, as PyTorch does; else the physical cores that this process
    may use.

    Two threads of one core share its arithmetic units, and more threads than a container's quota
    wait for each other.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return max(1, min(physical_cores(ROOT), cpu_quota(ROOT)))


def physical_cores(root: Path = ROOT) -> int:
    """Cores that this process may run on, by its CPU affinity. A CPU counts as a core of its own
    where the system does not say with which others it shares one.

    Args:
        root: of the file system that describes the machine.
    """
    allowed = (
        os.sched_getaffinity(0)
        if hasattr(os, "sched_getaffinity")
        else set(range(os.cpu_count() or 1))
    )
    return len({_core(root, cpu) for cpu in allowed})


@cache
def cpu_quota(root: Path = ROOT) -> int:
    """CPUs' worth of time that the control groups of this process allow, rounded up; NO_LIMIT where
    none limits it.

    Its own group and all of those above it count, of both versions: the smallest quota holds.
    systemd's CPUQuota= and a container's --cpus are such quotas.
    """
    quotas = [quota for group in groups("cpu", root) if (quota := _quota_of(group)) is not None]
    return min(map(math.ceil, quotas), default=NO_LIMIT)


@cache
def _core(root: Path, cpu: int) -> str:
    """What tells a CPU's core from all others: the list of the CPUs that share it."""
    for name in _SIBLINGS:
        siblings = read(root / _CPUS / f"cpu{cpu}" / "topology" / name).strip()
        if siblings:
            return siblings
    return f"cpu{cpu}"


def _quota_of(group: Path) -> float | None:
    """CPUs' worth of time; None where there is no limit."""
    text = (
        read(group / "cpu.max")
        or f"{read(group / 'cpu.cfs_quota_us')} {read(group / 'cpu.cfs_period_us')}"
    )
    try:
        quota, period = map(int, text.split())
    except ValueError:  # "max", -1 alone, or no such files
        return None
    return quota / period if quota > 0 and period > 0 else None
