"""Files that are either whole or not there: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import xxhash

from regionspot.errors import ArtifactError

READ_BYTES = 1 << 20


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, so that a reader or a crash finds the old file or the new one and nothing between.

    Missing directories are made.

    Raises:
        ArtifactError: it cannot be written. What was at `path` is untouched, and nothing is left beside it.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_flushed(aside, content)
        os.replace(aside, path)
        flush_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {path}: {why_not_written(error)}") from error


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Wait until the disk has a directory's entries: a rename is safe only then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why_not_written(error: OSError) -> str:
    """The reason in words, and what to do where the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and run the same command again"
    return error.strerror or str(error)


def file_digest(path: Path) -> str:
    """xxh3 (64 bits, hexadecimal) of a file's content."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def in_units(num_bytes: float) -> str:
    """Bytes as people read them: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
