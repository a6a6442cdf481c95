"""Atomic writes: the old file or the new one, and nothing beside it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regionspot.errors import ArtifactError
from regionspot.files import LEFTOVER_AGE_S, cache_root, delete_leftovers, file_digest, in_units, write_atomically


def test_writes_and_makes_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(ArtifactError, match=r"cannot write .*file: the disk is full; free some space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_threads_that_write_the_same_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have written aside before any renames, so each needs a place of its own."""
    barrier, real = threading.Barrier(4), os.replace

    def replace(source: Path, target: Path) -> None:
        barrier.wait(10)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    failures: list[Exception] = []

    def write(content: bytes) -> None:
        try:
            write_atomically(tmp_path / "file", content)
        except ArtifactError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(bytes([n]) * 1000,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(set((tmp_path / "file").read_bytes())) == 1 and os.listdir(tmp_path) == ["file"]


def test_only_old_leftovers_are_deleted(tmp_path: Path) -> None:
    old, new, other = tmp_path / ".shard.7.8.tmp", tmp_path / ".shard.9.8.tmp", tmp_path / "shard"
    for path in (old, new, other):
        path.write_bytes(b"")
    for path in (old, other):
        os.utime(path, (0, path.stat().st_mtime - LEFTOVER_AGE_S - 10))
    delete_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [new.name, "shard"]
    delete_leftovers(tmp_path / "none")


def test_the_root_of_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in [("~/c", tmp_path / "c"), ("", tmp_path / ".cache/regionspot"), ("a/b", Path("a/b"))]:
        monkeypatch.setenv("REGIONSPOT_CACHE", value)
        assert cache_root() == expected
    monkeypatch.delenv("REGIONSPOT_CACHE")
    assert cache_root() == tmp_path / ".cache" / "regionspot"


def test_other_reasons_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"Not a directory|File exists"):
        write_atomically(tmp_path / "file" / "below", b"")


def test_digest_and_units(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    first = file_digest(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"x" * 2_999_999 + b"y")
    assert len(first) == 16 and first != file_digest(tmp_path / "file")
    sizes: list[tuple[Any, str]] = [(0, "0 bytes"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5.0 TiB")]
    check: Callable[[Any], str] = in_units
    assert [check(size) for size, _ in sizes] == [text for _, text in sizes]
