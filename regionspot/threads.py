"""How many threads a runtime on the CPU is given."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

ROOT = Path("/")
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
    quotas = [quota for group in _cpu_groups(root) if (quota := _quota_of(group)) is not None]
    return min(map(math.ceil, quotas), default=NO_LIMIT)


@dataclass(frozen=True)
class _Mount:
    """Where a hierarchy of control groups can be seen: `top`, a group's path in it, lies at
    `point`.
    """

    version: int
    top: PurePosixPath
    point: PurePosixPath


@cache
def _core(root: Path, cpu: int) -> str:
    """What tells a CPU's core from all others: the list of the CPUs that share it."""
    for name in _SIBLINGS:
        siblings = _read(root / _CPUS / f"cpu{cpu}" / "topology" / name).strip()
        if siblings:
            return siblings
    return f"cpu{cpu}"


def _cpu_groups(root: Path) -> Iterator[Path]:
    """The folders of the groups that bound this process's time, its own first, then those
    above it.
    """
    paths = dict(_own_paths(_read(root / "proc/self/cgroup")))
    for mount in _mounts(_read(root / "proc/self/mountinfo")):
        if mount.version not in paths:
            continue
        point = root / mount.point.relative_to("/")
        inside = _below(paths[mount.version], mount.top)
        yield from (point / folder for folder in (inside, *inside.parents))


def _own_paths(text: str) -> Iterator[tuple[int, PurePosixPath]]:
    """(version, path) of each group in /proc/self/cgroup that can have a quota."""
    for line in text.splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            yield 2, PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            yield 1, PurePosixPath(path)


def _mounts(text: str) -> Iterator[_Mount]:
    """The hierarchies in /proc/self/mountinfo that can have a quota."""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        top, point = (PurePosixPath(_unescaped(field)) for field in fields[3:5])
        if kind[0] == "cgroup2":
            yield _Mount(2, top, point)
        elif kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            yield _Mount(1, top, point)


def _below(path: PurePosixPath, top: PurePosixPath) -> PurePosixPath:
    """A group's path below the mounted one; the mounted one itself where it lies elsewhere, as in
    some containers.
    """
    if ".." in path.parts:
        return PurePosixPath()
    return path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()


def _quota_of(group: Path) -> float | None:
    """CPUs' worth of time; None where there is no limit."""
    text = (
        _read(group / "cpu.max")
        or f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
    )
    try:
        quota, period = map(int, text.split())
    except ValueError:  # "max", -1 alone, or no such files
        return None
    return quota / period if quota > 0 and period > 0 else None


def _unescaped(field: str) -> str:
    """A field of mountinfo, which writes spaces as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _read(path: Path) -> str:
    """A file's text; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
