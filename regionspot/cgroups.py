"""The control groups of this process (Linux): what containers and systemd bound it by."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")


@dataclass(frozen=True)
class _Mount:
    """Where a hierarchy of control groups can be seen: `top`, a group's path in it, lies at
    `point`.
    """

    version: int
    top: PurePosixPath
    point: PurePosixPath


def groups(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """The folders of the groups by which a controller bounds this process, its own first, then
    those above it.

    Args:
        controller: "cpu" or "memory".
        root: of the file system that describes the machine.
    """
    paths = dict(_own_paths(read(root / "proc/self/cgroup"), controller))
    for mount in _mounts(read(root / "proc/self/mountinfo"), controller):
        if mount.version not in paths:
            continue
        point = root / mount.point.relative_to("/")
        inside = _below(paths[mount.version], mount.top)
        yield from (point / folder for folder in (inside, *inside.parents))


def _own_paths(text: str, controller: str) -> Iterator[tuple[int, PurePosixPath]]:
    """(version, path) of each group in /proc/self/cgroup that the controller can bound."""
    for line in text.splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            yield 2, PurePosixPath(path)
        elif controller in controllers.split(","):
            yield 1, PurePosixPath(path)


def _mounts(text: str, controller: str) -> Iterator[_Mount]:
    """The hierarchies in /proc/self/mountinfo that the controller can be in."""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        top, point = (PurePosixPath(_unescaped(field)) for field in fields[3:5])
        if kind[0] == "cgroup2":
            yield _Mount(2, top, point)
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            yield _Mount(1, top, point)


def _below(path: PurePosixPath, top: PurePosixPath) -> PurePosixPath:
    """A group's path below the mounted one; the mounted one itself where it lies elsewhere, as in
    some containers.
    """
    if ".." in path.parts:
        return PurePosixPath()
    return path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()


def memory_bytes(root: Path = ROOT) -> int:
    """Bytes of memory that this process may use: the machine's, or what its control groups allow;
    the smallest limit holds.
    """
    limits = [_memory_of(group) for group in groups("memory", root)]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit in limits if limit is not None)])


def _memory_of(group: Path) -> int | None:
    """A group's limit in bytes; None where there is none."""
    text = read(group / "memory.max") or read(group / "memory.limit_in_bytes")
    return int(text) if text.strip().isdecimal() else None


def _unescaped(field: str) -> str:
    """A field of mountinfo, which writes spaces as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def read(path: Path) -> str:
    """A file's text; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
