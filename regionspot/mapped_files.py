"""Give back the memory of files that are mapped and were read once. Linux only; elsewhere nothing
happens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4


def forget_pages(path: Path) -> int:
    """Let go of the pages of a file that this process maps and cannot write to: they are read again
    when needed.

    A runtime that maps its weights and packs them into a form of its own would otherwise count them
    twice.

    Returns:
        Bytes of the mappings.
    """
    found = 0
    for start, length in _mappings(path.resolve()):
        if (
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED
            )
            == 0
        ):
            found += length
    return found


def _mappings(path: Path) -> Iterator[tuple[int, int]]:
    """(address, length) of each, of those that are read-only: what was written to a private one
    would be lost.
    """
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == str(path) and "w" not in fields[1]:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            yield start, end - start
