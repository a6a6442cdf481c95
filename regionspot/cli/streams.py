"""Standard output and error that nobody reads, or that cannot be written: the command's work goes
on all the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO

EXIT_NO_READER = 141
"""What a shell reports of a program that SIGPIPE ended."""


class KeptStream:
    """A text stream whose first failure is kept in `failure` instead of being raised; what follows
    it is dropped.

    Text that the stream's encoding cannot hold is escaped. Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        if self.failure is None:
            with self.keeping_failures():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding or "utf-8"
                    self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def write_bytes(self, content: bytes) -> None:
        """Write to the stream below the text, behind the text that was written before."""
        if self.failure is None:
            with self.keeping_failures():
                self._stream.flush()
                self._stream.buffer.write(content)
                self._stream.flush()

    def flush(self) -> None:
        if self.failure is None:
            with self.keeping_failures():
                self._stream.flush()

    @contextlib.contextmanager
    def keeping_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error

    def abandon(self) -> None:
        """After a failure: what is still in buffers goes nowhere, so that the end of the process is
        quiet.
        """
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class KeptStreams:
    """`sys.stdout` and `sys.stderr` as KeptStream while the block lasts. Closed ones become the
    null device.
    """

    def __enter__(self) -> KeptStreams:
        self._before = sys.stdout, sys.stderr
        _occupy_closed_descriptors()
        self._out, self._err = (KeptStream(stream or _null_stream()) for stream in self._before)
        sys.stdout, sys.stderr = self._out, self._err
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for stream in (self._out, self._err):
            stream.flush()
            if stream.failure is not None:
                stream.abandon()
        sys.stdout, sys.stderr = self._before

    def status(self, status: int) -> int:
        """The exit status of a command that returned `status`; says why standard output could not
        be written.
        """
        self._out.flush()
        self._err.flush()
        failures = [
            stream.failure for stream in (self._out, self._err) if stream.failure is not None
        ]
        if not failures:
            return status
        if self._out.failure is not None and self._out.failure.errno != errno.EPIPE:
            reason = self._out.failure.strerror or str(self._out.failure)
            print(f"error: cannot write to standard output: {reason}", file=self._err)
        return status or (
            EXIT_NO_READER if all(failure.errno == errno.EPIPE for failure in failures) else 2
        )


def _occupy_closed_descriptors() -> None:
    """Open the null device in the place of closed standard streams: a file that is opened later
    must not become one.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)


def _null_stream() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")
