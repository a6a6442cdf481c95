"""A lock on a directory, so that one process at a time writes into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from regionspot.errors import ArtifactError, InputError
from regionspot.files import why_not_written

LOCK_FILE = ".regionspot.lock"


@contextmanager
def locked(directory: Path, busy: str | None = None) -> Iterator[None]:
    """Holds the lock of a directory, which is created if it does not exist.

    The operating system releases the lock of a process that is killed. The file `LOCK_FILE` is
    never deleted: a process that waits for the deleted file and one that creates a new file would
    both get a lock. On a file system without locks nothing is held.

    Args:
        busy: Error message for a lock that another process holds. None waits until that process
            releases it.

    Raises:
        InputError: Another process holds the lock, and `busy` is given.
        ArtifactError: The directory cannot be created or written to.
    """
    # no fallback to marker files
    lock = filelock.FileLock(_create_lock_file(directory), preserve_lock_file=True)
    try:
        lock.acquire(blocking=busy is None)
    except filelock.Timeout as error:
        raise InputError(busy) from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


def _create_lock_file(directory: Path) -> Path:
    path = directory / LOCK_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise ArtifactError(f"cannot write to {directory}: {why_not_written(error)}") from error
    return path
