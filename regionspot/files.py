"""Files that are either whole or not there: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

from regionspot.errors import ArtifactError

READ_BYTES = 1 << 20
LEFTOVER_AGE_S = 3600.0
"""A file written aside that nobody has touched for so long is of a process that was killed."""


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, so that a reader or a crash finds the old file or the new one and nothing between.

    Missing directories are made.

    Raises:
        ArtifactError: it cannot be written. What was at `path` is untouched, and nothing is left beside it.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_flushed(aside, content)
        os.replace(aside, path)
        flush_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {path}: {why_not_written(error)}") from error


def delete_leftovers(directory: Path) -> None:
    """Delete what killed processes left half-written by `write_atomically`; what another may be writing now stays."""
    for path in directory.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
                path.unlink()


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
    import xxhash  # here, because `regionspot doctor` must run without it

    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def cache_root() -> Path:
    """Where everything is cached: $REGIONSPOT_CACHE, or ~/.cache/regionspot where that is unset or empty."""
    return Path(os.environ.get("REGIONSPOT_CACHE") or "~/.cache/regionspot").expanduser()


def in_units(num_bytes: float) -> str:
    """Bytes as people read them: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
