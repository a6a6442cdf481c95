"""What an encoded image will cost to decode, from its structure alone.

No decoder runs here: opening a file with one may already allocate its canvas (WebP), inflate its
texts (PNG) or loop over millions of parts in Python, and a bomb must be refused before that.

What decoding costs, by format:

- JPEG: pixels x scans. A progressive file may refine its 50 million pixels again and again, 75
  bytes and 28 ms a time, so scans are counted to the end of the file.
- PNG: pixels (interlaced ones, by Adam7, somewhat more), and chunks, which Pillow reads one by one
  in Python: 2.7 million empty ones fit into 32 MB and take 19 s. They are counted. Later frames of
  an animation are never decoded.
- WebP: pixels. Of an animation the first frame alone is decoded; the others are listed, in C.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from regionspot.serving.contract import Limits, RequestError, base64_hint

MAX_JPEG_SCANS = 64
"""Encoders write 20 at most; decoders have no limit of their own."""

MAX_JPEG_SEGMENTS = 2000
"""32 MB of color profile and the like in the largest segments are 500."""

MAX_JPEG_FILL = 65_536
"""Bytes between the segments of a header, where files have none or a few: Pillow reads them one by
one.
"""

MAX_PNG_CHUNKS = 65_536
"""32 MB in the pieces of 8 KiB that libpng writes are 4096."""

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""What ends entropy-coded data: no stuffed 0xff, restart marker or fill byte."""

_WINDOW = 1 << 20
_SOS, _EOI = 0xDA, 0xD9
_PNG = b"\x89PNG\r\n\x1a\n"
# SOF0..SOF15 without DHT, JPG and DAC
_SIZES_OF_JPEG = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SOI, _FIRST_WITH_LENGTH = 0xD8, 0xC0


def check_picture(content: bytes, limits: Limits) -> tuple[int, int]:
    """Refuses what is no image that the server reads, or one that takes too long to decode: it has
    too many pixels, scans or chunks.

    Args:
        content: a file's bytes. 32 MB take some 0.1 s.

    Returns:
        See `picture_size`.

    Raises:
        RequestError: IMAGE_INVALID or IMAGE_TOO_LARGE.
    """
    if not content:
        raise RequestError("IMAGE_INVALID", "the picture's file is empty: choose another")
    width, height = picture_size(content)
    if width * height > limits.max_image_pixels:
        raise RequestError(
            "IMAGE_TOO_LARGE",
            f"the picture has {width} x {height} pixels, at most {limits.max_image_pixels} in "
            "all: scale it down",
        )
    return width, height


def picture_size(content: bytes) -> tuple[int, int]:
    """(width, height) in pixels of a JPEG, PNG or WebP file, as stored: not turned upright.

    Raises:
        RequestError: IMAGE_INVALID for any other file, or a damaged header; IMAGE_TOO_LARGE for too
            many scans or chunks.
    """
    try:
        if content.startswith(b"\xff\xd8\xff"):
            size = _size_of_jpeg(content)
        elif content.startswith(_PNG) and content[12:16] == b"IHDR":
            size = _size_of_png(content)
        elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            size = _size_of_webp(content)
        else:
            hint = base64_hint(content)
            raise RequestError(
                "IMAGE_INVALID",
                f"this is no JPEG, PNG or WebP file: save the picture as one of them{hint}",
            )
    except (struct.error, IndexError) as error:
        raise _damaged() from error
    if 0 in size:
        raise _damaged()
    return size[0], size[1]


def _size_of_jpeg(content: bytes) -> tuple[int, int]:
    """The size in a JPEG's frame header, once all of its scans were counted.

    Finds the markers that libjpeg finds, whatever a scan's data hold.
    """
    size = None
    scans = fill = 0
    for marker, position, skipped in _jpeg_segments(content):
        fill += 0 if scans else skipped
        if fill > MAX_JPEG_FILL:
            raise _damaged()
        if marker in _SIZES_OF_JPEG and size is None:
            height, width = struct.unpack_from(">HH", content, position + 3)
            size = width, height
        scans += marker == _SOS
        if scans > MAX_JPEG_SCANS:
            raise RequestError(
                "IMAGE_TOO_LARGE",
                f"the JPEG file has more than {MAX_JPEG_SCANS} scans, which take long to decode: "
                "save it again",
            )
    if size is None:
        raise _damaged()
    return size


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, position behind it, and the number of bytes skipped before it, of each segment up to
    the end of the image; the last one's may be EOI.
    """
    position = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        found = _next_marker(content, position)
        if found is None:
            yield _EOI, len(content), len(content) - position
            return
        marker = content[found.end() - 1]
        yield marker, found.end(), found.start() - position
        if marker == _EOI:
            return
        position = found.end()
        if marker >= _FIRST_WITH_LENGTH and marker != _SOI:
            position += max(int.from_bytes(content[position : position + 2], "big"), 2)
    raise RequestError(
        "IMAGE_INVALID", f"the JPEG file has more than {MAX_JPEG_SEGMENTS} segments: save it again"
    )


def _next_marker(content: bytes, position: int) -> re.Match[bytes] | None:
    """Searches part by part: other threads stand still while one is searched."""
    for start in range(position, len(content), _WINDOW):
        if found := _JPEG_MARKER.search(content, start, start + _WINDOW + 1):
            return found
    return None


def _size_of_png(content: bytes) -> tuple[int, int]:
    """The size in a PNG's first chunk, once all of its chunks were counted."""
    width, height = struct.unpack_from(">II", content, 16)
    position = len(_PNG)
    for _ in range(MAX_PNG_CHUNKS):
        if position + 8 > len(content) or content.startswith(b"IEND", position + 4):
            return width, height
        position += 12 + int.from_bytes(content[position : position + 4], "big")
    raise RequestError(
        "IMAGE_TOO_LARGE",
        f"the PNG file has more than {MAX_PNG_CHUNKS} chunks, which take long to read: save it "
        "again",
    )


def _size_of_webp(content: bytes) -> tuple[int, int]:
    kind = content[12:16]
    if kind == b"VP8X":  # two 24-bit numbers, less 1
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(
            _three(content, 27), "little"
        )
    if kind == b"VP8L" and content[20] == 0x2F:  # 14 bits each, less 1
        (bits,) = struct.unpack_from("<I", content, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    # 14 bits each; the other two scale, for players
    if kind == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise _damaged()


def _three(content: bytes, position: int) -> bytes:
    if len(content) < position + 3:
        raise IndexError
    return content[position : position + 3]


def _damaged() -> RequestError:
    return RequestError(
        "IMAGE_INVALID", "the picture's file is damaged: its header says no size; save it again"
    )
