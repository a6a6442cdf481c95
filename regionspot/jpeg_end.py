"""JPEG files that lack nothing but their end marker: browsers and OpenCV show them, and they are
complete.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

END = b"\xff\xd9"
_COEFFICIENTS = 64
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, in Huffman's code
_SCAN = 0xDA
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
# they begin Huffman codes of all lengths
_FIRST_BYTES = (0x00, 0x60, 0x80, 0xB0, 0xC0, 0xE0, 0xF0, 0xF8)
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")

Pixels = npt.NDArray[np.uint8]


def with_end_marker(content: bytes, decode: Callable[[bytes], Pixels]) -> bytes | None:
    """The file with its end marker, or None where more is missing.

    Nothing is missing where all scans are there and the pixels do not depend on what follows the
    data.

    Args:
        content: a JPEG file that cannot be decoded to its end.
        decode: a file to its pixels.
    """
    content = content.removesuffix(b"\xff")
    scan = _last_scan(content)
    if scan is None:
        return None
    decoded = (decode(content + filler + END) for filler in _fillers(scan))
    first = next(decoded)
    return content + END if all(np.array_equal(first, other) for other in decoded) else None


def _fillers(scan: bytes) -> Iterator[bytes]:
    """What could follow a scan's data: each stands for other pixels, wherever any are missing."""
    restarts = _RESTART.findall(scan)
    following = [
        ((restarts[-1][0] + step if restarts else step - 1) & 7) | 0xD0 for step in range(1, 9)
    ]
    rng = np.random.default_rng(0)
    for first in _FIRST_BYTES:
        # without 0xff
        intervals = [
            bytes([first]) + rng.integers(0, 255, 64, np.uint8).tobytes() for _ in range(9)
        ]
        marked = zip(following, intervals[1:], strict=True)
        yield intervals[0] + b"".join(bytes([0xFF, marker]) + data for marker, data in marked)


def _last_scan(content: bytes) -> bytes | None:
    """The last scan's data, where the scans bring all coefficients of all components to full
    precision.
    """
    missing: dict[int, set[int]] = {}  # component -> coefficients
    position, data = 2, b""
    while position + 4 <= len(content):
        if content[position] != 0xFF:
            return None
        marker = content[position + 1]
        if marker == 0xFF or marker in _WITHOUT_LENGTH:  # fill bytes may stand before a marker
            position += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(content[position + 2 : position + 4], "big")
        segment = content[position + 4 : position + 2 + length]
        position += 2 + length
        if marker in _FRAMES:
            missing = {component: set(range(_COEFFICIENTS)) for component in segment[6::3]}
        if marker == _SCAN and len(segment) >= 4:
            _take_scan(segment, missing)
            start, position = position, _next_marker(content, position)
            data = content[start:position]
    return data if missing and not any(missing.values()) else None


def _take_scan(segment: bytes, missing: dict[int, set[int]]) -> None:
    count = segment[0]
    first, last, precision = segment[-3:]
    if precision & 0x0F == 0:  # no later scan refines these
        for component in segment[1 : 1 + 2 * count : 2]:
            missing.get(component, set()).difference_update(range(first, last + 1))


def _next_marker(content: bytes, position: int) -> int:
    """Where a scan's data end: at a byte 0xff that neither stands for itself (0xff00) nor begins a
    restart marker.
    """
    while True:
        position = content.find(b"\xff", position)
        if position < 0 or position + 1 >= len(content):
            return len(content)
        if content[position + 1] != 0 and not 0xD0 <= content[position + 1] <= 0xD7:
            return position
        position += 2
