"""Shows what the package logs on a standard stream: lines of text for people, lines of JSON for
programs.

Modules log with `logging.getLogger(__name__)`, and nothing is shown unless an application
configures logging. The commands are such applications, and use `log_to`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from regionspot.errors import visible_lines

PACKAGE = logging.getLogger("regionspot")


class JsonFormatter(logging.Formatter):
    """Formats a record as a line of JSON: `time`, in seconds since 1970, and its fields, those that
    are None left out.

    The fields are those of `logger.info(message, extra={"fields": {...}})`, or else `event`, the
    last part of the logger's name, `message`, and the traceback as `details`.
    """

    def format(self, record: logging.LogRecord) -> str:
        event = {
            "event": record.name.rpartition(".")[2],
            "message": record.getMessage(),
            "details": self.formatException(record.exc_info) if record.exc_info else None,
        }
        fields = {"time": round(record.created, 3), **getattr(record, "fields", event)}
        return json.dumps({name: value for name, value in fields.items() if value is not None})


class StandardStreamHandler(logging.Handler):
    """Writes to what `sys.stdout` or `sys.stderr` is at the time of each record, since commands
    replace them.
    """

    def __init__(self, stream: Literal["stdout", "stderr"]) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(visible_lines(self.format(record)), file=getattr(sys, self._stream), flush=True)
        except Exception:
            self.handleError(record)


def install_handler(
    stream: Literal["stdout", "stderr"], formatter: logging.Formatter | None = None
) -> None:
    """Sends what the package logs, from INFO on, to a stream only, in place of all earlier
    handlers.

    Args:
        formatter: by default the message alone.
    """
    handler = StandardStreamHandler(stream)
    handler.setFormatter(formatter)
    PACKAGE.handlers = [handler]
    PACKAGE.propagate = False
    PACKAGE.setLevel(logging.INFO)


@contextmanager
def log_to(
    stream: Literal["stdout", "stderr"],
    formatter: logging.Formatter | None = None,
    libraries: Sequence[str] = (),
) -> Iterator[None]:
    """Does as `install_handler` while the block lasts.

    Args:
        libraries: names of other loggers whose warnings go the same way.
    """
    loggers = [PACKAGE, *map(logging.getLogger, libraries)]
    before = [(one, one.handlers, one.propagate, one.level) for one in loggers]
    install_handler(stream, formatter)
    for library in loggers[1:]:
        library.handlers, library.propagate = PACKAGE.handlers, False
        library.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for one, handlers, propagate, level in before:
            one.handlers, one.propagate = handlers, propagate
            one.setLevel(level)
