"""How much memory this process took at its worst. Linux only; elsewhere nothing is claimed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

_STATUS = Path("/proc/self/status")
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
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None
    )
