"""Log files of processes that write by their own descriptors: private, of bounded size, read from
their ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from regionspot.errors import ArtifactError
from regionspot.files import why_not_written

MAX_BYTES = 16 << 20
"""A log file that is longer is rotated: what it holds becomes FILE.1, and FILE.1 becomes FILE.2."""

TAIL_BYTES = 64 << 10
TAIL_LINES = 12
LINE_LENGTH = 400
_NOISE = re.compile(r"[|+]|I\d{4} |[\s;]*$|At:|\s+\S+\(\d+\): \S+$")
"""Lines of Triton's log that explain no failure: tables, information, stack frames of Python."""


class LogFile:
    """A file for the output of a process.

    The process writes into the file itself, so that a supervisor that is slow, stopped or killed
    never blocks it. The file is therefore rotated by copying its content and truncating it: what is
    written between the two is lost. Devices and pipes are never rotated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = 0

    def open(self, empty: bool = False) -> BinaryIO:
        """Opens the file for a process to append to, and creates its folder. Only its owner can
        read it.

        Args:
            empty: Removes what the file holds.

        Raises:
            ArtifactError: The file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "ab", opener=_private)  # noqa: SIM115
        except OSError as error:
            raise ArtifactError(
                f"the log {self.path} cannot be written: {why_not_written(error)}"
            ) from error
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            with contextlib.suppress(OSError):  # another user's file, which may be written
                os.fchmod(file.fileno(), 0o600)
            if empty:
                file.truncate(0)
        self._start = file.tell()
        return file

    def rotate(self) -> None:
        """Starts the file again if it is longer than `MAX_BYTES`. Raises nothing: on a full disk
        its content is dropped.
        """
        with contextlib.suppress(OSError):
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size <= MAX_BYTES:
                return
            with contextlib.suppress(OSError):
                self._keep()
            os.truncate(self.path, 0)
            self._start = 0

    def _keep(self) -> None:
        first, second = (self.path.with_name(f"{self.path.name}.{n}") for n in (1, 2))
        if first.exists():
            first.replace(second)
        try:
            with open(self.path, "rb") as source, open(first, "wb", opener=_private) as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except OSError:
            first.unlink(missing_ok=True)
            raise

    def tail(self) -> str:
        """Returns the last lines since `open`, without Triton's tables and Python's stack frames,
        from at most `TAIL_BYTES` of the file.
        """
        if not self.path.is_file():
            return f"(its output went to {self.path}, which is no file)"
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._start, size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).decode(errors="replace").splitlines()
        relevant = [line[:LINE_LENGTH] for line in lines if not _NOISE.match(line)]
        return "\n".join(relevant[-TAIL_LINES:]) + f"\n(all of it: {self.path})"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
