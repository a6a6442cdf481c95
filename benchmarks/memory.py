"""How much memory processes take: this one at its worst, and others by /proc. Linux only; elsewhere
nothing is claimed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

_PROC = Path("/proc")
_STATUS = _PROC / "self" / "status"
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
MIB = 2**20


class PeakMemory:
    """Resident memory above what there was when this was made, in MiB; None where the system does
    not say.

    What was freed before goes back to the system first: reused, it would hide what is measured.
    """

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(AttributeError, OSError, TypeError):  # of glibc alone
            ctypes.CDLL(None).malloc_trim(0)
        self._before = _resident("VmRSS")

    def start(self) -> None:
        """Forget earlier peaks."""
        if self._before is not None:
            _CLEAR.write_text(_RESET_PEAK)

    def peak_mb(self) -> float | None:
        """The most since `start`."""
        peak = _resident("VmHWM")
        return None if peak is None or self._before is None else (peak - self._before) / MIB

    def total_mb(self) -> float | None:
        """The most that the whole process took since `start`, the libraries and the loaded model
        included.
        """
        peak = _resident("VmHWM")
        return None if peak is None else peak / MIB


def _resident(field: str) -> int | None:
    """Bytes, from the process's own entry in /proc."""
    try:
        return _sizes_in(_STATUS).get(field)
    except OSError:
        return None


def tree_of(root: int) -> list[int]:
    """A process and its descendants."""
    found = [root]
    for pid in found:  # grows meanwhile
        with contextlib.suppress(OSError):  # it has ended
            for children in (_PROC / str(pid) / "task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def proportional_bytes(pid: int) -> int:
    """Of a process, of pages that several share its share. Raises OSError or KeyError where it has
    ended.
    """
    return _sizes_in(_PROC / str(pid) / "smaps_rollup")["Pss"]


def status_bytes(pid: int) -> dict[str, int]:
    """The sizes in a process's status, such as `VmHWM`. Raises OSError where it has ended."""
    return _sizes_in(_PROC / str(pid) / "status")


def _sizes_in(path: Path) -> dict[str, int]:
    """In bytes."""
    words = [line.split() for line in path.read_text().splitlines()]
    return {
        line[0].rstrip(":"): int(line[1]) * 1024
        for line in words
        if len(line) == 3 and line[2] == "kB"
    }
