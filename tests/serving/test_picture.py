"""What images cost to decode, told from their structure: sizes, scans and chunks."""

from __future__ import annotations

import io
import struct
import time
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regionspot.serving.contract import Limits, RequestError
from regionspot.serving.picture import (
    MAX_JPEG_FILL,
    MAX_JPEG_SCANS,
    MAX_PNG_CHUNKS,
    check_picture,
    picture_size,
)


def encoded(width: int = 40, height: int = 30, file_format: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


PICTURES = {
    "jpeg": encoded(123, 45, "JPEG"),
    "progressive jpeg": encoded(123, 45, "JPEG", progressive=True),
    "jpeg with much before the size": encoded(
        123, 45, "JPEG", icc_profile=bytes(200_000), comment=b"a" * 300
    ),
    "png": encoded(123, 45, "PNG"),
    "lossy webp": encoded(123, 45, "WEBP"),
    "lossless webp": encoded(123, 45, "WEBP", lossless=True),
    "extended webp": encoded(123, 45, "WEBP", exif=b"Exif\x00\x00abc"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture_size(name: str) -> None:
    assert picture_size(PICTURES[name]) == (123, 45)


@settings(deadline=None)
@given(st.sampled_from(sorted(PICTURES)), st.integers(0, 60), st.binary(max_size=8))
def test_damaged_headers_are_refused_or_read(name: str, position: int, noise: bytes) -> None:
    content = PICTURES[name]
    with suppress(RequestError):
        assert min(picture_size(content[:position] + noise + content[position + len(noise) :])) > 0


def scan_bomb(scans: int, width: int = 40, height: int = 30) -> bytes:
    """A progressive JPEG whose last scan comes again and again, `scans` in all."""
    content = encoded(width, height, "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    end = content.rindex(b"\xff\xd9")
    return (
        content[:last] + content[last:end] * (scans + 1 - content.count(b"\xff\xda")) + b"\xff\xd9"
    )


def refusal(content: bytes) -> RequestError:
    with pytest.raises(RequestError) as refused:
        check_picture(content, Limits())
    return refused.value


def test_scans_are_counted_to_the_end_of_the_file() -> None:
    check_picture(scan_bomb(MAX_JPEG_SCANS), Limits())
    Image.open(io.BytesIO(scan_bomb(MAX_JPEG_SCANS))).load()
    found = refusal(scan_bomb(MAX_JPEG_SCANS + 1))
    assert found.code == "IMAGE_TOO_LARGE" and "scans" in str(found)
    hidden = scan_bomb(2000)
    # where libjpeg finds the scans all the same: behind restart markers, stuffed bytes, fill bytes,
    # a reserved marker with what looks like its length, and data that nobody reads
    noises = (b"\xff\xd3", b"\xff\x00", b"\xff\xff\xff", b"\xff\x01", b"\xff\x02\x7f\x00", b"ab")
    for noise in noises:
        assert "scans" in str(refusal(hidden.replace(b"\xff\xda", noise + b"\xff\xda")))


@pytest.mark.parametrize("distance", range(3))
def test_scans_are_found_wherever_they_lie(distance: int) -> None:
    """Also where one part of the search ends and the next begins."""
    content = scan_bomb(MAX_JPEG_SCANS)
    check_picture(content, Limits())
    header = content.index(b"\xff\xda") + 2
    length = int.from_bytes(content[header : header + 2], "big")
    data = header + length
    scan = b"a" * ((1 << 20) - distance) + b"\xff\xda" + content[header:data]
    assert "scans" in str(refusal(content[:data] + scan + content[data:]))


def test_what_looks_like_a_scan_is_none() -> None:
    """In a thumbnail, a comment, behind the end, and in pixels."""
    marker = b"\xff\xda\x00\x02"
    content = encoded(123, 45, "JPEG", comment=marker * 1000, exif=b"Exif\x00\x00" + marker * 1000)
    check_picture(content + marker * 1000, Limits())
    stuffed = bytes([0xFF, 0x00, 0xDA]) * 1000
    end = content.rindex(b"\xff\xd9")
    assert picture_size(content[:end] + stuffed + content[end:]) == (123, 45)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_a_large_jpeg_is_checked_in_no_time(options: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2000, 2000, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=95, **options)
    began = time.perf_counter()
    check_picture(file.getvalue(), Limits())
    assert time.perf_counter() - began < 0.5  # 0.01 s; a loop over its bytes takes 1 s


@pytest.mark.parametrize("kind", [b"IDAT", b"teSt", b"tEXt"])
def test_chunks_of_a_png_are_counted(kind: bytes) -> None:
    content = encoded(40, 30, "PNG")
    empty = struct.pack(">I", 0) + kind + struct.pack(">I", zlib.crc32(kind))
    check_picture(content[:33] + empty * 1000 + content[33:], Limits())
    found = refusal(content[:33] + empty * MAX_PNG_CHUNKS + content[33:])
    assert found.code == "IMAGE_TOO_LARGE" and "chunks" in str(found)
    check_picture(content + empty * MAX_PNG_CHUNKS, Limits())  # behind its end


@pytest.mark.parametrize("fill", [b"\xff", b"\x00"])
def test_fill_bytes_of_a_jpeg_are_counted(fill: bytes) -> None:
    """Pillow takes a microsecond for each."""
    content = encoded(40, 30, "JPEG")
    for marker in (b"\xff\xc0", b"\xff\xda"):
        at = content.index(marker)
        assert picture_size(content[:at] + fill * 3 + content[at:]) == (40, 30)
        began = time.perf_counter()
        found = refusal(content[:at] + fill * (4 << 20) + content[at:])
        assert found.code == "IMAGE_INVALID" and "damaged" in str(found)
        assert time.perf_counter() - began < 5
    comment = b"\xff\xfe\x00\x02"
    apart = content[:2] + (comment + fill * 1000) * (MAX_JPEG_FILL // 1000 + 1)
    assert "damaged" in str(refusal(apart + content[2:]))


def test_later_frames_cost_nothing() -> None:
    frames = [Image.new("RGB", (64, 64), (number % 250, 0, 0)) for number in range(50)]
    for file_format in ("WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, file_format, save_all=True, append_images=frames[1:])
        assert picture_size(file.getvalue()) == (64, 64)
