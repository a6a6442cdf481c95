"""The size of an encoded picture, from its first bytes alone.

No decoder of pictures runs in the gateway: opening a file with one may already allocate its canvas
(WebP) or inflate its texts (PNG), and a bomb must be refused before that. The server looks again,
with the decoder that it uses.
"""

from __future__ import annotations

import struct

from regionspot.serving.contract import Limits, RequestError, base64_hint

MAX_JPEG_SEGMENTS = 2000
"""Before the size; 32 MB of colour profile and the like in the largest segments are 500."""

_PNG = b"\x89PNG\r\n\x1a\n"
# SOF0..SOF15 without DHT, JPG and DAC
_SIZES_OF_JPEG = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset([0x01, *range(0xD0, 0xD9)])  # TEM, RST0..RST7, SOI


def check_picture(content: bytes, limits: Limits) -> None:
    """Refuse what is no picture that the server reads, or one with too many pixels.

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


def picture_size(content: bytes) -> tuple[int, int]:
    """(width, height) in pixels of a JPEG, PNG or WebP file, as stored: not turned upright.

    Raises:
        RequestError: IMAGE_INVALID for any other file, or a damaged header.
    """
    try:
        if content.startswith(b"\xff\xd8\xff"):
            size = _size_of_jpeg(content)
        elif content.startswith(_PNG) and content[12:16] == b"IHDR":
            size = struct.unpack_from(">II", content, 16)
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
    position = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        while content[position] == 0xFF and content[position + 1] == 0xFF:  # fill bytes
            position += 1
        if content[position] != 0xFF:
            raise _damaged()
        marker = content[position + 1]
        position += 2
        if marker in _SIZES_OF_JPEG:
            height, width = struct.unpack_from(">HH", content, position + 3)
            return width, height
        if marker not in _WITHOUT_LENGTH:
            (length,) = struct.unpack_from(">H", content, position)
            position += max(length, 2)
    raise _damaged()


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
