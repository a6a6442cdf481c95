"""Files that are either whole or not there: written aside, flushed to the disk, then renamed.

Devices, FIFOs and this process's own descriptors (/dev/stdout) are written into instead: nothing
takes their place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from regionspot.errors import ArtifactError, InputError, plain_text

READ_BYTES = 1 << 20
LEFTOVER_AGE_S = 3600.0
"""A file written aside that nobody has touched for so long is of a process that was killed."""

MAX_LINKS = 40
_DESCRIPTOR = re.compile(r"/(?:dev/fd|proc/(?:self|thread-self|(?P<pid>\d+))/fd)/(?P<fd>\d+)")
_NO_FSYNC = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
}
"""What file systems that cannot flush a directory say (FUSE, SMB), or folders that may be written
but not read.
"""


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, so that a reader or a crash finds the old file or the new one and
    nothing between.

    Missing directories are made. A symbolic link stays one, and its target is replaced. A file that
    is there keeps its mode; a new one gets what the umask allows. What is no regular file (a
    device, a FIFO, /dev/stdout) is written into.

    Raises:
        ArtifactError: it cannot be written. What was at `path` is untouched, and nothing is left
            beside it.
    """
    try:
        descriptor = own_descriptor(path)
        if descriptor is not None:
            if descriptor == 1 and sys.stdout is not None:
                sys.stdout.flush()  # what was printed before comes first
            _write_all(descriptor, content)
        elif _is_special(path):
            with open(path, "wb", buffering=0) as file:
                _write_all(file.fileno(), content)
        else:
            _replace(Path(os.path.realpath(path)), content)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ArtifactError(f"cannot write {path}: {why_not_written(error)}") from error


def own_descriptor(path: str | Path) -> int | None:
    """The number of this process's descriptor that a path names (/dev/stdout is 1, /dev/fd/3 is 3),
    else None.

    Raises:
        OSError: the path's symbolic links form a loop.
    """
    text = os.path.abspath(path)
    for _ in range(MAX_LINKS):
        folder, name = os.path.split(text)
        found = _DESCRIPTOR.fullmatch(text) or _DESCRIPTOR.fullmatch(
            os.path.join(os.path.realpath(folder), name)
        )
        if found and found["pid"] in (None, str(os.getpid())):
            return int(found["fd"])
        if not os.path.islink(text):
            return None
        text = os.path.normpath(os.path.join(os.path.realpath(folder), os.readlink(text)))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def same_file(a: str | Path, b: str | Path) -> bool:
    """Whether two paths lead to one file, also where it does not exist yet. Hard links count as
    files of their own.
    """
    if os.path.realpath(a) == os.path.realpath(b):
        return True
    try:
        first, second = os.stat(a), os.stat(b)
    except (OSError, ValueError):
        return False
    return os.path.samestat(first, second) and first.st_nlink == 1


@dataclass(frozen=True)
class FolderListing:
    """Files of a folder, in order of their paths, and how many of each kind were passed over."""

    files: tuple[Path, ...]
    skipped: Mapping[str, int]

    def describe_skipped(self) -> str:
        """ "2 folders, 3 .txt files", or nothing."""
        return ", ".join(
            f"{count} {kind}{'' if count == 1 else 's'}"
            for kind, count in sorted(self.skipped.items())
        )


def list_files(
    folder: str | Path, suffixes: Collection[str], recursive: bool = False
) -> FolderListing:
    """The files of a folder whose names end in one of `suffixes` (lower case, with the dot),
    without hidden ones.

    Hidden files include what macOS writes beside each file of a foreign disk (._photo.jpg).

    Raises:
        InputError: there is no such folder, or it cannot be read.
    """
    found: list[Path] = []
    skipped: Counter[str] = Counter()

    def look_into(directory: str) -> None:
        with os.scandir(directory) as listed:
            entries = list(listed)
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                skipped["hidden file"] += 1
            elif entry.is_dir():
                if recursive and not entry.is_symlink():
                    look_into(entry.path)
                else:
                    skipped["folder"] += 1
            elif suffix in suffixes:
                found.append(Path(entry.path))
            else:
                skipped[f"{plain_text(suffix)} file" if suffix else "file without a suffix"] += 1

    try:
        look_into(os.fspath(folder))
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = "there is no such folder" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"the folder {folder} cannot be read: {reason}") from error
    return FolderListing(tuple(sorted(found)), skipped)


