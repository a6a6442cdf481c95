"""Pages of mapped files are let go of, and read again when needed."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from regionspot.mapped_files import forget_pages

CONTENT = bytes(range(256)) * 4096  # 1 MiB


def resident_kb(path: Path) -> int:
    """Of the file's mappings in this process."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [index for index, line in enumerate(lines) if line.endswith(f" {path}")]
    return sum(
        int(line.split()[1])
        for start in starts
        for line in lines[start : start + 8]
        if line.startswith("Rss:")
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it does nothing")
def test_read_again_when_needed(tmp_path: Path) -> None:
    path = tmp_path / "weights with a space.bin"
    path.write_bytes(CONTENT)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped,
    ):
        assert mapped[:] == CONTENT
        assert resident_kb(path) == 1024
        assert forget_pages(path) == len(CONTENT)
        assert resident_kb(path) == 0
        assert mapped[:] == CONTENT


def test_what_could_be_lost_stays(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:4] = b"mine"
        assert forget_pages(path) == 0
        assert mapped[:4] == b"mine"


def test_a_file_that_is_not_mapped(tmp_path: Path) -> None:
    assert forget_pages(tmp_path / "nothing") == 0
