"""Atomic writes: the old file or the new one, and nothing beside it."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regionspot import files
from regionspot.errors import ArtifactError, InputError
from regionspot.files import (
    LEFTOVER_AGE_S,
    cache_root,
    delete_leftovers,
    file_digest,
    in_units,
    same_file,
    write_atomically,
)


def test_writes_and_makes_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(
        ArtifactError, match=r"cannot write .*file: the disk is full; free some space"
    ):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_threads_that_write_the_same_file_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert (
        not failures
        and len(set((tmp_path / "file").read_bytes())) == 1
        and os.listdir(tmp_path) == ["file"]
    )


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
    for value, expected in [
        ("~/c", tmp_path / "c"),
        ("", tmp_path / ".cache/regionspot"),
        ("a/b", Path("a/b")),
    ]:
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
    sizes: list[tuple[Any, str]] = [
        (0, "0 bytes"),
        (1536, "1.5 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 40, "5.0 TiB"),
    ]
    check: Callable[[Any], str] = in_units
    assert [check(size) for size, _ in sizes] == [text for _, text in sizes]


def test_a_device_is_written_into(tmp_path: Path) -> None:
    """What `mknod null c 1 3` makes: renaming over /dev/null would destroy it."""
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"try")
    except OSError:
        pytest.skip("this user may not make or use devices")
    write_atomically(device, b"content")
    assert stat.S_ISCHR(device.lstat().st_mode) and os.listdir(tmp_path) == ["null"]


def test_a_fifo_is_written_into(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    write_atomically(fifo, b"x" * 200_000)
    reader.join(10)
    assert read == [b"x" * 200_000] and stat.S_ISFIFO(fifo.lstat().st_mode)


def test_a_socket_is_refused_and_stays(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(
            ArtifactError, match=r"cannot write .*socket: No such device or address"
        ):
            write_atomically(tmp_path / "socket", b"content")
    assert stat.S_ISSOCK((tmp_path / "socket").lstat().st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("sink", ["file", "pipe", "socket"])
def test_the_processes_own_output(tmp_path: Path, name: str, sink: str) -> None:
    """Opening /dev/stdout fails where it is a socket, and a rename would part a file from its
    redirection.
    """
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = (
        "import sys; from regionspot.files import write_atomically; print('before');"
        " write_atomically(sys.argv[1], b'content\\n'); print('after')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / name)]
    if sink == "pipe":
        out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    elif sink == "file":
        with open(tmp_path / "out", "wb") as file:
            subprocess.run(command, stdout=file, check=True)
        out = (tmp_path / "out").read_bytes()
    else:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            subprocess.run(command, stdout=theirs.fileno(), check=True)
            out = ours.recv(100)
    assert out == b"before\ncontent\nafter\n"


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    for name, content in (("target", b"old"), ("missing", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        link = tmp_path / f"link-{name}"
        link.symlink_to(name)
        write_atomically(link, b"new")
        assert link.is_symlink() and (tmp_path / name).read_bytes() == b"new"


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ArtifactError, match=r"cannot write .*/a: its symbolic links form a loop"):
        write_atomically(tmp_path / "a", b"")
    assert (tmp_path / "a").is_symlink() and sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_modes_are_kept_and_new_files_follow_the_umask(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"")
    old.chmod(0o600)
    before = os.umask(0o027)
    try:
        write_atomically(old, b"x")
        write_atomically(new, b"x")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (old, new)] == [0o600, 0o640]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As on FUSE and SMB: the file is in its place, so nothing is reported as unwritten."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_long_names_and_names_that_cannot_be(tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 127):
        write_atomically(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"
    for name in ("n" * 256, "a\0b"):
        with pytest.raises(ArtifactError, match="cannot write"):
            write_atomically(tmp_path / name, b"x")


def test_one_file_by_two_names(tmp_path: Path) -> None:
    file, link, other = tmp_path / "file", tmp_path / "link", tmp_path / "hard"
    file.write_bytes(b"")
    link.symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    assert same_file(file, link) and same_file(tmp_path / "new", tmp_path / "x" / ".." / "new")
    assert not same_file(file, tmp_path / "new") and not same_file(file, tmp_path / "loop")
    os.link(file, other)
    assert not same_file(file, other), "a rename parts hard links"


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container that runs as a user id of its own, without HOME."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("pathlib.os.path.expanduser", lambda path: path)
    monkeypatch.delenv("REGIONSPOT_CACHE", raising=False)
    files.private_folder.cache_clear()
    root = cache_root()
    assert (
        root == tmp_path / f"regionspot-cache-{os.getuid()}"
        and stat.S_IMODE(root.stat().st_mode) == 0o700
    )
    root.chmod(0o777)  # as one that somebody else has made for us
    files.private_folder.cache_clear()
    assert cache_root() != root and cache_root().parent == tmp_path and cache_root() == cache_root()
    files.private_folder.cache_clear()
    monkeypatch.setenv("REGIONSPOT_CACHE", "~nobody-of-that-name/x")
    with pytest.raises(
        InputError, match="REGIONSPOT_CACHE is '~nobody-of-that-name/x', but there is no such home"
    ):
        cache_root()