def delete_leftovers(directory: Path) -> None:
    """Delete what killed processes left half-written by `write_atomically`; what another may be
    writing now stays.
    """
    for path in directory.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
                path.unlink()


def write_flushed(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file and wait until the disk has it. `mode`: of a new file, before the umask."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Wait until the disk has a directory's entries: a rename is safe only then.

    Where the file system cannot do so, the entries are there all the same, and nothing is raised.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def why_not_written(error: Exception) -> str:
    """The reason in words, and what to do where the disk is full."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and run the same command again"
    if number == errno.ELOOP:
        return "its symbolic links form a loop"
    return getattr(error, "strerror", None) or str(error)


def file_digest(path: Path) -> str:
    """xxh3 (64 bits, hexadecimal) of a file's content."""
    import xxhash  # here, because `regionspot doctor` must run without it

    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def cache_root() -> Path:
    """Where everything is cached: $REGIONSPOT_CACHE, or ~/.cache/regionspot where that is unset or
    empty.

    A user without a home directory gets a private folder among the temporary files.

    Raises:
        InputError: REGIONSPOT_CACHE begins with a ~ that leads nowhere.
    """
    named = os.environ.get("REGIONSPOT_CACHE")
    if named:
        return expand_home(named, "REGIONSPOT_CACHE")
    try:
        return Path("~/.cache/regionspot").expanduser()
    except RuntimeError:  # HOME is unset, and the user has no account
        return private_folder()


def expand_home(path: str | Path, what: str) -> Path:
    """A path with its ~ or ~user replaced.

    Args:
        what: the variable or option that holds it, for the message.

    Raises:
        InputError: there is no such home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{what} is {str(path)!r}, but there is no such home directory: set HOME, or write the "
            "whole path"
        ) from error


def in_units(num_bytes: float) -> str:
    """Bytes as people read them: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of `path`, which is no link; it takes over the old one's owner
    and mode.
    """
    if os.path.islink(path):  # realpath leaves a loop as it is
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    aside = path.with_name(f".{path.name[:40]}.{os.getpid()}.{threading.get_ident()}.tmp")
    old = _status(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_flushed(aside, content, 0o666 if old is None else 0o600)
        if old is not None:
            _take_over(aside, old)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    # the file is in its place; at worst a power failure brings back the old one
    with contextlib.suppress(OSError):
        flush_directory(path.parent)


def _take_over(path: Path, old: os.stat_result) -> None:
    """Give a file the owner, where this user may, and the mode of the one that it replaces."""
    new = path.stat()
    if hasattr(os, "chown") and (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with contextlib.suppress(OSError):
            os.chown(path, old.st_uid, old.st_gid)
    with contextlib.suppress(OSError):  # a file system without modes
        path.chmod(stat.S_IMODE(old.st_mode))


def _is_special(path: str | Path) -> bool:
    """Whether a path leads to something that is there, and neither a regular file nor a folder."""
    status = _status(path)
    return status is not None and not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))


def _status(path: str | Path) -> os.stat_result | None:
    """What a path leads to; None where there is nothing. Other errors, such as a loop of links, are
    raised.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


@cache
def private_folder() -> Path:
    """A folder that only this user can write to, the same one for each process where nobody else
    took its name.
    """
    try:
        if hasattr(os, "getuid"):
            path = Path(tempfile.gettempdir()) / f"regionspot-cache-{os.getuid()}"
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            status = path.lstat()
            if (
                stat.S_ISDIR(status.st_mode)
                and status.st_uid == os.getuid()
                and not status.st_mode & 0o077
            ):
                return path
        return Path(tempfile.mkdtemp(prefix="regionspot-cache-"))
    except OSError:  # nowhere to write: as a cache that is read-only
        return Path(os.devnull) / "regionspot"
