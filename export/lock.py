"""One export into a directory at a time: two would overwrite each other's manifest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from regionspot.errors import ArtifactError, InputError
from regionspot.files import why_not_written

try:
    import fcntl
except ImportError:  # Windows: without a lock
    fcntl = None  # type: ignore[assignment]

LOCK = ".export.lock"


@contextmanager
def locked(directory: Path, wait: bool = False, busy: str = "") -> Iterator[None]:
    """Hold the directory, which is made if it is missing. A process that is killed lets go of it.

    The file `LOCK` stays: taking it away would let a third process in beside one that waits. Where the system or the
    file system knows no locks, nothing is held.

    Args:
        wait: until another process lets go of it.
        busy: what to say where it does not.

    Raises:
        InputError: another process holds it, and this one is not to wait.
        ArtifactError: it cannot be written to.
    """
    with _lock_file(directory) as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise InputError(
                busy
                or f"another process is exporting into {directory}: wait until it has ended, or name another directory "
                "with --out"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def _lock_file(directory: Path) -> BinaryIO:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return open(directory / LOCK, "ab")
    except OSError as error:
        raise ArtifactError(f"cannot write to {directory}: {why_not_written(error)}") from error
